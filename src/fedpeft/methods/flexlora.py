"""FlexLoRA: every client has the rank that it can afford; the server averages products and cuts them by SVD.

Bai, Chen, Qian, Yao, Li: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources, NeurIPS 2024, arXiv 2402.11505.

Paper to code

| paper | here |
|---|---|
| rank r_k of client k | `ranks`, or the devices file; `State.ranks` |
| mean of the clients' products B_k A_k | `average` |
| SVD of the mean; each client gets its own rank of it | `average`, `send`; `maths.lowrank.truncate` |

Departures: the SVD is taken of the small core of the stacked factors, which gives the same. The server keeps the
adapter's rank of it, which is the largest that a client has. The mean is weighted by examples.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fedpeft.core import pairs, tree
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Update, Weights
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import mean_loss, ordinary_fit
from fedpeft.core.ranks import Ranked, client_ranks, rank_for
from fedpeft.core.tree import Params
from fedpeft.maths import lowrank


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # of the largest rank: B = U diag(s), A = V^T, the head
    ranks: Mapping[str, int] = field(default_factory=dict)  # r_k of every client
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class FlexLora(Ranked):
    """FlexLoRA (Bai et al. 2024): unequal ranks, mean of products, SVD."""

    state: ClassVar[type[State]] = State

    def init(self, env: ServerEnv) -> State:
        """The fresh adapter, and everybody's rank."""
        return State(env.initial(), client_ranks(self, env))

    def round(self) -> tuple[Exchange, ...]:
        """One round."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.train, self.average),)

    def send(self, state: State, client: ClientId) -> Weights:
        """The r_k largest singular values, and the head."""
        return Weights(pairs.cut(state.params, rank_for(state.ranks, client)))

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train LoRA of the client's own rank."""
        fitted = yield ordinary_fit(self, down.params, env)
        return Update(fitted.params, len(env.data), fitted.loss), memory

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """The SVD of sum_k p_k B_k A_k, and the mean of the head."""
        updates = list(ups.values())
        weights = lowrank.shares([up.examples for up in updates])

        def decomposed(own: Sequence[lowrank.Pair], before: lowrank.Pair) -> lowrank.Pair:
            return lowrank.truncate(lowrank.stack(own, weights), len(before[1]))

        mean = tree.mean((pairs.others(up.params), up.examples) for up in updates)
        factors = pairs.combined([up.params for up in updates], decomposed, state.params)
        return State(tree.overlay(mean, factors), client_ranks(self, env), mean_loss(updates))

    def result(self, state: State) -> Params:
        """The product of the largest rank."""
        return state.params


METHOD = FlexLora
