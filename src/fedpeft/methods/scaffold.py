"""SCAFFOLD: control variates correct the drift of clients towards their own optima.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for Federated Learning,
ICML 2020, arXiv 1910.06378, Algorithm 1 with option II.

Paper to code

| paper | here |
|---|---|
| x, c | `State.params`, `State.control`; `Broadcast` on the way down |
| c_i, kept by client i, zero at first | `Memory.control` |
| S, N | how many clients answered, `len(ups)`; how many there are, `len(env.clients)` |
| K, eta_l, eta_g | `steps` (or whole `epochs`), `lr`, `server_lr` |
| y_i <- y_i - eta_l (g_i(y_i) - c_i + c) | `train`: SGD with `Fit.drift` = c - c_i |
| c_i+ = c_i - c + (x - y_i) / (K eta_l) | `train`, option II |
| (Delta y_i, Delta c_i) = (y_i - x, c_i+ - c_i) | `Correction.params`, `Correction.control` |
| x <- x + (eta_g / S) sum Delta y_i; c <- c + (1 / N) sum Delta c_i | `update`; the latter is S / N times a mean |

Departures: none in the algorithm; the objective is the even mean of the clients' losses, as in the paper, so answers
are not weighted by examples. With `epochs`, K differs between clients. The optimizer is plain SGD and cannot be
another: (x - y_i) / (K eta_l) is the mean gradient only where a step is eta_l times a gradient, and Adam's are not; a
control variate made of Adam's steps would be added to gradients of another scale. Where `head_lr` is set, the head's
part of that quotient is taken with it. Decay and clipping act on g_i, before the correction, and are part of c_i.

Traffic per client and round: down = 2 params; up = 2 params
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.core import tree
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, ServerEnv
from fedpeft.core.fit import SGD, Fit, Fitted
from fedpeft.core.method import Defaults, check_ranges, mean_loss, ordinary_fit
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # x
    control: Params  # c, in the layout of params
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Memory:
    """What a client keeps between its turns."""

    control: Params  # c_i, in the layout of params


@dataclass(frozen=True)
class Broadcast:
    """What the server sends."""

    params: Params  # x
    control: Params  # c


@dataclass(frozen=True)
class Correction:
    """What a client answers."""

    params: Params  # Delta y_i
    control: Params  # Delta c_i
    examples: int  # the client's rows; they weight the reported loss alone
    loss: float


@dataclass(frozen=True)
class Scaffold(Defaults):
    """SCAFFOLD (Karimireddy et al. 2020), Algorithm 1, option II."""

    server_lr: float = 1.0  # eta_g: the server's step along the mean of the answers
    cohort: int = 10  # S: clients per round; 0: all
    epochs: int = 1  # passes over a client's rows per round
    batch_size: int = 8  # rows per step
    lr: float = 0.1  # eta_l: local learning rate of plain SGD
    head_lr: float | None = None  # local learning rate of the classification head; null: lr
    weight_decay: float = 0.0  # decay of the local optimizer, part of the gradient
    clip: float | None = None  # bound on the gradient's norm before the correction; null: none
    steps: int | None = None  # K: local steps per round, instead of whole epochs

    state: ClassVar[type[State]] = State
    memory: ClassVar[type[Memory]] = Memory

    def __post_init__(self) -> None:
        check_ranges(self, above={"server_lr": 0})

    def init(self, env: ServerEnv) -> State:
        """x_0 and c = 0."""
        params = env.initial()
        return State(params, tree.zeros_like(params))

    def init_client(self, env: ClientEnv) -> Memory:
        """c_i = 0."""
        return Memory(tree.zeros_like(env.initial()))

    def round(self) -> tuple[Exchange, ...]:
        """One pass of the server's loop."""
        return (Exchange("train", Broadcast, Correction, sample(self.cohort), self.send, self.train, self.update),)

    def send(self, state: State, client: ClientId) -> Broadcast:
        """(x, c)."""
        return Broadcast(state.params, state.control)

    def train(
        self, down: Broadcast, memory: Memory, env: ClientEnv
    ) -> Generator[Fit, Fitted, tuple[Correction, Memory]]:
        """K corrected steps of SGD, then option II for the client's control variate."""
        optimizer = SGD(self.lr, weight_decay=self.weight_decay)
        drift = tree.sub(down.control, memory.control)
        fitted = yield ordinary_fit(self, down.params, env, optimizer=optimizer, drift=drift)
        moved = tree.sub(fitted.params, down.params)  # y_i - x
        per_step = {name: t / (fitted.steps * self.rate(name)) for name, t in moved.items()}
        change = tree.scale(tree.add(down.control, per_step), -1.0)  # c_i+ - c_i = -c + (x - y_i) / (K eta_l)
        up = Correction(moved, change, len(env.data), fitted.loss)
        return up, Memory(tree.add(memory.control, change))

    def rate(self, name: str) -> float:
        """eta_l of one parameter."""
        return self.head_lr if self.head_lr is not None and name.startswith("head.") else self.lr

    def update(self, state: State, ups: Mapping[ClientId, Correction], env: ServerEnv) -> State:
        """x + (eta_g / S) sum Delta y_i and c + (S / N) times the mean of Delta c_i."""
        move = tree.mean((up.params, 1.0) for up in ups.values())
        change = tree.mean((up.control, 1.0) for up in ups.values())
        return State(
            tree.axpy(self.server_lr, move, state.params),
            tree.axpy(len(ups) / len(env.clients), change, state.control),
            mean_loss(ups.values()),
        )

    def result(self, state: State) -> Params:
        """x."""
        return state.params


METHOD = Scaffold
