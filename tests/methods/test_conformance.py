"""What every method must do. Methods are found by discovery; none is named here.

A method is run on the toy federation of `tests/toy.py`: four clients around centres of their own, or one client with
all rows where the method is `pooled`. One uninterrupted run of each (`Ran`) is what the other runs are compared with.
Every alternative of a `Literal` field is a variant of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import toy
from fedpeft import methods
from fedpeft.core import records
from fedpeft.core.adapter import AdaLora, Bottleneck, HeadOnly, Lora
from fedpeft.core.client import answer
from fedpeft.core.errors import ConfigError
from fedpeft.core.evaluate import Evaluate
from fedpeft.core.exchange import Call, ClientEnv, Exchange, Method, Record, ServerEnv
from fedpeft.core.federate import Done, Start, federate, schedule
from fedpeft.core.fit import Fit
from fedpeft.core.method import plain, rebuild
from fedpeft.core.tree import block_of
from fedpeft.engines.inprocess import InProcess
from transports import Direct, Pipes, Recording, Rewritten, Silent

ROUNDS, SEED = 3, 11
LONG = 6  # rounds after which the loss must have fallen
RANK, SIZE = 2, 16
ROWS = 2  # of the smallest client; the largest has three more
MODEL: dict[str, Any] = {"width": 3, "dtype": "float32", "dropout": 0.1, "blocks": 2}
SETTINGS = {
    "cohort": 3,
    "lr": 0.05,
    "batch_size": 2,
    "epochs": 2,
    "server_lr": 0.5,
    "warmup_rounds": 2,
    "warmup_steps": 3,
    "batches": (2,),
    "depths": (0.0,),
}  # used as far as a method has such fields
HEADER_BYTES = 1500
FALLS = 0.95  # of the loss is left at most after a few rounds
CPU_SECONDS = 5.0  # of a quiet machine
SHARED = 1.6  # how much more processor time the same takes where another process shares the core
importlib.import_module("scipy.optimize")  # not at the cost of the case that comes first
spent: dict[str, float] = {}


@dataclass(frozen=True)
class Case:
    """One method with one setting of its fields."""

    name: str
    values: Mapping[str, Any]

    @functools.cached_property
    def cls(self) -> type[Method]:
        return methods.load(self.name)

    def make(self) -> Method:
        return rebuild(self.cls, self.plain)

    @functools.cached_property
    def model(self) -> dict[str, Any]:
        """Arguments of the toy: with bottlenecks or factors for methods that tune these alone."""
        method = self.make()
        if isinstance(method.adapter(), Bottleneck):
            return MODEL | {"size": SIZE}
        if isinstance(method.adapter(), AdaLora):
            return MODEL | {"rank": RANK, "triplets": True}
        factors = isinstance(method.adapter(), Lora) and method.accepts(HeadOnly()) is not None
        return MODEL | ({"rank": RANK} if factors else {})

    def data(self, width: int = MODEL["width"], rows: int = ROWS) -> dict[str, dict[str, toy.Points]]:
        return toy.federation(self.cls.pooled, width=width, rows=rows)

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        return plain(methods.build(self.name, self.values))

    def engine(
        self, model: toy.ToyModel | None = None, seed: int = SEED, batch: int = 1, rows: int = ROWS
    ) -> InProcess:
        return InProcess(self.make, model or toy.ToyModel(**self.model), self.data(rows=rows), seed, batch=batch)

    def run(self, transport: Any, seed: int = SEED, rounds: int = ROUNDS, start: Start | None = None) -> list[Done]:
        model = toy.ToyModel(**self.model)
        return list(federate(self.make(), transport, model, rounds=rounds, seed=seed, start=start))


def cases() -> Iterator[Any]:
    """The default of every method, and every alternative of its `Literal` fields."""
    for name in methods.names():
        hints = typing.get_type_hints(methods.load(name))
        common = {field: value for field, value in SETTINGS.items() if field in hints}
        yield pytest.param(Case(name, common), id=name)
        for field in methods.describe(methods.load(name)):
            if typing.get_origin(hints[field.name]) is Literal:
                others = [o for o in typing.get_args(hints[field.name]) if o != field.default]
                for other in others:
                    yield pytest.param(Case(name, {**common, field.name: other}), id=f"{name}-{field.name}={other}")


every = pytest.mark.parametrize("case", list(cases()))
each = pytest.mark.parametrize("name", methods.names())


@pytest.fixture(autouse=True)
def few_seconds(request: pytest.FixtureRequest) -> Iterator[None]:
    """All tests of one case together take at most CPU_SECONDS of this process, as long as nobody shares its core."""
    case = request.node.callspec.params.get("case")
    name = f"{case.name} {case.values}" if case else request.node.callspec.params["name"]
    start = time.process_time()
    yield
    spent[name] = spent.get(name, 0.0) + time.process_time() - start
    assert spent[name] <= CPU_SECONDS * SHARED, f"{name}: {spent[name]:.1f} s of processor time"


@pytest.fixture(scope="session")
def worker() -> Iterator[subprocess.Popen[bytes]]:
    """A freshly started process that gets nothing but plain data."""
    script = Path(__file__).with_name("site_worker.py")
    with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=20) == 0


def bits(record: Record) -> str:
    return records.encode(record).hex()


def final(done: list[Done]) -> str:
    return bits(done[-1].state)


@dataclass(frozen=True)
class Step:
    """What an exchange left, as bytes."""

    number: int
    state: bytes
    kind: type[Record]  # of the state
    versions: tuple[tuple[str, int], ...]
    memories: tuple[tuple[str, bytes], ...]  # of every client that has one, as committed

    def start(self, case: Case) -> Start:
        """Where a run goes on that was killed after the exchange."""
        return Start(self.number, records.decode(self.state, case.cls.state), dict(self.versions))

    def engine(self, case: Case) -> InProcess:
        """An engine of a process that finds these memories."""
        engine = case.engine()
        for client, memory in self.memories:
            version = dict(self.versions)[client]
            engine.memories.stage(client, version, records.decode(memory, case.cls.memory), None)
        return engine

    @property
    def ended(self) -> tuple[str, dict[str, str]]:
        """What `final` and `memories` say of a run that ends here."""
        return self.state.hex(), {client: memory.hex() for client, memory in self.memories}


@dataclass(frozen=True)
class Ran:
    """An uninterrupted run of a case, one client at a time: what other runs are compared with, as plain values."""

    steps: tuple[Step, ...]
    records: tuple[tuple[type[Record], type[Record], frozenset[type[Record]], frozenset[type[Record]]], ...]
    # of every call: the declared records down and up, and those that went
    first: tuple[tuple[str, str], ...]  # the answers to the first call, by client
    loss: float  # of everybody's own model at the end
    fresh: float  # and before the run

    @property
    def ended(self) -> tuple[str, dict[str, str]]:
        """What `final` and `memories` say of it."""
        return self.steps[-1].ended


def ran(case: Case, rounds: int) -> Ran:
    """The run, made."""
    engine = case.engine()
    recording, steps = Recording(engine), []
    model = toy.ToyModel(**case.model)
    for done in federate(case.make(), recording, model, rounds=rounds, seed=SEED):
        own = tuple((c, bytes.fromhex(memory)) for c, memory in memories(case, engine, [done]).items())
        state = records.encode(done.state)
        steps.append(Step(done.number, state, type(done.state), tuple(done.versions.items()), own))
    went = tuple(
        (call.exchange.down, call.exchange.up, frozenset(map(type, downs.values())), frozenset(map(type, ups)))
        for call, downs, answers in recording.calls
        for ups in [[answers.ups[client] for client in answers.ups]]
    )
    first = tuple((client, bits(up)) for client, up in recording.calls[0][2].ups.items())
    last = steps[-1].start(case)
    fresh = case.make().init(ServerEnv(toy.ToyModel(**case.model), tuple(engine.clients()), SEED, ROUNDS))
    return Ran(
        tuple(steps),
        went,
        first,
        own_loss(case, engine, last.state, last.versions),
        own_loss(case, case.engine(), fresh, {}),
    )


@pytest.fixture(scope="module")
def uninterrupted() -> Callable[..., Ran]:
    """The run of a case over so many rounds, made once for all tests."""
    kept: dict[tuple[str, str, int], Ran] = {}

    def get(case: Case, rounds: int = ROUNDS) -> Ran:
        key = case.name, json.dumps(case.plain, sort_keys=True), rounds
        if key not in kept:
            kept[key] = ran(case, rounds)
        return kept[key]

    return get


def own_loss(case: Case, transport: Any, state: Record, versions: Mapping[str, int], number: int = 10_000) -> float:
    """Mean loss of every client's own model on its own rows."""
    method = case.make()
    exchange = Evaluate(method).exchange()
    question = exchange.down(method.result(state), "train")
    call = Call(exchange, number, ROUNDS, ROUNDS, versions=versions)
    ups = transport.exchange(call, dict.fromkeys(transport.clients(), question)).ups
    return sum(float(u.personal["loss"]) for u in ups.values()) / sum(int(u.personal["n"]) for u in ups.values())


def memories(case: Case, engine: InProcess, done: list[Done]) -> dict[str, str]:
    """The committed memory of every client that has one."""
    return {c: bits(engine.memories.load(c, v, case.cls.memory)) for c, v in done[-1].versions.items()}


# --- the same bits ------------------------------------------------------------------------------------------------


@each
def test_who_plans_by_the_number_of_rounds_is_told_to_users(name: str) -> None:
    """Two rounds of two are two of twenty, but for methods that `resume` warns of."""
    hints = typing.get_type_hints(methods.load(name))
    case = Case(name, {field: value for field, value in SETTINGS.items() if field in hints})
    found = []
    for rounds in (2, 20):
        model = toy.ToyModel(**case.model)
        loop = federate(case.make(), case.engine(), model, rounds=rounds, seed=SEED)
        found.append([records.encode(done.state) for done in itertools.takewhile(lambda done: done.round <= 2, loop)])
    assert found[0] == found[1] or methods.load(name).plans_by_rounds


@each
def test_a_schedule_reaches_every_method_that_takes_one(name: str) -> None:
    """In the first round a client of 12 rows trains on 3 of them, however the method makes its Fits."""
    hints = typing.get_type_hints(methods.load(name))
    case = Case(name, {field: value for field, value in SETTINGS.items() if field in hints})
    pace = {"schedule": "random", "schedule_beta": 0.25, "schedule_alpha": 1.0}
    try:
        method = methods.build(name, {**case.values, **pace})
    except ConfigError as error:
        assert methods.load(name)().accepts_schedule("random") in str(error).replace("; leave method.schedule out", "")
        return
    fits: list[Fit] = []

    class Watched(toy.ToyModel):
        def fit_many(self, wanted: Any) -> Any:
            fits.extend(wanted)
            return super().fit_many(wanted)

    model = Watched(**case.model)
    points = [toy.points(*np.random.default_rng(i).standard_normal((12, MODEL["width"]))) for i in range(4)]
    data = {f"c{i}": {"train": own} for i, own in enumerate(points)}
    engine = InProcess(lambda: method, model, data, SEED)
    setups = len(method.setup())
    for done in federate(method, engine, model, rounds=1, seed=SEED):
        if done.number <= setups:
            fits.clear()
    for own in points:
        used = {row for fit in fits if fit.data is own for batch in fit.batches for row in batch}
        assert len(used) <= 3
    assert any(fit.data is own for fit in fits for own in points)


@every
def test_same_seed_same_bits_and_another_seed_other_bits(case: Case, uninterrupted: Callable[..., Ran]) -> None:
    ends = []
    for seed in (SEED, SEED + 1):
        engine = case.engine(seed=seed)
        done = case.run(engine, seed)
        ends.append((final(done), memories(case, engine, done)))
    assert ends[0] == uninterrupted(case).ended
    assert ends[1] != ends[0]


@every
def test_in_process_equals_direct_hand_over_and_a_fresh_process(
    case: Case, worker: subprocess.Popen[bytes], uninterrupted: Callable[..., Ran]
) -> None:
    whole = uninterrupted(case)
    model = toy.ToyModel(**case.model)
    known = set(vars(model))
    direct = Direct(case.make(), model, case.data(), SEED)
    values = json.loads(json.dumps(case.plain))
    pipes = Pipes(worker, case.name, values, case.cls, toy.plain(case.data()), case.model, SEED)
    for transport in (direct, pipes):
        done = case.run(transport)
        assert final(done) == whole.ended[0]
        assert own_loss(case, transport, done[-1].state, done[-1].versions) == whole.loss
    assert set(vars(model)) == known, "the method left something in the model"


@every
def test_fit_many_equals_fit(case: Case) -> None:
    """With more rows, so that clients are done after unequal numbers of steps."""
    together, alone = (case.engine(batch=batch, rows=2 * ROWS) for batch in (10, 1))
    a, b = case.run(together), case.run(alone)
    assert final(a) == final(b)
    assert memories(case, together, a) == memories(case, alone, b)


@every
def test_resume_from_every_exchange_equals_uninterrupted(case: Case, uninterrupted: Callable[..., Ran]) -> None:
    """After each exchange a process is killed in the next one, and another finds the memories and goes on.

    From the first exchange it goes on to the end. From a later one it makes one exchange: that leaves what the process
    that goes on from there was given.
    """
    whole = uninterrupted(case)
    for number, step in enumerate(whole.steps[:-1], 1):
        engine = step.engine(case)
        model = toy.ToyModel(**case.model)
        lost = federate(case.make(), engine, model, rounds=ROUNDS, seed=SEED, start=step.start(case))
        next(lost)  # killed after the clients staged their memories, before anything was saved
        lost.close()
        model = toy.ToyModel(**case.model)
        rest = federate(case.make(), engine, model, rounds=ROUNDS, seed=SEED, start=step.start(case))
        for wanted in whole.steps[number : number + 1 if number > 1 else None]:
            done = next(rest)
            assert (bits(done.state), memories(case, engine, [done])) == wanted.ended
            assert tuple(done.versions.items()) == wanted.versions
        rest.close()


@every
def test_order_of_answers_is_irrelevant(case: Case, uninterrupted: Callable[..., Ran]) -> None:
    """Clients work, and answer, in the opposite order."""
    turned = Recording(Rewritten(case.engine(), asked=lambda call, downs: dict(reversed(list(downs.items())))))
    assert final(case.run(turned)) == uninterrupted(case).ended[0]
    for _, downs, answers in turned.calls:
        assert list(answers.ups) == list(reversed(list(downs)))
        assert [receipt.client for receipt in answers.receipts] == list(answers.ups)


@every
def test_a_dirty_model_is_harmless(case: Case, uninterrupted: Callable[..., Ran]) -> None:
    """Left-overs in the model and the global generators change nothing."""
    model = toy.ToyModel(**case.model)
    engine = case.engine(model)
    soil = np.random.default_rng(0)

    def scramble(client: str, call: Call) -> None:
        model.dirt = object()
        torch.manual_seed(int(soil.integers(1 << 31)))
        np.random.seed(int(soil.integers(1 << 31)))

    engine.fault = scramble
    assert final(case.run(engine)) == uninterrupted(case).ended[0]


@every
def test_received_records_are_unchanged(case: Case) -> None:
    """`send`, `work` and `fold` leave state, messages and memory as they got them."""
    method, model, data = case.make(), toy.ToyModel(**case.model), case.data()
    clients = sorted(data)
    server = ServerEnv(model, clients, SEED, ROUNDS)
    state = method.init(server)
    kept: dict[str, Record] = {}
    for round, exchange, _ in schedule(method, ROUNDS):
        server = dataclasses.replace(server, round=round, exchange=exchange.name)
        cohort = list(exchange.pick(state, clients, server.rng("pick")))
        before = bits(state)
        downs = {c: exchange.send(state, c) for c in cohort}
        ups = {c: unchanged_work(case, exchange, downs[c], kept, client_env(server, c, data)) for c in cohort}
        assert bits(state) == before, f"{exchange.name}: send or work changed the state"
        sent = [bits(up) for up in ups.values()]
        new = exchange.fold(state, ups, dataclasses.replace(server, cohort=cohort))
        assert bits(state) == before, f"{exchange.name}: fold changed the old state"
        assert [bits(up) for up in ups.values()] == sent, f"{exchange.name}: fold changed an answer"
        state = new


def client_env(server: ServerEnv, client: str, data: Mapping[str, Mapping[str, toy.Points]]) -> ClientEnv:
    return ClientEnv(client, server.model, data[client], SEED, ROUNDS, server.round, server.exchange)


def unchanged_work(case: Case, exchange: Exchange, down: Record, kept: dict[str, Record], env: ClientEnv) -> Record:
    memory = kept[env.client] if env.client in kept else case.make().init_client(env)
    before = bits(down), bits(memory)
    up, kept[env.client] = answer(exchange, down, memory, env)
    assert (bits(down), bits(memory)) == before, f"{exchange.name}: work changed what it was given"
    return up


# --- what goes wrong on the way -----------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_a_lost_client_does_not_stop_the_run(case: Case, place: int, uninterrupted: Callable[..., Ran]) -> None:
    """One answer of every cohort is lost; the others count as if nothing were, and the loss still falls."""
    engine, whole = case.engine(), uninterrupted(case, LONG)
    silent = Recording(Silent(engine, place))
    done = case.run(silent, rounds=LONG)
    assert len(done) == len(whole.steps)
    call, downs, some = silent.calls[0]
    assert call.attempt == 0 and len(some.ups) == len(downs) - 1
    assert {c: bits(up) for c, up in some.ups.items()} == {c: up for c, up in whole.first if c in some.ups}
    nobody = {call.exchange.name for call, _, _ in silent.calls if call.exchange.quorum == 0}  # need answer these
    for step in done:
        assert not step.cohort or any(r.lost for r in step.receipts)
        assert not step.cohort or step.answered or step.exchange in nobody
    assert own_loss(case, engine, done[-1].state, done[-1].versions) < FALLS * whole.fresh


@every
def test_an_answer_that_was_lost_leaves_no_memory(case: Case) -> None:
    engine = case.engine()
    transport = Silent(engine, 0)
    done = case.run(transport, rounds=1)
    gone = {c for step in done for c in step.cohort} - {c for step in done for c in step.answered}
    assert not gone & done[-1].versions.keys()


# --- records and fields -------------------------------------------------------------------------------------------


@every
def test_records_are_of_the_declared_types_and_survive_the_codec(case: Case, uninterrupted: Callable[..., Ran]) -> None:
    whole = uninterrupted(case)
    for down, up, downs, ups in whole.records:
        assert downs <= {down} and ups <= {up}
    for step in whole.steps:
        assert step.kind is case.cls.state
        assert records.encode(records.decode(step.state, case.cls.state)) == step.state
    for _, memory in whole.steps[-1].memories:
        assert records.encode(records.decode(memory, case.cls.memory)) == memory


@every
def test_hyper_parameters_survive_json(case: Case) -> None:
    method = case.make()
    values = json.loads(json.dumps(plain(method)))
    assert rebuild(case.cls, values) == method
    assert methods.build(case.name, values) == method


@each
def test_every_field_has_a_default_and_a_meaning(name: str) -> None:
    for field in methods.describe(methods.load(name)):
        assert field.default is not dataclasses.MISSING, field.name
        assert len(field.meaning) > 8, field.name


# --- what it is for, and what it says about itself ----------------------------------------------------------------


@every
def test_the_loss_falls(case: Case, uninterrupted: Callable[..., Ran]) -> None:
    whole = uninterrupted(case, LONG)
    assert whole.loss < FALLS * whole.fresh


@every
def test_bytes_are_what_the_docstring_says(case: Case) -> None:
    """`Traffic per client and round: down = 2 params; up = params`, to within the headers of the records."""
    width = 3000
    engine = Recording(InProcess(case.make, toy.ToyModel(**case.model | {"width": width}), case.data(width), SEED))
    says = traffic_of(case.name)
    step = None
    measured: dict[tuple[int, str], list[tuple[int, int]]] = {}
    travelled: dict[tuple[int, str], tuple[list[Record], list[Record]]] = {}
    for step in federate(case.make(), engine, toy.ToyModel(**case.model | {"width": width}), rounds=2, seed=SEED):
        for receipt in step.receipts if step.round else ():
            place, (_, downs, answers) = (step.round, receipt.client), engine.calls[-1]
            measured.setdefault(place, []).append((receipt.bytes_down, receipt.bytes_up))
            down, up = travelled.setdefault(place, ([], []))
            down.append(downs[receipt.client])
            up.append(answers.ups[receipt.client])
    assert measured and step is not None
    for place, exchanges in measured.items():
        totals = map(sum, zip(*exchanges, strict=True))
        for way, total, sent in zip(says, totals, travelled[place], strict=True):
            count = copies(says[way], case, step.state, width, place[0], sent, travelled[place][0])
            assert 0 < total - 4 * count <= HEADER_BYTES * len(exchanges), way


def traffic_of(name: str) -> dict[str, str]:
    """The machine-readable line of a method's docstring: how many times the params travel, down and up."""
    doc = sys.modules[methods.load(name).__module__].__doc__ or ""
    found = re.search(r"^Traffic per client and round: down = (.+); up = (.+)$", doc, re.MULTILINE)
    assert found, "the docstring needs a line 'Traffic per client and round: down = ...; up = ...'"
    return dict(zip(("down", "up"), found.groups(), strict=True))


PLANNED = ("the weights of its plan", "the weights ever trained")
WHAT = "|".join(["params", "A", "B", "head", "values", *PLANNED])
FIELD = re.compile(r".+ \(`(\w+)`\)")
PART = re.compile(rf"(?:([\d.]+) )?({WHAT})( of the shared layers)?")


def copies(text: str, case: Case, state: Any, width: int, round: int, sent: list[Record], asked: list[Record]) -> float:
    """How many numbers a phrase of the traffic line stands for.

    Parts joined by "and": all parameters, the factors A or B, the head, those of the blocks in `state.layers`; or any
    words and a field of the records (`FIELD`), counted as it went. "... in odd rounds, ... in even ones" where the
    rounds differ.

    Args:
        sent: the records that went that way.
        asked: those that went down.
    """
    if text == "nothing":
        return 0.0
    turns = re.fullmatch(r"(.+) in odd rounds, (.+) in even ones", text)
    if turns:
        text = turns[1 if round % 2 else 2]
    stages = re.fullmatch(r"(.+) at first, (.+) later", text)
    if stages:
        text = stages[1 if round == 1 else 2]
    every = toy.ToyModel(**case.model | {"width": width}).init(np.random.default_rng(0))
    total = 0.0
    for part in text.split(" and "):
        field = FIELD.fullmatch(part)
        if field:
            assert any(hasattr(record, field[1]) for record in sent), f"no record has a field {field[1]!r}"
            total += sum(numbers(getattr(record, field[1], None)) for record in sent)
            continue
        found = PART.fullmatch(part)
        assert found, f"traffic {part!r} must be 'nothing' or fit to {PART.pattern!r}"
        if found[2] == "values":  # the share of the weights that a density leaves
            sizes = [t.shape[1] for name, t in every.items() if name.endswith(".A")]
            total += sum(math.ceil(case.make().density * size) for size in sizes)  # type: ignore[attr-defined]
            continue
        if found[2] == "the weights of its plan":
            total += sum(rank * (d_out + d_in) for own in asked for rank, d_out, d_in in _plan_of(own))
            continue
        if found[2] == "the weights ever trained":  # by anybody, or what was folded away of them
            own = [t for name, t in every.items() if name.rpartition(".")[0] in state.union]
            total += sum(t.numel() for t in own) + sum(numbers(getattr(record, "stack", None)) for record in sent)
            continue
        kept = [t for name, t in every.items() if found[2] == "params" or name.endswith(f".{found[2]}")]
        if found[2] == "head":
            kept = [every[toy.HEAD]]
        if found[3]:
            kept = [t for name, t in every.items() if block_of(name) in (None, *state.layers)]
        total += float(found[1] or 1) * sum(t.numel() for t in kept)
    return total


def _plan_of(record: Record) -> list[tuple[int, int, int]]:
    return list(getattr(record, "train", {}).values())


def numbers(part: Any) -> int:
    """How many numbers the tensors of a record, or of a part of one, have."""
    if isinstance(part, torch.Tensor):
        return part.numel()
    if dataclasses.is_dataclass(part):
        return sum(numbers(getattr(part, field.name)) for field in dataclasses.fields(part))
    inner = part.values() if isinstance(part, Mapping) else part if isinstance(part, tuple) else ()
    return sum(map(numbers, inner))


@each
def test_the_docstring_names_its_source_and_maps_it_to_code(name: str) -> None:
    module = sys.modules[methods.load(name).__module__]
    doc = module.__doc__ or ""
    assert re.search(r"arXiv \d{4}\.\d{4,5}|DOI 10\.\d{4,}/\w", doc), "no citation"
    table = doc.partition("\nPaper to code\n\n")[2].partition("\n\n")[0].splitlines()
    assert table[:2] == ["| paper | here |", "|---|---|"] and len(table) > 3
    assert all(row.count("|") == 3 for row in table), "a cell of the table contains a bar"
    assert re.search(r"^Departures: ", doc, re.MULTILINE)
    assert module.METHOD is methods.load(name)
    code = {*dir(module.METHOD), *(f.name for f in methods.describe(module.METHOD))}
    named = set(re.findall(r"`([a-z_0-9]+)`", "\n".join(table)))
    assert named <= code, f"the table names {sorted(named - code)}, which the class does not have"
