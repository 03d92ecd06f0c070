"""The engine alone, on a model of three numbers: copies, bytes, order, memories, losses."""

from __future__ import annotations

import gc
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch

from fedpeft.core import records, tree, wire
from fedpeft.core.cohort import everyone
from fedpeft.core.errors import StoreError
from fedpeft.core.exchange import Call, ClientEnv, Exchange, Nothing, Receipt, ServerEnv, Weights
from fedpeft.core.fit import SGD, Fit, Fitted
from fedpeft.core.memories import InMemory
from fedpeft.core.method import Defaults, plain, rebuild
from fedpeft.core.tree import Params
from fedpeft.engines.inprocess import InProcess
from toy import BODY, HEAD, ToyModel, params, points, vector

DATA = {f"c{i}": {"train": points([i, 0.0, 1.0], [i, 2.0, 1.0])} for i in range(4)}


@dataclass(frozen=True)
class Turns:
    """A client's memory: how often it has answered."""

    count: int


@dataclass(frozen=True)
class Told:
    """An answer."""

    params: Params
    examples: int
    turns: int
    attempt: int


@dataclass(frozen=True)
class Counting(Defaults):
    """One step of SGD from what was sent; clients named in `trouble` do what it says."""

    trouble: Mapping[str, str] = field(default_factory=dict)
    lr: float = 0.5

    memory: ClassVar[type[Turns]] = Turns

    def init_client(self, env: ClientEnv) -> Turns:
        if self.trouble.get(env.client) == "init":
            raise KeyError("no adapter")
        return Turns(0)

    def exchange(self) -> Exchange:
        return Exchange("train", Weights, Told, everyone, self.send, self.train, self.fold)

    def round(self) -> tuple[Exchange, ...]:
        return (self.exchange(),)

    def send(self, state: Params, client: str) -> Weights:
        return Weights(state)

    def train(self, down: Weights, memory: Turns, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Any, Any]]:
        trouble = self.trouble.get(env.client)
        if trouble == "work":
            raise MemoryError("out of memory")
        if trouble == "mutate":
            down.params[HEAD].add_(100)
        fitted = yield Fit(down.params, env.data, [[0, 1]], SGD(float("nan") if trouble == "fit" else self.lr))
        if trouble == "after":
            raise RuntimeError("after training")
        told = Told(fitted.params, len(env.data), memory.count + 1, env.attempt)
        if trouble == "infinite":
            told = replace(told, params={**fitted.params, HEAD: torch.tensor([torch.inf], dtype=torch.float64)})
        if trouble == "negative":
            told = replace(told, examples=-1)
        if trouble == "odd answer":
            return Nothing(), memory
        if trouble == "odd memory":
            return told, Weights(fitted.params)
        if trouble == "odd count":
            return told, Turns("three")  # type: ignore[arg-type]
        return told, memory if trouble == "same" else Turns(memory.count + 1)

    def fold(self, state: Params, ups: Mapping[str, Told], env: ServerEnv) -> Params:
        return tree.mean((up.params, up.examples) for up in ups.values())


def engine(trouble: Mapping[str, str] | None = None, **changes: Any) -> InProcess:
    values = plain(Counting(trouble or {}))
    return InProcess(**{"make": lambda: Counting(**values), "model": ToyModel(), "data": DATA, "seed": 0} | changes)


def call(number: int = 0, versions: Mapping[str, int] | None = None, attempt: int = 0) -> Call:
    return Call(Counting().exchange(), number, number + 1, 9, attempt, versions or {})


def downs(*clients: str) -> dict[str, Weights]:
    return {client: Weights(params(0.0, 0.0, 0.0)) for client in clients or DATA}


# --- what goes right --------------------------------------------------------------------------------------------


def test_answers_are_worked_out_by_hand() -> None:
    """From 0 half of the way to the mean of the client's rows, (i, 1, 1)."""
    answers = engine().exchange(call(), downs())
    assert {client: vector(up.params) for client, up in answers.ups.items()} == {
        f"c{i}": [i / 2, 0.5, 0.5] for i in range(4)
    }
    assert engine().clients() == ["c0", "c1", "c2", "c3"]


def test_bytes_are_those_of_the_codec_both_ways() -> None:
    answers = engine().exchange(call(), downs("c2", "c1"))
    assert [r.client for r in answers.receipts] == ["c2", "c1"]
    for receipt in answers.receipts:
        assert receipt.bytes_down == len(records.encode(Weights(params(0.0, 0.0, 0.0))))
        assert receipt.bytes_up == len(records.encode(answers.ups[receipt.client]))
        assert (receipt.meter.steps, receipt.meter.examples, receipt.meter.trained_tokens) == (1, 2, 6)
        assert receipt.lost is None and receipt.staged


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_clients_train_in_groups_and_company_changes_nothing(batch: int) -> None:
    model = ToyModel()
    answers = engine(model=model, batch=batch).exchange(call(), downs())
    assert model.calls == {1: [1, 1, 1, 1], 2: [2, 2], 3: [3, 1], 4: [4]}[batch]
    alone = engine().exchange(call(), downs())
    for client in DATA:
        assert tree.sha256(answers.ups[client].params) == tree.sha256(alone.ups[client].params)


def test_every_client_gets_its_own_copy() -> None:
    """c0 writes into what it was sent; nobody else sees it, the sender neither."""
    shared = Weights(params(0.0, 0.0, 0.0))
    answers = engine({"c0": "mutate"}, batch=4).exchange(call(), dict.fromkeys(DATA, shared))
    assert vector(answers.ups["c0"].params) == [0.0, 0.5, 50.5]
    assert vector(answers.ups["c1"].params) == [0.5, 0.5, 0.5]
    assert vector(shared.params) == [0.0, 0.0, 0.0]


def test_record_that_is_sent_to_all_is_encoded_once_and_others_are_not_mixed_up(monkeypatch: Any) -> None:
    sent: list[str] = []
    encode = records.encode

    def counted(record: Any) -> bytes:
        sent.append(type(record).__name__)
        return encode(record)

    monkeypatch.setattr(records, "encode", counted)
    state = params(0.0, 0.0, 0.0)
    engine().exchange(call(), {client: Weights(state) for client in DATA})
    assert sent.count("Weights") == 1
    two = {"c0": Weights(state), "c1": Weights(params(2.0, 0.0, 0.0)), "c2": Weights(state)}
    answers = engine().exchange(call(), two)
    assert [vector(answers.ups[c].params)[0] for c in ("c0", "c1", "c2")] == [0.0, 1.5, 1.0]


def test_method_of_a_client_is_made_anew_from_plain_data() -> None:
    made: list[Counting] = []

    def make() -> Counting:
        made.append(rebuild(Counting, plain(Counting())))
        return made[-1]

    engine(make=make).exchange(call(), downs())
    assert len({id(method) for method in made}) == 4


# --- memories ---------------------------------------------------------------------------------------------------


def test_memory_counts_only_once_the_ledger_names_it() -> None:
    made = engine()
    first = made.exchange(call(0), downs("c0"))
    assert first.ups["c0"].turns == 1
    assert made.exchange(call(0, attempt=1), downs("c0")).ups["c0"].turns == 1  # nothing was committed
    committed = {"c0": call(0, attempt=1).version}
    assert made.exchange(call(1, committed), downs("c0")).ups["c0"].turns == 2
    assert made.exchange(call(1, committed), downs("c0")).ups["c0"].turns == 2


def test_unchanged_memory_is_not_stored() -> None:
    made = engine({"c0": "same"})
    (receipt,) = made.exchange(call(), downs("c0")).receipts
    assert receipt.lost is None and not receipt.staged
    with pytest.raises(StoreError, match="is missing"):
        made.memories.load("c0", call().version, Turns)


def test_a_full_disk_stops_everything_and_a_lost_memory_its_client() -> None:
    """The first is the run's own store that failed; the second leaves the others as they are."""

    class Full(InMemory):
        def stage(self, *arguments: Any) -> None:
            raise StoreError("no space left")

    with pytest.raises(StoreError, match="no space left"):
        engine(memories=Full()).exchange(call(), downs())
    answers = engine().exchange(call(1, {"c0": 5}), downs())
    lost = {receipt.client: receipt.lost for receipt in answers.receipts if receipt.lost}
    assert list(lost) == ["c0"] and "version 5, is missing" in lost["c0"] and len(answers.ups) == len(downs()) - 1


# --- what goes wrong --------------------------------------------------------------------------------------------

LOST = {
    "init": "KeyError: 'no adapter'",
    "work": "MemoryError: out of memory",
    "fit": "a learning rate is nan",
    "after": "RuntimeError: after training",
    "infinite": "refused: params/head.w of Told holds 1 numbers that are not finite",
    "negative": "refused: an answer counts -1 examples",
    "odd answer": "refused: a 'Nothing' came where a 'Told' was expected",
    "odd memory": "the work left a Weights where a memory Turns was expected",
    "odd count": "its memory cannot be kept: ",
}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("trouble", LOST)
def test_trouble_of_one_client_loses_that_client_alone(trouble: str, batch: int) -> None:
    answers = engine({"c1": trouble}, batch=batch).exchange(call(), downs())
    assert list(answers.ups) == ["c0", "c2", "c3"]
    (lost,) = [receipt for receipt in answers.receipts if receipt.lost is not None]
    assert lost.client == "c1" and not lost.staged and lost.bytes_down > 0
    assert lost.lost is not None and lost.lost.startswith(LOST[trouble])
    alone = engine().exchange(call(), downs())
    for client in answers.ups:
        assert tree.sha256(answers.ups[client].params) == tree.sha256(alone.ups[client].params)


def test_everybody_lost_leaves_no_answer_and_all_reasons() -> None:
    answers = engine(dict.fromkeys(DATA, "work"), batch=4).exchange(call(), downs())
    assert len(answers.ups) == 0 and [r.lost for r in answers.receipts] == ["MemoryError: out of memory"] * 4


def test_client_that_is_not_there_costs_nothing() -> None:
    made = engine(fault=lambda client, at: f"away in round {at.round}" if client == "c3" else None)
    answers = made.exchange(call(4), downs())
    (lost,) = [receipt for receipt in answers.receipts if receipt.lost is not None]
    assert (lost.client, lost.lost, lost.bytes_down, lost.meter.steps) == ("c3", "away in round 5", 0, 0)


def test_late_answer_is_lost_with_its_memory() -> None:
    def clock(receipt: Receipt) -> float:
        assert receipt.bytes_down and receipt.bytes_up and receipt.meter.trained_tokens == 6
        return 10.0 if receipt.client == "c0" else 3.0

    made = engine(clock=clock, deadline_s=3.0)
    answers = made.exchange(call(), downs("c0", "c1"))
    late, good = answers.receipts
    assert late.lost == "late: 10 s, deadline 3 s" and not late.staged and late.bytes_up > 0
    assert good.lost is None
    assert [r.simulated_seconds for r in answers.receipts] == [3.0, 3.0]  # nobody waits longer than the deadline
    with pytest.raises(StoreError):
        made.memories.load("c0", call().version, Turns)


def test_wire_may_lose_or_garble_an_answer() -> None:
    seen: list[int] = []

    def carry(client: str, at: Call, data: bytes) -> bytes | None:
        seen.append(len(data))
        return {"c0": None, "c1": data[:20], "c2": data}.get(client, b"x" * 500)

    answers = engine(carry=carry).exchange(call(), downs())
    reasons = {receipt.client: receipt.lost for receipt in answers.receipts}
    assert list(answers.ups) == ["c2"] and reasons["c2"] is None and reasons["c0"] == "no answer"
    assert str(reasons["c1"]).startswith("refused: ") and str(reasons["c3"]).startswith("refused: ")
    assert [r.bytes_up for r in answers.receipts] == [0, 20, seen[2], 500]
    assert [r.staged for r in answers.receipts] == [False, False, True, False]


def test_check_of_an_answer_that_fails_in_an_unforeseen_way_loses_the_answer() -> None:
    def accept(down: Any, up: Any) -> None:
        raise ZeroDivisionError("check")

    broken = replace(call(), exchange=replace(Counting().exchange(), accept=accept))
    answers = engine().exchange(broken, downs("c0"))
    assert answers.receipts[0].lost == "refused: ZeroDivisionError: check"


def test_narrow_wire_is_what_both_ends_see() -> None:
    """Parameters lose half a step of 1 / 127 on each way; the memory does not travel and stays as it is."""
    width = 200
    start = {BODY: torch.linspace(-1, 1, width - 1), HEAD: torch.ones(1)}
    data = {"c0": {"train": points([0.5] * width, [0.5] * width)}}
    inner = InProcess(Counting, ToyModel(width=width), data, 0, wire=lambda e: wire.wired(e, "int8"))
    made = wire.with_wire(inner, "int8")
    answers = made.exchange(call(), {"c0": Weights(start)})
    exact = InProcess(Counting, ToyModel(width=width), data, 0).exchange(call(), {"c0": Weights(start)})
    gap = (answers.ups["c0"].params[BODY] - exact.ups["c0"].params[BODY]).abs().max()
    assert 0 < gap <= 2 / 254 + 1e-6
    assert answers.receipts[0].bytes_down < 0.7 * exact.receipts[0].bytes_down
    assert inner.memories.load("c0", call().version, Turns) == Turns(1)


def test_large_cohort_waits_on_disk_and_folds_to_the_same(monkeypatch: Any) -> None:
    whole = engine().exchange(call(), downs())
    monkeypatch.setattr("fedpeft.core.spool.Spool.__init__.__defaults__", (1,))
    spooled = engine().exchange(call(), downs())
    fold = Counting().exchange().fold
    env = ServerEnv(ToyModel(), list(DATA), 0, 9)
    assert tree.sha256(fold({}, spooled.ups, env)) == tree.sha256(fold({}, whole.ups, env))
    del spooled
    gc.collect()
