"""Scores of models, from sums that pool over clients.

A classifier's `score` gives, for some rows, `confusion` (K, K) int64 with true classes as rows and predicted ones as
columns, `loss` the sum of the cross-entropies, and `n` the number of rows. A language model's gives `loss` the summed
negative log-likelihood of all answer tokens, `tokens` their number, `n`, and where rows have choices `choices` and
`hits`. Sums of two clients add up to the sums of their pooled rows, so a federated score equals the score that one
would get with all rows in one place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedpeft.core.errors import DataError
from fedpeft.core.exchange import ClientId
from fedpeft.core.metrics import check_metric, names

Score: TypeAlias = Mapping[str, Tensor]

METRICS = names("labels")


def pool(scores: Iterable[Score]) -> dict[str, Tensor]:
    """The sums over all rows of all scores."""
    total: dict[str, Tensor] = {}
    for score in scores:
        for name, value in score.items():
            if name not in total:
                total[name] = value.clone()
            elif total[name].shape != value.shape:
                shapes = f"{tuple(total[name].shape)} and {tuple(value.shape)}"
                raise DataError(f"scores with {name} of shapes {shapes} cannot be pooled; use the same label list")
            else:
                total[name] += value
    if not total:
        raise DataError("no score to pool; at least one client must have rows to evaluate")
    return total


def metrics_of(score: Score, metric: str = "accuracy") -> dict[str, float]:
    """What the sums are of: labels (accuracy, loss, the task's own metric) or text (perplexity, loss, choices)."""
    return _of_text(score, metric) if "tokens" in score else _of_labels(score, metric)


def _of_labels(score: Score, metric: str) -> dict[str, float]:
    """Accuracy, mean loss and the task's own metric.

    Where a quotient is 0 / 0 (no rows, a class that neither occurs nor is predicted, a constant predictor's
    correlation) it is 0, as in scikit-learn. `acc_f1` is the mean of accuracy and of the F1 of class 1 (GLUE's MRPC and
    QQP) and comes with both parts.
    """
    counts = score["confusion"].cpu().numpy().astype(np.int64)
    check_metric(metric, len(counts))
    rows = int(score["n"])
    found = {"accuracy": _ratio(int(np.trace(counts)), int(counts.sum())), "loss": _ratio(float(score["loss"]), rows)}
    if metric == "macro_f1":
        found[metric] = _macro_f1(counts)
    elif metric == "matthews":
        found[metric] = _matthews(counts)
    elif metric == "acc_f1":
        found["f1"] = _f1(counts, 1)
        found[metric] = (found["accuracy"] + found["f1"]) / 2
    return found


def _of_text(score: Score, metric: str) -> dict[str, float]:
    """Mean negative log-likelihood of a token in nats, its exponential, bits per byte, and the accuracy of choices.

    The perplexity is exp(sum of all losses / number of all tokens): rows weigh by their tokens. A loss above 700 nats,
    whose exponential no float holds, gives infinity. `choice_accuracy` is there where rows have choices, or where it
    was asked for (0 where none has).
    """
    check_metric(metric, of="text")
    loss = _ratio(float(score["loss"]), int(score["tokens"]))
    found = {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss}
    if size := int(score.get("bytes", 0)):  # comparable between tokenizers
        found["bits_per_byte"] = float(score["loss"]) / math.log(2) / size
    choices = int(score.get("choices", 0))
    if choices or metric == "choice_accuracy":
        found["choice_accuracy"] = _ratio(int(score.get("hits", 0)), choices)
    return found


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _f1(counts: NDArray[np.int64], k: int) -> float:
    """F1 of class k: 2 TP / (2 TP + FP + FN)."""
    return _ratio(2 * int(counts[k, k]), int(counts[k].sum() + counts[:, k].sum()))


def _macro_f1(counts: NDArray[np.int64]) -> float:
    """The mean F1 over the classes that occur or are predicted."""
    present = np.flatnonzero(counts.sum(0) + counts.sum(1))
    return _ratio(math.fsum(_f1(counts, int(k)) for k in present), len(present))


def _matthews(counts: NDArray[np.int64]) -> float:
    """The correlation of true and predicted classes (R_K of Gorodkin 2004, doi 10.1016/j.compbiolchem.2004.09.006).

    In whole numbers up to the last step, so that it is exact at any number of rows.
    """
    true, predicted = [int(n) for n in counts.sum(1)], [int(n) for n in counts.sum(0)]
    total = sum(true)
    covariance = int(np.trace(counts)) * total - sum(t * p for t, p in zip(true, predicted, strict=True))
    spread = (total**2 - sum(p * p for p in predicted)) * (total**2 - sum(t * t for t in true))
    return covariance / math.sqrt(spread) if spread else 0.0


def constant_score(train_labels: ArrayLike, labels: ArrayLike, classes: int) -> dict[str, Tensor]:
    """The score of predicting the most frequent training label for every row (ties: the smaller label).

    Its loss is that of the training labels' frequencies with one added to each count, so that a label which never
    occurred costs something finite.
    """
    seen = _histogram(train_labels, classes)
    true = _histogram(labels, classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion[:, int(seen.argmax())] = torch.from_numpy(true)
    surprise = np.log((seen.sum() + classes) / (seen + 1))
    return {
        "confusion": confusion,
        "loss": torch.tensor(float(true @ surprise), dtype=torch.float64),
        "n": torch.tensor(int(true.sum()), dtype=torch.int64),
    }


def majority(train_labels: ArrayLike, labels: ArrayLike, classes: int, metric: str = "accuracy") -> dict[str, float]:
    """What always predicting the most frequent training label scores; see `constant_score`.

    Args:
        train_labels: (rows,) class indices of all training rows.
        labels: (rows,) class indices of the rows that are scored.
    """
    return metrics_of(constant_score(train_labels, labels, classes), metric)


def label_prior(
    train_labels: Mapping[ClientId, ArrayLike],
    labels: Mapping[ClientId, ArrayLike],
    classes: int,
    metric: str = "accuracy",
) -> dict[str, float]:
    """What each client scores that always predicts its own most frequent training label, pooled over clients.

    The bar for personalised models: on skewed clients it is high, and a model that only learned who it belongs to
    reaches it.
    """
    nobody: Sequence[int] = ()
    scores = (constant_score(train_labels.get(c, nobody), rows, classes) for c, rows in labels.items())
    return metrics_of(pool(scores), metric)


def _histogram(labels: ArrayLike, classes: int) -> NDArray[np.int64]:
    flat = np.asarray(labels, dtype=np.int64).reshape(-1)
    if flat.size and not (flat.min() >= 0 and flat.max() < classes):
        odd = flat.min() if flat.min() < 0 else flat.max()
        raise DataError(f"label {odd} is outside 0 to {classes - 1}; check the task's labels")
    return np.bincount(flat, minlength=classes).astype(np.int64)
