"""HetLoRA: clients of unequal rank; the server pads with zeros, weights by norms and averages the factors.

Cho, Liu, Xu, Fahrezi, Joshi: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024,
arXiv 2401.06432.

Paper to code

| paper | here |
|---|---|
| rank r_k of client k | `ranks`, or the devices file; `State.ranks` |
| zero-padding to the largest rank, mean of the factors | `average`; `maths.lowrank.pad` |
| sparsity-weighted aggregation: weights by the norm of the client's product | `average`, slot by slot |
| truncation: client k gets the first r_k rows and columns | `send` |

Departures: the weight of a client in a slot is ||B_k A_k||_F over the sum of all; where all are zero the weights are
equal. Rows that nobody of the cohort has stay as they were. Rank self-pruning, in which clients give up rows while they
train, is left out. The head is averaged by examples.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

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

    params: Params  # of the largest rank, and the head
    ranks: Mapping[str, int] = field(default_factory=dict)  # r_k of every client
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class HetLora(Ranked):
    """HetLoRA (Cho et al. 2024): unequal ranks, zero-padding, weights by norms."""

    state: ClassVar[type[State]] = State

    def init(self, env: ServerEnv) -> State:
        """The fresh adapter, and everybody's rank."""
        return State(env.initial(), client_ranks(self, env))

    def round(self) -> tuple[Exchange, ...]:
        """One round."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.train, self.average),)

    def send(self, state: State, client: ClientId) -> Weights:
        """The first r_k rows of A and columns of B, and the head."""
        return Weights(pairs.cut(state.params, rank_for(state.ranks, client)))

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train LoRA of the client's own rank."""
        fitted = yield ordinary_fit(self, down.params, env)
        return Update(fitted.params, len(env.data), fitted.loss), memory

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """Padded factors, weighted by ||B_k A_k||_F, and the mean of the head."""
        updates = list(ups.values())

        def padded(own: Sequence[lowrank.Pair], before: lowrank.Pair) -> lowrank.Pair:
            top = max(len(a) for _, a in own)
            weights = lowrank.shares([lowrank.norm(pair) for pair in own])
            b, a = lowrank.mean([lowrank.pad(pair, top) for pair in own], weights)
            return torch.cat([b, before[0][:, top:]], dim=1), torch.cat([a, before[1][top:]])

        mean = tree.mean((pairs.others(up.params), up.examples) for up in updates)
        factors = pairs.combined([up.params for up in updates], padded, state.params)
        return State(tree.overlay(mean, factors), client_ranks(self, env), mean_loss(updates))

    def result(self, state: State) -> Params:
        """The factors of the largest rank."""
        return state.params


METHOD = HetLora
