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

    @cached_property
    def rarities(self) -> NDArray[np.float64]:
        """(rows,) -sum over a row's tokens of the log of the token's share among all rows (Platanios et al. 2019)."""
        every = np.concatenate([*self.tokens, np.zeros(0, np.int32)])
        known, counts = np.unique(every, return_counts=True)
        cost = -np.log(counts / max(1, len(every)))
        return np.array([cost[np.searchsorted(known, own)].sum() for own in self.tokens])

    def truncated(self, tokens: int) -> Examples:
        """The same rows, cut to so many tokens: the first ones and the last, which may be a special one.

        A mask that stands for the label is never cut, nor what stands behind it: the text before it is.
        """
        cuts = [self._kept(row, tokens) for row in range(len(self))]
        own = tuple(t[kept] for t, kept in zip(self.tokens, cuts, strict=True))
        segments = self.segments and tuple(s[kept] for s, kept in zip(self.segments, cuts, strict=True))
        marks = self.marks
        if marks is not None:
            marks = np.array([int(np.flatnonzero(k == m)[0]) for k, m in zip(cuts, marks, strict=True)], np.int64)
        return Examples(own, self.labels, segments, marks)

    def _kept(self, row: int, tokens: int) -> NDArray[np.int64]:
        """The places of a row that stay."""
        length = len(self.tokens[row])
        if length <= tokens:
            return np.arange(length)
        behind = 1 if self.marks is None or self.marks[row] < tokens - 1 else length - int(self.marks[row])
        first = max(1, tokens - behind)
        return np.concatenate([np.arange(first), np.arange(max(first, length - behind), length)])

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
