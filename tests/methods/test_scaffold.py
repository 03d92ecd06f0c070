"""SCAFFOLD on three numbers."""

from __future__ import annotations

import pytest

import toy
from fedpeft.core.exchange import Record
from fedpeft.core.federate import Done
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.fedavg import FedAvg
from fedpeft.methods.scaffold import Memory, Scaffold

A, B = toy.points((8, 0, 4)), toy.points((0, 4, 4))


def memory(done: Done, engine: InProcess, client: str) -> Record:
    return engine.memories.load(client, done.versions[client], Memory)


def test_two_clients_two_rounds() -> None:
    """m_a = (8, 0, 4), m_b = (0, 4, 4); K = 1, eta_l = 1/2, eta_g = 1; the gradient of i at x is x - m_i.

    Round 1 from x = c = c_i = 0: plain SGD, y_a = (4, 0, 2), y_b = (0, 2, 2).
        c_i+ = 0 - 0 + (0 - y_i) / (1/2) = -m_i: the gradient at x, as it should be
        x = (2, 1, 2); c = 0 + (2/2) (-(m_a + m_b) / 2) = (-4, -2, -4)
    Round 2: g_a - c_a + c = (2, 1, 2) - m_a + m_a + c = (-2, -1, -2), the same for b: nobody drifts.
        y_i = (2, 1, 2) + (1, 1/2, 1) = (3, 3/2, 3) = x
        c_a+ = c_a - c + (x_old - y_a) / (1/2) = (-8, 0, -4) + (4, 2, 4) - (2, 1, 2) = (-6, 1, -2), its gradient at
        (2, 1, 2); c_b+ = (0, -4, -4) + (2, 1, 2) = (2, -3, -2); c = (-2, -1, -2), their mean
    """
    done, engine = toy.run(Scaffold(lr=0.5, steps=1), {"a": A, "b": B})
    assert toy.vector(done[0].state.params) == [2.0, 1.0, 2.0]
    assert toy.vector(done[0].state.control) == [-4.0, -2.0, -4.0]
    assert toy.vector(memory(done[0], engine, "a").control) == [-8.0, 0.0, -4.0]
    assert toy.vector(memory(done[0], engine, "b").control) == [0.0, -4.0, -4.0]
    done, engine = toy.run(Scaffold(lr=0.5, steps=1), {"a": A, "b": B}, rounds=2)
    assert toy.vector(done[1].state.params) == [3.0, 1.5, 3.0]
    assert toy.vector(done[1].state.control) == [-2.0, -1.0, -2.0]
    assert toy.vector(memory(done[1], engine, "a").control) == [-6.0, 1.0, -2.0]
    assert toy.vector(memory(done[1], engine, "b").control) == [2.0, -3.0, -2.0]


def test_the_control_variate_is_the_mean_gradient_of_the_local_steps() -> None:
    """K = 2 from 0: y = m/2, then 3m/4; the gradients were -m and -m/2, and (0 - 3m/4) / (2 * 1/2) = -3m/4.

    With eta_l 1/4 on the head, y_head = m/4, then 7m/16; the gradients were -m and -3m/4, their mean -7m/8.
    """
    done, engine = toy.run(Scaffold(lr=0.5, steps=2, head_lr=0.25), {"a": A})
    assert toy.vector(done[0].state.params) == [6.0, 0.0, 7 / 4]
    assert toy.vector(memory(done[0], engine, "a").control) == [-6.0, 0.0, -7 / 2]


def test_partial_participation_moves_c_by_its_share() -> None:
    """One of N = 2 takes part: c = (1/2) Delta c_i = -m_i / 2; x moves by eta_g (y_i - x) = m_i for eta_g = 2."""
    done, engine = toy.run(Scaffold(lr=0.5, steps=1, cohort=1, server_lr=2.0), {"a": A, "b": B})
    (client,) = done[0].cohort
    m = {"a": [8.0, 0.0, 4.0], "b": [0.0, 4.0, 4.0]}[client]
    assert toy.vector(done[0].state.params) == m
    assert toy.vector(done[0].state.control) == [-v / 2 for v in m]
    assert toy.vector(memory(done[0], engine, client).control) == [-v for v in m]
    assert done[0].versions.keys() == {client}


def test_unequal_numbers_of_steps_do_not_pull_the_solution() -> None:
    """a makes 1 step a round and b 3; the minimum of (f_a + f_b) / 2 is (4, 2, 4), and SCAFFOLD stays there.

    With plain averaging a goes lr of the way to m_a, b 1 - (1 - lr)^3 of the way to m_b: for lr = 0.3 these are 0.3
    and 0.657, and the fixed point (weights 1 and 3) has first coordinate 0.3 * 8 / (0.3 + 3 * 0.657) = 1.06.
    """
    data = {"a": A, "b": toy.points((0, 4, 4), (0, 4, 4), (0, 4, 4))}
    done, _ = toy.run(Scaffold(lr=0.3, batch_size=1), data, rounds=50)
    assert toy.vector(done[-1].state.params) == pytest.approx([4.0, 2.0, 4.0], abs=1e-6)
    plain, _ = toy.run(FedAvg(optimizer="sgd", lr=0.3, batch_size=1), data, rounds=50)
    assert toy.vector(plain[-1].state.params)[0] == pytest.approx(2.4 / (0.3 + 3 * 0.657), abs=1e-6)
