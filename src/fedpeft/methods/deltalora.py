"""Delta-LoRA: the frozen weights move along with the product of the factors.

Zi, Qi, Wang, Wang, Wong, Zhang: Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices, 2023,
arXiv 2309.02411, under federated averaging.

Paper to code

| paper | here |
|---|---|
| W <- W + lambda c (B⁺A⁺ - B A) at every step after the first K | `train`; `weight`, `start_steps` |
| no gradient of W, no dropout | `train`; the echo of `models/adapters/lora` |
| aggregation | `average`: means of the factors, and the mean change of W as a base delta |

Departures: the paper is not federated. The steps' changes telescope to lambda c (B_E A_E - B_K A_K), of rank 2 r at
most: these factors travel, and their mean, weighted by examples, joins the base delta. The base itself never changes.
The defaults of lambda and K are ours.

Traffic per client and round: down = params and the changes that it missed (`news`); up = params and 2 A and 2 B
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedpeft.core import changes, pairs, tree
from fedpeft.core.averaging import Tuning
from fedpeft.core.changes import Changed, Copy, News
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, ServerEnv, matching
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import check_ranges, local_batches, mean_loss, ordinary_fit
from fedpeft.core.tree import Params
from fedpeft.maths import lowrank


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # Ā, B̄ and the head
    changed: Changed = field(default_factory=Changed)  # what W has moved
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Broadcast:
    """What the server sends."""

    params: Params
    news: News  # of what W has moved


@dataclass(frozen=True)
class Answer:
    """What a client answers."""

    params: Params
    ends: Params  # A and B of both ends of the path: [B_E, -B_K] and [A_E; A_K]
    examples: int
    loss: float


@dataclass(frozen=True)
class DeltaLora(Tuning):
    """Delta-LoRA (Zi et al. 2023): W moves along with B A."""

    weight: float = 0.5  # lambda: how far W moves with the product
    start_steps: int = 0  # K: steps of a client's turn before W begins to move

    state: ClassVar[type[State]] = State
    memory: ClassVar[type[Copy]] = Copy

    def __post_init__(self) -> None:
        check_ranges(self, at_least={"weight": 0, "start_steps": 0})

    def init(self, env: ServerEnv) -> State:
        """The fresh adapter; W has not moved."""
        return State(env.initial())

    def init_client(self, env: ClientEnv) -> Copy:
        """No change yet."""
        return Copy()

    def round(self) -> tuple[Exchange, ...]:
        """One round."""
        return (Exchange("train", Broadcast, Answer, sample(self.cohort), self.send, self.train, self.average, fits),)

    def send(self, state: State, client: ClientId) -> Broadcast:
        """The means, and what the client lacks of W's change."""
        return Broadcast(state.params, changes.news_for(state.changed, client))

    def train(self, down: Broadcast, memory: Copy, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Answer, Copy]]:
        """K ordinary steps, then steps with which W moves."""
        copy, batches = changes.kept_up(memory, down.news), local_batches(self, env)
        before, first = (copy.total,) if copy.total else (), min(self.start_steps, len(batches))
        params, moments, losses = down.params, None, []
        if first:
            fitted = yield ordinary_fit(self, params, env, batches=batches[:first], also=before, dropout=0.0)
            params, moments, losses = fitted.params, fitted.moments, [fitted.loss] * first
        here = pairs.factors(params)
        echo = {f"{stem}.echo": torch.tensor([self.weight]) for stem in pairs.stems(params)}
        origin = changes.as_delta(here, -self.weight * pairs.scale_of(env.model.spec))
        fitted = yield ordinary_fit(
            self,
            tree.overlay(params, echo),
            env,
            batches=batches[first:],
            also=(*before, origin),
            train=frozenset(params),
            moments=moments,
            dropout=0.0,
        )
        losses += [fitted.loss] * fitted.steps
        end = {name: fitted.params[name] for name in params}
        loss = sum(losses) / max(1, len(losses))
        return Answer(end, path(end, here), len(env.data), loss), copy

    def average(self, state: State, ups: Mapping[ClientId, Answer], env: ServerEnv) -> State:
        """The means; lambda c sum_k p_k (B_E A_E - B_K A_K) joins what W has moved."""
        updates = list(ups.values())
        mean = tree.mean((up.params, up.examples) for up in updates)
        weights = lowrank.shares([up.examples for up in updates])
        scale = self.weight * pairs.scale_of(env.model.spec)
        step = changes.as_delta(lowrank.joined([up.ends for up in updates], weights), scale)
        return State(mean, changes.advanced(state.changed, step, ups), mean_loss(updates))

    def result(self, state: State) -> Params:
        """The means over the moved W."""
        return tree.overlay(state.changed.total, state.params)


def path(end: Params, start: Params) -> dict[str, torch.Tensor]:
    """Factors whose product is B_E A_E - B_K A_K."""
    made = {}
    for stem in pairs.stems(start):
        (b, a), (b0, a0) = pairs.pair(end, stem), pairs.pair(start, stem)
        made[f"{stem}.B"], made[f"{stem}.A"] = torch.cat([b, -b0], dim=1), torch.cat([a, a0])
    return made


def fits(down: Broadcast, up: Answer) -> None:
    """Raise RecordError unless params and the ends of the path have the layout of what was sent."""
    matching(down, up)
    want = path(pairs.factors(down.params), pairs.factors(down.params))
    tree.same_layout(want, up.ends)
    tree.same_dtypes(want, up.ends)


METHOD = DeltaLora
