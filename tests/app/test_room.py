"""Clients whose devices lack memory: who they are, what is said of them, and what a run does without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import small
from fedpeft import app
from fedpeft.app.federation import Federation, build
from fedpeft.app.room import memory_bytes
from fedpeft.config import load_config
from fedpeft.core.errors import DataError

SMALL, LARGE = ("000", "003"), 10**9


def devices(folder: Path, memory: int, more: str = "") -> str:
    """Two clients with so much memory, four with a gigabyte."""
    file = folder / f"devices_{memory}.toml"
    assign = "\n".join(f'00{i} = "{"small" if f"00{i}" in SMALL else "large"}"' for i in range(6))
    profiles = f"[profile.small]\nmemory_bytes = {memory}\n{more}\n[profile.large]\nmemory_bytes = {LARGE}\n"
    file.write_text(f"{profiles}[clients]\n{assign}\n")
    return str(file)


def made(place: Path, **changes: Any) -> Federation:
    return build(load_config(small.config(place, **changes)))


def need(place: Path, **changes: Any) -> dict[str, int]:
    """What a step needs of each small client's device."""
    fed = made(place, run__devices=devices(place, 1), **changes)
    assert set(fed.cramped) == set(SMALL) and {usable for _, usable in fed.cramped.values()} == {1}
    return {client: needed for client, (needed, _) in fed.cramped.items()}


def asked(run: app.Run) -> set[str]:
    lines = (run.folder / "exchanges.jsonl").read_text().splitlines()
    return {line["client"] for line in map(json.loads, lines)}


def test_a_client_is_too_small_below_what_its_own_step_needs(place: Path) -> None:
    most = need(place)
    assert max(most.values()) <= memory_bytes(made(place), 1)  # of the longest row of all
    enough, short = max(most.values()), max(most.values()) - 1
    assert not made(place, run__devices=devices(place, enough)).cramped
    assert set(made(place, run__devices=devices(place, short)).cramped) <= set(SMALL)
    assert made(place, run__devices=devices(place, short)).cramped
    assert not made(place).cramped  # without devices nothing is known of them
    # a device's own memory before training, and what an allocator takes on top
    roomy = need(place, method__batch_size=1)
    assert all(roomy[client] < most[client] for client in SMALL)
    context = made(place, run__devices=devices(place, enough, "context_bytes = 1000")).cramped
    ratio = made(place, run__devices=devices(place, enough, "peak_ratio = 1.5")).cramped
    assert {needed for needed, _ in context.values()} >= {enough + 1000}
    assert {needed for needed, _ in ratio.values()} >= {round(1.5 * enough)}


def test_a_smaller_rank_needs_less(place: Path) -> None:
    whole = need(place, method__name="hetlora", adapter__rank=16)
    cut = devices(place, 2, "rank = 2")
    fed = made(place, method__name="hetlora", adapter__rank=16, run__devices=cut)
    assert all(fed.cramped[client][0] < whole[client] for client in SMALL)


def test_they_are_named_and_take_part_or_are_left_out(place: Path, tmp_path: Path) -> None:
    values = {"run__devices": devices(place, 1000), "method__cohort": 0}
    words = "2 of 6 clients have devices with less memory than training needs"
    kept = small.config(place, **values)
    (told,) = app.check(kept)["warnings"]
    assert told.startswith(words) and told.endswith("run.too_small: leave_out excludes them")
    without = small.config(place, **values, run__too_small="leave_out")
    run = app.run(without, out=tmp_path / "without")
    assert f"warning: {words}" in (run.folder / "run.log").read_text()
    assert asked(run) == {"001", "002", "004", "005"}
    assert asked(app.run(kept, out=tmp_path / "kept")) >= set(SMALL)
    traffic = run.manifest["bytes_down"] + run.manifest["bytes_up"]
    assert app.check(without)["estimate"]["bytes"] == traffic


def test_too_few_with_room_are_an_error_before_training(place: Path) -> None:
    values = {"run__devices": devices(place, 1000), "run__too_small": "leave_out"}
    with pytest.raises(DataError, match=r"leaves out 2 of 6 clients.* and 5 are wanted: lower method\.batch_size"):
        made(place, **values, method__cohort=5).start()


def test_a_method_that_plans_for_devices_is_left_alone(place: Path) -> None:
    values = small.config(place, run__devices=devices(place, 1000), run__too_small="leave_out")
    values["method"] = {"name": "fedpipe"}
    fed = build(load_config(values))
    assert not fed.cramped and fed.invited == fed.clients
