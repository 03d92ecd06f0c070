"""Tokenised examples: what a client's data is to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.rng import Rng


@dataclass(frozen=True)
class Examples:
    """Rows of token ids with their targets; immutable, cheap to take a part of.

    Args:
        tokens: one int32 array of token ids per row, special tokens included, not padded, already truncated.
        labels: (rows,) class index of each row, int64.
        segments: token-type ids like `tokens` where the model has them (text pairs), else None.
        marks: (rows,) position of the mask that stands for the label, int64; None where the format has none.
    """

    tokens: tuple[NDArray[np.int32], ...]
    labels: NDArray[np.int64]
    segments: tuple[NDArray[np.int32], ...] | None = None
    marks: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per row, (rows,)."""
        return np.fromiter((len(t) for t in self.tokens), dtype=np.int64, count=len(self.tokens))

    def take(self, rows: Sequence[int] | NDArray[np.integer]) -> Examples:
        """The given rows in the given order; the token arrays are shared, not copied."""
        index = [int(i) for i in rows]
        segments = None if self.segments is None else tuple(self.segments[i] for i in index)
        marks = None if self.marks is None else self.marks[index]
        return Examples(tuple(self.tokens[i] for i in index), self.labels[index], segments, marks)

    def distinct(self, limit: int) -> list[int]:
        """The first rows of which no two have the same tokens, at most `limit` of them."""
        seen: dict[bytes, int] = {}
        for row, tokens in enumerate(self.tokens):
            if len(seen) == limit:
                break
            seen.setdefault(tokens.tobytes(), row)
        return list(seen.values())

    def epochs(self, epochs: int, batch_size: int, rng: Rng) -> list[list[int]]:
        """Row indices: each epoch a fresh permutation, cut into batches; the last batch of an epoch may be short."""
        return epoch_batches(len(self), epochs, batch_size, rng)


def epoch_batches(rows: int, epochs: int, batch_size: int, rng: Rng) -> list[list[int]]:
    """`epochs` permutations of `rows` indices, each cut into batches of `batch_size` (the last may be short)."""
    batches: list[list[int]] = []
    for _ in range(epochs):
        order = rng.permutation(rows).tolist()
        batches += [order[i : i + batch_size] for i in range(0, rows, batch_size)]
    return batches
