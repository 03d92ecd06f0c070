"""Whole numbers from shares."""

from __future__ import annotations

import math

ROUNDING = 1e-9  # a product that is above a whole number by less than this counts as that number


def round_up(number: float) -> int:
    """The least whole number that is not below, to rounding: .6 of 20 is 12, though it is 12.000000000000002."""
    return math.ceil(number - ROUNDING)
