"""SLoRA: first a sparse part of the weights is trained together, then LoRA that starts from its best approximation.

Babakniya, Elkordy, Ezzeldin, Liu, Song, El-Khamy, Avestimehr: SLoRA: Federated Parameter Efficient Fine-Tuning of
Language Models, 2023, arXiv 2308.06522.

Paper to code

| paper | here |
|---|---|
| stage 1: sparse fine-tuning under one common random mask | `train`; `density`, `stage_rounds`, `stage_lr` |
| what travels is what the mask leaves | `send`: the numbers under the mask, nothing else |
| SVD of the change gives the start of LoRA's factors | `decompose`; `maths.lowrank.halves` |
| stage 2: federated LoRA | `train`, `average` |

Departures: the mask is drawn from the run's seed in every projection that has an adapter, so nobody sends it. The
change of stage 1 is a base delta that acts beside the base; in stage 2 the factors take its place. Stage 1 ends after
`stage_rounds`, or at half of the rounds where there are fewer than twice as many. The means are weighted by examples.
The defaults of `density`, `stage_rounds` and `stage_lr` are ours.

Traffic per client and round: down = values and head at first, params later; up = values and head at first, params later
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedpeft.core import pairs, tree
from fedpeft.core.averaging import Tuning
from fedpeft.core.changes import dense_name
from fedpeft.core.cohort import sample
from fedpeft.core.counts import round_up
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Update
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import check_ranges, mean_loss, ordinary_fit
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params
from fedpeft.maths import lowrank


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # A, B and the head
    values: Params  # of the change under the mask, (numbers,) by slot; empty in stage 2
    widths: Mapping[str, tuple[int, int]]  # (d_out, d_in) of every slot
    seed: int = 0  # of the mask
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Broadcast:
    """What the server sends: the values and the head in stage 1, the factors and the head in stage 2."""

    params: Params
    sparse: bool  # whether this is stage 1


@dataclass(frozen=True)
class SLora(Tuning):
    """SLoRA (Babakniya et al. 2023): sparse training first, whose SVD starts LoRA."""

    stage_rounds: int = 10  # rounds of stage 1, at most half of all
    density: float = 0.01  # share of the weights that stage 1 trains
    stage_lr: float = 1e-3  # local learning rate of stage 1

    plans_by_rounds: ClassVar[bool] = True
    state: ClassVar[type[State]] = State

    def __post_init__(self) -> None:
        check_ranges(self, at_least={"stage_rounds": 1}, above={"density": 0, "stage_lr": 0}, at_most={"density": 1})

    def accepts_schedule(self, kind: str) -> str | None:
        """All but that by the Fisher information of LoRA's factors, of which stage 1 has none."""
        told = "method.schedule fisher is of LoRA's factors, and stage 1 of method slora has none"
        return told if kind == "fisher" else None

    def init(self, env: ServerEnv) -> State:
        """The fresh adapter; no change of the weights. An adapter that has learnt something needs no stage 1."""
        params = env.initial()
        widths = pairs.widths(params)
        values = {} if pairs.learnt(params) or not self.last_sparse(env.rounds) else self.empty(widths)
        return State(params, values, widths, env.seed)

    def empty(self, widths: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Zeros for the numbers under the mask."""
        return {f"values.{stem}": torch.zeros(numbers(shape, self.density)) for stem, shape in widths.items()}

    def last_sparse(self, rounds: int) -> int:
        """The last round of stage 1."""
        return min(self.stage_rounds, rounds // 2)

    def round(self) -> tuple[Exchange, ...]:
        """One round of whichever stage it is."""
        return (Exchange("train", Broadcast, Update, sample(self.cohort), self.send, self.train, self.average),)

    def send(self, state: State, client: ClientId) -> Broadcast:
        """The values under the mask and the head, or the factors and the head."""
        if state.values:
            return Broadcast(tree.overlay(state.values, pairs.others(state.params)), True)
        return Broadcast(state.params, False)

    def train(self, down: Broadcast, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train the values under the mask, or LoRA."""
        if not down.sparse:
            fitted = yield ordinary_fit(self, down.params, env)
            return Update(fitted.params, len(env.data), fitted.loss), memory
        fresh, dense, mask, places = env.initial(), {}, {}, {}
        head = pairs.others(fresh).keys()
        for stem, shape in pairs.widths(fresh).items():
            places[stem] = under_mask(env.seed, stem, shape, self.density)
            dense[dense_name(stem)] = scattered(down.params[f"values.{stem}"], places[stem], shape)
            mask[dense_name(stem)] = scattered(torch.ones(len(places[stem])), places[stem], shape)
        params = tree.overlay(dense, {name: down.params[name] for name in head})
        fitted = yield ordinary_fit(replace(self, lr=self.stage_lr), params, env, mask=mask)
        values = {f"values.{stem}": fitted.params[dense_name(stem)].flatten()[at] for stem, at in places.items()}
        answer = tree.overlay(values, {name: fitted.params[name] for name in head})
        return Update(answer, len(env.data), fitted.loss), memory

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """The mean; at the end of stage 1 its change becomes LoRA's factors."""
        mean = tree.mean((up.params, up.examples) for up in ups.values())
        if not state.values:
            return replace(state, params=mean, loss=mean_loss(ups.values()))
        values = {name: mean.pop(name) for name in state.values}
        params = tree.overlay(state.params, mean)
        moved = replace(state, params=params, values=values, loss=mean_loss(ups.values()))
        return self.decompose(moved, env) if env.round >= self.last_sparse(env.rounds) else moved

    def decompose(self, state: State, env: ServerEnv) -> State:
        """c B A is the best approximation of the change at the adapter's rank; B and A share the singular values."""
        scale, params = pairs.scale_of(env.model.spec), dict(state.params)
        for stem, change in ((stem, self.change(state)[dense_name(stem)] / scale) for stem in state.widths):
            a = params[f"{stem}.A"]
            b, kept = lowrank.revived(lowrank.halves((change, torch.eye(change.shape[1])), len(a)), a)
            params |= {f"{stem}.B": b.to(a.dtype), f"{stem}.A": kept.to(a.dtype)}
        return replace(state, params=params, values={})

    def result(self, state: State) -> Params:
        """The factors, or in stage 1 the change of the weights; and the head."""
        if not state.values:
            return state.params
        return tree.overlay(pairs.others(state.params), self.change(state))

    def change(self, state: State) -> dict[str, Tensor]:
        """The base delta of stage 1."""
        return {
            dense_name(stem): scattered(
                state.values[f"values.{stem}"], under_mask(state.seed, stem, shape, self.density), shape
            )
            for stem, shape in state.widths.items()
        }


def numbers(shape: tuple[int, ...], density: float) -> int:
    """How many numbers of a weight stage 1 trains: at least one."""
    return max(1, round_up(density * math.prod(shape)))


def under_mask(seed: int, stem: str, shape: tuple[int, ...], density: float) -> Tensor:
    """(numbers,) places in the flat weight that stage 1 trains, ascending; the same for everybody."""
    drawn = rng_for(seed, "mask", client=stem).choice(math.prod(shape), size=numbers(shape, density), replace=False)
    return torch.from_numpy(drawn).sort().values


def scattered(values: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The values at their places in a weight of zeros."""
    dense = torch.zeros(math.prod(shape), dtype=values.dtype)
    dense[places] = values
    return dense.view(shape)


METHOD = SLora
