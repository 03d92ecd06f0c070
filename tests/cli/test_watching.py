"""What a running job shows."""

from __future__ import annotations

import io

import pytest

from fedpeft.cli import watching
from fedpeft.cli.render import progress_line, text_table, time_left
from fedpeft.cli.watching import Watch
from fedpeft.progress import Progress

SCORES = {"validation": {"global": {"accuracy": 0.5, "loss": 1.0}}}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_line_has_round_loss_bytes_time_and_scores() -> None:
    line = progress_line(Progress(10, 40, 0.713, 6_000_000, 6_300_000, 20.0, SCORES))
    assert line == "round 10/40  loss 0.713  12.3 MB  20.0 s gone  1 min 00 s left  validation global accuracy 0.500"


def test_time_left_is_what_the_pace_so_far_says() -> None:
    assert time_left(Progress(5, 20, seconds=10.0)) == 30.0
    assert time_left(Progress(5, 20, seconds=110.0, set_up_seconds=100.0)) == 30.0, "the set-up is no round"
    assert progress_line(Progress(0, 20, exchange="warmup 3")).startswith("set-up: warmup 3  ")
    assert time_left(Progress(0, 20, seconds=10.0)) is None
    assert time_left(Progress(25, 20, seconds=10.0)) == 0.0


def test_plain_lines_come_once_a_round_and_not_in_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(watching.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Watch(stream) as watch:
        for r in range(1, 7):
            now = float(r)
            watch(Progress(r, 6))
            watch(Progress(r, 6))  # a second exchange of the same round
        watch(Progress(6, 6, metrics=SCORES))
        watch(Progress(6, 6, message="client 003 was lost"))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["1/6", "3/6", "5/6", "6/6"]
    assert lines[3].endswith("validation global accuracy 0.500"), "the last round is told once, with its scores"
    assert lines[4:] == ["client 003 was lost"]


def test_every_exchange_of_the_set_up_is_a_line_and_a_message_is_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(watching.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Watch(stream) as watch:
        watch(Progress(0, 6, message="warning: few rows"))
        for i in (1, 2):
            now += 5.0
            watch(Progress(0, 6, exchange=f"warmup {i}"))
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["warning: few rows", "set-up: warmup 1", "set-up: warmup 2"]


def test_terminal_gets_a_bar_with_the_same_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Watch(stream) as watch:
        watch(Progress(0, 6, exchange="warmup 2"))
        watch(Progress(3, 6, 0.25, 1_000_000, 500_000, 30.0, message="[not markup] said"))
    shown = stream.getvalue()
    for part in ("3/6", "loss 0.250", "1.50 MB", "30.0 s left", "[not markup] said"):
        assert part in shown


def test_table_is_aligned() -> None:
    assert text_table(["a", "n"], [["long name", "1"], ["x", "100"]], frozenset({1})) == (
        "a            n\n---------  ---\nlong name    1\nx          100"
    )
