"""MomS+AdamD: momentum on the server, Adam on the device, prefixes in every layer.

One of the optimisation baselines of FedPepTAO (Che et al. 2023, arXiv 2310.15080). The body of that paper was not at
hand: what it is we read from its name, and the details are ours. Momentum on the server: Hsu, Qi, Brown 2019,
arXiv 1909.06335.

Paper to code

| paper | here |
|---|---|
| prompts of all layers | `adapter`: parameters `prefix.{l}` |
| Adam on the device, whose moments stay there | `train`, `Memory.moments` |
| momentum on the server | `update`: v <- beta v + (1 - beta) delta; w <- w - `server_lr` v |

Departures: the momentum is damped by (1 - beta), which Hsu et al. do not do: without it it diverges where clients take
few long steps. Rates, decay and clipping are those of FedPepTAO's device.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from fedpeft.core.adapter import AdapterSpec, Prefix
from fedpeft.core.averaging import only
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, ServerEnv, Update, Weights
from fedpeft.core.fit import Fit, Fitted, Moments
from fedpeft.core.method import Defaults, check_ranges, mean_loss, ordinary_fit
from fedpeft.core.tree import Params
from fedpeft.maths import drift


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # w
    momentum: drift.Momentum = field(default_factory=drift.Momentum)  # v
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Memory:
    """What a client keeps between its turns."""

    moments: Moments = field(default_factory=Moments)  # of Adam; none before the first turn


@dataclass(frozen=True)
class MomSAdamD(Defaults):
    """Server momentum and device Adam over prefixes in every layer."""

    server_lr: float = 1.0  # of the server's step along v
    beta: float = 0.9  # momentum of the server
    cohort: int = 10  # clients per round; 0: all
    epochs: int = 1  # passes over a client's rows per round
    batch_size: int = 8  # rows per step
    lr: float = 4e-2  # local learning rate of AdamW
    head_lr: float | None = 3e-3  # local learning rate of the classification head; null: lr
    weight_decay: float = 0.1  # decay of the local optimizer
    clip: float | None = 1.0  # bound on the gradient's norm at every local step; null: none
    steps: int | None = None  # local steps per round, instead of whole epochs

    state: ClassVar[type[State]] = State
    memory: ClassVar[type[Memory]] = Memory

    def __post_init__(self) -> None:
        check_ranges(self, at_least={"beta": 0}, above={"server_lr": 0}, below={"beta": 1})

    def adapter(self) -> AdapterSpec:
        """A prefix of 20 tokens in every layer."""
        return Prefix()

    def accepts(self, spec: AdapterSpec) -> str | None:
        """Prefixes alone."""
        return only(self, spec)

    def init(self, env: ServerEnv) -> State:
        """w_0 and v = 0."""
        return State(env.initial(), drift.Momentum(rate=self.server_lr))

    def init_client(self, env: ClientEnv) -> Memory:
        """No moments yet."""
        return Memory()

    def round(self) -> tuple[Exchange, ...]:
        """One round."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.train, self.update),)

    def send(self, state: State, client: ClientId) -> Weights:
        """w."""
        return Weights(state.params)

    def train(self, down: Weights, memory: Memory, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Memory]]:
        """Adam that goes on from the moments of the client's last turn."""
        fitted = yield ordinary_fit(self, down.params, env, moments=memory.moments)
        return Update(fitted.params, len(env.data), fitted.loss), Memory(fitted.moments)

    def update(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """Damped momentum of the mean step."""
        steps = {client: drift.Step(up.params, up.examples) for client, up in ups.items()}
        params, momentum = drift.damped_momentum(state.params, steps, state.momentum, self.beta)
        return State(params, momentum, mean_loss(ups.values()))

    def result(self, state: State) -> Params:
        """w."""
        return state.params


METHOD = MomSAdamD
