"""Scores of a run's large model, steered and alone, after the run: of the global adapter, and of every client's own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedpeft.app.federation import Federation
from fedpeft.app.holding import SCORES, Holding, hold
from fedpeft.core.errors import RequestError
from fedpeft.core.examples import Examples
from fedpeft.core.tree import Params
from fedpeft.runs.history import OWN_PROXIES, PROXY
from fedpeft.runs.store import RunFolder

Metrics = dict[str, dict[str, float]]
WITHOUT = "leave the large model out (--without-large)"


@dataclass(frozen=True)
class Steering:
    """A run's large model with the adapter that steers it.

    Attributes:
        held: the large model, and what it said of the run's texts.
        params: the best-validated global adapter.
        alpha: that goes with it.
        own: each client's own adapter, as it is now; None: not asked for.
    """

    held: Holding
    params: Params
    alpha: float
    own: Callable[[], Iterable[Params]] | None = None

    def scores(self, split: str) -> Metrics:
        """Metrics by who says it, on a split of the run; nothing where the large model tells no losses.

        Every client's own adapter steers with the alpha that is best for it on the validation texts. What is told of
        these proxies is the mean over clients, each scored on all rows of the split (the baseline "local proxy").
        """
        found = self.held.scores(self.params, self.alpha, split)
        if not found or self.own is None:
            return found
        each = [self.held.scores(own, self.held.chosen(own), split)[PROXY] for own in self.own()]
        mean = {key: statistics.fmean(own[key] for own in each) for key in each[0]}
        return {**found, OWN_PROXIES: {**mean, "clients": len(each)}}

    def scores_of(self, data: Examples) -> Metrics:
        """As `scores`, on rows that are not the run's, of the global adapter alone."""
        return self.held.scores_of(self.params, self.alpha, data)

    @property
    def missing(self) -> str | None:
        """Why there are no scores; None: there are."""
        if self.held.scorable:
            return None
        return f"{self.held.large.caps.identity} tells a few candidates alone, and scores of given texts need all"


def steering(
    fed: Federation, folder: RunFolder, params: Params, own: Callable[[], Iterable[Params]] | None = None
) -> Steering | None:
    """Open a run's large model again; None where it had none.

    Args:
        params: the best-validated global adapter, whose alpha is the run's where the run has come to its end.

    Raises:
        RequestError: another large model than the run's, or one that does not answer.
    """
    try:
        held = hold(fed)
    except RequestError as error:
        raise RequestError(f"{error}; or {WITHOUT}") from error
    if held is None:
        return None
    manifest = folder.manifest()
    before, now = manifest.get("large_identity"), held.large.caps.identity
    if before != now:
        raise RequestError(f"the large model of {folder.path} was {before}, and is {now} now; restore it, or {WITHOUT}")
    if (folder.path / SCORES).is_dir():
        held.folder = folder.path
    told = manifest.get("proxy", {}).get("alpha") if manifest.get("status") == "finished" else None
    return Steering(held, params, held.chosen(params) if told is None else float(told), own)
