"""What formats have in common: those that predict labels, and those with one sequence per row, as it was tokenised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.core.errors import FitError
from fedpeft.core.examples import Examples
from fedpeft.core.tree import Params
from fedpeft.models.readouts import Item, Passes


class LabelReadout:
    """How a format that predicts labels is scored: rows weigh alike, and the likeliest class counts."""

    def weight(self, item: Item) -> int:
        """1."""
        return 1

    def outcomes(self, model: Passes, params: Params | None, data: Examples) -> Tensor:
        """(rows, classes) logits."""
        return model.logits(params, data)

    def sums(self, outcomes: Tensor, data: Examples) -> dict[str, Tensor]:
        """See `classification_sums`."""
        return classification_sums(outcomes, torch.from_numpy(data.labels))


class TextReadout(LabelReadout):
    """The sequences of a format in which the label is no part of the text."""

    candidates = 1

    def training(self, client: int, data: Examples, row: int) -> Item:
        """The text."""
        return Item(client, data, row)

    def predicting(self, client: int, data: Examples, row: int) -> Sequence[Item]:
        """The text."""
        return (Item(client, data, row),)

    def known(self, item: Item) -> int | None:
        """None."""
        return None

    def length(self, item: Item) -> int:
        """Tokens of the text."""
        return len(item.data.tokens[item.row])

    def sequence(self, item: Item) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
        """The text as it was tokenised."""
        segments = item.data.segments
        return item.data.tokens[item.row], None if segments is None else segments[item.row]


def classification_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Confusion matrix (classes, classes; rows true), summed cross-entropy (float64) and count, from logits."""
    classes = logits.shape[1]
    predicted = logits.argmax(dim=1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)
    loss = F.cross_entropy(logits.double(), labels, reduction="sum") if len(labels) else torch.zeros(()).double()
    return {"confusion": confusion, "loss": loss, "n": torch.tensor(len(labels))}


def check_labels(data: Examples, classes: int, what: str) -> None:
    """Raise FitError unless every label is one of the classes.

    Args:
        what: who has the classes.
    """
    labels = data.labels
    if len(labels) and not 0 <= (odd := int(labels.min() if labels.min() < 0 else labels.max())) < classes:
        raise FitError(f"a label is {odd}; {what} classes 0 to {classes - 1}")
