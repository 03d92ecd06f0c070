"""Sampling over stable ids."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.core.cohort import everyone, sample
from fedpeft.core.rng import rng_for

CLIENTS = [f"c{i}" for i in range(10)]


@pytest.mark.parametrize(("size", "want"), [(0, 10), (1, 1), (4, 4), (10, 10), (99, 10)])
def test_a_sample_has_its_size_and_nobody_twice(size: int, want: int) -> None:
    got = sample(size)(None, CLIENTS, rng_for(0, "pick"))
    assert len(got) == len(set(got)) == want and set(got) <= set(CLIENTS)


def test_the_same_place_gives_the_same_cohort_in_the_same_order() -> None:
    picks = [list(sample(5)(None, CLIENTS, rng_for(0, "pick", round=r))) for r in (1, 1, 2)]
    assert picks[0] == picks[1] != picks[2]


def test_everybody_is_picked_equally_often_at_every_place() -> None:
    """6,000 samples of 3 of 10: each client is expected 600 times at each place; 5 deviations are 116."""
    counts = np.zeros((3, 10))
    rng = rng_for(0, "pick")
    for _ in range(6000):
        for place, client in enumerate(sample(3)(None, CLIENTS, rng)):
            counts[place, CLIENTS.index(client)] += 1
    assert np.abs(counts - 600).max() < 5 * (6000 * 0.1 * 0.9) ** 0.5


def test_nobody_can_be_picked_where_nobody_is() -> None:
    assert list(sample(3)(None, [], rng_for(0, "pick"))) == []


def test_everyone_is_everyone_in_order() -> None:
    rng = rng_for(0, "pick")
    got = everyone(None, CLIENTS, rng)
    assert got == CLIENTS and got is not CLIENTS
    assert rng.random() == rng_for(0, "pick").random()  # nothing was drawn
