"""Curricula around any method, and the three rivals that are one of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import toy
from fedpeft import methods
from fedpeft.config.load import load_config
from fedpeft.core import changes, records, tree
from fedpeft.core.adapter import Lora, Prefix
from fedpeft.core.changes import News
from fedpeft.core.difficulty import difficulties
from fedpeft.core.errors import ConfigError
from fedpeft.core.examples import Examples
from fedpeft.core.exchange import Call, ClientEnv, ServerEnv, Update, Weights
from fedpeft.core.federate import Done, Start, federate
from fedpeft.core.fit import Fit, Soften
from fedpeft.core.memories import InMemory
from fedpeft.core.method import plain, rebuild
from fedpeft.core.model import FisherProbe
from fedpeft.core.tree import Params
from fedpeft.engines.inprocess import InProcess
from fedpeft.maths import curriculum
from fedpeft.methods._schedule import with_schedule
from fedpeft.methods.fedavg import FedAvg
from turns import served

SAME: dict[str, Any] = {"cohort": 3, "epochs": 2, "batch_size": 4, "lr": 5e-3}
KINDS = ("fisher", "loss", "random", "rarity", "length", "two_stage")


class Watched(InProcess):
    """Keeps every Fit that a client asked for, by round."""

    def exchange(self, call: Call, downs: Any) -> Any:
        seen, real = self.__dict__.setdefault("fits", []), self.model.fit_many
        kept = self.model

        class Model:
            def __getattr__(self, name: str) -> Any:
                return getattr(kept, name)

            def fit_many(self, fits: Any) -> Any:
                seen.extend((call.round, fit) for fit in fits)
                return real(fits)

        watched = replace(self, model=Model())
        return InProcess.exchange(watched, call, downs)


def run(method: Any, rounds: int = 4, rows: int = 20, start: Start | None = None) -> tuple[list[Done], Any]:
    model = tiny.model("bert", dtype="float32")
    data = {f"c{i}": {"train": tiny.examples(tiny.place(i), rows + i)} for i in range(3)}
    engine = Watched(lambda: method, model, data, 0)
    return list(federate(method, engine, model, rounds=rounds, seed=0, start=start)), engine


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fedavg", "fedsa_lora"])
def test_any_method_takes_a_schedule(name: str, kind: str) -> None:
    """It learns, survives JSON, and resumes to the same bits."""
    method: Any = methods.build(name, {**SAME, "schedule": kind})
    values = json.loads(json.dumps(plain(method)))
    assert rebuild(type(method), values) == methods.build(name, values) == method
    whole, engine = run(method)
    assert own_loss(method, engine, whole[-1], whole[-1].versions) < own_loss(method, engine, whole[0], {})
    model, again = engine.model, replace(engine, memories=InMemory())
    loop = federate(method, again, model, rounds=4, seed=0)
    start = [next(loop) for _ in range(2)][-1].start
    loop.close()
    saved = Start(2, records.decode(records.encode(start.state), type(method).state), start.versions)
    rest = list(federate(method, again, model, rounds=4, seed=0, start=saved))
    assert records.encode(rest[-1].state) == records.encode(whole[-1].state)
    assert method.personalised is (name == "fedsa_lora")


def own_loss(method: Any, engine: Any, step: Done, versions: Mapping[str, int]) -> float:
    """Mean loss of every client's own model, or of the global one where it has no memory, on its own rows."""
    total = count = 0.0
    for client in engine.clients():
        params = method.result(step.state)
        if client in versions:
            params = method.personal(params, engine.memories.load(client, versions[client], method.memory))
        sums = engine.model.score(params, engine.data[client]["train"])
        total, count = total + float(sums["loss"]), count + int(sums["n"])
    return total / count


def test_without_a_schedule_nothing_changes() -> None:
    assert type(methods.build("fedavg", {**SAME, "schedule": None})) is methods.load("fedavg")
    whole, _ = run(methods.build("fedavg", SAME))
    paced, _ = run(methods.build("fedavg", {**SAME, "schedule": "random", "schedule_beta": 1.0}))
    assert tree.sha256(whole[-1].state.params) == tree.sha256(paced[-1].state.params), (
        "all rows from the first round on"
    )


def test_easy_rows_come_first() -> None:
    """At a rate of .6, .6 + .4 t / (.8 T) of the rows are in use; the easiest by what the first visit's model says."""
    method = methods.build("fedavg", {**SAME, "schedule": "fisher"})
    _, engine = run(method, rounds=5)
    counts = {}
    for round, fit in engine.fits:
        used = {row for batch in fit.batches for row in batch}
        counts.setdefault(round, set()).add(len(used) / len(fit.data))
        if round == 1:
            easiest = curriculum.easy_first(
                engine.model.fisher(fit.params, fit.data, range(len(fit.data))).trace.tolist()
            )
            assert used == set(easiest[: len(used)])
    for round, shares in counts.items():
        wanted = min(1.0, 0.6 + 0.4 * (round - 1) / 4)
        assert all(wanted <= share < wanted + 1 / 20 + 1e-9 for share in shares)


def test_rows_are_cut_less_and_less() -> None:
    for kind, expected in (("length", [8, 10, 12, 12]), ("two_stage", [8, 8, 12, 12])):
        _, engine = run(methods.build("fedavg", {**SAME, "schedule": kind}), rounds=4)
        longest = {}
        for round, fit in engine.fits:
            whole = engine.data["c0"]["train"].lengths.max()
            longest[round] = max(longest.get(round, 0), int(fit.data.lengths.max()))
            assert whole <= 12
        assert [longest[r] for r in (1, 2, 3, 4)] == expected


@pytest.mark.parametrize(("name", "kind"), [("voc", "rarity"), ("slw", "length"), ("shortformer", "two_stage")])
def test_the_rivals_are_schedules_on_lora(name: str, kind: str) -> None:
    """The same Fits as FedAvg's under the schedule of that name."""
    alone, first = run(methods.build(name, SAME))
    paced, second = run(methods.build("fedavg", {**SAME, "schedule": kind}))
    assert tree.sha256(alone[-1].state.params) == tree.sha256(paced[-1].state.params)
    assert len(first.fits) == len(second.fits) > 0
    plainly, _ = run(methods.build("fedavg", SAME))
    assert tree.sha256(alone[-1].state.params) != tree.sha256(plainly[-1].state.params)
    assert "not prefix" in str(methods.load(name)().accepts(Prefix()))


def test_problems_are_named() -> None:
    with pytest.raises(ConfigError, match=r"method.schedule_beta is 0\.0; it must be above 0"):
        methods.build("fedavg", {"schedule": "loss", "schedule_beta": 0.0})
    with pytest.raises(ConfigError, match=r"method.schedule is 'fishy'; it must be fisher \| loss"):
        methods.build("fedavg", {"schedule": "fishy"})
    with pytest.raises(ConfigError, match="schedule_betta is not a field of fedavg; did you mean 'schedule_beta'"):
        methods.build("fedavg", {"schedule": "loss", "schedule_betta": 0.5})
    method = methods.build("ptuning_v2", {"schedule": "fisher"})
    assert "use adapter.kind lora, or method.schedule loss" in str(method.accepts(Prefix()))
    assert methods.build("fedavg", {"schedule": "fisher"}).accepts(Lora()) is None
    config = load_config({"method": {"name": "scaffold", "schedule": "loss", "lr": 0.1}})
    assert config.method.fields["schedule"] == "loss" and config.method.fields["schedule_beta"] == 0.6


def test_a_client_that_fails_in_its_work_is_told_so() -> None:
    """What goes wrong in a Fit is thrown into the method's own work."""
    method: Any = methods.build("fedavg", {**SAME, "schedule": "random"})
    here = ClientEnv("a", toy.ToyModel(), {"train": toy.points((1, 2, 3), (2, 3, 4))}, 0, 3, 1, "train")
    exchange = method.round()[0]
    work = exchange.work(exchange.down(here.initial()), method.init_client(here), here)
    assert len(next(work).batches) >= 1
    with pytest.raises(ValueError, match="out of memory"):
        work.throw(ValueError("out of memory"))


# --- a schedule leaves a method its own way of training ---------------------------------------------------------------


def work(method: Any, exchange: int, down: Any, here: ClientEnv, memory: Any = None) -> tuple[list[Fit], Any]:
    """The Fits that a client's work asks for, and the memory that it leaves."""
    steps = method.round()[exchange].work(down, memory or method.init_client(here), here)
    fits, (_, left) = served(steps, here.model)
    return fits, left


def measured(kind: Any, params: Params, here: ClientEnv, also: tuple[Params, ...] = ()) -> list[float]:
    """How difficult the client's rows are."""
    found: list[float] = served(difficulties(kind, params, here, also=also), here.model)[1]
    return found


def place(rows: int = 20, round: int = 1, rounds: int = 10, **model: Any) -> ClientEnv:
    """A client of the toy with factors."""
    draw = np.random.default_rng(3).standard_normal((rows, 3))
    toys = toy.ToyModel(**{"rank": 2, "blocks": 2, "dtype": "float32"} | model)
    return ClientEnv("a", toys, {"train": toy.points(*draw)}, 0, rounds, round, "train")


def sent(method: Any, here: ClientEnv) -> Any:
    """What the server sends at first."""
    return method.send(method.init(ServerEnv(here.model, ("a",), 0, here.rounds)), "a")


def rows_of(fits: list[Fit]) -> list[list[int]]:
    return [list(batch) for fit in fits for batch in fit.batches]


def test_the_parts_of_a_turn_stay_parts() -> None:
    """Delta-LoRA: two steps before W moves, then the others. FedAlt: batches of their own for either half."""
    here = place()
    method = methods.build("deltalora", {**SAME, "epochs": 1, "start_steps": 2, "schedule": "fisher"})
    fits, memory = work(method, 0, sent(method, here), here)
    assert [fit.steps for fit in fits] == [2, 1], "the easiest 12 of 20 rows, 4 a step"
    assert sorted(row for batch in rows_of(fits) for row in batch) == sorted(memory.rows.tolist()[:12])
    method = methods.build("fedalt", {**SAME, "schedule": "random"})
    fits, memory = work(method, 0, sent(method, here), here)
    assert len(fits) == 2 and rows_of(fits[:1]) != rows_of(fits[1:])
    for fit in fits:
        assert {row for batch in fit.batches for row in batch} == set(memory.rows.tolist()[:12])


def test_methods_that_choose_their_rows_themselves_refuse() -> None:
    for name, kind, words in [
        ("fibecfed", "loss", "method fibecfed has a curriculum of its own"),
        ("centralized", "length", "method centralized goes through everybody's rows"),
        ("voc", "random", "method voc is a schedule itself"),
        ("slw", "random", "method slw is a schedule itself"),
        ("shortformer", "random", "method shortformer is a schedule itself"),
        ("slora", "fisher", "method.schedule fisher is of LoRA's factors, and stage 1 of method slora has none"),
    ]:
        with pytest.raises(ConfigError, match=rf"  - {words}.*; leave method.schedule out$") as refused:
            methods.build(name, {"schedule": kind, "schedule_beta": 3.0})
        assert len(refused.value.problems) == 1, "a bound of what must be left out helps nobody"
    assert methods.build("slora", {"schedule": "loss"}).accepts(Lora()) is None
    told = str(methods.build("ffa_lora", {"schedule": "loss"}).accepts(Prefix()))
    assert told.startswith("method ffa_lora trains adapter.kind lora, not prefix")


@pytest.mark.parametrize("kind", ["fisher", "loss"])
@pytest.mark.parametrize("name", ["flora", "fedex_lora", "deltalora"])
def test_rows_are_ranked_by_the_model_that_trains_on_them(name: str, kind: str) -> None:
    """A newcomer's base delta is in it: that of Delta-LoRA beside its factors' own origin."""
    here = place(round=2)
    method = methods.build(name, {**SAME, "schedule": kind})
    delta = {
        f"delta.{stem}{side}": torch.from_numpy(np.random.default_rng(len(stem)).standard_normal(shape)).float() * 4
        for stem, width in (("block.0.w", 1), ("block.1.w", 1))
        for side, shape in ((changes.LEFT, (1, 1)), (changes.RIGHT, (1, width)))
    }
    down = replace(sent(method, here), news=News(1, whole=delta))
    fits, memory = work(method, 0, down, here)
    fit = fits[0]
    assert fit.also and fit.also[0].keys() == delta.keys()
    known = {also: measured(kind, fit.params, here, fit.also if also else ()) for also in (True, False)}
    assert memory.rows.tolist() == curriculum.easy_first(known[True]) != curriculum.easy_first(known[False])


def test_a_cohort_ranks_its_rows_together() -> None:
    """Those who have no order yet, in one call: all three of the first round, nobody later; and to the same orders."""
    method = methods.build("fedavg", {**SAME, "cohort": 0, "schedule": "fisher"})
    data = {f"c{i}": {"train": place(9 + i).data} for i in range(3)}
    found = []
    for batch in (1, 10):
        engine = InProcess(lambda: method, place().model, data, 0, batch=batch)
        last = list(federate(method, engine, engine.model, rounds=3, seed=0))[-1]
        orders = [engine.memories.load(c, last.versions[c], method.memory).rows.tolist() for c in data]  # type: ignore[attr-defined]
        found.append((records.encode(last.state), orders, engine.model.probes, engine.model.calls))  # type: ignore[attr-defined]
    assert found[0][:2] == found[1][:2]
    assert [own[2] for own in found] == [[1, 1, 1], [3]] and found[1][3] == [3, 3, 3]


def test_work_that_looks_at_its_rows_itself_is_ranked_too() -> None:
    """Its own question is answered before its first Fit shows what it trains."""

    class Looks(FedAvg):
        __module__ = FedAvg.__module__

        def train(self, down: Any, memory: Any, env: ClientEnv) -> Any:
            yield FisherProbe(down.params, env.data, [0])
            return (yield from super().train(down, memory, env))

        def round(self) -> Any:
            return tuple(replace(e, work=self.train) for e in super().round())

    here = place()
    method = with_schedule(Looks)(**SAME, schedule="fisher")
    fits, memory = work(method, 0, sent(method, here), here)
    assert memory.rows.tolist() == curriculum.easy_first(measured("fisher", here.initial(), here))
    assert {row for batch in rows_of(fits) for row in batch} == set(memory.rows.tolist()[:12])
    assert here.model.probes == [1, 1, 1, 1], "twice its own, the order, and this test's"  # type: ignore[attr-defined]

    class Leaves(Looks):
        __module__ = FedAvg.__module__

        def train(self, down: Any, memory: Any, env: ClientEnv) -> Any:
            yield FisherProbe(down.params, env.data, [0])
            return Update(down.params, 1, 0.0), memory

    idle = with_schedule(Leaves)(**SAME, schedule="fisher")
    assert work(idle, 0, sent(idle, here), here)[0] == []


def test_rows_are_ranked_once() -> None:
    here = place()
    method = methods.build("fedavg", {**SAME, "schedule": "loss"})
    _, first = work(method, 0, sent(method, here), here)
    other = Weights({name: t + 5 for name, t in sent(method, here).params.items()})
    fits, second = work(method, 0, other, replace(here, round=2), first)
    assert second.rows.tolist() == first.rows.tolist()
    assert measured("loss", other.params, here) != measured("loss", sent(method, here).params, here)
    assert {row for batch in rows_of(fits) for row in batch} <= set(first.rows.tolist()[:13])


def test_pacing_is_as_the_fields_say() -> None:
    """Quadratic, T 10, over after half of it: .5 + .5 (t / 5)² of 20 rows."""
    method = methods.build(
        "fedavg",
        {**SAME, "schedule": "random", "schedule_beta": 0.5, "schedule_alpha": 0.5, "schedule_pacing": "quad"},
    )
    memory, used = None, []
    for round in range(1, 11):
        here = place(round=round)
        fits, memory = work(method, 0, sent(method, here), here, memory)
        used.append(len({row for batch in rows_of(fits) for row in batch}))
    assert used == [10, 11, 12, 14, 17, 20, 20, 20, 20, 20]


def test_all_rows_need_no_order() -> None:
    """With a share of 1 from the beginning nothing is measured."""
    here = place()
    here.model.losses = None  # type: ignore[method-assign, assignment]
    method = methods.build("fedavg", {**SAME, "schedule": "loss", "schedule_beta": 1.0})
    fits, memory = work(method, 0, sent(method, here), here)
    assert memory.rows.tolist() == list(range(20))
    alone, _ = work(methods.build("fedavg", SAME), 0, sent(method, here), here)
    assert rows_of(fits) == rows_of(alone)


def test_a_client_without_rows_trains_on_none() -> None:
    for kind in KINDS:
        here = replace(place(), splits={"train": toy.Points(np.zeros((0, 3)))})
        method = methods.build("fedavg", {**SAME, "schedule": kind})
        fits, memory = work(method, 0, sent(method, here), here)
        assert [fit.steps for fit in fits] == [0] and not len(memory.rows)


@pytest.mark.parametrize("name", ["voc", "fedavg"])
def test_rows_of_common_words_come_first(name: str) -> None:
    """Competence .01 at first, so one batch; after half of the rounds sqrt(.5 (1 - 1e-4) + 1e-4) = .7071: 14 of 20."""
    method = methods.build(name, SAME | ({"schedule": "rarity"} if name == "fedavg" else {}))
    for round, count in ((1, 4), (6, 14), (11, 20)):
        here = place(round=round)
        fits, _ = work(method, 0, sent(method, here), here)
        common = np.argsort(here.data.rarities, kind="stable")[:count]
        assert {row for batch in rows_of(fits) for row in batch} == set(common.tolist())


def test_self_evolution_softens_the_targets() -> None:
    here = place()
    method = methods.build("se", {**SAME, "threshold": 0.7, "share": 0.2})
    fits, _ = work(method, 0, sent(method, here), here)
    assert [fit.soften for fit in fits] == [Soften(0.7, 0.2)]


# --- rows -------------------------------------------------------------------------------------------------------------


def texts(*rows: list[int], marks: list[int] | None = None) -> Examples:
    return Examples(
        tuple(np.array(row, np.int32) for row in rows),
        np.zeros(len(rows), np.int64),
        tuple(np.arange(len(row), dtype=np.int32) for row in rows),
        None if marks is None else np.array(marks, np.int64),
    )


def test_rarity_is_that_of_the_words_of_all_rows() -> None:
    data = texts([1, 2], [1, 1], [3])
    expected = [-math.log(3 / 5) - math.log(1 / 5), -2 * math.log(3 / 5), -math.log(1 / 5)]
    assert data.rarities.tolist() == pytest.approx(expected)


def test_rows_are_cut_between_their_first_tokens_and_the_last() -> None:
    data = texts([0, 1, 2, 3, 4, 5], [7, 8])
    cut = data.truncated(4)
    assert [t.tolist() for t in cut.tokens] == [[0, 1, 2, 5], [7, 8]]
    assert cut.segments is not None and cut.segments[0].tolist() == [0, 1, 2, 5] and cut.labels is data.labels
    assert [t.tolist() for t in data.truncated(6).tokens] == [t.tolist() for t in data.tokens]


def test_a_mask_is_never_cut() -> None:
    """Nor what stands behind it: the text before it is cut. A mask at the beginning costs nothing."""
    data = texts([0, 1, 2, 3, 4, 99, 6], [0, 99, 2, 3, 4, 5, 6], marks=[5, 1])
    cut = data.truncated(4)
    assert [t.tolist() for t in cut.tokens] == [[0, 1, 99, 6], [0, 99, 2, 6]]
    assert cut.marks is not None and cut.marks.tolist() == [2, 1]
    assert [t.tolist() for t in data.truncated(1).tokens] == [[0, 99, 6], [0, 99, 2, 3, 4, 5, 6]]
