"""Scores of a run's large model, steered and alone, after the run: of the global adapter, and of every client's own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from fedpeft.app.federation import Federation
from fedpeft.app.holding import SCORES, Holding, hold
from fedpeft.core.errors import RequestError
from fedpeft.core.examples import Examples
from fedpeft.core.tree import Params
from fedpeft.models.hf import HFModel
from fedpeft.models.sessions import Span, Speaker
from fedpeft.runs.history import ENSEMBLE, OWN_PROXIES, PROXY
from fedpeft.runs.store import RunFolder

Metrics = dict[str, dict[str, float]]
WITHOUT = "leave the large model out (--without-large)"


@dataclass(frozen=True)
class Chorus:
    """Tuned small models that speak as one, with the mean of their logits; they score given texts and do not decode."""

    speakers: tuple[Speaker, ...]

    @property
    def model(self) -> HFModel:
        """The model that all of them are."""
        return self.speakers[0].model

    def scores(self, sequences: Sequence[Sequence[int]], spans: Sequence[Span] | None = None) -> list[Tensor]:
        """See `Speaker.scores`."""
        total = self.speakers[0].scores(sequences, spans)
        for speaker in self.speakers[1:]:
            total = [own + more for own, more in zip(total, speaker.scores(sequences, spans), strict=True)]
        return [own / len(self.speakers) for own in total]


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

        Every client's own adapter steers with the alpha that the run would choose for it: `proxy.alpha` where that is a
        number, else by `proxy.select` on the validation texts. What is told of these proxies is the mean over clients,
        each scored on all rows of the split (the baseline "local proxy"). Their ensemble is steered by the mean of
        their changes, z_L + alpha mean_k (z_Tk - z_B), with an alpha of least loss.
        """
        held = self.held
        found = held.scores(self.params, self.alpha, split)
        if not found or self.own is None:
            return found
        params = list(self.own())
        each = [held.scores(own, held.chosen(own), split)[PROXY] for own in params]
        mean = {key: statistics.fmean(own[key] for own in each) for key in each[0]}
        clients = {"clients": len(each)}
        return {**found, OWN_PROXIES: mean | clients, ENSEMBLE: self._ensemble(params, split) | clients}

    def _ensemble(self, params: Sequence[Params], split: str) -> dict[str, float]:
        held, fixed = self.held, self.held.fed.config.proxy.alpha
        chorus = Chorus(tuple(Speaker(held.fed.model, own) for own in params))
        trio = replace(held.trio(params[0]), tuned=cast(Speaker, chorus))  # as far as given texts are scored
        alpha = held.curve_of(trio).best if fixed == "auto" else float(fixed)
        return held.scores_with(trio, alpha, split)[PROXY]

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
    finished = manifest.get("status") == "finished"
    if finished and (folder.path / SCORES).is_dir():  # while a run goes on, what it keeps is its own
        held.folder = folder.path
    told = manifest.get("proxy", {}).get("alpha") if finished else None
    return Steering(held, params, held.chosen(params) if told is None else float(told), own)
