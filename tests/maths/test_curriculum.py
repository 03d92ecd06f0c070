"""Pacing, orders and rows against the specification's golden values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.maths.curriculum import (
    common_words,
    competence,
    easy_first,
    ends,
    enough,
    kept_rows,
    pace,
    ranked_batches,
    row_masks,
    some_of,
    stratified,
    tokens_at,
    whole_batches,
)

TIMES = (0, 10, 20, 40, 60, 79, 80, 99)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("linear", [12, 13, 14, 16, 18, 20, 20, 20]),
        ("exp", [12, 13, 14, 16, 18, 20, 20, 20]),
        ("sqrt", [12, 14, 15, 17, 19, 20, 20, 20]),
        ("quad", [12, 13, 13, 14, 17, 20, 20, 20]),
        ("step", [12, 12, 12, 12, 12, 12, 20, 20]),
    ],
)
def test_golden_paces(kind: Any, wanted: list[int]) -> None:
    assert [pace(t, 100, 20, kind, 0.6, 0.8) for t in TIMES] == wanted


def test_golden_paces_of_few_batches_and_their_means() -> None:
    assert [pace(t, 10, 5, "linear", 0.6, 0.8) for t in range(10)] == [3, 4, 4, 4, 4, 5, 5, 5, 5, 5]
    assert {pace(t, 100, 1, "linear", 0.6, 0.8) for t in range(100)} == {1}
    assert [pace(t, 100, 3, "linear", 0.6, 0.8) for t in (0, 13, 14, 99)] == [2, 2, 3, 3]
    kinds: tuple[Any, ...] = ("linear", "sqrt", "exp", "quad", "step")
    means = [np.mean([pace(t, 100, 20, kind, 0.6, 0.8) / 20 for t in range(100)]) for kind in kinds]
    assert means == pytest.approx([0.856, 0.8705, 0.8445, 0.807, 0.68], abs=1e-9)


@given(st.sampled_from(["linear", "sqrt", "exp", "quad", "step"]), st.integers(1, 60), st.integers(1, 40),
       st.floats(0.01, 1), st.floats(0.01, 1))  # fmt: skip
def test_a_pace_grows_to_everything(kind: Any, rounds: int, parts: int, beta: float, alpha: float) -> None:
    found = [pace(t, rounds, parts, kind, beta, alpha) for t in range(rounds + 1)]
    assert found == sorted(found) and found[0] >= 1 and found[-1] == parts


def test_orders() -> None:
    assert easy_first([3.0, 1.0, 2.0, 1.0]) == [1, 3, 2, 0]
    assert ends(10, 4) == [4, 8, 10] and ends(8, 4) == [4, 8] and ends(3, 4) == [3]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_every_beginning_of_a_stratified_order_has_the_labels_proportions(labels: list[int], random: Any) -> None:
    order = list(range(len(labels)))
    random.shuffle(order)
    got = stratified(order, labels)
    assert sorted(got) == sorted(order)
    for label in set(labels):
        share = labels.count(label) / len(labels)
        assert [r for r in got if labels[r] == label] == [r for r in order if labels[r] == label]
        for n in range(len(got) + 1):
            assert abs(sum(labels[r] == label for r in got[:n]) - share * n) <= len(set(labels))


def test_rows_that_are_kept() -> None:
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])
    assert kept_rows(scores, 0.4).tolist() == [False, True, True, False, False]
    assert kept_rows(scores, 0.6 * (1 + 1e-12)).sum() == 3
    assert kept_rows(torch.zeros(4), 0.5).all() and kept_rows(scores, 1.0).all()
    assert kept_rows(scores, 0.01).sum() == 1
    many = torch.cat([torch.tensor([100.0]), torch.full((39,), 1e-3)])
    assert kept_rows(many, 0.5, "energy", 0.9).sum() == 4, "a tenth of the rows at least"
    assert kept_rows(torch.tensor([5.0, 3.0, 2.0]), 0.5, "energy", 0.8).tolist() == [True, True, False]


def test_masks_have_the_layout_of_their_matrices() -> None:
    params = {"a.A": torch.zeros(3, 2).double(), "a.B": torch.zeros(2, 3), "head": torch.zeros(1)}
    made = row_masks(params, {"a.A": torch.tensor([1.0, 3.0, 2.0]), "a.B": torch.zeros(2)}, 0.5)
    assert made.keys() == {"a.A"} and made["a.A"].tolist() == [[0, 0], [1, 1], [1, 1]]
    assert made["a.A"].dtype == torch.float64, "where a matrix has no information, all of it may change"


def test_whole_batches_keep_their_rows() -> None:
    """Three batches, two epochs: each once per epoch; five steps are of two epochs."""
    rows, parts = [5, 3, 1, 0, 2], [[5, 3], [1, 0], [2]]
    for steps, wanted in ((None, 6), (5, 5), (2, 2)):
        got = whole_batches(rows, [2, 4, 5], 2, steps, np.random.default_rng(1))
        assert len(got) == wanted and all(batch in parts for batch in got)
        assert sorted(got[:3]) == sorted(parts) or len(got) < 3
    assert (
        whole_batches(rows, [2, 4, 5], 9, None, np.random.default_rng(1))[:3]
        != whole_batches(rows, [2, 4, 5], 9, None, np.random.default_rng(1))[3:6]
    )


def test_some_rows_are_drawn_without_repeats() -> None:
    got = some_of([9, 4, 7, 2], 3, np.random.default_rng(0))
    assert len(set(got)) == 3 and got == [row for row in (9, 4, 7, 2) if row in got]
    assert some_of([9, 4], 3, np.random.default_rng(0)) == [9, 4]


def test_golden_number_of_layers_by_energy() -> None:
    """Scores (.05 .3 .1 .25 .2 .1): .9 of their sum needs the five largest."""
    assert enough(sorted([0.05, 0.3, 0.1, 0.25, 0.2, 0.1], reverse=True), 0.9) == 5
    assert enough([1.0, 1.0], 0.5) == 1 and enough([0.0, 0.0], 0.9) == 1


def test_energy_is_a_share_at_any_scale() -> None:
    """Fisher information is far below 1: 4 of 5 equal numbers hold .8 of it, whatever their size."""
    for scale in (1e-30, 1e-12, 1.0, 1e12):
        assert enough([scale] * 5, 0.8) == 4
        assert kept_rows(torch.full((20,), scale), 0.5, "energy", 0.8).sum() == 16


def test_rows_within_the_competence_of_a_round() -> None:
    """c0 .01; of 2.89 rows those that are whole."""
    assert competence(0, 100, 0.01) == pytest.approx(0.01) and competence(100, 100, 0.01) == pytest.approx(1)
    assert competence(25, 100, 0.01) == pytest.approx(math.sqrt(0.25 * (1 - 1e-4) + 1e-4))
    rarities = [3.0, 1.0, 2.0, 1.0, 5.0]
    assert common_words(rarities, 0, 9, 2) == [1, 3]
    assert common_words(rarities, 3, 9, 1) == [1, 3]
    assert common_words(rarities, 9, 9, 1) == [1, 3, 2, 0, 4]


def test_growing_lengths() -> None:
    assert [tokens_at(t, 10, 48) for t in (0, 1, 2, 5, 9)] == [8, 16, 24, 48, 48]
    assert tokens_at(0, 10, 5) == 8


def test_batches_of_chance_are_ranked_by_the_mean_of_their_rows() -> None:
    """Means 5, 1 and 3: rows in that order of batches, each kept as it is, and where they end."""
    rows, ended = ranked_batches([[4, 0], [1], [3, 2]], torch.tensor([2.0, 1.0, 4.0, 2.0, 8.0]))
    assert rows == [1, 3, 2, 4, 0] and ended == [1, 3, 5]
