"""Pooled training: all rows in one place, as if privacy were no matter. The bound above the federated methods.

The baseline called "centralized" in papers on federated learning, e.g. standard SGD on the full training set in McMahan
et al. 2017, arXiv 1602.05629. It is written as a method so that its runs are saved, scored and compared alike.

Paper to code

| paper | here |
|---|---|
| the union of all clients' data | the data of the one client that a `pooled` method runs on |
| the minibatches of SGD | `batches`: consecutive parts of an endless stream of shuffled passes over the rows |
| the learning curve by examples seen | by rounds; a round takes `share` times all rows, as many as a cohort would see |

The stream needs no memory: pass number e is shuffled by its own place of randomness, and the part that a round takes
follows from the round's number. The optimizer's moments live on from round to round.

Departures: none. The traffic below is that of a federation of one client, kept so that all runs have the same shape.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fedpeft.core.cohort import everyone
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, ServerEnv, Update, Weights
from fedpeft.core.fit import Fit, Fitted, Moments
from fedpeft.core.method import Defaults, check_ranges, ordinary_fit
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params
    loss: float | None = None  # mean training loss of the last round; None before the first


@dataclass(frozen=True)
class Memory:
    """What lives on from round to round."""

    moments: Moments = field(default_factory=Moments)


@dataclass(frozen=True)
class Centralized(Defaults):
    """Ordinary training on everybody's rows."""

    share: float = 0.1  # rows per round over all rows; cohort / clients makes a round that of a federated method
    epochs: int = 1  # how often that share is taken in a round; the epochs of the federated method
    batch_size: int = 8  # rows per step
    lr: float = 1e-3  # learning rate
    head_lr: float | None = None  # learning rate of the classification head; null: lr
    optimizer: Literal["adamw", "sgd"] = "adamw"  # its moments live on from round to round
    weight_decay: float = 0.0  # decay of the optimizer
    clip: float | None = None  # bound on the gradient's norm at every step; null: none
    steps: int | None = None  # steps per round, instead of share

    pooled: ClassVar[bool] = True
    state: ClassVar[type[State]] = State
    memory: ClassVar[type[Memory]] = Memory

    def __post_init__(self) -> None:
        check_ranges(self, above={"share": 0})

    def init(self, env: ServerEnv) -> State:
        """The fresh adapter."""
        return State(env.initial())

    def init_client(self, env: ClientEnv) -> Memory:
        """An optimizer that has made no step."""
        return Memory()

    def round(self) -> tuple[Exchange, ...]:
        """The next part of the stream."""
        return (Exchange("train", Weights, Update, everyone, self.send, self.train, self.keep),)

    def send(self, state: State, client: ClientId) -> Weights:
        """The parameters as they are."""
        return Weights(state.params)

    def train(self, down: Weights, memory: Memory, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Memory]]:
        """Train on from where the last round ended."""
        fitted = yield ordinary_fit(self, down.params, env, batches=self.batches(env), moments=memory.moments)
        return Update(fitted.params, len(env.data), fitted.loss), Memory(fitted.moments)

    def rows_of_round(self, rows: float) -> float:
        """The share of them."""
        return super().rows_of_round(rows) * (self.share if self.steps is None else 1.0)

    def batches(self, env: ClientEnv) -> list[list[int]]:
        """The rows of this round, cut into batches; the last may be short."""
        rows = len(env.data)
        size = self.steps * self.batch_size if self.steps else max(1, round(self.share * self.epochs * rows))
        start = (env.round - 1) * size
        passes = {e: _shuffled(rows, env.seed, e) for e in range(start // rows, (start + size - 1) // rows + 1)}
        part = [passes[i // rows][i % rows] for i in range(start, start + size)]
        return [part[i : i + self.batch_size] for i in range(0, size, self.batch_size)]

    def keep(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """The only answer there is."""
        (up,) = ups.values()
        return State(up.params, up.loss)

    def result(self, state: State) -> Params:
        """The parameters as they are."""
        return state.params


def _shuffled(rows: int, seed: int, number: int) -> list[int]:
    order: list[int] = rng_for(seed, "stream", round=number).permutation(rows).tolist()
    return order


METHOD = Centralized
