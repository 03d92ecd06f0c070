"""MomD: momentum on the device. Prefixes in every layer, trained by SGD with momentum, and federated averaging.

One of the optimisation baselines of FedPepTAO (Che et al. 2023, arXiv 2310.15080). The body of that paper was not at
hand: what it is we read from its name, and the details are ours. SGD with momentum: Sutskever, Martens, Dahl, Hinton,
ICML 2013.

Paper to code

| paper | here |
|---|---|
| prompts of all layers | `adapter`: parameters `prefix.{l}` |
| momentum on the device | `momentum`, in `train` |
| aggregation | `average`, weighted by examples |

Departures: the moments start from zero in every round; the rate, .5, is ours: SGD needs far larger ones than Adam.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from fedpeft.core.adapter import AdapterSpec, Prefix
from fedpeft.core.averaging import Averaging
from fedpeft.core.exchange import ClientEnv, Nothing, Update, Weights
from fedpeft.core.fit import SGD, Fit, Fitted
from fedpeft.core.method import check_ranges, ordinary_fit


@dataclass(frozen=True)
class MomD(Averaging):
    """Momentum SGD on the device, averaging on the server, prefixes in every layer."""

    lr: float = 0.5  # local learning rate of SGD
    head_lr: float | None = 0.05  # local learning rate of the classification head; null: lr
    momentum: float = 0.9  # of the local SGD, from zero in every round
    clip: float | None = 1.0  # bound on the gradient's norm at every local step; null: none

    def __post_init__(self) -> None:
        check_ranges(self, at_least={"momentum": 0}, below={"momentum": 1})

    def adapter(self) -> AdapterSpec:
        """A prefix of 20 tokens in every layer."""
        return Prefix()

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Momentum SGD on the client's own rows."""
        optimizer = SGD(self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        fitted = yield ordinary_fit(self, down.params, env, optimizer=optimizer)
        return Update(fitted.params, len(env.data), fitted.loss), memory


METHOD = MomD
