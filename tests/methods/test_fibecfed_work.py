"""FibecFed: what its work asks of the model, and what it starts from, on a model that keeps what it was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import toy
from fedpeft.core import tree
from fedpeft.core.exchange import ClientEnv, ServerEnv, Update
from fedpeft.core.federate import federate
from fedpeft.core.fit import Fit
from fedpeft.core.tree import block_of
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.fibecfed import FibecFed, Memory, Probe, Task
from turns import served


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


class Asked(toy.ToyModel):
    """A toy with factors that keeps what its probes were asked, and gives known sensitivities."""

    def __init__(self) -> None:
        super().__init__(blocks=3, rank=2, width=7)
        self.asked: list[dict[str, Any]] = []

    def fisher(self, params: Any, data: Any, rows: Any, token_norm: Any = "sqrt", also: Any = ()) -> Any:
        self.asked.append({"params": params, "rows": list(rows), "token_norm": token_norm})
        return super().fisher(params, data, rows, token_norm, also)

    def sensitivity(self, params: Any, data: Any, rows: Any, perturbation: Any, size: float, rng: Any) -> Any:
        self.asked.append({"params": params, "rows": list(rows), "kind": perturbation, "size": size})
        known = torch.tensor([[1.0, 2.0], [4.0, 2.0], [1.0, 3.0], [9.0, 9.0]]), torch.full((4, 2), 2.0)
        return known[0], known[1] * torch.tensor([[1.0], [2.0], [1.0], [3.0]])


def asked(round: int = 1, rows: int = 20) -> ClientEnv:
    draw = np.random.default_rng(5).normal(size=(rows, 7))
    return ClientEnv("a", Asked(), {"train": toy.points(*draw)}, 0, 10, round, "layers" if not round else "train")


def ended(work: Any, model: Any) -> tuple[list[Fit], Any, Any]:
    """The Fits of a work, its answer and the memory that it leaves."""
    fits, (up, memory) = served(work, model)
    return fits, up, memory


@pytest.mark.parametrize(
    ("form", "wanted"), [("output", [0.75, 1.0, 1.5]), ("amplification", [2.5, (1 / 4 + 3 / 2) / 2, 6.0])]
)
def test_a_layers_score_is_its_mean_relative_change(form: Any, wanted: list[float]) -> None:
    """Changes (4 2), (1 3), (9 9) of outputs of size 4, 2, 6; or over those of what comes in: (1 2), (4 2), (1 3)."""
    here = asked(0)
    method = FibecFed(layer_score=form, perturbation="inf", gamma_eps=0.25, score_samples=7)
    params = {name: t + 1 for name, t in here.initial().items()}
    _, up, memory = ended(method.score(Probe(params, 3), Memory(), here), here.model)
    assert up.layers.tolist() == pytest.approx(wanted) and up.examples == 20 and up.ratio is None
    (probe,) = here.model.asked  # type: ignore[attr-defined]
    assert probe["params"] is params and (probe["kind"], probe["size"]) == ("inf", 0.25)
    assert len(set(probe["rows"])) == 7 and not len(memory.rows)
    ended(method.score(Probe(None, 3), Memory(), here), here.model)
    same(here.model.asked[-1]["params"], here.initial())  # type: ignore[attr-defined]


@pytest.mark.parametrize("initialise", ["all", "cohort", "lazy"])
def test_examples_are_ordered_before_the_first_round_or_at_the_first_visit(initialise: Any) -> None:
    here = asked(0)
    method = FibecFed(initialise=initialise, token_norm="mean", batch_size=4)
    start = {name: t + 1 for name, t in here.initial().items()}
    _, _, memory = ended(method.score(Probe(start, 3), Memory(), here), here.model)
    ranked = [own for own in here.model.asked if "token_norm" in own]  # type: ignore[attr-defined]
    assert bool(len(memory.rows)) is bool(ranked) is (initialise == "all")
    if ranked:
        assert ranked[0]["params"] is start and ranked[0]["token_norm"] == "mean"
        assert ranked[0]["rows"] == list(range(20))


def test_rows_are_scored_on_some_of_the_examples_in_use() -> None:
    """Three of five batches: 12 easiest rows, of which 5 give the rows' information, with the given token norm."""
    here = asked()
    method = FibecFed(batch_size=4, fisher_samples=5, token_norm="sum", rho_rule="energy", eta=0.3, warmup_rounds=0)
    state = method.divided(replace(method.init(server(here)), scores=torch.tensor([3.0, 2.0, 1.0])), server(here))
    assert state.layers == (0, 1)
    (fit,), _, memory = ended(method.train(method.send(state, "a"), Memory(), here), here.model)
    order, rows = here.model.asked  # type: ignore[attr-defined]
    assert order["token_norm"] == rows["token_norm"] == "sum" and len(order["rows"]) == 20
    easy = set(memory.rows.tolist()[:12])
    assert len(set(rows["rows"])) == 5 and set(rows["rows"]) <= easy
    assert {row for batch in fit.batches for row in batch} == easy
    assert memory.fisher.keys() == {"block.2.w.A", "block.2.w.B"}
    wide = torch.arange(20.0) + 1
    mask = method.mask({"x.B": torch.zeros(20, 2)}, {"x.B": wide})["x.B"][:, 0]
    assert mask.tolist() == [float(row > 15) for row in range(20)], "20 + 19 + 18 = 57 of 210 are less than .3, 74 not"


def server(here: ClientEnv, **more: Any) -> ServerEnv:
    return ServerEnv(here.model, ("a", "b"), 0, 10, **more)


def test_everybody_starts_from_the_mean_of_the_warm_up() -> None:
    """n (1, 3), every number 2 and 6 -> 5, shared and not; the layers are scored there."""
    here, method = asked(0), FibecFed()
    state = method.init(server(here))
    answers = {
        client: Update({name: torch.full_like(t, value) for name, t in state.start.items()}, n, value)
        for client, value, n in (("a", 2.0, 1), ("b", 6.0, 3))
    }
    state = method.warmed(state, answers, server(here, exchange="warmup 1"))
    assert state.loss == 5 and not state.layers
    for params in (state.start, state.shared, method.ask(state, "a").params or {}):
        assert params.keys() == here.initial().keys() and all(bool((t == 5).all()) for t in params.values())
    moved = replace(state, layers=(0,), shared={name: t + 1 for name, t in state.shared.items() if "0" in name})
    same(method.ask(moved, "a").params or {}, tree.overlay(moved.start, moved.shared))


def test_what_was_sent_of_a_layer_comes_before_what_a_client_remembers() -> None:
    """A layer that was shared since a client's last visit: it goes on from where that ended, not from its own."""
    here, method = asked(), FibecFed(rho=1.0, beta=1.0)
    params = here.initial()
    mine = {name: torch.full_like(t, 3.0) for name, t in params.items() if block_of(name) in (1, 2)}
    rest = {name: torch.full_like(t, 4.0) for name, t in params.items() if block_of(name) == 2}
    shared = {name: torch.full_like(t, 5.0) for name, t in params.items() if block_of(name) in (0, None)}
    (fit,), up, memory = ended(method.train(Task(shared, rest, (0,)), Memory(mine), here), here.model)
    same(fit.params, {**params, **mine, **rest, **shared})
    assert up.params.keys() == shared.keys() and memory.local.keys() == mine.keys()
    (fit,), *_ = ended(method.train(Task(shared, None, (0,)), Memory(mine), here), here.model)
    same(fit.params, {**params, **mine, **shared})


def test_a_local_head_starts_where_the_warm_up_ended() -> None:
    """It is sent once: with a client's first task."""
    here = asked(0)
    for method, names in ((FibecFed(head="local"), {toy.HEAD}), (FibecFed(head="shared"), set())):
        state = method.warmed(method.init(server(here)), {"a": Update(here.initial(), 1, 0.0)}, server(here))
        state = method.divided(state, server(here))
        rest = method.send(state, "a").rest or {}
        assert {name for name in rest if block_of(name) is None} == names
        after = method.average(state, {"a": Update(state.shared, 1, 0.0)}, server(here))
        assert method.send(after, "a").rest is None


def test_without_a_curriculum_nothing_is_ranked() -> None:
    here = asked()
    _, memory = served(FibecFed(beta=1.0, batch_size=4).ordered(here.initial(), Memory(), here), here.model)
    assert not here.model.asked and memory.rows.tolist() == list(range(20))  # type: ignore[attr-defined]
    assert len(FibecFed(beta=1.0, batch_size=4, epochs=1).in_use(memory, here)) == 5
    whole = FibecFed(beta=1.0, batch_size=4, batching="sorted_batches")
    served(whole.ordered(here.initial(), Memory(), here), here.model)
    assert here.model.asked, "whole batches are of the order"  # type: ignore[attr-defined]


def test_a_late_client_ranks_with_its_cohort() -> None:
    """Whoever is new ranks while the others look at rows in use, and looks at its own in a second call."""
    method = FibecFed(cohort=2, batch_size=4, warmup_rounds=0, layers_by="first", epochs=1)
    data = {f"c{i}": {"train": asked(rows=9 + i).data} for i in range(3)}
    model = asked().model
    engine = InProcess(lambda: method, model, data, 0, batch=10)  # type: ignore[arg-type]
    seen: set[str] = set()
    for done in federate(method, engine, model, rounds=4, seed=0):
        new = [client for client in done.answered if client not in seen]
        assert model.probes == [2, *([len(new)] if new else [])] and model.calls == [2]  # type: ignore[attr-defined]
        seen |= {*done.answered}
        model.probes.clear(), model.calls.clear()  # type: ignore[attr-defined]
    assert seen == data.keys(), "one of them came late"
