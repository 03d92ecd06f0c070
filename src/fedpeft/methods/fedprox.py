"""FedProx: federated averaging whose clients are held near the global model by a proximal term.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, MLSys 2020,
arXiv 1812.06127, Algorithm 2.

Paper to code

| paper | here |
|---|---|
| w^t | `State.params`; `Weights.params` on the way down |
| K, E, eta | `cohort`, `epochs`, `lr` |
| mu | `mu` |
| h_k(w; w^t) = F_k(w) + (mu / 2) norm(w - w^t)^2, inexactly | `train`: `Fit.prox` with the centre w^t |
| w^{t+1} = (1 / K) sum_k w_k^{t+1}, devices drawn with probability p_k | `average`: mean by examples, drawn evenly |

Departures: devices are drawn evenly and averaged by their number of examples, as in FedAvg, instead of drawn by
examples and averaged evenly, so that a comparison with FedAvg differs in mu alone. The inexactness gamma_k^t is not
set: it follows from `epochs` or `steps`. Local training is AdamW unless `optimizer: sgd`; the proximal gradient is
added to the loss gradient before clipping.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpeft.core import tree
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Update, Weights
from fedpeft.core.fit import Fit, Fitted, Prox
from fedpeft.core.method import Defaults, check_ranges, mean_loss, ordinary_fit
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # w^t
    loss: float | None = None  # mean training loss of the last cohort, without the proximal term; None before the first


@dataclass(frozen=True)
class FedProx(Defaults):
    """FedProx (Li et al. 2020), Algorithm 2; mu = 0 is FedAvg."""

    mu: float = 0.01  # strength of the pull towards the global model; 0: FedAvg
    cohort: int = 10  # K: clients per round; 0: all
    epochs: int = 1  # E: passes over a client's rows per round
    batch_size: int = 8  # rows per step
    lr: float = 1e-3  # eta: local learning rate
    head_lr: float | None = None  # local learning rate of the classification head; null: lr
    optimizer: Literal["adamw", "sgd"] = "adamw"  # local optimizer, fresh in every round
    weight_decay: float = 0.0  # decay of the local optimizer
    clip: float | None = None  # bound on the gradient's norm at every local step; null: none
    steps: int | None = None  # local steps per round, instead of whole epochs

    state: ClassVar[type[State]] = State

    def __post_init__(self) -> None:
        check_ranges(self, at_least={"mu": 0})

    def init(self, env: ServerEnv) -> State:
        """w^0."""
        return State(env.initial())

    def round(self) -> tuple[Exchange, ...]:
        """One pass of the server's loop."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.train, self.average),)

    def send(self, state: State, client: ClientId) -> Weights:
        """w^t."""
        return Weights(state.params)

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """w_k^{t+1}, an inexact minimiser of h_k(w; w^t)."""
        fitted = yield ordinary_fit(self, down.params, env, prox=Prox(self.mu, center=down.params))
        return Update(fitted.params, len(env.data), fitted.loss), memory

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """w^{t+1}."""
        return State(tree.mean((up.params, up.examples) for up in ups.values()), mean_loss(ups.values()))

    def result(self, state: State) -> Params:
        """w^t."""
        return state.params


METHOD = FedProx
