"""The engine's thread: batches, queue, cancelled rows, errors, and its end."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fedpeft.core.errors import RequestError
from fedpeft.proxy.batch import Late, News, Row
from fedpeft.proxy.blackbox import BackendError
from fedpeft.proxy.engine import Engine
from fedpeft.proxy.refusal import Refusal
from fedpeft.proxy.settings import Settings
from proxy.served import CAPS, TOKENIZER, FakeLarge, Script, Scripted, fake_trio, until

TRIO = fake_trio()


class Inbox:
    """What a request was told."""

    def __init__(self, rows: int = 1) -> None:
        self.texts = [""] * rows
        self.finishes: list[str | None] = [None] * rows
        self.error: BaseException | None = None

    def __call__(self, news: News) -> None:
        if isinstance(news, BaseException):
            self.error = news
            return
        for new in news:
            self.texts[new.row] += new.emitted.text
            self.finishes[new.row] = new.emitted.finish
            assert (new.done is None) == (new.emitted.finish is None)

    def wait(self) -> Inbox:
        until(lambda: self.error is not None or None not in self.finishes)
        return self


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def engines() -> Iterator[Any]:
    made: list[Engine] = []

    def make(script: Script, **options: Any) -> Engine:
        made.append(Engine(decoding=script, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def row(text: str, **settings: Any) -> Row:
    return Row(TOKENIZER(text)["input_ids"], replace(Settings(max_tokens=100), **settings))


@contextlib.contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The engine's thread is kept busy meanwhile, so that all that is submitted waits."""
    block = threading.Event()
    busy = engine.call(lambda: block.wait(10))
    yield
    block.set()
    assert busy.result(10)


def test_waiting_rows_form_one_batch_with_settings_of_their_own(script, engines):
    engine = engines(script, max_batch=8)
    script.gate.clear()
    first = Inbox()
    engine.submit(TRIO, [row("a")], first)
    until(lambda: engine.running == 1)
    others = [Inbox(2), Inbox()]
    engine.submit(TRIO, [row("b", temperature=0.0), row("c", max_tokens=3)], others[0])
    engine.submit(TRIO, [row("d")], others[1])
    script.gate.set()
    assert first.wait().texts == ["you said a"] and first.finishes == ["stop"]
    assert others[0].wait().texts == ["you said b", "you"] and others[0].finishes == ["stop", "length"]
    assert others[1].wait().texts == ["you said d"]
    assert [len(prompts) for _, prompts, _ in script.opened] == [1, 3]
    assert [s.temperature for s in script.opened[1][2]] == [0.0, Settings().temperature, Settings().temperature]
    until(lambda: script.closed == 2 and engine.running == 0)


def test_no_more_rows_than_max_batch_are_open_and_none_is_forgotten(script, engines):
    engine = engines(script, max_batch=5, max_queue=200)
    inboxes = [Inbox(3) for _ in range(50)]
    for i, inbox in enumerate(inboxes):
        engine.submit(TRIO, [row(f"{i}.{j}") for j in range(3)], inbox)
    for i, inbox in enumerate(inboxes):
        assert inbox.wait().texts == [f"you said {i}.{j}" for j in range(3)]
    assert script.most == 5
    sizes = [len(prompts) for _, prompts, _ in script.opened]
    assert all(size >= 3 for size in sizes[2:-1]), sizes  # half of the batch's five places


def test_a_short_request_does_not_wait_for_a_long_one(script, engines):
    script.says = lambda prompt: "x" * 5000 if prompt == "long" else "y"
    engine, slow, quick = engines(script, max_batch=2), Inbox(), Inbox()
    engine.submit(TRIO, [row("long", max_tokens=10_000)], slow)
    engine.submit(TRIO, [row("short")], quick)
    assert quick.wait().texts == ["y"] and slow.finishes == [None]


def test_other_models_get_a_batch_of_their_own(script, engines):
    engine, one, two = engines(script), Inbox(), Inbox()
    small = replace(TRIO, large=None, base=None)
    with held(engine):
        script.gate.clear()
        engine.submit(TRIO, [row("a")], one)
        engine.submit(small, [row("b")], two)
    until(lambda: engine.running == 2)
    script.gate.set()
    assert one.wait().texts == ["you said a"] and two.wait().texts == ["you said b"]
    assert {id(trio) for trio, _, _ in script.opened} == {id(TRIO), id(small)}


def test_drafts_are_for_the_three_models_together_alone(engines):
    drafts = []

    def opened(trio, prompts, settings, speculate):
        drafts.append((trio.steered, speculate))
        return Script()(trio, prompts, settings, speculate)

    engine = engines(opened, speculate=4)
    parts = [TRIO, replace(TRIO, large=None, base=None), replace(TRIO, tuned=None, base=None)]
    inboxes = [Inbox() for _ in parts]
    for trio, inbox in zip(parts, inboxes, strict=True):
        engine.submit(trio, [row("a")], inbox)
    assert [inbox.wait().texts for inbox in inboxes] == [["you said a"]] * 3
    assert sorted(drafts) == [(False, 0), (False, 0), (True, 4)]


def test_a_batch_is_no_larger_than_the_black_box_takes(script, engines):
    trio, inbox = fake_trio(FakeLarge(replace(CAPS, max_batch=2))), Inbox(7)
    engines(script, max_batch=8).submit(trio, [row(str(i)) for i in range(7)], inbox)
    assert inbox.wait().texts == [f"you said {i}" for i in range(7)]
    assert max(len(prompts) for _, prompts, _ in script.opened) == 2


def test_a_full_queue_turns_requests_away_and_takes_them_again_later(script, engines):
    engine, inbox = engines(script, max_batch=1, max_queue=2), Inbox()
    script.gate.clear()
    engine.submit(TRIO, [row("a")], inbox)
    until(lambda: engine.running == 1)
    engine.submit(TRIO, [row("b"), row("c")], Inbox(2))
    for refused in (lambda: engine.submit(TRIO, [row("d")], Inbox()), lambda: engine.call(lambda: 1)):
        with pytest.raises(Refusal, match="2 answers wait already, and 1 more do not fit into the queue of 2") as told:
            refused()
        assert told.value.status == 429 and told.value.code == "queue_full"
    script.gate.set()
    inbox.wait()
    until(lambda: engine.waiting == 0)
    assert engine.call(lambda: 7).result(10) == 7


def test_cancelled_rows_leave_queue_and_batch(script, engines):
    engine, kept = engines(script, max_batch=2), Inbox()
    script.gate.clear()
    running = engine.submit(TRIO, [row("a"), row("b")], Inbox(2))
    until(lambda: engine.running == 2)
    waiting = engine.submit(TRIO, [row("c")], Inbox())
    engine.submit(TRIO, [row("d")], kept)
    engine.cancel(waiting)
    assert engine.waiting == 1
    engine.cancel(running)
    script.gate.set()
    assert kept.wait().texts == ["you said d"]
    assert sorted(script.dropped) == [0, 1]
    assert all(TOKENIZER.decode(p) != "c" for _, prompts, _ in script.opened for p in prompts)
    until(lambda: script.now == 0)


def test_an_error_in_a_step_ends_its_batch_alone(script, engines, caplog):
    script.fail = lambda step: BackendError("large died; start it again") if step == 4 else None
    engine, broken = engines(script), Inbox(2)
    engine.submit(TRIO, [row("a"), row("b", max_tokens=2)], broken)
    until(lambda: broken.error is not None)
    assert str(broken.error) == "large died; start it again" and broken.finishes == [None, "length"]
    assert script.closed == 1 and engine.running == 0
    script.fail = lambda step: None
    again = Inbox()
    engine.submit(TRIO, [row("c")], again)
    assert again.wait().texts == ["you said c"]


def test_one_bad_row_does_not_take_its_neighbours_along(script, engines):
    bad = TOKENIZER("bad")["input_ids"]
    script.refuse = lambda prompts: RequestError("too long") if bad in map(list, prompts) else None
    engine, good, wrong = engines(script), Inbox(), Inbox()
    with held(engine):
        engine.submit(TRIO, [row("good")], good)
        engine.submit(TRIO, [row("bad")], wrong)
    assert good.wait().texts == ["you said good"]
    assert str(wrong.wait().error) == "too long"


def test_an_error_behind_a_step_or_in_a_call_does_not_end_the_engine(script, engines, monkeypatch):
    engine, broken, again = engines(script), Inbox(), Inbox()
    with monkeypatch.context() as patched:
        patched.setattr(Scripted, "completions", lambda self: 1 / 0)
        engine.submit(TRIO, [row("a")], broken)
        assert isinstance(broken.wait().error, ZeroDivisionError)
    with pytest.raises(SystemExit):
        engine.call(sys.exit).result(10)
    engine.submit(TRIO, [row("b")], again)
    assert again.wait().texts == ["you said b"] and engine.alive


def test_no_thread_to_be_had_is_told_and_the_engine_goes_on(script, engines, monkeypatch):
    def none(*_: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("fedpeft.proxy.calls.Worker", none)
    engine = engines(script)
    with pytest.raises(RuntimeError, match="start new thread"):
        engine.call(lambda: 1, types.SimpleNamespace(elsewhere=True)).result(10)
    assert engine.call(lambda: 2).result(10) == 2


def test_a_request_may_come_while_those_that_wait_are_told(script, engines):
    engine, waiting, late = engines(script, max_batch=1), Inbox(), Inbox()
    script.gate.clear()
    engine.submit(TRIO, [row("a")], Inbox())
    until(lambda: engine.running == 1)
    engine.submit(TRIO, [row("b")], waiting)
    coming: list[threading.Thread] = []

    class Crowded(deque):
        def __iter__(self) -> Iterator[Any]:
            for place in deque.__iter__(self):
                yield place
                if not coming:
                    coming.append(threading.Thread(target=engine.submit, args=(TRIO, [row("c")], late)))
                    coming[0].start()
                    coming[0].join(0.2)

    engine._rows = Crowded(engine._rows)
    engine._fail(types.SimpleNamespace(tickets=[], trio=TRIO, open=set()), Late("large", 1.0))
    assert isinstance(waiting.error, Late)
    coming[0].join(10)
    script.gate.set()
    assert late.wait().texts == ["you said c"]


def test_errors_nobody_foresaw_are_logged_without_what_they_quote(script, engines, caplog):
    script.fail = lambda step: ValueError("my secret prompt")
    inbox = Inbox()
    with caplog.at_level(logging.DEBUG):
        engines(script).submit(TRIO, [row("a")], inbox)
        inbox.wait()
    until(lambda: "ValueError" in caplog.text)
    assert "secret" not in caplog.text and "in step" in caplog.text


def test_other_work_is_done_between_steps_and_its_errors_are_its_own(script, engines):
    engine = engines(script)
    assert engine.call(threading.current_thread).result(10).name == "fedpeft-engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(10)
    assert engine.call(lambda: 2).result(10) == 2


def test_stopping_takes_no_more_and_finishes_what_is_there(script, engines):
    engine, inbox = engines(script), Inbox()
    script.gate.clear()
    engine.submit(TRIO, [row("a")], inbox)
    until(lambda: engine.running == 1)
    engine.stop()
    assert not engine.alive
    with pytest.raises(Refusal, match="stopping"):
        engine.submit(TRIO, [row("b")], Inbox())
    script.gate.set()
    assert inbox.wait().texts == ["you said a"]


def test_closing_tells_everybody(script, engines):
    engine, running, waiting = engines(script, max_batch=1), Inbox(), Inbox()
    script.gate.clear()
    engine.submit(TRIO, [row("a")], running)
    until(lambda: engine.running == 1)
    engine.submit(TRIO, [row("b")], waiting)
    future = engine.call(lambda: 1)
    closing = threading.Thread(target=engine.close)
    closing.start()
    until(lambda: not engine.alive)
    script.gate.set()
    closing.join(10)
    for inbox in (running, waiting):
        assert isinstance(inbox.wait().error, Refusal) and inbox.error.code == "stopping"
    with pytest.raises(Refusal, match="stopped"):
        future.result(10)
    assert script.closed == 1


def test_sizes_that_serve_nobody_are_refused():
    for name in ("max_batch", "max_queue"):
        with pytest.raises(RequestError, match=f"{name} 0 serves nobody"):
            Engine(**{name: 0})
