"""Federated averaging of whatever adapter a method brings (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1).

Many methods are an adapter, and averaging: they state the adapter, and share the rest from here. `methods/fedavg.py` is
the algorithm written out.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Update, Weights
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import Defaults, check_ranges, mean_loss, name_of, ordinary_fit
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class Averaged:
    """What the server knows."""

    params: Params  # the mean of the last cohort's adapters
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Tuning(Defaults):
    """The fields of ordinary local training, for methods of one kind of adapter.

    A subclass is a frozen dataclass, and brings an `adapter()` unless it tunes LoRA; it may give the fields other
    defaults.
    """

    cohort: int = 10  # clients per round; 0: all
    epochs: int = 1  # passes over a client's rows per round
    batch_size: int = 8  # rows per step
    lr: float = 1e-3  # local learning rate of AdamW, whose moments start from zero in every round
    head_lr: float | None = None  # local learning rate of the classification head; null: lr
    weight_decay: float = 0.0  # decay of the local optimizer
    clip: float | None = None  # bound on the gradient's norm at every local step; null: none
    steps: int | None = None  # local steps per round, instead of whole epochs

    def __post_init__(self) -> None:
        check_ranges(self)

    def accepts(self, spec: AdapterSpec) -> str | None:
        """The method's own kind of adapter alone: with another it would be another method."""
        return only(self, spec)


@dataclass(frozen=True)
class Averaging(Tuning):
    """Every client of a cohort trains the adapter it is sent; the server takes the mean, weighted by examples."""

    state: ClassVar[type[Averaged]] = Averaged

    def init(self, env: ServerEnv) -> Averaged:
        """The fresh adapter."""
        return Averaged(env.initial())

    def round(self) -> tuple[Exchange, ...]:
        """One round."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.train, self.average),)

    def send(self, state: Averaged, client: ClientId) -> Weights:
        """The mean."""
        return Weights(state.params)

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train it on the client's own rows."""
        fitted = yield ordinary_fit(self, down.params, env)
        return Update(fitted.params, len(env.data), fitted.loss), memory

    def average(self, state: Averaged, ups: Mapping[ClientId, Update], env: ServerEnv) -> Averaged:
        """The mean of the answers, weighted by examples; what did not travel stays."""
        mean = tree.mean((up.params, up.examples) for up in ups.values())
        return Averaged(tree.overlay(state.params, mean), mean_loss(ups.values()))

    def result(self, state: Averaged) -> Params:
        """The mean."""
        return state.params


def only(method: Defaults, spec: AdapterSpec) -> str | None:
    """None where the adapter is of the kind that a method brings itself, else a sentence that says what to use."""
    own = method.adapter().kind
    if spec.kind == own:
        return None
    name = name_of(method)
    return f"method {name} trains adapter.kind {own}, not {spec.kind}; leave adapter.kind out, or use method fedavg"
