"""FedAvg on three numbers."""

from __future__ import annotations

import pytest

import toy
from fedpeft.core.errors import ConfigError
from fedpeft.methods.fedavg import FedAvg

A = toy.points((1, 2, 3))
B = toy.points((5, -2, 3), (5, -2, 3), (5, -2, 3))
SGD = FedAvg(optimizer="sgd", lr=0.5, batch_size=4)


def test_two_rounds_of_the_weighted_mean() -> None:
    """One step of SGD with lr 1/2 takes a client half-way to the mean of its rows.

    Round 1 from (0, 0, 0): a, with n = 1, gives (1/2, 1, 3/2); b, with n = 3, gives (5/2, -1, 3/2).
        w = ((1/2 + 3 * 5/2) / 4, (1 - 3) / 4, 3/2) = (2, -1/2, 3/2)
        loss: a 1/2 (1 + 4 + 9) = 7, b 1/2 (25 + 4 + 9) = 19, together (7 + 3 * 19) / 4 = 16
    Round 2: a gives (3/2, 3/4, 9/4), b gives (7/2, -5/4, 9/4).
        w = ((3/2 + 21/2) / 4, (3/4 - 15/4) / 4, 9/4) = (3, -3/4, 9/4)
    """
    done, _ = toy.run(SGD, {"a": A, "b": B}, rounds=2)
    assert toy.vector(done[0].state.params) == [2.0, -0.5, 1.5]
    assert done[0].state.loss == 16.0
    assert toy.vector(done[1].state.params) == [3.0, -0.75, 2.25]


def test_the_mean_is_over_those_who_took_part() -> None:
    """A cohort of one: the new w is that client's own, (1/2, 1, 3/2) or (5/2, -1, 3/2)."""
    done, _ = toy.run(FedAvg(cohort=1, optimizer="sgd", lr=0.5, batch_size=4), {"a": A, "b": B})
    expected = {"a": [0.5, 1.0, 1.5], "b": [2.5, -1.0, 1.5]}
    (client,) = done[0].cohort
    assert toy.vector(done[0].state.params) == expected[client]


def test_first_step_of_adamw_is_the_sign_of_the_gradient() -> None:
    """m / sqrt(v) = g / |g| at the first step: a moves by lr (1, 1, 1), b by lr (1, -1, 1).

    w = lr (1, (1 - 3) / 4, 1) = lr (1, -1/2, 1)
    """
    done, _ = toy.run(FedAvg(lr=0.01, batch_size=4), {"a": A, "b": B})
    assert toy.vector(done[0].state.params) == pytest.approx([0.01, -0.005, 0.01], rel=1e-7)


def test_steps_replace_epochs() -> None:
    """Three steps of half the way each, whatever the number of rows: 1 - 1/8 of (1, 2, 3)."""
    done, _ = toy.run(FedAvg(optimizer="sgd", lr=0.5, batch_size=4, steps=3), {"a": A})
    assert toy.vector(done[0].state.params) == [0.875, 1.75, 2.625]
    assert [r.meter.steps for r in done[0].receipts] == [3]


def test_head_rate_clip_and_decay() -> None:
    """Gradient at 0 of a client whose rows are (3, 4, 12): -(3, 4, 12), norm 13; clipped to 6.5 it is halved.

    lr 1/2 on the body and 1/4 on the head: (3/4, 1, 3/2). (torch divides by norm + 1e-6, hence the tolerance.)
    Decay 1/5 from (10, 0, 0), one row (10, 0, 0), no clip: gradient 0 + 10/5 = 2, so 10 - 1/2 * 2 = 9.
    """
    method = FedAvg(optimizer="sgd", lr=0.5, head_lr=0.25, clip=6.5)
    done, _ = toy.run(method, {"a": toy.points((3, 4, 12))})
    assert toy.vector(done[0].state.params) == pytest.approx([0.75, 1.0, 1.5], rel=1e-6)
    decayed, _ = toy.run(
        FedAvg(optimizer="sgd", lr=0.5, weight_decay=0.2), {"a": toy.points((10, 0, 0))}, 1, (10, 0, 0)
    )
    assert toy.vector(decayed[0].state.params) == pytest.approx([9.0, 0.0, 0.0])


def test_all_ranges_are_checked_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        FedAvg(cohort=-1, epochs=0, batch_size=0, lr=float("nan"), clip=0.0, steps=0, head_lr=-1.0, weight_decay=-0.1)
    assert len(caught.value.problems) == 8
    assert "method.epochs is 0; it must be at least 1" in caught.value.problems
