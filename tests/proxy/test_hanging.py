"""Large models on other machines that do not answer: who asked is told so, and everybody else goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from fedpeft.proxy.backends import open_backend
from fedpeft.proxy.batch import Late, News, Row
from fedpeft.proxy.blackbox import BackendError, NoAnswer, Scores, TopK, Want
from fedpeft.proxy.decode import decode
from fedpeft.proxy.engine import Engine
from fedpeft.proxy.refusal import Refusal
from fedpeft.proxy.scoring import score
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.trio import Trio
from fedpeft.proxy.turns import Turn, Worker, waiting
from proxy.callers import post
from proxy.fake_servers import KEY, LONGEST
from proxy.lent import VOCAB, large, lending
from proxy.parrot import LONG, Parrot, Said, speaking
from proxy.served import Artefact, serving, until

SHORT, LONG_TEXT = [3, 4, 5], list(range(3, 3 + LONGEST + 1))


class Inbox:
    """What a request was told."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.error: BaseException | None = None
        self.done = threading.Event()

    def __call__(self, news: News) -> None:
        if isinstance(news, BaseException):
            self.error = news
            self.done.set()
            return
        for new in news:
            self.tokens.append(new.emitted.token)
            if new.done is not None:
                self.done.set()


def alone(large: Any) -> Trio:
    return Trio(large, None, None, None, VOCAB, frozenset())


def row(prompt: Sequence[int], n: int = 6) -> Row:
    return Row(prompt, Settings(max_tokens=n))


@pytest.fixture
def engines() -> Iterator[Any]:
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        made.append(Engine(**options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def hanging(fakes: dict[str, str], fault: str = "hang", kind: str = "vllm", **more: Any) -> Any:
    return open_backend(f"{kind}+{fakes[kind]}/{fault}", token=KEY, **more)


# --- a connection -----------------------------------------------------------------------------------------------


def test_no_answer_within_the_limit_is_an_error(fakes: dict[str, str]) -> None:
    session = hanging(fakes, timeout_s=0.3).open([SHORT], TopK(5))
    session.scores([[6]])
    session.scores([[7]])
    began = time.monotonic()
    with pytest.raises(NoAnswer, match=r"did not answer \(ReadTimeout.*; see whether the server runs"):
        session.scores([[8]])
    assert time.monotonic() - began < 5


def test_an_answer_byte_by_byte_is_given_up(fakes: dict[str, str]) -> None:
    with pytest.raises(NoAnswer, match=r"sent \d+ bytes in \d+ s; see what holds it up"):
        hanging(fakes, "drip", timeout_s=0.3).open([SHORT], TopK(5))


# --- the engine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rows"), [("vllm", 2), ("llamacpp", 1), ("llamacpp", 2)])
def test_others_go_on_while_a_server_hangs_and_its_requests_are_told(
    fakes: dict[str, str], engines: Any, kind: str, rows: int
) -> None:
    """llama.cpp is asked row by row in threads of a pool, which have no turn of their own to give away."""
    engine, stuck = engines(patience_s=60), Inbox()
    engine.submit(alone(hanging(fakes, kind=kind)), [row(SHORT)] * rows, stuck)
    until(lambda: len(stuck.tokens) == rows * (LONGEST - len(SHORT) + 1))
    own, other = Inbox(), Inbox()
    engine.submit(alone(large()), [row(LONG_TEXT)], own)
    engine.submit(alone(open_backend(f"vllm+{fakes['vllm']}", token=KEY)), [row(LONG_TEXT)], other)
    assert own.done.wait(20) and other.done.wait(20) and not stuck.done.is_set()
    assert own.error is None is other.error and len(own.tokens) == 6 == len(other.tokens)
    assert engine.call(lambda: 7).result(10) == 7, "texts are scored meanwhile, too"
    engine._patience_s = 0.25
    assert stuck.done.wait(10) and isinstance(stuck.error, BackendError)
    said = str(stuck.error)
    assert f"at {kind}+" in said and "did not answer within 0.25 s; see whether its server" in said
    again = Inbox()
    engine.submit(alone(large()), [row(SHORT)], again)
    assert again.done.wait(10) and again.error is None
    assert own.tokens == list(decode(alone(large()), [LONG_TEXT], [Settings(max_tokens=6)])[0].tokens)


def test_who_waits_for_a_server_that_hangs_does_not_wait_as_long_again(fakes: dict[str, str], engines: Any) -> None:
    engine, trio = engines(patience_s=0.6, max_batch=1), alone(hanging(fakes))
    inboxes, free = [Inbox() for _ in range(4)], Inbox()
    for inbox in inboxes:
        engine.submit(trio, [row(LONG_TEXT)], inbox)
    engine.submit(alone(large()), [row(SHORT)], free)
    began = time.monotonic()
    assert all(inbox.done.wait(10) for inbox in (*inboxes, free))
    assert time.monotonic() - began < 4 * 0.6, "one wait for all of them"
    assert all(isinstance(inbox.error, Late) for inbox in inboxes) and free.error is None and len(free.tokens) == 6


@pytest.mark.parametrize("most", [1, 4])
def test_rows_of_a_server_that_hangs_take_no_room_of_others(fakes: dict[str, str], engines: Any, most: int) -> None:
    engine, stuck, local, other = engines(max_batch=most), Inbox(), Inbox(), Inbox()
    trio = alone(hanging(fakes))
    engine.submit(trio, [row(LONG_TEXT)] * most, stuck)
    until(lambda: engine.running == most)
    engine.submit(trio, [row(LONG_TEXT)], Inbox())
    engine.submit(alone(large()), [row(SHORT)], local)
    engine.submit(alone(open_backend(f"vllm+{fakes['vllm']}", token=KEY)), [row(SHORT)], other)
    assert local.done.wait(10) and local.error is None and len(local.tokens) == 6
    assert other.done.wait(10) and other.error is None and len(other.tokens) == 6
    assert not stuck.done.is_set() and engine.waiting == 1 and engine.running == most


@pytest.mark.parametrize("prompt", [LONG_TEXT, SHORT], ids=["opening", "a step"])
def test_a_connection_that_gives_up_first_is_one_wait_for_all(
    fakes: dict[str, str], engines: Any, prompt: list[int]
) -> None:
    engine, trio = engines(patience_s=0.3, max_batch=1), alone(hanging(fakes, timeout_s=0.3))
    inboxes = [Inbox() for _ in range(4)]
    for inbox in inboxes:
        engine.submit(trio, [row(prompt)], inbox)
    assert all(inbox.done.wait(10) for inbox in inboxes)
    assert isinstance(inboxes[0].error, NoAnswer) and all(inbox.error is inboxes[0].error for inbox in inboxes)


@pytest.mark.parametrize(("kind", "rows"), [("vllm", 1), ("llamacpp", 2)])
def test_a_request_that_is_cancelled_leaves_a_server_that_hangs(
    fakes: dict[str, str], engines: Any, kind: str, rows: int
) -> None:
    engine, stuck, free = engines(max_batch=rows), Inbox(), Inbox()
    ticket = engine.submit(alone(hanging(fakes, kind=kind)), [row(LONG_TEXT)] * rows, stuck)
    until(lambda: engine.running == rows)
    engine.submit(alone(large()), [row(SHORT)], free)
    engine.cancel(ticket)
    assert free.done.wait(10) and free.error is None and not stuck.done.is_set()


@pytest.mark.parametrize(("kind", "rows"), [("vllm", 1), ("llamacpp", 2)])
def test_the_engine_ends_while_a_server_hangs(fakes: dict[str, str], kind: str, rows: int) -> None:
    engine, stuck = Engine(), Inbox()
    engine.submit(alone(hanging(fakes, kind=kind)), [row(LONG_TEXT)] * rows, stuck)
    until(lambda: engine.running == rows)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 5 and stuck.done.is_set() and "stopped" in str(stuck.error)


class Slow:
    """A model behind the logit server that opens a session when its door is open."""

    def __init__(self) -> None:
        self.caps, self.asked, self.door, self.closed = large().caps, threading.Event(), threading.Event(), []

    def open(self, prompts: Sequence[Sequence[int]], want: Want) -> Any:
        self.asked.set()
        assert self.door.wait(20)
        made: Any = large().open(prompts, want)
        close = made.close
        made.close = lambda: (self.closed.append(made), close())
        return made


@pytest.mark.parametrize("how", ["cancelled", "late"])
def test_a_session_that_opens_when_nobody_wants_it_is_closed_there(engines: Any, how: str) -> None:
    slow, engine, inbox = Slow(), engines(), Inbox()
    with lending(slow) as (url, sessions):
        ticket = engine.submit(alone(open_backend(url)), [row(SHORT)], inbox)
        assert slow.asked.wait(10)
        if how == "cancelled":
            engine.cancel(ticket)
        else:
            engine._patience_s = 0.0
        until(lambda: engine.running == 0)
        slow.door.set()
        until(lambda: len(slow.closed) == 1)
        assert not sessions.held and isinstance(inbox.error, Late) == (how == "late")


# --- whole and in turn --------------------------------------------------------------------------------------------


class Remote(Parrot):
    """A parrot on another machine: each step waits until its door is open."""

    elsewhere = True

    def __init__(self, text: str) -> None:
        super().__init__(text, LONG)
        self.door, self.closed = threading.Event(), 0
        self.door.set()

    def open(self, prompts: Sequence[Sequence[int]], want: Want) -> Said:
        parrot = self

        class Waits(Said):
            def scores(self, new: Sequence[Sequence[int]]) -> Scores:
                with waiting():
                    assert parrot.door.wait(20)
                return super().scores(new)

            def close(self) -> None:
                parrot.closed += 1

        self.session = Waits
        return super().open(prompts, want)


def test_the_endpoint_says_the_same_of_a_model_elsewhere() -> None:
    here, there = speaking("a text"), Remote("a text")
    remote = Artefact(replace(here.trio, large=there))
    said = []
    for artefact in (here, remote):
        with serving(artefact=artefact) as (url, _):
            body = {"prompt": ["x", "y"], "max_tokens": 20, "temperature": 0}
            said.append([choice["text"] for choice in post(url, body).json()["choices"]])
            echo = {"prompt": "a t", "max_tokens": 0, "echo": True, "logprobs": 0}
            refused = post(url, echo).json()
            assert refused["choices"][0]["logprobs"]["token_logprobs"][0] is None
    assert said == [["a text", "a text"]] * 2
    until(lambda: there.closed >= 1)


def test_a_late_answer_is_502_and_the_next_request_is_answered() -> None:
    there = Remote("a text")
    with serving(artefact=Artefact(replace(speaking("").trio, large=there)), patience_s=0.4) as (url, engine):
        there.door.clear()
        body = {"prompt": "x", "max_tokens": 20, "temperature": 0}
        late = post(url, body)
        assert late.status_code == 502 and "did not answer within 0.4 s" in late.json()["error"]["message"]
        assert late.json()["error"]["code"] == "backend_error" and engine.running == 0
        there.door.set()
        until(lambda: there.closed == 1)
        assert post(url, body).json()["choices"][0]["text"] == "a text"


def test_scores_of_a_model_elsewhere_are_asked_beside_the_engine(engines: Any) -> None:
    there, engine = Remote("a text"), engines()
    trio = replace(speaking("").trio, large=there)
    there.door.clear()
    future = engine.call(lambda: score(trio, [[1, 2, 3]], [1])[0], there)
    assert engine.call(lambda: 7).result(10) == 7 and not future.done()
    there.door.set()
    assert len(future.result(10).logprobs) == 2
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0, there).result(10)


def asking(door: threading.Event, begun: list[str], what: str) -> Any:
    """Work that waits for another machine."""

    def work() -> str:
        with waiting():
            begun.append(what)
            assert door.wait(20)
        return what

    return work


def test_few_scores_of_a_model_elsewhere_are_asked_at_once_and_the_others_wait(engines: Any) -> None:
    engine, there, other = engines(max_queue=3), Remote("a text"), Remote("a text")
    door, begun = threading.Event(), list[str]()
    futures = [engine.call(asking(door, begun, what), there) for what in "ab"]
    until(lambda: engine.waiting == 0)
    futures += [engine.call(asking(door, begun, what), there) for what in "cde"]
    with pytest.raises(Refusal, match="3 answers wait already") as told:
        engine.call(asking(door, begun, "f"), there)
    assert told.value.status == 429
    assert futures.pop().cancel()
    until(lambda: engine.waiting == 2)
    assert engine.call(lambda: 7, other).result(10) == 7 and engine.call(lambda: 8).result(10) == 8
    assert sorted(begun) == ["a", "b"]
    door.set()
    assert [future.result(10) for future in futures] == list("abcd") and sorted(begun) == list("abcd")


def test_who_waits_for_scores_that_do_not_come_is_told(engines: Any) -> None:
    engine, there, inbox = engines(max_batch=1), Remote("a text"), Inbox()
    door, begun = threading.Event(), list[str]()
    there.door.clear()
    engine.submit(alone(there), [row(SHORT)], Inbox())
    until(lambda: engine.running == 1)
    engine.submit(alone(there), [row(SHORT)], inbox)
    futures = [engine.call(asking(door, begun, what), there) for what in "abcd"]
    until(lambda: len(begun) == 2)
    assert engine.waiting == 3
    engine._patience_s = 0.0
    assert all(isinstance(future.exception(10), NoAnswer) for future in futures)
    assert inbox.done.wait(10) and isinstance(inbox.error, NoAnswer) and engine.waiting == 0
    assert sorted(begun) == ["a", "b"]
    door.set()
    there.door.set()


def test_the_engine_ends_while_scores_are_waited_for() -> None:
    engine, there, door, begun = Engine(), Remote("a text"), threading.Event(), list[str]()
    futures = [engine.call(asking(door, begun, what), there) for what in "abc"]
    until(lambda: len(begun) == 2)
    closing = threading.Thread(target=engine.close)
    closing.start()
    for future in futures:
        with pytest.raises(Refusal, match="the server stopped"):
            future.result(10)
    door.set()
    closing.join(10)
    assert not closing.is_alive() and sorted(begun) == ["a", "b"]


def test_a_turn_goes_to_who_has_waited_longest() -> None:
    turn, order = Turn(), []
    turn.acquire()
    threads = []
    for i in range(4):
        threads.append(threading.Thread(target=lambda i=i: (turn.acquire(), order.append(i), turn.release())))
        threads[-1].start()
        until(lambda i=i: len(turn._queue) == i + 1)
    turn.release()
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3]
    with turn:
        assert order == [0, 1, 2, 3], "and it is free again"


def test_a_worker_gives_its_turn_away_while_it_waits_and_what_nobody_wants_up() -> None:
    turn, door, ended = Turn(), threading.Event(), []
    worker = Worker(turn, lambda: None)

    def work() -> str:
        with waiting():
            assert door.wait(20)
        return "done"

    worker.do(work)
    until(lambda: worker.waited_s > 0)
    with turn:
        assert worker.busy, "its turn is ours"
        door.set()
        until(lambda: len(turn._queue) == 1)
        assert worker.waited_s == 0, "it waits for its turn, no longer for the server"
    until(lambda: not worker.busy)
    assert worker.take() == "done" and worker.waited_s == 0
    door.clear()
    worker.do(work)
    until(lambda: worker.waited_s > 0)
    worker.leave(ended.append)
    door.set()
    worker.join(10)
    assert ended == ["done"], "what was asked is heard, since it may have to be closed"
    with turn, waiting():
        assert turn._held, "of a thread that is no worker nothing changes"


def test_what_nobody_wants_asks_nothing_more_but_what_it_closes() -> None:
    turn, door, asked = Turn(), threading.Event(), []
    worker = Worker(turn, lambda: None)

    def ask(what: str) -> None:
        with waiting():
            asked.append(what)
            assert door.wait(20)

    def work() -> None:
        try:
            ask("open")
            ask("scores")
        finally:
            ask("close")

    worker.do(work)
    until(lambda: len(asked) == 1)
    worker.leave(lambda _: ask("the end"))
    door.set()
    worker.join(10)
    assert asked == ["open", "close", "the end"]
