"""When to end a run before its last round: `run.stop` of the configuration.

The decision is a pure function of the figures so far, and what it remembers is plain data in the checkpoint, so a
resumed run ends where the uninterrupted one would have ended. (`seconds` is measured time; a limit on it ends two runs
on a busy and on an idle machine at different rounds, interrupted or not.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedpeft.core.metrics import better
from fedpeft.runs.units import count_text


@dataclass(frozen=True)
class Limits:
    """Where a run ends; None is no limit."""

    score: float | None = None  # the validation score that is good enough
    bytes: int | None = None  # down and up together, set-up included
    seconds: float | None = None  # of the whole run, earlier parts of a resumed one included
    patience: int | None = None  # evaluations in a row without a better score
    metric: str = "accuracy"  # which score that is, and so which way is better


@dataclass(frozen=True)
class Standing:
    """What has been seen so far."""

    best: float | None = None  # best score
    waited: int = 0  # evaluations since then

    def plain(self) -> dict[str, Any]:
        """As data that JSON can carry."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Standing:
        """The standing that `plain` wrote; an empty mapping gives a fresh one."""
        return cls(**plain)


def look(
    limits: Limits, standing: Standing, *, score: float | None, bytes: int, seconds: float
) -> tuple[Standing, str | None]:
    """The new standing after a round, and why the run is to end there (None: it goes on).

    Args:
        score: of the round's evaluation; None where the round was not evaluated. NaN never counts as better.
        bytes: all bytes of the run so far.
        seconds: all seconds of the run so far.
    """
    if score is not None:
        found = better(limits.metric, score, standing.best)
        standing = Standing(score, 0) if found else Standing(standing.best, standing.waited + 1)
    return standing, _reason(limits, standing, score, bytes, seconds)


def _reason(limits: Limits, standing: Standing, score: float | None, bytes: int, seconds: float) -> str | None:
    wanted = limits.score
    if wanted is not None and score is not None and (score == wanted or better(limits.metric, score, wanted)):
        return f"validation score {score:.4g} reached run.stop.score {wanted:g}"
    if limits.bytes is not None and bytes >= limits.bytes:
        return f"{bytes:,} bytes sent reached run.stop.bytes {limits.bytes:,}"
    if limits.seconds is not None and seconds >= limits.seconds:
        return f"{seconds:.1f} s reached run.stop.seconds {limits.seconds:g}"
    if limits.patience is not None and standing.waited >= limits.patience and score is not None:
        waited = count_text(standing.waited, "evaluation")
        return f"{waited} without a better score reached run.stop.patience {limits.patience}"
    return None
