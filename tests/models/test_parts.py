"""Parts of a step: complete, bounded, no dearer than the obvious cuts; and batches as tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tiny
from fedpeft.core.errors import FitError
from fedpeft.models.parts import PART_COST_TOKENS, collate, cut

LENGTHS = st.lists(st.integers(1, 70), max_size=60)
BUDGETS = st.integers(1, 400)


def cost(parts: list[NDArray[np.int64]], lengths: NDArray[np.int64]) -> int:
    return sum(len(part) * int(lengths[part].max()) + PART_COST_TOKENS for part in parts)


@settings(deadline=None, max_examples=150)
@given(LENGTHS, BUDGETS)
@example([5] * 50, 12)
@example([], 10)
def test_every_row_once_in_order_of_length_under_the_budget(sizes: list[int], budget: int) -> None:
    lengths = np.array(sizes, dtype=np.int64)
    parts = cut(lengths, budget)
    joined = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    assert sorted(joined.tolist()) == list(range(len(sizes)))
    assert (np.diff(lengths[joined]) >= 0).all()
    for part in parts:
        assert len(part) == 1 or len(part) * lengths[part].max() <= budget


@settings(deadline=None, max_examples=150)
@given(LENGTHS, BUDGETS)
def test_no_obvious_cut_is_cheaper(sizes: list[int], budget: int) -> None:
    """Neither every row alone, nor one part for each length, nor all rows in one where that fits."""
    lengths = np.array(sizes, dtype=np.int64)
    found = cost(cut(lengths, budget), lengths)
    assert found <= int((lengths + PART_COST_TOKENS).sum())
    by_length = [np.flatnonzero(lengths == n) for n in np.unique(lengths)]
    if all(len(part) * lengths[part].max() <= budget for part in by_length):
        assert found <= cost(by_length, lengths)
    if sizes and len(sizes) * max(sizes) <= budget:
        assert found <= cost([np.arange(len(sizes))], lengths)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8, unique=True), BUDGETS)
def test_the_cut_is_the_cheapest_of_all_consecutive_ones(sizes: list[int], budget: int) -> None:
    """By brute force over all 2^(n-1) cuts of rows of different lengths."""
    lengths = np.array(sizes, dtype=np.int64)
    order = np.argsort(lengths)
    best = min(
        cost(parts, lengths)
        for ends in range(1 << (len(sizes) - 1))
        for parts in [np.split(order, [i + 1 for i in range(len(sizes) - 1) if ends >> i & 1])]
        if all(len(part) == 1 or len(part) * lengths[part].max() <= budget for part in parts)
    )
    assert cost(cut(lengths, budget), lengths) == best


def test_rows_of_equal_length_are_cut_where_the_budget_says() -> None:
    assert [part.tolist() for part in cut(np.array([4] * 7), 12)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [len(part) for part in cut(np.array([100, 100, 2, 2, 2, 2]), 300)] == [4, 2]


def test_a_batch_is_padded_on_the_right() -> None:
    tokens = (np.array([7, 8, 9], dtype=np.int32), np.array([5], dtype=np.int32))
    segments = (np.array([0, 1, 1], dtype=np.int32), np.array([1], dtype=np.int32))
    batch = collate([(tokens[1], segments[1]), (tokens[0], segments[0])], pad=3, device=tiny.CPU, segments=True)
    assert batch.inputs["input_ids"].tolist() == [[5, 3, 3], [7, 8, 9]]
    assert batch.inputs["token_type_ids"].tolist() == [[1, 0, 0], [0, 1, 1]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.lengths.tolist() == [1, 3]
    without = collate([(tokens[0], None)], pad=3, device=tiny.CPU, segments=True)
    assert without.inputs["token_type_ids"].tolist() == [[0, 0, 0]]
    assert "attention_mask" not in without.inputs, "nothing is padded, so the faster attention without a mask will do"
    plain = collate([(tokens[0], segments[0])], pad=3, device=tiny.CPU, segments=False)
    assert plain.inputs.keys() == {"input_ids"}


def test_a_row_without_tokens_is_refused() -> None:
    assert [part.tolist() for part in cut(np.array([0, 0, 3]), 2)]
    with pytest.raises(FitError, match="a row has no tokens; drop empty texts from the data"):
        collate([(np.zeros(0, dtype=np.int32), None)], pad=0, device=torch.device("cpu"), segments=False)
