"""RoLoRA: the two factors take turns, so that every mean is exact.

Chen, Guo, Ju, Dalal, Zhu, Khisti: Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, NeurIPS
2025, arXiv 2502.01755.

Paper to code

| paper | here |
|---|---|
| alternating minimisation: one factor trains, the other is frozen and everybody's | `train`, as `State.side` says |
| mean of the factor that trained; the mean of the products is the product with it | `average` |

Departures: the first round trains B, since at B = 0 the gradient of A is zero; the turns change with every round. The
mean is weighted by examples. The head, where there is one, trains in every round.

Traffic per client and round: down = params; up = B and head in odd rounds, A and head in even ones
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.core import pairs, tree
from fedpeft.core.averaging import Tuning
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Update, Weights, matching
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import mean_loss, ordinary_fit
from fedpeft.core.tree import Params

OTHER = {"A": "B", "B": "A"}


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # A, B and the head
    side: str = "B"  # the factor whose turn it is
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Turn:
    """What the server sends."""

    params: Params
    side: str  # the factor to train, A or B


@dataclass(frozen=True)
class RoLora(Tuning):
    """RoLoRA (Chen et al. 2025): A and B in turn."""

    state: ClassVar[type[State]] = State

    def init(self, env: ServerEnv) -> State:
        """The fresh adapter; B begins."""
        return State(env.initial())

    def round(self) -> tuple[Exchange, ...]:
        """One round over the factor whose turn it is."""
        return (Exchange("train", Turn, Update, sample(self.cohort), self.send, self.train, self.average, its_turn),)

    def send(self, state: State, client: ClientId) -> Turn:
        """Both factors, and which one is to be trained."""
        return Turn(state.params, state.side)

    def train(self, down: Turn, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train one factor and the head; the other factor acts, frozen."""
        names = trained(down).keys()
        fitted = yield ordinary_fit(self, down.params, env, train=frozenset(names))
        return Update({name: fitted.params[name] for name in names}, len(env.data), fitted.loss), memory

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """The mean of the factor; then it is the other's turn."""
        mean = tree.mean((up.params, up.examples) for up in ups.values())
        return State(tree.overlay(state.params, mean), OTHER[state.side], mean_loss(ups.values()))

    def result(self, state: State) -> Params:
        """Both factors as they are."""
        return state.params


def trained(down: Turn) -> Params:
    """What a client trains and sends back: the factor whose turn it is, and the head."""
    return pairs.others(down.params, OTHER[down.side])


def its_turn(down: Turn, up: Update) -> None:
    """Raise RecordError unless the answer holds the factor whose turn it is."""
    matching(Weights(trained(down)), up)


METHOD = RoLora
