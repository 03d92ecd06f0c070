"""FedOpt on three numbers: each server optimizer against the equations, written again with numpy."""

from __future__ import annotations

import numpy as np
import pytest

import toy
from fedpeft.core.errors import ConfigError
from fedpeft.methods.fedopt import FedOpt

# Local SGD with rate 1 jumps to the mean of the client's rows, so the weighted mean of the answers is always
# (1/4) (9, 2, -1) + (3/4) (1, 0, -1) = (3, 1/2, -1), and Delta_t = (3, 1/2, -1) - x_t.
DATA = {"a": toy.points((9, 2, -1)), "b": toy.points((1, 0, -1), (1, 0, -1), (1, 0, -1))}
TARGET = np.array([3.0, 0.5, -1.0])


def method(server_optimizer: str, **values: float) -> FedOpt:
    settings = {"server_lr": 1.0, "beta1": 0.5, "beta2": 0.5, "tau": 1.0, **values}
    return FedOpt(server_optimizer=server_optimizer, optimizer="sgd", lr=1.0, **settings)  # type: ignore[arg-type]


def test_momentum() -> None:
    """eta = 1/2, beta_1 = 1/2, first coordinate: Delta = 3, m = 3, x = 3/2; Delta = 3/2, m = 3/2 + 3/2 = 3, x = 3.

    The other coordinates are in the same ratio: x_1 = T / 2, x_2 = T. The third round overshoots: Delta = 0, m = T/2,
    x = 5/4 T.
    """
    done, _ = toy.run(method("momentum", server_lr=0.5), DATA, rounds=3)
    for step, factor in zip(done, (0.5, 1.0, 1.25), strict=True):
        assert toy.vector(step.state.params) == pytest.approx(TARGET * factor, abs=1e-12)
    assert done[-1].state.second == {}


def test_no_momentum_and_rate_one_is_plain_averaging() -> None:
    done, _ = toy.run(method("momentum", beta1=0.0), DATA)
    assert toy.vector(done[0].state.params) == pytest.approx(TARGET, abs=1e-12)


@pytest.mark.parametrize(
    ("server_optimizer", "second"),
    [("adam", (5.0, 0.625, 1.0)), ("yogi", (5.5, 0.875, 1.0)), ("adagrad", (10.0, 1.25, 2.0))],
)
def test_first_step(server_optimizer: str, second: tuple[float, ...]) -> None:
    """Delta = (3, 1/2, -1), Delta^2 = (9, 1/4, 1), v_{-1} = tau^2 = 1, betas 1/2; m = Delta / 2 without correction.

    adam:    v = (1 + Delta^2) / 2 = (5, 5/8, 1)
    yogi:    v = 1 - Delta^2 sign(1 - Delta^2) / 2 = (1 + 9/2, 1 - 1/8, 1)
    adagrad: v = 1 + Delta^2 = (10, 5/4, 2)
    x = m / (sqrt(v) + 1)
    """
    done, _ = toy.run(method(server_optimizer), DATA)
    state = done[0].state
    assert toy.vector(state.first) == pytest.approx([1.5, 0.25, -0.5], abs=1e-12)
    assert toy.vector(state.second) == pytest.approx(second, abs=1e-12)
    assert toy.vector(state.params) == pytest.approx(TARGET / 2 / (np.sqrt(second) + 1), abs=1e-12)


def by_hand(kind: str, rounds: int, eta: float, beta1: float, beta2: float, tau: float) -> np.ndarray:
    """Algorithm 2 of the paper, line by line."""
    x, m, v = np.zeros(3), np.zeros(3), np.full(3, tau**2)
    for _ in range(rounds):
        delta = TARGET - x
        m = beta1 * m + (1 - beta1) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "yogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + eta * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize("kind", ["adam", "yogi", "adagrad"])
@pytest.mark.parametrize("rounds", [2, 5])
def test_further_steps(kind: str, rounds: int) -> None:
    done, _ = toy.run(method(kind, server_lr=0.1, beta1=0.9, beta2=0.99, tau=0.01), DATA, rounds=rounds)
    assert toy.vector(done[-1].state.params) == pytest.approx(by_hand(kind, rounds, 0.1, 0.9, 0.99, 0.01), abs=1e-12)


def test_ranges() -> None:
    with pytest.raises(ConfigError) as caught:
        FedOpt(tau=0.0, beta1=1.0, beta2=-0.1, server_lr=0.0)
    assert len(caught.value.problems) == 4
