"""The metrics that can select: what each is of, and which way is better."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedpeft.core.errors import RequestError

Of: TypeAlias = Literal["labels", "text"]


@dataclass(frozen=True)
class Metric:
    """A score by which parameters are chosen.

    Attributes:
        of: what has to be predicted: labels, or text.
        lower: whether less is better; then it is a number of at least 1 without an upper bound, else a share.
    """

    of: Of
    lower: bool = False


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("labels"),
    "macro_f1": Metric("labels"),
    "matthews": Metric("labels"),
    "acc_f1": Metric("labels"),  # mean of accuracy and F1 of the second label
    "perplexity": Metric("text", lower=True),  # exp of the mean negative log-likelihood of the answers' tokens
    "choice_accuracy": Metric("text"),  # share of the rows with choices whose right one is the likeliest
}


def names(of: Of) -> tuple[str, ...]:
    """The metrics of labels or of text; the first one is the usual one."""
    return tuple(name for name, metric in METRICS.items() if metric.of == of)


def lower(metric: str) -> bool:
    """Whether less is better."""
    return metric in METRICS and METRICS[metric].lower


def better(metric: str, score: float, than: float | None) -> bool:
    """Whether a score beats another one; NaN beats nothing, and None is beaten by every number."""
    if math.isnan(score):
        return False
    return than is None or (score < than if lower(metric) else score > than)


def rank(metric: str, score: float) -> float:
    """A key that sorts the best score first."""
    return score if lower(metric) else -score


def check_metric(metric: str, classes: int = 0, of: Of = "labels") -> None:
    """Raise RequestError unless the metric exists, is of that, and can be computed for that many classes."""
    known = names(of)
    if metric == "loss":
        remedy = f"choose from {', '.join(known)}"
        raise RequestError(f"task.metric: loss cannot be selected (it is reported beside the metric); {remedy}")
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
        what = f"is of {METRICS[metric].of}, and the task of {of}" if metric in METRICS else "is unknown"
        raise RequestError(f"task.metric {metric!r} {what}; {remedy}")
    if metric == "acc_f1" and classes != 2:
        raise RequestError(f"task.metric acc_f1 needs 2 classes and the task has {classes}; choose macro_f1")
