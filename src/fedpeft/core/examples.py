"""Tokenised examples: what a client's data is to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.rng import Rng


@dataclass(frozen=True)
class Choices:
    """Answers of which one is right.

    Args:
        tokens: of each answer, int32.
        right: which one.
    """

    tokens: tuple[NDArray[np.int32], ...]
    right: int


@dataclass(frozen=True)
class Examples:
    """Rows of token ids with their targets; immutable, cheap to take a part of.

    Args:
        tokens: one int32 array of token ids per row, special tokens included, not padded, already truncated.
        labels: (rows,) class index of each row, int64.
        segments: token-type ids like `tokens` where the model has them (text pairs), else None.
        marks: (rows,) position of the mask that stands for the label, int64; None where the format has none.
        starts: (rows,) how many tokens stand before a row's answer, at least 1, int64; the tokens from there on
            are to be predicted. None where no answer is part of the tokens.
        choices: the answers that a row offers, None for a row that offers none; None: no row does.
    """

    tokens: tuple[NDArray[np.int32], ...]
    labels: NDArray[np.int64]
    segments: tuple[NDArray[np.int32], ...] | None = None
    marks: NDArray[np.int64] | None = None
    starts: NDArray[np.int64] | None = None
    choices: tuple[Choices | None, ...] | None = None

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
        starts = None if self.starts is None else self.starts[index]
        choices = None if self.choices is None else tuple(self.choices[i] for i in index)
        return Examples(tuple(self.tokens[i] for i in index), self.labels[index], segments, marks, starts, choices)

    @cached_property
    def rarities(self) -> NDArray[np.float64]:
        """(rows,) -sum over a row's tokens of the log of the token's share among all rows (Platanios et al. 2019)."""
        every = np.concatenate([*self.tokens, np.zeros(0, np.int32)])
        known, counts = np.unique(every, return_counts=True)
        cost = -np.log(counts / max(1, len(every)))
        return np.array([cost[np.searchsorted(known, own)].sum() for own in self.tokens])

    def truncated(self, tokens: int) -> Examples:
        """The same rows, cut to so many tokens: the first ones and the last, which may be a special one.

        A mask that stands for the label is never cut, nor what stands behind it: the text before it is. Of a row with
        an answer, the answer keeps its first tokens, half of all at least, and what stands before it its last ones.
        """
        cuts = [self._kept(row, tokens) for row in range(len(self))]
        own = tuple(t[kept] for t, kept in zip(self.tokens, cuts, strict=True))
        segments = self.segments and tuple(s[kept] for s, kept in zip(self.segments, cuts, strict=True))
        marks = self.marks
        if marks is not None:
            marks = np.array([int(np.flatnonzero(k == m)[0]) for k, m in zip(cuts, marks, strict=True)], np.int64)
        starts = self.starts
        if starts is not None:
            starts = np.array([int((k < s).sum()) for k, s in zip(cuts, starts, strict=True)], np.int64)
        return Examples(own, self.labels, segments, marks, starts, self.choices)

    def _kept(self, row: int, tokens: int) -> NDArray[np.int64]:
        """The places of a row that stay."""
        length = len(self.tokens[row])
        if length <= tokens:
            return np.arange(length)
        if self.starts is not None:
            start = int(self.starts[row])
            answer = max(1, min(length - start, max(tokens - start, (tokens + 1) // 2)))
            return np.arange(start - max(1, tokens - answer), start + answer)
        behind = 1 if self.marks is None or self.marks[row] < tokens - 1 else length - int(self.marks[row])
        first = max(1, tokens - behind)
        return np.concatenate([np.arange(first), np.arange(max(first, length - behind), length)])

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """The rows of all parts, one part after the other; what no part with rows has is None."""
        held = [part for part in parts if len(part)]

        def rows(name: str) -> Any:
            values = [getattr(part, name) for part in held]
            return None if not held or any(v is None for v in values) else values

        segments, marks, starts, choices = map(rows, ("segments", "marks", "starts", "choices"))
        labels = [part.labels for part in parts]
        return cls(
            tuple(t for part in held for t in part.tokens),
            np.concatenate(labels) if labels else np.zeros(0, dtype=np.int64),
            segments and tuple(s for own in segments for s in own),
            marks and np.concatenate(marks),
            starts and np.concatenate(starts),
            choices and tuple(c for own in choices for c in own),
        )

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
