"""Whole numbers from shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

ROUNDING = 1e-9  # a product that is above a whole number by less than this counts as that number


def round_up(number: float) -> int:
    """The least whole number that is not below, to rounding: .6 of 20 is 12, though it is 12.000000000000002."""
    return math.ceil(number - ROUNDING)


def dealt(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the given shares that sum to the total: rounded down, spare ones to the largest remainders.

    Args:
        shares: that sum to 1; of equal remainders the earlier one is served first.
    """
    counts = [math.floor(share * total) for share in shares]
    remainders = [round((share * total - count) / ROUNDING) for share, count in zip(shares, counts, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda i: -remainders[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
