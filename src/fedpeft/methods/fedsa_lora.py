"""FedSA-LoRA: A is shared and averaged; B, and the head, stay with the client.

Guo, Zeng, Wang, Fan, Wang, Qu: Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025,
arXiv 2410.01463.

Paper to code

| paper | here |
|---|---|
| A and B both trained | `train` |
| A, general knowledge, sent and averaged | `send`, `average` |
| B, the client's own knowledge, never sent | `Memory.local`, which the client's own model has (`personal`) |

Departures: the head stays with the client, as in the authors' configuration (`local_param`), and the mean is weighted
by examples. The global model has the mean A and a B of zero, so it is the base with a fresh head: judge the clients'
own models.

Traffic per client and round: down = A; up = A
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import ClassVar

from fedpeft.core import pairs, tree
from fedpeft.core.averaging import Averaged, Averaging
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Update, Weights
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import ordinary_fit
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class Memory:
    """What a client keeps between its turns; nothing of it travels."""

    local: Params = field(default_factory=dict)  # B and the head; empty before the first turn


@dataclass(frozen=True)
class FedSALora(Averaging):
    """FedSA-LoRA (Guo et al. 2025): shared A, own B."""

    memory: ClassVar[type[Memory]] = Memory

    def init_client(self, env: ClientEnv) -> Memory:
        """Nothing of its own yet: B is zero, the head is the fresh one."""
        return Memory()

    def round(self) -> tuple[Exchange, ...]:
        """One round over A."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.learn, self.average),)

    def send(self, state: Averaged, client: ClientId) -> Weights:
        """The mean of A."""
        return Weights(pairs.factors(state.params, "A"))

    def learn(self, down: Weights, memory: Memory, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Memory]]:
        """Train the shared A and the client's own B and head."""
        fitted = yield ordinary_fit(self, tree.overlay(env.initial(), memory.local, down.params), env)
        shared, own = pairs.factors(fitted.params, "A"), pairs.others(fitted.params, "A")
        return Update(shared, len(env.data), fitted.loss), Memory(own)

    def personal(self, params: Params, memory: Memory) -> Params:
        """The mean A beside the client's own B and head."""
        return tree.overlay(params, memory.local)


METHOD = FedSALora
