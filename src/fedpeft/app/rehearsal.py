"""A run without training: the method's own exchanges over the run's own wire, clock and cohorts.

Every Fit is answered at once, with its parameters moved a little, so what travels has the lengths of a real run's
records, and work is counted as the model counts it. What a method computes besides Fits is not known without doing it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from fedpeft.app.federation import Federation
from fedpeft.core import tree
from fedpeft.core.errors import ModelError
from fedpeft.core.federate import Done, federate
from fedpeft.core.fit import Fit, Fitted, Moments
from fedpeft.models.hf import HFModel
from fedpeft.runs.clock import Clock, slowest

log = logging.getLogger("fedpeft")

MOST_BYTES, MOST_TURNS = 2**27, 1000  # after which the rounds that are left are taken for like the last ones
LOSS = 0.7071067811865476  # of every step: as long in a record as a real one
EXPECTED = ("not available", "late")  # reasons to be lost that a run has, too
COMPUTING = (
    "fit", "fisher", "fisher_many", "hessian", "hidden", "logits", "token_logits", "losses", "item_losses", "outcomes",
    "score", "sensitivity", "distil",
)  # fmt: skip


@dataclass(frozen=True)
class Rehearsal:
    """What a run would cost.

    Attributes:
        rounds: that were played; the costs of further ones are those of the last half of these.
        turns: of all clients, in all rounds.
        rows, flops: of a mean turn.
    """

    rounds: int
    turns: float
    bytes_down: float
    bytes_up: float
    simulated_seconds: float
    rows: float
    flops: float


class Still:
    """A model that trains nothing: it counts the work of a Fit, and refuses everything else that costs a pass."""

    def __init__(self, model: HFModel) -> None:
        self._model = model
        self.refused = False

    def __getattr__(self, name: str) -> Any:
        if name in COMPUTING:
            self.refused = True
            raise ModelError(f"{name} is not known without computing")
        return getattr(self._model, name)

    def fit_many(self, fits: Sequence[Fit]) -> list[Fitted | Exception]:
        """The parameters, each number that trains moved a little; losses and moments that no training gave."""
        return [self._answer(fit) for fit in fits]

    def _answer(self, fit: Fit) -> Fitted:
        generator = torch.Generator().manual_seed(fit.seed % 2**63)
        moved = dict(fit.params)
        for name in fit.trained if fit.batches else ():
            t = fit.params[name]
            moved[name] = t + 1e-3 * torch.randn(t.shape, generator=generator).to(t)
        ones = {name: torch.ones_like(fit.params[name]) for name in fit.trained}
        steps, rows = len(fit.batches), sum(map(len, fit.batches))
        return Fitted(moved, (LOSS,) * steps, steps, rows, Moments(steps, ones, ones), *self._model.cost(fit))


def rehearse(fed: Federation) -> Rehearsal | None:
    """The costs of the run; None where a set-up, other work than training or the size of what travels forbid it."""
    if fed.method.setup() or 8 * fed.cohort * tree.count(fed.initial) > MOST_BYTES:
        return None
    still = Still(fed.model)
    played = replace(fed, model=cast(HFModel, still))
    run, rounds = fed.config.run, list[_Round]()
    loop = federate(
        fed.method, played.transport(), played.model, rounds=run.rounds, seed=run.seed, resources=fed.resources,
        quorum=run.quorum, clients=fed.invited,
    )  # fmt: skip
    try:
        for _, exchanges in itertools.groupby(loop, key=lambda done: done.round):
            rounds.append(_costs(list(exchanges), fed.clock))
            if still.refused or rounds[-1].failed:
                return None
            if sum(r.sent for r in rounds) > MOST_BYTES or sum(r.turns for r in rounds) > MOST_TURNS:
                break
    except Exception as error:  # nobody's answer, or a server that cannot work with parameters that nobody trained
        log.debug("no rehearsal: %s", error)
        return None
    return _whole(rounds, run.rounds)


@dataclass(frozen=True)
class _Round:
    """The costs of one round."""

    turns: int
    down: int
    up: int
    seconds: float
    rows: int
    flops: int
    failed: bool  # whether a client's work came to nothing, though its device was there in time

    @property
    def sent(self) -> int:
        return self.down + self.up


def _costs(exchanges: Sequence[Done], clock: Clock) -> _Round:
    receipts = [receipt for done in exchanges for receipt in done.receipts]
    return _Round(
        len(receipts),
        sum(receipt.bytes_down for receipt in receipts),
        sum(receipt.bytes_up for receipt in receipts),
        sum(slowest(done.receipts) for done in exchanges),
        sum(receipt.meter.examples for receipt in receipts),
        sum(clock.flops(receipt.meter) for receipt in receipts),
        any(receipt.lost is not None and not receipt.lost.startswith(EXPECTED) for receipt in receipts),
    )


def _whole(rounds: Sequence[_Round], total: int) -> Rehearsal:
    late, left = rounds[len(rounds) // 2 :], total - len(rounds)

    def over(key: Callable[[_Round], float]) -> float:
        return sum(map(key, rounds)) + left * sum(map(key, late)) / len(late)

    turns = over(lambda r: r.turns)
    return Rehearsal(
        rounds=len(rounds),
        turns=turns,
        bytes_down=over(lambda r: r.down),
        bytes_up=over(lambda r: r.up),
        simulated_seconds=over(lambda r: r.seconds),
        rows=over(lambda r: r.rows) / turns,
        flops=over(lambda r: r.flops) / turns,
    )
