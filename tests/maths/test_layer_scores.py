"""Layer scores by hand, and the choice of layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.core.rng import rng_for
from fedpeft.maths.layers import choose_layers, layer_count, layer_score, relative_changes

RNG = rng_for(0, "test")


def samples(b: int, cosine: float) -> Tensor:
    """b vectors of unequal lengths of which every two have this cosine."""
    gram = np.full((b, b), cosine) + (1 - cosine) * np.eye(b)
    values, vectors = np.linalg.eigh(gram)
    rows = vectors * np.sqrt(values.clip(0))
    return torch.from_numpy(rows * np.arange(1, b + 1)[:, None])


@pytest.mark.parametrize(
    ("b", "cosine", "zeta"),
    [(2, 0.0, 1.0), (2, 0.5, 1.189483), (2, 0.9, 4.432344), (2, 1.0, 49994.84), (8, 0.5, 1.359266), (8, 0.9, 7.000058)],
)
def test_golden_scores(b: int, cosine: float, zeta: float) -> None:
    assert layer_score(samples(b, cosine)) == pytest.approx(zeta, rel=1e-5)


def test_a_score_by_hand() -> None:
    """Two samples with the cosine .6 have the eigenvalues .4 and 1.6."""
    pair = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    terms = [math.log(v + 1e-5) + 1 / (v + 1e-5) for v in (0.4, 1.6)]
    assert layer_score(pair) == pytest.approx(sum(terms) / 2, rel=1e-6)


@given(st.integers(2, 8), st.integers(1, 20), st.integers(0, 1000))
def test_a_score_is_at_least_one(b: int, features: int, seed: int) -> None:
    assert layer_score(torch.from_numpy(rng_for(seed, "x").normal(size=(b, features)))) >= 1 - 1e-9


def test_a_sample_of_zeros_counts_as_orthogonal_to_nothing() -> None:
    assert math.isfinite(layer_score(torch.tensor([[0.0, 0.0], [1.0, 0.0]])))


def test_counts() -> None:
    assert [layer_count(r, 24, 24) for r in (1 / 3, 0.5, 0.51, 0.0, 1.0)] == [8, 12, 13, 1, 24]
    assert layer_count(1.0, 6, 5) == 5


def test_choices() -> None:
    scores = torch.tensor([3.0, 9.0, 9.0, 1.0, 5.0])
    every = range(5)
    assert choose_layers(scores, 2, "score", every, RNG) == (1, 2)
    assert choose_layers(scores, 1, "score", every, RNG) == (1,), "ties go to the lower index"
    assert choose_layers(scores, 3, "score", (0, 3, 4), RNG) == (0, 3, 4)
    assert choose_layers(scores, 2, "first", every, RNG) == (0, 1)
    assert choose_layers(scores, 2, "last", every, RNG) == (3, 4)
    assert choose_layers(scores, 2, "middle", every, RNG) == (1, 2)
    assert choose_layers(scores, 12, "middle", range(24), RNG) == tuple(range(6, 18))
    drawn = {choose_layers(scores, 2, "random", every, rng_for(s, "layers")) for s in range(40)}
    assert len(drawn) == 10 and all(a < b for a, b in drawn)


def test_relative_changes_by_hand() -> None:
    """Changes (1 2), (4 2), (1 3) of outputs (2 2), (4 4), (2 2); where nothing changes the number is still finite."""
    changes = torch.tensor([[1.0, 2.0], [4.0, 2.0], [1.0, 3.0]])
    sizes = torch.tensor([[2.0, 2.0], [4.0, 4.0], [2.0, 2.0]])
    assert relative_changes(changes, sizes).tolist() == [0.75, 1.0]
    assert relative_changes(changes, sizes, of_input=True).tolist() == pytest.approx([2.5, (1 / 4 + 3 / 2) / 2])
    assert bool(torch.isfinite(relative_changes(torch.zeros(2, 2), torch.zeros(2, 2))).all())
