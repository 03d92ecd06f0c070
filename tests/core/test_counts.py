"""Whole numbers from shares, by hand and at random."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.core.counts import dealt, round_up


def test_spare_ones_go_to_the_largest_remainders() -> None:
    assert dealt([0.5, 0.3, 0.2], 7) == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert dealt([0.25] * 4, 6) == [2, 2, 1, 1]  # equal remainders: the earlier first
    assert dealt([0.29, 0.71], 100) == [29, 71]  # .29 * 100 is 28.999999999999996
    assert dealt([13 / 30, 11 / 30, 6 / 30], 168) == [73, 62, 33]  # 72.8, 61.6, 33.6: equal, not in floating point
    assert dealt([], 0) == []


@pytest.mark.parametrize("seed", range(20))
def test_they_sum_to_the_total_and_are_next_to_the_shares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares, total = rng.dirichlet(np.full(9, 0.5)).tolist(), int(rng.integers(1, 400))
    counts = dealt(shares, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))


def test_a_product_just_above_a_whole_number_is_that_number() -> None:
    assert round_up(0.6 * 20) == 12 and round_up(12.1) == 13
