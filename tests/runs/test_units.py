"""Quantities as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.runs.units import count_text, flops_text, number_text, share_text


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 FLOPs"), (999, "999 FLOPs"), (4_704_666_624, "4.70 GFLOPs"), (1e15, "1.00 PFLOPs"), (9e21, "9000 EFLOPs")],
)
def test_operations(n: float, text: str) -> None:
    assert flops_text(n) == text


@given(st.floats(1, 1e18))
def test_operations_are_right_to_three_digits(n: float) -> None:
    number, unit = flops_text(n).split()
    size = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}[unit.removesuffix("FLOPs")]
    assert float(number) * size == pytest.approx(n, rel=0.006) or n < 100


def test_counts_agree_with_their_nouns() -> None:
    assert [count_text(n, "round") for n in (0, 1, 2, 1200, 1.5)] == [
        "0 rounds", "1 round", "2 rounds", "1,200 rounds", "1.5 rounds",
    ]  # fmt: skip
    assert count_text(2, "entry", "entries") == "2 entries"
    assert (number_text(128.0), number_text(23.599)) == ("128", "23.6")
    assert share_text(0.3812) == "38.1 %"
