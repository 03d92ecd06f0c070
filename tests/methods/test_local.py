"""Local training on three numbers."""

from __future__ import annotations

import numpy as np
import pytest

import toy
from fedpeft.core.federate import Done
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.local import Local, Memory

A, B, C = toy.points((4, 8, 0)), toy.points((0, 0, 8)), toy.points((8, 8, 8))
DATA = {"a": A, "b": B, "c": C}


def own(done: Done, engine: InProcess, client: str, method: Local) -> list[float]:
    """The client's own model."""
    memory = engine.memories.load(client, done.versions[client], Memory)
    return toy.vector(method.personal(method.result(done.state), memory))


def test_everybody_goes_their_own_way() -> None:
    """One step of SGD with lr 1/2 per round: after two rounds everybody is 3/4 of the way to their own mean."""
    method = Local(cohort=0, optimizer="sgd", lr=0.5)
    done, engine = toy.run(method, DATA, rounds=2)
    assert own(done[-1], engine, "a", method) == [3.0, 6.0, 0.0]
    assert own(done[-1], engine, "b", method) == [0.0, 0.0, 6.0]
    assert own(done[-1], engine, "c", method) == [6.0, 6.0, 6.0]
    assert toy.vector(method.result(done[-1].state)) == [0.0, 0.0, 0.0]


def test_clients_take_turns() -> None:
    """Cohorts of two among three clients: ab, ca, bc, and after three rounds everybody has had two turns."""
    method = Local(cohort=2, optimizer="sgd", lr=0.5)
    done, engine = toy.run(method, DATA, rounds=3)
    assert [tuple(step.cohort) for step in done] == [("a", "b"), ("c", "a"), ("b", "c")]
    assert own(done[-1], engine, "b", method) == [0.0, 0.0, 6.0]
    assert done[-1].state.turns == 6


def test_the_loss_is_the_mean_by_examples() -> None:
    """From 0: a 1/2 (16 + 64) = 40 with one row, b 1/2 * 64 = 32 with three, together (40 + 96) / 4 = 34."""
    data = {"a": A, "b": toy.points((0, 0, 8), (0, 0, 8), (0, 0, 8))}
    done, _ = toy.run(Local(optimizer="sgd", lr=0.5), data)
    assert done[0].state.loss == 34.0


def test_the_optimizer_lives_on_from_turn_to_turn() -> None:
    """Three turns of one AdamW step each are three steps of Adam's equations (Kingma & Ba 2015, Algorithm 1)."""
    done, engine = toy.run(Local(lr=0.1), {"a": A}, rounds=3)
    w, m, v, target = np.zeros(3), np.zeros(3), np.zeros(3), A.x[0]
    for t in (1, 2, 3):
        g = w - target
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert own(done[-1], engine, "a", Local()) == pytest.approx(w, abs=1e-12)


def test_who_has_not_had_a_turn_has_the_fresh_adapter() -> None:
    method = Local(cohort=1)
    done, _ = toy.run(method, DATA, start=(1, 2, 3))
    assert done[0].versions.keys() == {"a"}
    assert toy.vector(done[0].state.params) == [1.0, 2.0, 3.0]
