"""The loop, over a transport of fifteen lines and a method of two exchanges that only adds numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from fedpeft.core.cohort import sample
from fedpeft.core.errors import QuorumError
from fedpeft.core.exchange import Answers, Call, ClientEnv, Exchange, Nothing, Receipt, ServerEnv, anything
from fedpeft.core.federate import ATTEMPTS, Done, Start, federate, schedule
from fedpeft.core.method import Defaults

MODEL: Any = None  # the loop only hands it on
CLIENTS = ["a", "b", "c", "d", "e", "f"]


@dataclass(frozen=True)
class Number:
    x: float


@dataclass
class Fake:
    """Every client works at once and answers in reversed order; `lost` says who does not answer and why."""

    lost: Callable[[str, Call], str | None] = lambda client, call: None
    calls: list[tuple[Call, dict[str, Any]]] = field(default_factory=list)
    memories: dict[tuple[str, int], Number] = field(default_factory=dict)

    def clients(self) -> Sequence[str]:
        return CLIENTS

    def exchange(self, call: Call, downs: Mapping[str, Any]) -> Answers:
        self.calls.append((call, dict(downs)))
        ups, receipts = {}, []
        for client in reversed(downs):
            env = ClientEnv(client, MODEL, {}, 0, call.rounds, call.round, call.exchange.name, call.attempt)
            memory = self.memories.get((client, call.versions.get(client, 0)), Number(0))
            lost = self.lost(client, call)
            up, self.memories[client, call.version] = call.exchange.work(downs[client], memory, env)  # type: ignore[misc]
            if lost is None:
                ups[client] = up
            receipts.append(Receipt(client, lost=lost, staged=True))
        return Answers(ups, tuple(receipts))


@dataclass(frozen=True)
class Adding(Defaults):
    """Set-up: everybody's letter. Round: `count` gives how often a client answered, `draw` a number of its place."""

    cohort: int = 3
    nobody: bool = False

    def init(self, env: ServerEnv) -> Number:
        return Number(0.5)

    def setup(self) -> Sequence[Exchange]:
        return (self._exchange("hello", self.count),)

    def round(self) -> Sequence[Exchange]:
        return self._exchange("count", self.count), self._exchange("draw", self.draw)

    def _exchange(self, name: str, work: Any) -> Exchange:
        pick = (lambda state, clients, rng: []) if self.nobody else sample(self.cohort)
        return Exchange(name, Number, Number, pick, self.send, work, self.fold, anything)

    def send(self, state: Number, client: str) -> Number:
        return state

    def count(self, down: Number, memory: Number, env: ClientEnv) -> tuple[Number, Number]:
        return Number(memory.x + 1), Number(memory.x + 1)

    def draw(self, down: Number, memory: Number, env: ClientEnv) -> tuple[Number, Number]:
        return Number(float(env.rng("draw").random())), memory

    def fold(self, state: Number, ups: Mapping[str, Number], env: ServerEnv) -> Number:
        """Order matters: each answer halves what came before."""
        x = state.x + float(env.rng("noise").random())
        for up in ups.values():
            x = x / 2 + up.x
        return Number(x)

    def result(self, state: Number) -> Any:
        return {}


def run(transport: Fake | None = None, method: Any = None, **given: Any) -> list[Done]:
    given = {"rounds": 3, "seed": 7} | given
    return list(federate(method or Adding(), transport or Fake(), MODEL, **given))


# --- order ------------------------------------------------------------------------------------------------------


def test_exchanges_come_in_order_and_say_where_they_are() -> None:
    places = [(done.number, done.round, done.exchange, done.last) for done in run(rounds=2)]
    assert places == [
        (1, 0, "hello", True),
        (2, 1, "count", False), (3, 1, "draw", True),
        (4, 2, "count", False), (5, 2, "draw", True),
    ]  # fmt: skip
    assert [(r, e.name, last) for r, e, last in schedule(Adding(), 1)] == [
        (0, "hello", True), (1, "count", False), (1, "draw", True)
    ]  # fmt: skip


def test_the_transport_is_told_the_place_and_sent_the_state() -> None:
    transport = Fake()
    done = run(transport, rounds=2)
    assert [call.number for call, _ in transport.calls] == [0, 1, 2, 3, 4]
    assert [(call.round, call.rounds, call.attempt) for call, _ in transport.calls] == [
        (0, 2, 0), (1, 2, 0), (1, 2, 0), (2, 2, 0), (2, 2, 0)
    ]  # fmt: skip
    for before, (call, downs) in zip(done, transport.calls[1:], strict=False):
        assert list(downs) == list(done[call.number].cohort) and set(downs.values()) == {before.state}


def test_answers_are_folded_in_cohort_order_whatever_order_they_came_in() -> None:
    """One exchange by hand: every first answer is 1, so x goes to x/2 + 1 three times; the order shows in `draw`."""
    first, *_, draw = run(rounds=1)
    noise = ServerEnv(MODEL, CLIENTS, 7, 1, 0, "hello").rng("noise").random()
    assert first.state.x == pytest.approx((0.5 + noise) / 8 + 1.75)
    x = run(rounds=1)[1].state.x + ServerEnv(MODEL, CLIENTS, 7, 1, 1, "draw").rng("noise").random()
    for client in draw.cohort:
        x = x / 2 + float(ClientEnv(client, MODEL, {}, 0, 1, 1, "draw").rng("draw").random())
    assert draw.state.x == pytest.approx(x, rel=1e-15)
    assert draw.answered == draw.cohort


def test_no_set_up_and_no_rounds_give_no_exchanges() -> None:
    @dataclass(frozen=True)
    class Plain(Adding):
        def setup(self) -> Sequence[Exchange]:
            return ()

    assert run(method=Plain(), rounds=0) == []
    assert [done.round for done in run(method=Plain(), rounds=1)] == [1, 1]


# --- resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(8))
def test_a_run_resumed_anywhere_gives_the_same_states_and_memories(number: int) -> None:
    def lost(client: str, call: Call) -> str | None:
        return "late" if (CLIENTS.index(client) + call.number) % 4 == 0 else None

    whole = run(Fake(lost))
    transport = Fake(lost)
    done = run(transport)[:number]
    start = done[-1].start if done else None
    rest = run(Fake(lost, memories=transport.memories), start=start)
    assert [(d.number, d.state, d.versions, d.cohort, d.answered) for d in done + rest] == [
        (d.number, d.state, d.versions, d.cohort, d.answered) for d in whole
    ]


def test_a_start_is_not_changed_by_the_run() -> None:
    start = Start(0, Number(1.0), {"a": 5})
    run(start=start)
    assert start == Start(0, Number(1.0), {"a": 5})


def test_seeds_give_other_cohorts() -> None:
    cohorts = {seed: [d.cohort for d in run(seed=seed)] for seed in range(3)}
    assert len({str(c) for c in cohorts.values()}) == 3
    assert len(set(cohorts[0])) > 1  # and exchanges of one run differ too


# --- lost clients -----------------------------------------------------------------------------------------------


def test_a_lost_client_keeps_its_old_memory() -> None:
    """a is lost in the second exchange: it counts 1 in the set-up, and 2, not 3, in round 2."""
    transport = Fake(lambda client, call: "late" if client == "a" and call.number == 1 else None)
    done = run(transport, Adding(cohort=0), rounds=2)
    hello, lost, *_ = done
    versions = [call.version for call, _ in transport.calls]
    assert hello.versions == dict.fromkeys(CLIENTS, versions[0])
    assert lost.versions == dict.fromkeys(CLIENTS, versions[1]) | {"a": versions[0]}
    assert lost.answered == tuple(c for c in lost.cohort if c != "a")
    assert {(r.client, r.lost) for r in lost.receipts if r.lost} == {("a", "late")}
    counts = {c: transport.memories[c, done[-1].versions[c]].x for c in CLIENTS}
    assert counts == dict.fromkeys(CLIENTS, 3.0) | {"a": 2.0}
    assert sorted(versions) == versions and len(set(versions)) == len(versions)


def test_only_staged_memories_enter_the_ledger() -> None:
    class Forgetful(Fake):
        def exchange(self, call: Call, downs: Mapping[str, Any]) -> Answers:
            answers = super().exchange(call, downs)
            return Answers(answers.ups, tuple(Receipt(r.client, staged=r.client == "b") for r in answers.receipts))

    done = run(Forgetful(), Adding(cohort=0), rounds=1)
    assert [set(d.versions) for d in done] == [{"b"}] * 3


def test_below_the_quorum_another_cohort_is_asked() -> None:
    """Nobody answers the first attempt of round 1's first exchange; the second attempt has its own randomness."""
    transport = Fake(lambda client, call: "silent" if (call.number, call.attempt) == (1, 0) else None)
    _, count, _ = run(transport, rounds=1)
    tries = [(call, list(downs)) for call, downs in transport.calls if call.number == 1]
    assert [call.attempt for call, _ in tries] == [0, 1]
    for call, cohort in tries:
        rng = ServerEnv(MODEL, CLIENTS, 7, 1, 1, "count", call.attempt).rng("pick")
        assert cohort == list(sample(3)(None, CLIENTS, rng))
    assert tries[0][1] != tries[1][1] and list(count.cohort) == tries[1][1]
    assert [r.lost for r in count.receipts] == ["silent"] * 3 + [None] * 3
    assert {count.versions[c] for c in count.answered} == {tries[1][0].version}
    assert count.versions.items() <= (run(rounds=1)[0].versions | dict.fromkeys(count.answered, 18)).items()


@pytest.mark.parametrize(("quorum", "attempts"), [(1.0, 4), (0.67, 4), (2 / 3, 1), (0.5, 1), (0.01, 1)])
def test_the_quorum_is_a_share_of_the_cohort(quorum: float, attempts: int) -> None:
    """One of three is lost each time; two thirds answer."""
    transport = Fake(lambda client, call: "late" if client == transport_cohort(call)[0] else None)

    def transport_cohort(call: Call) -> list[str]:
        return list(transport.calls[-1][1])

    if attempts == 1:
        assert [len(d.answered) for d in run(transport, rounds=0, quorum=quorum)] == [2]
    else:
        with pytest.raises(QuorumError):
            run(transport, rounds=0, quorum=quorum)
    assert len(transport.calls) == attempts


def test_the_quorum_error_says_what_where_and_what_to_do() -> None:
    transport = Fake(lambda client, call: f"{client} is out" if call.round == 1 else None)
    with pytest.raises(QuorumError) as caught:
        run(transport, Adding(cohort=5))
    text = str(caught.value)
    assert text.startswith(
        "round 1, exchange 'count': 0 of 5 clients answered in the last of 4 attempts, below the quorum of 0.5 ("
    )
    last = sorted(transport.calls[-1][1])
    assert "; ".join(f"{c}: {c} is out" for c in last[:3]) + "; and 2 more" in text
    assert "Lower run.quorum" in text and "resume" in text
    assert len(transport.calls) == 1 + ATTEMPTS
    done = caught.value.done
    assert done is not None and (done.number, done.round, done.exchange, done.answered) == (2, 1, "count", ())
    assert sorted(r.client for r in done.receipts) == sorted(c for _, asked in transport.calls[1:] for c in asked)


def test_one_answer_is_needed_however_low_the_quorum() -> None:
    with pytest.raises(QuorumError, match="0 of 3"):
        run(Fake(lambda client, call: "out"), quorum=1e-12)


def test_an_exchange_may_need_nobody() -> None:
    """Its own quorum of 0 stands before the run's: nobody's answer leaves the state, and nobody is asked again."""

    @dataclass(frozen=True)
    class Inviting(Adding):
        def setup(self) -> Sequence[Exchange]:
            return (replace(super().setup()[0], quorum=0.0),)

    transport = Fake(lambda client, call: "out" if client != "a" else None)
    (hello,) = run(transport, Inviting(cohort=0), rounds=0, quorum=1.0)
    assert hello.answered == ("a",) and set(hello.versions) == {"a"} and hello.state != Number(0.5)
    transport = Fake(lambda client, call: "out")
    (hello,) = run(transport, Inviting(), rounds=0, quorum=1.0)
    assert (hello.answered, hello.versions, hello.state) == ((), {}, Number(0.5))
    assert len(transport.calls) == 1 and [r.lost for r in hello.receipts] == ["out"] * 3


def test_an_exchange_may_need_more_than_the_run() -> None:
    @dataclass(frozen=True)
    class Strict(Adding):
        def setup(self) -> Sequence[Exchange]:
            return (replace(super().setup()[0], quorum=1.0),)

    transport = Fake(lambda client, call: "out" if client == "a" else None)
    with pytest.raises(QuorumError, match=r"5 of 6 clients answered .* below the quorum of 1 "):
        run(transport, Strict(cohort=0), quorum=0.5)


def test_a_pick_of_nobody_leaves_the_state_and_goes_on() -> None:
    transport = Fake()
    done = run(transport, Adding(nobody=True), rounds=2)
    assert len(done) == 5
    assert all(d.state == Number(0.5) and d.versions == {} and d.cohort == () == d.answered for d in done)
    assert [call.attempt for call, _ in transport.calls] == [0] * 5


def test_the_fold_sees_who_was_asked_and_who_answered() -> None:
    seen: list[Any] = []

    @dataclass(frozen=True)
    class Watching(Adding):
        def fold(self, state: Number, ups: Mapping[str, Number], env: ServerEnv) -> Number:
            seen.append((list(ups), list(env.cohort), env.round, env.exchange, env.attempt, env.resources, len(ups)))
            return state

    transport = Fake(lambda client, call: "late" if client == "b" else None)
    run(transport, Watching(cohort=0), rounds=0, resources={"a": "phone"})
    cohort = list(transport.calls[0][1])
    assert seen == [([c for c in cohort if c != "b"], cohort, 0, "hello", 0, {"a": "phone"}, 5)]


def test_a_caller_may_stop_at_any_time() -> None:
    transport = Fake()
    for done in federate(Adding(), transport, MODEL, rounds=100, seed=0):
        if done.number == 2:
            break
    assert len(transport.calls) == 2


def test_the_empty_record_is_the_default_memory() -> None:
    assert Adding().memory is Nothing and Adding().init_client(MODEL) == Nothing()
