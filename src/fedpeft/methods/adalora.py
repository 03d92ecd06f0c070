"""AdaLoRA: a budget of rank that is shared out among the layers by importance, and shrinks while the model learns.

Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen, Zhao: Adaptive Budget Allocation for Parameter-Efficient
Fine-Tuning, ICLR 2023, arXiv 2303.10512, under federated averaging.

Paper to code

| paper | here |
|---|---|
| W + P Λ Q | `adapter`; parameters P, E (the diagonal of Λ) and Q |
| orthogonality penalty gamma (norm(P^T P - I)² + norm(Q Q^T - I)²) | `train`, `penalty`; `Orthogonal` |
| sensitivity abs(w dL/dw), per triplet: of E, and the means over P's column and Q's row | `Answer.sensitivities` |
| importance: smoothed sensitivity times its uncertainty, beta_1 and beta_2 | `average`, `beta1`, `beta2` |
| cubic schedule of the budget | `budget`; `share`, `first_share`, `last_share` |
| E outside the budget is set to zero | `average` |

Departures: the paper is not federated. Steps are rounds: clients send their triplets' sensitivities, the server smooths
their mean, weighted by examples, and prunes after each round. A client's sensitivity is the root mean square of w dL/dw
over its turn, from the second moment of its Adam, and smoothing is done per triplet instead of per number. The defaults
of the penalty and of the budget's shares are ours.

Traffic per client and round: down = params; up = params and scores (`sensitivities`)
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.adapter import AdaLora, AdapterSpec
from fedpeft.core.averaging import Tuning
from fedpeft.core.cohort import sample
from fedpeft.core.counts import round_up
from fedpeft.core.errors import ConfigError, RecordError
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Weights, matching
from fedpeft.core.fit import AdamW, Fit, Fitted
from fedpeft.core.method import check_ranges, mean_loss, ordinary_fit
from fedpeft.core.tree import Params
from fedpeft.maths.importance import Smoothed, grams, stems, triplet_scores


@dataclass(frozen=True)
class Orthogonal:
    """weight * sum over slots of norm(P^T P - I)² + norm(Q Q^T - I)², for every client."""

    weight: float

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """(clients,) from stacked params, each (clients, ...)."""
        total = torch.zeros(len(next(iter(params.values()))))
        for rest in grams(params):
            total = total.to(rest) + rest.square().sum(dim=(1, 2))
        return self.weight * total


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # P, E, Q and the head
    smoothed: Smoothed = field(default_factory=Smoothed)  # (rank,) by slot: mean sensitivity, and how much it changes
    kept: int = 0  # triplets in the budget
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Answer:
    """What a client answers."""

    params: Params
    sensitivities: Params  # (rank,) by slot
    examples: int
    loss: float


@dataclass(frozen=True)
class AdaLoraMethod(Tuning):
    """AdaLoRA (Zhang et al. 2023): rank where it matters."""

    penalty: float = 0.1  # gamma: weight of the orthogonality of P and Q
    share: float = 0.5  # of the triplets that are left at the end
    first_share: float = 0.1  # share of the rounds before the budget shrinks
    last_share: float = 0.3  # share of the rounds after it has shrunk
    beta1: float = 0.85  # momentum of the sensitivity
    beta2: float = 0.85  # momentum of its uncertainty

    plans_by_rounds: ClassVar[bool] = True
    state: ClassVar[type[State]] = State

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("penalty", "first_share", "last_share", "beta1", "beta2"), 0)
        check_ranges(self, at_least=shares, above={"share": 0}, below={"beta1": 1, "beta2": 1}, at_most={"share": 1})
        if self.first_share + self.last_share >= 1:
            said = f"method.first_share {self.first_share:g} and method.last_share {self.last_share:g}"
            raise ConfigError([f"{said} leave no round in which the budget shrinks; their sum must be below 1"])

    def adapter(self) -> AdapterSpec:
        """Twelve triplets on query and value of every block."""
        return AdaLora()

    def init(self, env: ServerEnv) -> State:
        """Fresh triplets, all in the budget."""
        params = env.initial()
        return State(params, kept=sum(len(params[f"{stem}.E"]) for stem in stems(params)))

    def round(self) -> tuple[Exchange, ...]:
        """One round."""
        return (Exchange("train", Weights, Answer, sample(self.cohort), self.send, self.train, self.average, scored),)

    def send(self, state: State, client: ClientId) -> Weights:
        """The triplets and the head."""
        return Weights(state.params)

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Answer, Nothing]]:
        """Train with the penalty; tell how sensitive the loss was to every triplet."""
        fitted = yield ordinary_fit(self, down.params, env, penalty=Orthogonal(self.penalty))
        return Answer(fitted.params, sensitivities(fitted), len(env.data), fitted.loss), memory

    def average(self, state: State, ups: Mapping[ClientId, Answer], env: ServerEnv) -> State:
        """The mean; sensitivities are smoothed, and E outside of the budget is zero."""
        params = tree.mean((up.params, up.examples) for up in ups.values())
        found = tree.mean((up.sensitivities, up.examples) for up in ups.values())
        smoothed = state.smoothed.after(found, self.beta1, self.beta2)
        importance = smoothed.scores
        total = sum(len(t) for t in importance.values())
        kept = self.budget(env.round, env.rounds, total)
        every = torch.cat([importance[stem] for stem in sorted(importance)])
        inside = torch.zeros(total, dtype=torch.bool)
        inside[torch.argsort(every, descending=True, stable=True)[:kept]] = True
        parts = torch.split(inside, [len(importance[stem]) for stem in sorted(importance)])
        for stem, own in zip(sorted(importance), parts, strict=True):
            params[f"{stem}.E"] = torch.where(own, params[f"{stem}.E"], torch.zeros_like(params[f"{stem}.E"]))
        return State(params, smoothed, kept, mean_loss(ups.values()))

    def budget(self, round: int, rounds: int, total: int) -> int:
        """How many triplets are kept after a round: all, then cubically fewer, then the share."""
        begin, end = self.first_share * rounds, rounds - self.last_share * rounds
        least = max(1, round_up(self.share * total))
        if round <= begin:
            return total
        if round >= end:
            return least
        return least + round_up((total - least) * (1 - (round - begin) / (end - begin)) ** 3)

    def result(self, state: State) -> Params:
        """The triplets and the head."""
        return state.params

    def choices(self, state: State) -> dict[str, Any]:
        """How many triplets every slot has in the budget."""
        kept = {stem: int((state.params[f"{stem}.E"] != 0).sum()) for stem in stems(state.params)}
        return {"triplets": state.kept, "triplets_of": kept}


def sensitivities(fitted: Fitted) -> dict[str, Tensor]:
    """Per triplet: of E's number, and the means over P's column and Q's row, of the root mean square of w dL/dw."""
    corrected = 1 - AdamW().betas[1] ** max(1, fitted.moments.step)
    own = {
        name: fitted.params[name].abs() * (second / corrected).sqrt()
        for name, second in fitted.moments.second.items()
        if name.endswith((".P", ".E", ".Q"))
    }
    return triplet_scores(own)


def scored(down: Weights, up: Answer) -> None:
    """Raise RecordError unless there is a sensitivity, not negative, for every triplet."""
    matching(down, up)
    want = {stem: down.params[f"{stem}.E"] for stem in stems(down.params)}
    tree.same_layout(want, up.sensitivities)
    if any(bool((t < 0).any()) for t in up.sensitivities.values()):
        raise RecordError("a sensitivity is negative")


METHOD = AdaLoraMethod
