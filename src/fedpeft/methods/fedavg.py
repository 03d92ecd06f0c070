"""Federated averaging over adapter parameters: the cohort trains, the server takes the weighted mean.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-Efficient Learning of Deep Networks from Decentralized
Data, AISTATS 2017, arXiv 1602.05629, Algorithm 1.

Paper to code

| paper | here |
|---|---|
| w_t, the global model | `State.params`, the adapter and the head; the base model is frozen |
| C K, the size of the random set S_t | `cohort`, clients by number instead of by share |
| E, B, eta | `epochs`, `batch_size`, `lr` |
| ClientUpdate(k, w) | `train` |
| w_{t+1} = sum_k (n_k / m_t) w^k_{t+1}, m_t = sum of n_k over S_t | `average`; n_k is `Update.examples` |

Departures: local training is AdamW unless `optimizer: sgd`, because adapters of a transformer hardly move with plain
SGD; its moments start from zero in every round. `steps` fixes the number of local steps instead of the epochs.
Clients whose answer is missing take no part in m_t.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpeft.core import tree
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Update, Weights
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import Defaults, check_ranges, mean_loss, ordinary_fit
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # w_t
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class FedAvg(Defaults):
    """FederatedAveraging (McMahan et al. 2017), Algorithm 1."""

    cohort: int = 10  # m: clients per round; 0: all
    epochs: int = 1  # E: passes over a client's rows per round
    batch_size: int = 8  # B: rows per step
    lr: float = 1e-3  # eta: local learning rate
    head_lr: float | None = None  # local learning rate of the classification head; null: lr
    optimizer: Literal["adamw", "sgd"] = "adamw"  # local optimizer, fresh in every round
    weight_decay: float = 0.0  # decay of the local optimizer
    clip: float | None = None  # bound on the gradient's norm at every local step; null: none
    steps: int | None = None  # local steps per round, instead of whole epochs

    state: ClassVar[type[State]] = State

    def __post_init__(self) -> None:
        check_ranges(self)

    def init(self, env: ServerEnv) -> State:
        """w_0."""
        return State(env.initial())

    def round(self) -> tuple[Exchange, ...]:
        """One pass of the server's loop."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.train, self.average),)

    def send(self, state: State, client: ClientId) -> Weights:
        """w_t."""
        return Weights(state.params)

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """ClientUpdate(k, w)."""
        fitted = yield ordinary_fit(self, down.params, env)
        return Update(fitted.params, len(env.data), fitted.loss), memory

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """w_{t+1} = sum_k (n_k / m_t) w^k_{t+1}."""
        return State(tree.mean((up.params, up.examples) for up in ups.values()), mean_loss(ups.values()))

    def result(self, state: State) -> Params:
        """w_t."""
        return state.params


METHOD = FedAvg
