"""Exact match and ROUGE-L by hand."""

from __future__ import annotations

import pytest

from fedpeft.core.metrics import better, lower, names, rank
from fedpeft.runs.texts import exact_match, last_number, rouge_available, rouge_l


def test_exact_match() -> None:
    assert exact_match("  The Cat\nsat ", ["a dog", "the cat sat"]) and not exact_match("the cat", ["the cat sat"])
    assert exact_match("so it is 1,234.", ["#### 1234"], "number") and not exact_match("12", ["#### 1234"], "number")
    assert not exact_match("none", ["none"], "number")


@pytest.mark.parametrize(
    ("text", "number"),
    [("is 1,234.", 1234.0), ("-3.5 or 7.25", 7.25), ("48/2 = 24", 24.0), ("a -2", -2.0), ("no", None)],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.skipif(not rouge_available(), reason="rouge-score is not installed (pip install 'fedpeft[generate]')")
def test_rouge_l() -> None:
    """3 words of 6, F = 2 * 1 * .5 / 1.5; the best reference counts; words are stemmed."""
    assert rouge_l(["the cat sat"], [["the cat sat on the mat"]]) == pytest.approx(2 / 3)
    assert rouge_l(["the cat sat", "x"], [["a", "the cats sat"], ["y"]]) == pytest.approx(0.5)


def test_which_way_is_better() -> None:
    assert better("perplexity", 2.0, 3.0) and not better("perplexity", 3.0, 3.0) and better("accuracy", 0.5, 0.4)
    assert better("perplexity", 9.0, None) and not better("perplexity", float("nan"), None)
    assert sorted([3.0, 1.0], key=lambda x: rank("perplexity", x)) == [1.0, 3.0] and rank("accuracy", 0.5) == -0.5
    assert [name for name in names("text") if lower(name)] == ["perplexity"] and not any(map(lower, names("labels")))
