"""No federation: every client trains an adapter of its own, alone. The bound that a federated method must beat.

The baseline called "local" in papers on federated learning, e.g. Smith, Chiang, Sanjabi, Talwalkar: Federated
Multi-Task Learning, NeurIPS 2017, arXiv 1705.10467, which compares with local and global models.

Paper to code

| paper | here |
|---|---|
| w_t, the model of client t | `Memory.params`; the client's own model, `personal` |
| training on client t's data alone | `train`, which goes on from the last turn, with the optimizer's moments |

Clients take turns: each round trains the next `cohort` clients in the order of their ids, so after N / cohort rounds
everybody has had exactly one turn, and a run costs each client as much computation as FedAvg does on average.
With `cohort: 0` everybody trains in every round. There is no global model; `result` is the fresh adapter that
everybody starts from, and its score says what no training gives. Look at the personalised scores.

Departures: none. The order is fixed, not drawn, so that all clients train equally long.

Traffic per client and round: down = nothing; up = nothing
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv
from fedpeft.core.fit import Fit, Fitted, Moments
from fedpeft.core.method import Defaults, check_ranges, mean_loss, ordinary_fit
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # the fresh adapter, never changed
    turns: int = 0  # how many turns have been given out
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Memory:
    """What a client keeps between its turns: its own model and optimizer."""

    params: Params
    moments: Moments = field(default_factory=Moments)


@dataclass(frozen=True)
class Report:
    """How the client's training went; no parameter leaves it."""

    examples: int
    loss: float


@dataclass(frozen=True)
class Local(Defaults):
    """Local training without any exchange of parameters."""

    cohort: int = 10  # clients that have their turn in a round; 0: all
    epochs: int = 1  # passes over a client's rows per turn
    batch_size: int = 8  # rows per step
    lr: float = 1e-3  # learning rate
    head_lr: float | None = None  # learning rate of the classification head; null: lr
    optimizer: Literal["adamw", "sgd"] = "adamw"  # its moments live on from turn to turn
    weight_decay: float = 0.0  # decay of the optimizer
    clip: float | None = None  # bound on the gradient's norm at every step; null: none
    steps: int | None = None  # steps per turn, instead of whole epochs

    state: ClassVar[type[State]] = State
    memory: ClassVar[type[Memory]] = Memory

    def __post_init__(self) -> None:
        check_ranges(self)

    def init(self, env: ServerEnv) -> State:
        """The fresh adapter."""
        return State(env.initial())

    def init_client(self, env: ClientEnv) -> Memory:
        """The same fresh adapter."""
        return Memory(env.initial())

    def round(self) -> tuple[Exchange, ...]:
        """The next clients have their turn."""
        return (Exchange("train", Nothing, Report, self.next, self.send, self.train, self.count),)

    def next(self, state: State, clients: Sequence[ClientId], rng: Rng) -> list[ClientId]:
        """The clients whose turn it is, in the order of their ids, round and round."""
        n = len(clients) if self.cohort == 0 else min(self.cohort, len(clients))
        return [clients[(state.turns + i) % len(clients)] for i in range(n)]

    def send(self, state: State, client: ClientId) -> Nothing:
        """Nothing but the word that it is the client's turn."""
        return Nothing()

    def train(self, down: Nothing, memory: Memory, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Report, Memory]]:
        """Train on from where the client's last turn ended."""
        fitted = yield ordinary_fit(self, memory.params, env, moments=memory.moments)
        return Report(len(env.data), fitted.loss), Memory(fitted.params, fitted.moments)

    def count(self, state: State, ups: Mapping[ClientId, Report], env: ServerEnv) -> State:
        """Whoever was asked has had the turn, lost or not."""
        return replace(state, turns=state.turns + len(env.cohort), loss=mean_loss(ups.values()))

    def result(self, state: State) -> Params:
        """The fresh adapter: there is no global model."""
        return state.params

    def personal(self, params: Params, memory: Memory) -> Params:
        """The client's own model."""
        return memory.params


METHOD = Local
