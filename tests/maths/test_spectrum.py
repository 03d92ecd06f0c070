"""The spectrum from products alone, against dense eigenvalues and the golden values of the specification."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.core.rng import rng_for
from fedpeft.maths.layers import layer_count
from fedpeft.maths.spectrum import (
    Kept,
    eigengap,
    first_gap,
    lanczos,
    largest,
    plateau,
    rademacher,
    steepest,
    tridiagonal,
)

RNG = 5


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def symmetric(size: int) -> Tensor:
    draw = torch.from_numpy(rng_for(RNG, "matrix").normal(size=(size, size)))
    return (draw + draw.T) / 2


def test_all_steps_give_all_eigenvalues_with_the_weights_of_the_start() -> None:
    """omega_j = (q_j . start)^2 / |start|^2 for the eigenvectors q_j."""
    matrix = symmetric(20)
    start = rademacher(20, rng_for(RNG, "probe"))
    assert set(start.tolist()) == {1.0, -1.0}
    theta, omega = tridiagonal(lambda v: matrix @ v, start, 20)
    values, vectors = np.linalg.eigh(matrix.numpy())
    assert np.allclose(theta, values, atol=1e-9)
    assert np.allclose(omega, (vectors.T @ start.numpy()) ** 2 / 20, atol=1e-9)


def test_a_few_steps_give_the_ends_and_the_moments() -> None:
    """k steps integrate polynomials up to degree 2k - 1 exactly, and find the extreme eigenvalues first."""
    matrix = symmetric(200)
    start = rademacher(200, rng_for(RNG, "probe"))
    theta, omega = tridiagonal(lambda v: matrix @ v, start, 30)
    v = start
    for degree in range(8):
        moment = float(start @ v) / 200
        assert float((omega * theta**degree).sum()) == pytest.approx(moment, rel=1e-8, abs=1e-8)
        v = matrix @ v
    values = np.linalg.eigvalsh(matrix.numpy())
    assert float(theta[-1]) == pytest.approx(values[-1], abs=0.05)
    assert float(omega.sum()) == pytest.approx(1.0)


def test_many_steps_stay_orthogonal_where_eigenvalues_lie_far_apart() -> None:
    """Without re-orthogonalisation the largest would come several times."""
    values = torch.logspace(-6, 3, 60, dtype=torch.float64)
    theta, omega = tridiagonal(lambda v: values * v, torch.ones(60, dtype=torch.float64), 60)
    assert len(theta) == 60 and torch.allclose(theta, values, rtol=1e-6, atol=1e-8)
    assert torch.allclose(omega, torch.full((60,), 1 / 60, dtype=torch.float64), atol=1e-6)


def test_several_probes_share_their_weight() -> None:
    matrix = symmetric(40)
    theta, omega = lanczos(lambda v: matrix @ v, 40, 10, rng_for(RNG, "probe"), probes=6)
    assert len(theta) == 60 and bool((theta[1:] >= theta[:-1]).all())
    assert float(omega.sum()) == pytest.approx(1.0)
    rng = rng_for(RNG, "probe")
    own = [tridiagonal(lambda v: matrix @ v, rademacher(40, rng), 10) for _ in range(6)]
    assert float((theta * omega).sum()) == pytest.approx(np.mean([float((t * o).sum()) for t, o in own]))
    trace = float(matrix.trace()) / 40
    errors = {
        n: np.std([
            float((t * o).sum()) - trace
            for t, o in (lanczos(lambda v: matrix @ v, 40, 10, rng_for(s, "p"), n) for s in range(40))
        ])
        for n in (1, 8)
    }  # fmt: skip
    assert errors[8] < 0.6 * errors[1]


def test_power_iteration_finds_the_largest_by_absolute_value() -> None:
    matrix = torch.diag(torch.tensor([1.0, -3.0, 2.0, 0.5], dtype=torch.float64))
    assert largest(lambda v: matrix @ v, 4, 60, rng_for(RNG, "power")) == pytest.approx(3.0, abs=1e-9)
    assert largest(lambda v: 0 * v, 4, 8, rng_for(RNG, "power")) == 0.0
    dense = symmetric(30)
    found = largest(lambda v: dense @ v, 30, 8, rng_for(RNG, "power"))
    assert (
        0.5 * np.abs(np.linalg.eigvalsh(dense.numpy())).max() < found <= np.abs(np.linalg.eigvalsh(dense)).max() + 1e-9
    )


# --- golden values of the specification, section 9 ---


@pytest.mark.parametrize("seed", range(4))
def test_the_gap_of_two_groups(seed: int) -> None:
    matrix = diagonal(*[0.01] * 8, *[1.0] * 4)
    theta, omega = lanczos(lambda v: matrix @ v, 12, 30, rng_for(seed, "probe"))
    assert theta.tolist() == pytest.approx([0.01, 1.0]) and omega.tolist() == pytest.approx([2 / 3, 1 / 3])
    kept = eigengap(theta, omega, 0.1)
    assert kept == Kept(pytest.approx(1 / 3), True, pytest.approx(0.01), pytest.approx(1.0))
    assert layer_count(kept.ratio, 24, 24) == 8, "not 9"
    assert not eigengap(theta, omega, 0.3).usable


@pytest.mark.parametrize("seed", range(4))
def test_the_gap_of_four_groups(seed: int) -> None:
    matrix = diagonal(*[-0.5] * 2, *[0.0] * 5, *[0.2] * 3, *[2.0] * 2)
    theta, omega = lanczos(lambda v: matrix @ v, 12, 30, rng_for(seed, "probe"))
    assert omega.tolist() == pytest.approx([1 / 6, 5 / 12, 1 / 4, 1 / 6])
    assert eigengap(theta, omega, 0.04).ratio == pytest.approx(0.4166667)
    assert eigengap(theta, omega, 0.1).ratio == pytest.approx(0.1666667)


def test_a_gap_says_nothing_where_it_cannot() -> None:
    one, two = torch.tensor([1.0]).double(), torch.tensor([0.01, 1.0]).double()
    assert eigengap(one, torch.ones(1).double(), 0.0) == Kept()
    assert eigengap(two, torch.tensor([0.01, 0.99]).double(), 0.1) == Kept(
        pytest.approx(0.99), False, pytest.approx(0.01), 1.0
    ), "above .95"
    assert eigengap(two, torch.tensor([0.5, math.nan]).double(), 0.1) == Kept()
    assert eigengap(two, torch.tensor([0.5, 0.5]).double(), math.inf) == Kept()
    assert eigengap(-two.flip(0), torch.tensor([0.5, 0.5]).double(), 0.1) == Kept(), "no positive value"


@pytest.mark.parametrize(("top", "keep"), [(0.1, 0.317), (1.0, 0.532), (10.0, 0.631)])
def test_a_plateau_of_a_bulk_at_zero(top: float, keep: float) -> None:
    theta = torch.cat([torch.zeros(44), top * torch.linspace(0.3, 1, 6)]).double()
    omega = torch.cat([torch.full((44,), 0.95 / 44), torch.full((6,), 0.05 / 6)]).double()
    assert plateau(theta, omega).ratio == pytest.approx(keep, abs=0.002)


def test_plateaus_of_other_spectra() -> None:
    even = plateau(torch.linspace(0.01, 1, 50).double(), torch.full((50,), 0.02).double())
    assert even.ratio == pytest.approx(0.980, abs=0.002) and even.usable
    mixed = plateau(torch.tensor([-0.5, 0.0, 0.5]).double(), torch.tensor([0.1, 0.7, 0.2]).double())
    assert mixed.ratio == pytest.approx(0.283, abs=0.002)
    assert plateau(torch.tensor([math.nan]).double(), torch.ones(1).double()) == Kept()


def test_golden_first_gaps() -> None:
    """(0 .1 .2 1.5 1.6): with .25 the third place, r .4; with .5 none. Slopes of three points: 2, 3, 8 / 3."""
    values = torch.tensor([0.0, 0.1, 0.2, 1.5, 1.6])
    assert first_gap(values, 0.25) == pytest.approx(0.4) and first_gap(values, 0.5) is None
    x, b = (torch.tensor(t, dtype=torch.float64) for t in ([[0.0], [1.0], [3.0]], [[0.0], [2.0], [8.0]]))
    assert steepest([(x[i], b[i]) for i in range(3)]) == 3
