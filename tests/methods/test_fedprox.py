"""FedProx on three numbers."""

from __future__ import annotations

import pytest

import toy
from fedpeft.core.errors import ConfigError
from fedpeft.methods.fedavg import FedAvg
from fedpeft.methods.fedprox import FedProx


def test_the_second_step_feels_the_pull() -> None:
    """h(w) = 1/2 (w - m)^2 + mu/2 w^2 from w^t = 0, with m = (4, 8, -4), mu = 1/2 and lr = 1/2.

    Step 1: the pull is zero, w = m/2 = (2, 4, -2).
    Step 2: gradient (w - m) + w/2 = (-2 + 1, -4 + 2, 2 - 1) = (-1, -2, 1), w = (2.5, 5, -2.5).
    """
    method = FedProx(mu=0.5, optimizer="sgd", lr=0.5, steps=2)
    done, _ = toy.run(method, {"a": toy.points((4, 8, -4))})
    assert toy.vector(done[0].state.params) == [2.5, 5.0, -2.5]


def test_local_training_converges_to_the_proximal_point() -> None:
    """The minimiser of h is (m + mu w^t) / (1 + mu); for w^t = (4, 4, 4), m = (0, 8, 4), mu = 3 it is (3, 5, 4).

    With lr 1/5 a step shrinks the distance to it by 1 - (1 + mu) / 5 = 1/5; after 4 steps (1, -1, 0) / 625 are left.
    """
    method = FedProx(mu=3.0, optimizer="sgd", lr=0.2, steps=4)
    done, _ = toy.run(method, {"a": toy.points((0, 8, 4))}, start=(4, 4, 4))
    assert toy.vector(done[0].state.params) == pytest.approx([3 + 1 / 625, 5 - 1 / 625, 4], abs=1e-12)


def test_the_centre_is_the_model_that_was_sent_and_answers_are_weighted() -> None:
    """At convergence a (n = 1, m = (4, 0, 0)) and b (n = 3, m = (0, 4, 0)) give (m + w^t) / 2 for mu = 1.

    Round 1 from 0: (2, 0, 0) and (0, 2, 0), mean (1/2, 3/2, 0).
    Round 2: (9/4, 3/4, 0) and (1/4, 11/4, 0), mean ((9/4 + 3/4) / 4, (3/4 + 33/4) / 4, 0) = (3/4, 9/4, 0).
    """
    data = {"a": toy.points((4, 0, 0)), "b": toy.points((0, 4, 0), (0, 4, 0), (0, 4, 0))}
    method = FedProx(mu=1.0, optimizer="sgd", lr=0.25, steps=60)
    done, _ = toy.run(method, data, rounds=2)
    assert toy.vector(done[0].state.params) == pytest.approx([0.5, 1.5, 0.0], abs=1e-12)
    assert toy.vector(done[1].state.params) == pytest.approx([0.75, 2.25, 0.0], abs=1e-12)


def test_without_a_pull_it_is_fedavg_bit_for_bit() -> None:
    data = {client: splits["train"] for client, splits in toy.federation(False).items()}
    ends = [toy.run(m, data, rounds=3)[0][-1].state for m in (FedProx(mu=0.0, cohort=2), FedAvg(cohort=2))]
    assert toy.vector(ends[0].params) == toy.vector(ends[1].params)


def test_a_negative_pull_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.mu is -1\.0"):
        FedProx(mu=-1.0)
