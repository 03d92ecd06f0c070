"""Adaptive federated optimization: the mean change of the cohort is the server optimizer's gradient.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: Adaptive Federated Optimization, ICLR 2021,
arXiv 2003.00295, Algorithms 1 and 2: FedAvgM, FedAdam, FedYogi, FedAdagrad.

Paper to code

| paper | here |
|---|---|
| x_t | `State.params` |
| Delta_i = x_{i,K} - x_t, Delta_t its mean | `step`: mean of the answers, minus x_t |
| m_t = beta_1 m_{t-1} + (1 - beta_1) Delta_t | `State.first` |
| v_t, three lines of Algorithm 2 | `second_moment` |
| v_{-1} >= tau^2 | `init`: v_{-1} = tau^2 |
| x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau) | `step` |
| eta, eta_l | `server_lr`, `lr` |
| beta_1, beta_2, tau | `beta1`, `beta2`, `tau` |
| FedAvgM: server SGD with momentum | `server_optimizer: momentum`; m_t = beta_1 m_{t-1} + Delta_t, x_t + eta m_t |

As in the paper there is no correction of the bias of m and v: v_{-1} = tau^2 takes its place. The paper runs FedAdagrad
without momentum (beta1 = 0); that is a setting here, not a special case.

Departures: Delta_t is the mean weighted by examples, as in FedAvg, where Algorithm 2 writes an even mean. Local
training is AdamW unless `optimizer: sgd`.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Update, Weights
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import Defaults, check_ranges, mean_loss, ordinary_fit
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # x_t
    first: Params  # m_{t-1}, in the layout of params
    second: Params  # v_{t-1}, in the layout of params; empty for momentum
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class FedOpt(Defaults):
    """FedOpt (Reddi et al. 2021): FedAvgM, FedAdam, FedYogi and FedAdagrad."""

    server_optimizer: Literal["momentum", "adam", "yogi", "adagrad"] = "adam"  # what the server does with Delta_t
    server_lr: float = 0.01  # eta: the server's learning rate; momentum wants about 1
    beta1: float = 0.9  # beta_1: decay of m; the paper's FedAdagrad has 0
    beta2: float = 0.99  # beta_2: decay of v for adam and yogi
    tau: float = 1e-3  # tau: degree of adaptivity; v starts from its square
    cohort: int = 10  # clients per round; 0: all
    epochs: int = 1  # E: passes over a client's rows per round
    batch_size: int = 8  # rows per step
    lr: float = 1e-3  # eta_l: local learning rate
    head_lr: float | None = None  # local learning rate of the classification head; null: lr
    optimizer: Literal["adamw", "sgd"] = "adamw"  # local optimizer, fresh in every round
    weight_decay: float = 0.0  # decay of the local optimizer
    clip: float | None = None  # bound on the gradient's norm at every local step; null: none
    steps: int | None = None  # local steps per round, instead of whole epochs

    state: ClassVar[type[State]] = State

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least={"beta1": 0, "beta2": 0},
            above={"server_lr": 0, "tau": 0},
            below={"beta1": 1, "beta2": 1},
        )

    def init(self, env: ServerEnv) -> State:
        """x_0, m_{-1} = 0 and v_{-1} = tau^2."""
        params = env.initial()
        second = {name: torch.full_like(t, self.tau**2) for name, t in params.items()}
        return State(params, tree.zeros_like(params), {} if self.server_optimizer == "momentum" else second)

    def round(self) -> tuple[Exchange, ...]:
        """One pass of the server's loop."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.train, self.step),)

    def send(self, state: State, client: ClientId) -> Weights:
        """x_t."""
        return Weights(state.params)

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """x_{i,K}."""
        fitted = yield ordinary_fit(self, down.params, env)
        return Update(fitted.params, len(env.data), fitted.loss), memory

    def step(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """One step of the server optimizer along Delta_t."""
        delta = tree.sub(tree.mean((up.params, up.examples) for up in ups.values()), state.params)
        loss = mean_loss(ups.values())
        if self.server_optimizer == "momentum":
            first = tree.axpy(self.beta1, state.first, delta)
            return State(tree.axpy(self.server_lr, first, state.params), first, state.second, loss)
        first = tree.axpy(self.beta1, state.first, tree.scale(delta, 1 - self.beta1))
        second = tree.map2(self.second_moment, state.second, delta)
        move = tree.map2(lambda m, v: m / (v.sqrt() + self.tau), first, second)
        return State(tree.axpy(self.server_lr, move, state.params), first, second, loss)

    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        """v_t from v_{t-1} and Delta_t, element by element."""
        square = delta.square()
        if self.server_optimizer == "adagrad":
            return v + square
        if self.server_optimizer == "yogi":
            return v - (1 - self.beta2) * square * torch.sign(v - square)
        return self.beta2 * v + (1 - self.beta2) * square

    def result(self, state: State) -> Params:
        """x_t."""
        return state.params


METHOD = FedOpt
