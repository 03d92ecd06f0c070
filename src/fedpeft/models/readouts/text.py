"""What the formats `head` and `cloze` have in common: one sequence per row, as it was tokenised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.errors import FitError
from fedpeft.core.examples import Examples
from fedpeft.models.readouts import Item


class TextReadout:
    """The sequences of a format in which the label is no part of the text."""

    candidates = 1

    def training(self, client: int, data: Examples, row: int) -> Item:
        """The text."""
        return Item(client, data, row)

    def predicting(self, client: int, data: Examples, row: int) -> Sequence[Item]:
        """The text."""
        return (Item(client, data, row),)

    def length(self, item: Item) -> int:
        """Tokens of the text."""
        return len(item.data.tokens[item.row])

    def sequence(self, item: Item) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
        """The text as it was tokenised."""
        segments = item.data.segments
        return item.data.tokens[item.row], None if segments is None else segments[item.row]


def check_labels(data: Examples, classes: int, what: str) -> None:
    """Raise FitError unless every label is one of the classes.

    Args:
        what: who has the classes.
    """
    labels = data.labels
    if len(labels) and not 0 <= (odd := int(labels.min() if labels.min() < 0 else labels.max())) < classes:
        raise FitError(f"a label is {odd}; {what} classes 0 to {classes - 1}")
