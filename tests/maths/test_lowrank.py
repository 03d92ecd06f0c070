"""Low-rank factors against dense arithmetic in numpy, and the golden values of the specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.maths import lowrank

P = (1 / 8, 2 / 8, 5 / 8)
Array = NDArray[np.float64]


def golden(ranks: tuple[int, ...] = (2, 2, 2), d_out: int = 6, d_in: int = 5) -> list[lowrank.Pair]:
    pairs = []
    for k, rank in enumerate(ranks):
        a = [[((3 * i * i + 7 * j + 5 * k * (i + 1) + 1) % 11) / 10 - 0.5 for j in range(d_in)] for i in range(rank)]
        b = [[((2 * i * i + 5 * j + 3 * k * (i + 1) + 4) % 13) / 12 - 0.5 for j in range(rank)] for i in range(d_out)]
        pairs.append((torch.tensor(b, dtype=torch.float64), torch.tensor(a, dtype=torch.float64)))
    return pairs


def dense(pairs: list[lowrank.Pair], weights: tuple[float, ...] = P) -> Array:
    total: Array = sum(w * b.numpy() @ a.numpy() for (b, a), w in zip(pairs, weights, strict=True))
    return total


def error(pair: lowrank.Pair, target: Array) -> float:
    return float(np.linalg.norm(pair[0].numpy() @ pair[1].numpy() - target) / np.linalg.norm(target))


def test_the_golden_mean_of_products() -> None:
    m = dense(golden())
    assert np.linalg.norm(m) == pytest.approx(0.4433072, abs=1e-7)
    np.testing.assert_allclose(np.linalg.svd(m)[1], [0.3861995, 0.1936898, 0.0760166, 0.0610856, 0.0185884], atol=1e-7)


def test_golden_errors_of_means_stacks_and_truncations() -> None:
    pairs, m = golden(), dense(golden())
    assert error(lowrank.mean(pairs, P), m) == pytest.approx(0.7276248, abs=1e-6)
    stacked = lowrank.stack(pairs, P)
    assert error(stacked, m) < 1e-15 and stacked[1].shape == (6, 5)
    both = stacked[0], torch.cat([a * p for (_, a), p in zip(pairs, P, strict=True)])
    assert error(both, m) == pytest.approx(0.4322009, abs=1e-6), "weights on both factors, the mistake"
    wanted = {1: 0.4909673, 2: 0.2239416, 4: 0.0419312, 5: 0.0}
    for rank, expected in wanted.items():
        assert error(lowrank.truncate(stacked, rank), m) == pytest.approx(expected, abs=1e-6)


def test_golden_errors_of_the_refitted_factor() -> None:
    pairs, m = golden(), dense(golden())
    b, a = lowrank.mean(pairs, P)
    residual = lowrank.difference(lowrank.stack(pairs, P), (b, a))
    wanted = {0.0: 0.4757494, 0.01: 0.4764938, 0.1: 0.5098814, 1.0: 0.6579703}
    for ridge, expected in wanted.items():
        change = lowrank.refit(residual, a, ridge)
        assert error((b + change, a), m) == pytest.approx(expected, abs=1e-6)


def test_golden_errors_of_padding_by_norms() -> None:
    pairs = golden((1, 2, 4))
    norms = lowrank.shares([lowrank.norm(pair) for pair in pairs])
    np.testing.assert_allclose(norms, [0.1998183, 0.3528530, 0.4473286], atol=1e-7)
    padded = lowrank.mean([lowrank.pad(pair, 4) for pair in pairs], norms)
    assert error(padded, dense(pairs, tuple(norms))) == pytest.approx(0.7596213, abs=1e-6)


def test_golden_scalars() -> None:
    pairs = [(torch.tensor([[b]]).double(), torch.tensor([[a]]).double()) for a, b in ((1.0, 2.0), (3.0, 0.0))]
    half = (0.5, 0.5)
    b, a = lowrank.mean(pairs, half)
    whole = lowrank.stack(pairs, half)
    residual = lowrank.difference(whole, (b, a))
    assert lowrank.product(whole).item() == 1 and lowrank.product((b, a)).item() == 2
    assert lowrank.product(residual).item() == -1 and lowrank.refit(residual, a, 0.0).item() == -0.5


shape = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**16))


@given(shape)
def test_a_decomposition_is_that_of_the_dense_product(drawn: tuple[int, int, int, int]) -> None:
    d_out, d_in, rank, seed = drawn
    rng = np.random.default_rng(seed)
    b, a = rng.normal(size=(d_out, rank)), rng.normal(size=(rank, d_in))
    u, s, v = (t.numpy() for t in lowrank.svd((torch.from_numpy(b), torch.from_numpy(a))))
    np.testing.assert_allclose(u * s @ v.T, b @ a, atol=1e-9)
    np.testing.assert_allclose(s, np.linalg.svd(b @ a, compute_uv=False)[: len(s)], atol=1e-9)
    assert (np.diff(s) <= 1e-12).all() and (u[np.abs(u).argmax(axis=0), np.arange(len(s))] > 0).all()
    assert lowrank.norm((torch.from_numpy(b), torch.from_numpy(a))) == pytest.approx(np.linalg.norm(b @ a), rel=1e-9)


@given(shape, st.sampled_from([0.0, 0.3]))
def test_a_refit_is_the_least_squares_solution(drawn: tuple[int, int, int, int], ridge: float) -> None:
    d_out, d_in, rank, seed = drawn
    rng = np.random.default_rng(seed)
    target, a = rng.normal(size=(d_out, d_in)), rng.normal(size=(min(rank, d_in), d_in))
    got = lowrank.refit((torch.from_numpy(target), torch.eye(d_in).double()), torch.from_numpy(a), ridge)
    tall = np.vstack([a.T, np.sqrt(ridge) * np.eye(len(a))])
    wanted = np.linalg.lstsq(tall, np.vstack([target.T, np.zeros((len(a), d_out))]), rcond=None)[0].T
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-6 * max(1, np.abs(wanted).max()))


def cosine(x: Array, y: Array) -> float:
    return float((x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y)))


@given(shape)
def test_a_turned_factor_reaches_the_largest_cosine(drawn: tuple[int, int, int, int]) -> None:
    """With λ = 0 that is ||M P|| / ||M||, P the projection onto the rows of A; from within a right angle of M."""
    d_out, d_in, rank, seed = drawn
    rng = np.random.default_rng(seed)
    target, b = rng.normal(size=(d_out, d_in)), rng.normal(size=(d_out, rank))
    a = np.linalg.qr(rng.normal(size=(d_in, min(rank, d_in))))[0].T * rng.uniform(0.5, 2, size=(min(rank, d_in), 1))
    b = b[:, : len(a)] * np.sign(np.sum(b[:, : len(a)] @ a * target))
    towards = torch.from_numpy(target), torch.eye(d_in).double()
    change = lowrank.turn((torch.from_numpy(b), torch.from_numpy(a)), towards, 0.0).numpy()
    best = np.linalg.norm(target @ np.linalg.pinv(a) @ a) / np.linalg.norm(target)
    assert cosine((b + change) @ a, target) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ridge", [0.01, 0.1, 0.5])
def test_a_turned_factor_is_at_rest(seed: int, ridge: float) -> None:
    """Central differences of 1 - cos + λ ||ΔB|| in dense arithmetic vanish; or ΔB = 0, where they are at most λ."""
    rng, (d_out, d_in, rank) = np.random.default_rng(seed), (7, 12, 3)
    b, a, stray = (rng.normal(size=s) for s in ((d_out, rank), (rank, d_in), (d_out, d_in)))
    target = b @ a / np.linalg.norm(b @ a) + 0.5 * stray / np.linalg.norm(stray)
    towards = torch.from_numpy(target), torch.eye(d_in).double()
    change = lowrank.turn((torch.from_numpy(b), torch.from_numpy(a)), towards, ridge).numpy()

    def value(delta: Array, ridge: float) -> float:
        return 1 - cosine((b + delta) @ a, target) + ridge * float(np.linalg.norm(delta))

    assert value(change, ridge) <= value(0 * change, ridge) + 1e-12
    steps = np.eye(b.size).reshape(-1, *b.shape) * 1e-5
    own = ridge if change.any() else 0.0
    slopes = [(value(change + step, own) - value(change - step, own)) / 2e-5 for step in steps]
    assert np.linalg.norm(slopes) < (1e-4 if change.any() else ridge + 1e-6)


def test_turning_by_hand() -> None:
    """B = (1, 0), A = 1, M = (0, 1): the slope at B is (0, 1). With λ above 1 nothing moves; zeros have no angle."""
    pair, towards = (torch.tensor([[1.0], [0.0]]), torch.ones(1, 1)), (torch.tensor([[0.0], [1.0]]), torch.ones(1, 1))
    assert not lowrank.turn(pair, towards, 1.01).any()
    turned = pair[0] + lowrank.turn(pair, towards, 0.0)
    assert cosine(turned.numpy(), towards[0].numpy()) == pytest.approx(1, abs=1e-6)
    zero = torch.zeros(2, 1), torch.ones(1, 1)
    assert not lowrank.turn(zero, towards, 0.0).any() and not lowrank.turn(pair, zero, 0.0).any()
    assert not lowrank.turn(pair, (2 * pair[0], pair[1]), 0.0).any(), "the direction is right, whatever the length"


def test_what_has_less_rank_is_padded_with_zeros() -> None:
    b, a = lowrank.truncate((torch.ones(3, 1), torch.ones(1, 2)), 4)
    assert b.shape == (3, 4) and a.shape == (4, 2) and not b[:, 1:].any() and not a[1:].any()
    np.testing.assert_allclose((b @ a).numpy(), np.ones((3, 2)), atol=1e-12)
    zero = lowrank.truncate((torch.zeros(3, 2), torch.ones(2, 2)), 1)
    assert not lowrank.product(zero).any() and torch.isfinite(zero[1]).all()
    assert lowrank.shares([0, 0]) == [0.5, 0.5]


# --- factors of unequal rank (FedPipe) ----------------------------------------------------------------------------


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_the_golden_mean_of_two_rank_one_products() -> None:
    """B1 = e1, A1 = (2, 0), B2 = e2, A2 = (0, 4), w = .5: exact diag(1, 2); rank 1 keeps diag(0, 2); factor means miss
    it by .707107."""
    own = [(tensor([1], [0]), tensor([2, 0])), (tensor([0], [1]), tensor([0, 4]))]
    exact = dense(own, (0.5, 0.5))
    np.testing.assert_allclose(exact, np.diag([1, 2]))
    b, a = lowrank.halves(lowrank.stack(own, (0.5, 0.5)), 1)
    np.testing.assert_allclose(b @ a, np.diag([0, 2]), atol=1e-12)
    np.testing.assert_allclose(b.norm(), a.norm())
    zeros = (torch.zeros(2, 1), torch.zeros(1, 2))
    assert error(lowrank.slices(own, (0.5, 0.5), zeros), exact) == pytest.approx(0.707107, abs=1e-6)


def test_golden_aggregates_of_unequal_ranks() -> None:
    """Ranks 1 and 2, w = .25, .75, (e1, e1) and (I, I): exact diag(1, .75), slices I, padded diag(1, .5625); with the
    old second component ((0, 1)^T, (0, .4)) frozen, exact diag(1, .85)."""
    own = [(tensor([1], [0]), tensor([1, 0])), (torch.eye(2).double(), torch.eye(2).double())]
    weights = (0.25, 0.75)
    zeros = (torch.zeros(2, 2).double(), torch.zeros(2, 2).double())
    old = (tensor([0, 0], [0, 1]), tensor([0, 0], [0, 0.4]))
    np.testing.assert_allclose(lowrank.product(lowrank.stack(own, weights)), np.diag([1, 0.75]))
    b, a = lowrank.slices(own, weights, zeros)
    np.testing.assert_allclose(b @ a, np.eye(2))
    b, a = lowrank.mean([lowrank.filled(pair, zeros) for pair in own], weights)
    np.testing.assert_allclose(b @ a, np.diag([1, 0.5625]))
    tail = lowrank.tail(old, [1, 2], weights)
    both = lowrank.stack([*own, tail], [*weights, 1.0])
    np.testing.assert_allclose(lowrank.product(both), np.diag([1, 0.85]))
    b, a = lowrank.halves(both, 2)
    np.testing.assert_allclose(b @ a, np.diag([1, 0.85]), atol=1e-12)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 10**6))
def test_halves_are_exact_while_the_rank_lasts_and_share_the_singular_values(ranks: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    own = [(torch.from_numpy(rng.normal(size=(6, r))), torch.from_numpy(rng.normal(size=(r, 5)))) for r in ranks]
    weights = tuple(rng.dirichlet(np.ones(len(ranks))))
    whole = lowrank.stack(own, weights)
    b, a = lowrank.halves(whole, 5)
    np.testing.assert_allclose(b @ a, dense(own, weights), atol=1e-9)
    np.testing.assert_allclose(b.norm(dim=0), a.norm(dim=1), atol=1e-9)
    best = np.linalg.svd(dense(own, weights))
    first = best[1][:2] * best[0][:, :2] @ best[2][:2]
    np.testing.assert_allclose(lowrank.product(lowrank.halves(whole, 2)), first, atol=1e-9)


def test_halves_leave_out_what_is_negligible() -> None:
    b, a = lowrank.halves((torch.diag(tensor([1, 1e-7])[0]), torch.eye(2).double()), 2)
    assert not bool(b[:, 1].any()) and not bool(a[1].any()) and bool(a[0].any())


def test_a_product_is_compressed_to_its_own_rank() -> None:
    """Two equal halves of diag(2, 0) are one component of 2; a product of zero keeps one component of zeros."""
    half = tensor([1], [0]), tensor([1, 0])
    b, a = lowrank.compressed(lowrank.stack([half, half], (1.0, 1.0)), 256)
    assert b.shape == (2, 1) and a.shape == (1, 2)
    np.testing.assert_allclose(lowrank.product((b, a)), [[2, 0], [0, 0]], atol=1e-12)
    whole = torch.diag(tensor([3, 2, 1])[0]), torch.eye(3).double()
    assert lowrank.compressed(whole, 2)[1].shape == (2, 3) and lowrank.compressed(whole, 256)[1].shape == (3, 3)
    b, a = lowrank.compressed((torch.zeros(3, 2).double(), torch.zeros(2, 3).double()), 256)
    assert b.shape == (3, 1) and not b.any() and not a.any()


def test_slices_keep_what_nobody_has() -> None:
    before = (torch.arange(6.0).view(2, 3).double(), torch.arange(9.0).view(3, 3).double())
    own = [
        (torch.ones(2, 1).double(), torch.ones(1, 3).double()),
        (3 * torch.ones(2, 2).double(), torch.ones(2, 3).double()),
    ]
    b, a = lowrank.slices(own, (0.25, 0.75), before)
    np.testing.assert_allclose(b, [[2.5, 3, 2], [2.5, 3, 5]])
    np.testing.assert_allclose(a, [[1, 1, 1], [1, 1, 1], [6, 7, 8]])


def test_equal_clients_leave_every_aggregate_as_it_is() -> None:
    rng = np.random.default_rng(0)
    pair = (torch.from_numpy(rng.normal(size=(4, 2))), torch.from_numpy(rng.normal(size=(2, 3))))
    for b, a in (
        lowrank.slices([pair, pair], (0.3, 0.7), pair),
        lowrank.halves(lowrank.stack([pair, pair], (0.3, 0.7)), 2),
    ):
        np.testing.assert_allclose(b @ a, pair[0] @ pair[1], atol=1e-12)
