"""The arithmetic of scores: figures that a pencil gives, filters against plain NumPy, draws and drafts by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.maths import logits as m

INF = math.inf
ZL, ZT, ZB = torch.tensor([2.0, 1, 0]), torch.tensor([1.0, 3, 0]), torch.tensor([1.0, 1, 1])


def close(found: Tensor, expected: list[float], at: float = 1e-6) -> None:
    torch.testing.assert_close(found.float(), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=at)


# --- combining --------------------------------------------------------------------------------------------------


def test_three_tokens_by_hand() -> None:
    """d = (0, 2, -1): alpha 1 gives (2, 3, -1), alpha .5 (2, 2, -.5); on a tie the lower id is the greatest."""
    d = m.offsets(ZT, ZB)
    close(m.combine(ZL, d, 1.0), [2, 3, -1])
    close(m.combine(ZL, d, 1.0).softmax(0), [0.265388, 0.721399, 0.013213])
    half = m.combine(ZL, d, 0.5)
    close(half, [2, 2, -0.5])
    close(half.softmax(0), [0.480288, 0.480288, 0.039424])
    assert int(half.argmax()) == 0
    assert torch.equal(m.combine(ZL, d, 0.0), ZL)


def test_logits_and_log_probabilities_are_interchangeable() -> None:
    one = m.combine(ZL, m.offsets(ZT, ZB), 0.7).softmax(0)
    other = m.combine(ZL.log_softmax(0), m.offsets(ZT.log_softmax(0), ZB.log_softmax(0)), 0.7).softmax(0)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_what_is_not_finite_or_missing_changes_nothing() -> None:
    """An impossible token in T or B has offset 0; so has one that they lack; never a NaN."""
    close(m.offsets(torch.tensor([1, -INF, 0]), ZB), [0, 0, -1])
    close(m.offsets(torch.tensor([-INF, 3, INF]), torch.tensor([-INF, -INF, INF])), [0, 0, 0])
    close(m.offsets(ZT, ZB[:2], 5), [0, 2, 0, 0, 0])
    close(m.offsets(ZT, ZB, 2), [0, 2])
    large = torch.tensor([2.0, -INF, 0])
    for alpha in (0.0, 1.0, -3.0):
        z = m.combine(large, m.offsets(ZT, torch.tensor([-INF, 1, 1])), alpha)
        assert not z.isnan().any() and z[1] == -INF and z.softmax(0).sum() == pytest.approx(1)


def test_candidates_alone_by_hand() -> None:
    """The two likeliest of L cover .909969; with d the candidates share (.268941, .731059)."""
    p = ZL.softmax(0)
    ids = torch.tensor([0, 1])
    assert float(p[ids].sum()) == pytest.approx(0.909969, abs=1e-6)
    z = m.combine(m.scatter(p.log()[ids], ids, 3), m.offsets(ZT, ZB), 1.0)
    close(z.softmax(0), [0.268941, 0.731059, 0])
    close(m.scatter(torch.tensor([[[5.0, 7, 9]]]), torch.tensor([[[2, 9, 0]]]), 3), [[[9, -INF, 5]]])  # type: ignore[list-item]


def test_implausible_tokens_are_out() -> None:
    """With beta .5, p_L = (.665, .245, .090): token 0 alone is left."""
    z = m.combine(ZL, m.offsets(ZT, ZB), 1.0)
    close(m.plausible(z[None], ZL[None], 0.5)[0], [2, -INF, -INF])
    both = m.plausible(z.repeat(2, 1), ZL.repeat(2, 1), torch.tensor([0.0, 0.3]))
    close(both[0], z.tolist())
    close(both[1], [2, 3, -INF])


# --- penalties and filters --------------------------------------------------------------------------------------


def test_order_matters_by_hand() -> None:
    """z = (3, 2, 0) + (-3, 0, 3) = (0, 2, 3): top-k 1 is token 2 after combining, 0 before; a penalty moves it to 1."""
    large, d = torch.tensor([[3.0, 2, 0]]), torch.tensor([[-3.0, 0, 3]])
    z = m.combine(large, d, 1.0)
    assert int(m.keep_top_k(z, 1).argmax()) == 2 and int(m.combine(m.keep_top_k(large, 1), d, 1.0).argmax()) == 0
    seen = torch.tensor([[False, False, True]])
    close(m.penalise_repeats(z, seen, 2.0)[0], [0, 2, 1.5])
    close(m.penalise_repeats(-z, seen, 2.0)[0], [0, -2, -6])
    assert int(m.penalise_repeats(z, seen, 2.0).argmax()) == 1
    close(m.penalise_counts(z, torch.tensor([[0.0, 1, 3]]), 0.5, 0.25)[0], [0, 1.25, 1.75])


def test_filters_by_hand() -> None:
    z = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert (m.keep_top_k(z, 3) > -INF).tolist() == [[True, True, True, False]], "of equal ones the lower id stays"
    assert (m.keep_top_p(z, 0.5) > -INF).tolist() == [[True, False, False, False]], "the mass is reached exactly"
    assert (m.keep_top_p(z, 0.51) > -INF).tolist() == [[True, True, False, False]]
    assert (m.keep_min_p(z, 0.5) > -INF).tolist() == [[True, True, False, False]], "as much as the bound is enough"
    assert (m.keep_min_p(z, 0.51) > -INF).tolist() == [[True, False, False, False]]
    for same in (m.keep_top_k(z, 0), m.keep_top_k(z, 9), m.keep_top_p(z, 1.0), m.keep_min_p(z, 0.0)):
        assert torch.equal(same, z)


def plain_filter(z: NDArray[np.float64], k: int, p: float, min_p: float) -> NDArray[np.float64]:
    """Probabilities after the three filters, token by token, sorted with the lower id first on ties."""
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    if k:
        order = order[:k]
    weights = {i: math.exp(z[i] - z[order[0]]) for i in order}
    if p < 1:
        total, heap, kept = sum(weights.values()), 0.0, []
        for i in order:
            if heap / total >= p:
                break
            kept.append(i)
            heap += weights[i]
        order = kept
    order = [i for i in order if weights[i] >= min_p * weights[order[0]]]
    out = np.zeros(len(z))
    for i in order:
        out[i] = weights[i] / sum(weights[j] for j in order)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_filters_are_those_of_plain_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = np.round(rng.normal(0, 2, size=(6, 30)), 1).astype(np.float32)  # with ties
    z[1, 4:20] = -INF
    k = rng.integers(0, 33, size=6)
    p, min_p = rng.uniform(0.2, 1, size=6), rng.uniform(0, 0.3, size=6)
    p[0] = 1.0
    found = m.keep_top_k(torch.from_numpy(z), torch.from_numpy(k))
    found = m.keep_top_p(found, torch.from_numpy(p))
    found = m.keep_min_p(found, torch.from_numpy(min_p)).double().softmax(dim=-1)
    for row in range(6):
        expected = plain_filter(z[row].astype(np.float64), int(k[row]), p[row], min_p[row])
        np.testing.assert_allclose(found[row].numpy(), expected, atol=1e-6)


def test_a_draw_is_the_inverse_of_the_distribution() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    assert [m.draw(p, u) for u in (0.0, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53)] == [1, 1, 3, 3, 4, 4]
    assert [m.draw(8 * p, u) for u in (0.0, 0.5, 0.99)] == [1, 3, 4]
    grid = [m.draw(p, (i + 0.5) / 4000) for i in range(4000)]
    assert np.bincount(grid, minlength=6).tolist() == [0, 2000, 0, 1000, 1000, 0]


# --- speculation ------------------------------------------------------------------------------------------------


def test_acceptance_and_residual_by_hand() -> None:
    """Drafts from q are accepted with probability .2 + .3 + .1; with what is drawn after a rejection that gives c."""
    c, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1])
    accepted = torch.tensor([float(q[token]) * m.acceptable(c, q, token) for token in range(3)])
    close(accepted, [0.2, 0.3, 0.1])
    assert m.acceptable(c, q, 1) == pytest.approx(0.428571, abs=1e-6) and m.acceptable(c, q, 0) == 1
    close(m.residual(c, q), [0.75, 0, 0.25])
    assert torch.equal(m.residual(c, c), c)
    close(accepted + (1 - accepted.sum()) * m.residual(c, q), c.tolist())


# --- curve and distillation -------------------------------------------------------------------------------------


def test_curve_by_hand() -> None:
    """y = 1 of the three tokens: 1.407606, .733370, .326563 at alpha 0, .5, 1."""
    found = m.curve_terms(ZL[None], m.offsets(ZT, ZB)[None], torch.tensor([1]), [0.0, 0.5, 1.0])
    close(found, [1.407606, 0.733370, 0.326563])
    assert found.dtype == torch.float64
    two = m.curve_terms(ZL.repeat(2, 1), m.offsets(ZT, ZB).repeat(2, 1), torch.tensor([1, 0]), [1.0])
    assert float(two) == pytest.approx(0.326563 - math.log(0.265388), abs=1e-5)


def test_distillation_by_hand() -> None:
    """Teacher (.5, .25, .25), student uniform: KL .058892; at tau 2, times 4: .056882."""
    z, student = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.zeros(1, 3)
    close(m.divergence(m.teacher(z), student), [0.058892])
    close(m.divergence(m.teacher(z, 2.0), student, 2.0), [0.056882])
    assert float(m.distillation_loss(m.teacher(z), student)) == pytest.approx(0.058892, abs=1e-6)
    mixed = m.distillation_loss(m.teacher(z), student, torch.tensor([2]), share=0.25)
    assert float(mixed) == pytest.approx(0.25 * 0.058892 + 0.75 * math.log(3), abs=1e-5)
    bare = m.distillation_loss(m.teacher(z), student, torch.tensor([m.NO_TOKEN]), share=0.25)
    assert float(bare) == pytest.approx(0.25 * 0.058892, abs=1e-5)
    two, said = z.repeat(2, 1), torch.tensor([2, m.NO_TOKEN])
    for reduction, times in (("mean", 0.5), ("sum", 1.0)):
        found = m.distillation_loss(m.teacher(two), student.repeat(2, 1), said, 0.25, reduction=reduction)
        assert float(found) == pytest.approx(times * (float(mixed) + float(bare)), rel=1e-5)


def test_distillation_against_torch_and_its_gradient() -> None:
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(5, 9, generator=rng)
    student = torch.randn(5, 9, generator=rng, requires_grad=True)
    tau = 1.7
    found = m.distillation_loss(m.teacher(z, tau), student, temperature=tau)
    p = (z / tau).softmax(-1)
    expected = tau**2 * torch.nn.functional.kl_div((student / tau).log_softmax(-1), p, reduction="batchmean")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    by_hand = tau / 5 * ((student / tau).softmax(-1) - p)  # d/ds of tau^2 KL / n
    torch.testing.assert_close(student.grad, by_hand.detach(), rtol=1e-4, atol=1e-6)


def test_a_teacher_of_few_candidates_is_shared_out_among_them() -> None:
    """Of (.5, .3, .2) the first and last: (5/7, 2/7); the student's probabilities stay those over all tokens."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
    ids = torch.tensor([[2, 0]])
    found = m.divergence(m.teacher(p.log().gather(-1, ids)), q.log(), ids=ids)
    close(found, [5 / 7 * math.log(5 / 7 / 0.2) + 2 / 7 * math.log(2 / 7 / 0.3)])
    full = m.divergence(m.teacher(m.scatter(p.log().gather(-1, ids), ids, 3)), q.log())
    close(full, found.tolist())
