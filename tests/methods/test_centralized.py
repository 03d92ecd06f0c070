"""Pooled training on three numbers."""

from __future__ import annotations

from collections import Counter

import pytest

import toy
from fedpeft.core.errors import ConfigError
from fedpeft.core.exchange import ClientEnv
from fedpeft.core.fit import AdamW, Fit
from fedpeft.methods.centralized import Centralized

ROWS = toy.points((0, 0, 0), (2, 0, 0), (0, 4, 0), (0, 0, 8))


def batches(method: Centralized, round: int, rows: toy.Points = ROWS) -> list[list[int]]:
    return method.batches(ClientEnv("pooled", toy.ToyModel(), {"train": rows}, seed=0, rounds=9, round=round))


def test_full_batches_walk_to_the_mean_of_all_rows() -> None:
    """The mean of the rows is (1/2, 1, 2); a round that is one full batch with lr 1/2 halves the distance to it."""
    done, _ = toy.run(Centralized(share=1.0, batch_size=4, optimizer="sgd", lr=0.5), {"pooled": ROWS}, rounds=2)
    assert toy.vector(done[0].state.params) == [0.25, 0.5, 1.0]
    assert toy.vector(done[1].state.params) == [0.375, 0.75, 1.5]


def test_two_batches_of_a_round() -> None:
    """Two steps with lr 1/2, batches p then q of two rows each: w = mean(p) / 4 + mean(q) / 2.

    Half the rows per round; rounds 1 and 2 are p and q.
    """
    method = Centralized(share=0.5, batch_size=2, optimizer="sgd", lr=0.5)
    (p,), (q,) = batches(method, 1), batches(method, 2)
    assert sorted(p + q) == [0, 1, 2, 3]
    done, _ = toy.run(method, {"pooled": ROWS}, rounds=2)
    expected = ROWS.x[p].mean(axis=0) / 4 + ROWS.x[q].mean(axis=0) / 2
    assert toy.vector(done[1].state.params) == pytest.approx(expected, abs=1e-12)


def test_the_stream_takes_every_row_equally_often() -> None:
    """3 of 4 rows per round: 4 rounds are 12 rows, three passes, and round 2 crosses from the first to the second."""
    method = Centralized(share=0.75, batch_size=2)
    stream = [row for round in (1, 2, 3, 4) for batch in batches(method, round) for row in batch]
    assert [sorted(stream[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert [len(b) for b in batches(method, 2)] == [2, 1]
    many = toy.points(*((i, 0, 0) for i in range(40)))
    first, second = ([r for b in batches(Centralized(share=1.0), n, many) for r in b] for n in (1, 2))
    assert Counter(first) == Counter(second) and first != second


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        (Centralized(share=0.1, epochs=2, batch_size=3), [3, 3, 2]),  # 2 * 0.1 * 40 rows
        (Centralized(share=0.1, steps=3, batch_size=2), [2, 2, 2]),
        (Centralized(share=0.001, batch_size=4), [1]),
        (Centralized(share=2.0, batch_size=32), [32, 32, 16]),
    ],
)
def test_the_size_of_a_round(method: Centralized, sizes: list[int]) -> None:
    assert [len(b) for b in batches(method, 5, toy.points(*((i, 0, 0) for i in range(40))))] == sizes


def test_rounds_are_parts_of_one_training() -> None:
    """Three rounds give the bits of one Fit over the same batches: the optimizer's moments live on."""
    method = Centralized(share=0.75, batch_size=2, lr=0.1)
    done, _ = toy.run(method, {"pooled": ROWS}, rounds=3)
    stream = [batch for round in (1, 2, 3) for batch in batches(method, round)]
    whole = toy.ToyModel().fit(Fit(toy.params(0, 0, 0), ROWS, stream, AdamW(0.1)))
    assert toy.vector(done[-1].state.params) == toy.vector(whole.params)


def test_a_share_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"method\.share is 0\.0"):
        Centralized(share=0.0)
