"""FFA-LoRA: A stays as it was drawn and is everybody's; B alone trains and travels.

Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv 2403.12313.

Paper to code

| paper | here |
|---|---|
| A_0, random, the same at every client, frozen | `send` leaves it out; `train` draws it from the run's seed |
| B trained | `train` |
| mean of B; exact, since B̄ A_0 is the mean of the products B_k A_0 | `average` |

Departures: the mean is weighted by examples. The head, where there is one, trains and travels too.

Traffic per client and round: down = B and head; up = B and head
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from fedpeft.core import pairs, tree
from fedpeft.core.averaging import Averaged, Averaging
from fedpeft.core.exchange import ClientEnv, ClientId, Nothing, Update, Weights
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import ordinary_fit


@dataclass(frozen=True)
class FFALora(Averaging):
    """FFA-LoRA (Sun et al. 2024): half of LoRA's bytes, and a mean without error."""

    def send(self, state: Averaged, client: ClientId) -> Weights:
        """B and the head."""
        return Weights(pairs.others(state.params, "A"))

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train B and the head on the client's own rows; A_0 acts, frozen."""
        whole = tree.overlay(pairs.factors(env.initial(), "A"), down.params)
        fitted = yield ordinary_fit(self, whole, env, train=frozenset(down.params))
        return Update(pairs.others(fitted.params, "A"), len(env.data), fitted.loss), memory


METHOD = FFALora
