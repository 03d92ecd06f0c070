"""FedEx-LoRA: the mean of the factors, and what it lacks of the mean of the products is added to the base.

Singhal, Ponkshe, Vepakomma: FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models,
ACL 2025, arXiv 2410.09432.

Paper to code

| paper | here |
|---|---|
| Ā, B̄, the means of the factors | `average` |
| residual ΔW_res = mean of B_k A_k, less B̄ Ā; added to the frozen weights | `average`; `State.changed` |
| residual sent as factors of rank (K + 1) r at most | `send` |

Departures: the means are weighted by examples (the authors' code takes plain ones). The base itself is never changed;
its delta acts beside it, as factors or dense, whichever is smaller. A client that missed rounds gets what it missed, or
the whole delta where that is smaller.

Traffic per client and round: down = params and the changes that it missed (`news`); up = params
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from fedpeft.core import changes, pairs, tree
from fedpeft.core.averaging import Tuning
from fedpeft.core.changes import Changed, Copy, News
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, ServerEnv, Update
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import mean_loss, ordinary_fit
from fedpeft.core.tree import Params
from fedpeft.maths import lowrank


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # Ā, B̄ and the head
    changed: Changed = field(default_factory=Changed)  # the residuals so far
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Broadcast:
    """What the server sends."""

    params: Params
    news: News  # of the residuals


@dataclass(frozen=True)
class FedExLora(Tuning):
    """FedEx-LoRA (Singhal et al. 2025): means of factors without error."""

    state: ClassVar[type[State]] = State
    memory: ClassVar[type[Copy]] = Copy

    def init(self, env: ServerEnv) -> State:
        """The fresh adapter."""
        return State(env.initial())

    def init_client(self, env: ClientEnv) -> Copy:
        """No residual yet."""
        return Copy()

    def round(self) -> tuple[Exchange, ...]:
        """One round."""
        return (Exchange("train", Broadcast, Update, sample(self.cohort), self.send, self.train, self.average),)

    def send(self, state: State, client: ClientId) -> Broadcast:
        """The means, and what the client lacks of the residuals."""
        return Broadcast(state.params, changes.news_for(state.changed, client))

    def train(self, down: Broadcast, memory: Copy, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Copy]]:
        """Train both factors over the base and its residuals."""
        copy = changes.kept_up(memory, down.news)
        fitted = yield ordinary_fit(self, down.params, env, also=(copy.total,) if copy.total else ())
        return Update(fitted.params, len(env.data), fitted.loss), copy

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """Ā and B̄; c (sum_k p_k B_k A_k - B̄ Ā) joins the residuals."""
        updates = list(ups.values())
        mean = tree.mean((up.params, up.examples) for up in updates)
        weights = lowrank.shares([up.examples for up in updates])
        residual = lowrank.joined([*(up.params for up in updates), mean], [*weights, -1.0])
        step = changes.as_delta(residual, pairs.scale_of(env.model.spec))
        return State(mean, changes.advanced(state.changed, step, ups), mean_loss(updates))

    def result(self, state: State) -> Params:
        """The means over the base and its residuals."""
        return tree.overlay(state.changed.total, state.params)


METHOD = FedExLora
