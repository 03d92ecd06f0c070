"""Low-rank factors: sums of products, their truncation, and the ways in which servers combine unequal factors.

A pair is (B, A), B (d_out, r) and A (r, d_in), and stands for the product B A. Everything is computed in float64; the
results are float64 too. M = sum_k p_k B_k A_k is the mean of the clients' products, p_k their weights; B̄ and Ā are the
means of their factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpeft.core.pairs import Pair as Pair
from fedpeft.core.pairs import combined
from fedpeft.core.tree import Params


def shares(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum; equal shares where they sum to zero."""
    total = sum(weights)
    return [w / total for w in weights] if total > 0 else [1 / len(weights)] * len(weights)


def product(pair: Pair) -> Tensor:
    """B A, (d_out, d_in)."""
    b, a = pair
    return b.double() @ a.double()


def stack(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """One pair whose product is sum_k w_k B_k A_k, of the summed rank; the weights sit on B alone."""
    left = torch.cat([b.double() * w for (b, _), w in zip(pairs, weights, strict=True)], dim=1)
    return left, torch.cat([a.double() for _, a in pairs], dim=0)


def joined(parts: Sequence[Params], weights: Sequence[float]) -> dict[str, Tensor]:
    """Factors of the summed rank whose products are sum_k w_k B_k A_k, slot by slot, in the dtype that they came in."""

    def how(own: Sequence[Pair], before: Pair) -> Pair:
        return stack(own, weights)

    return combined(parts, how, parts[0])


def mean(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """(B̄, Ā): the weighted means of the factors, for pairs of equal rank; weights sum to 1."""
    left = torch.stack([b.double() * w for (b, _), w in zip(pairs, weights, strict=True)]).sum(dim=0)
    return left, torch.stack([a.double() * w for (_, a), w in zip(pairs, weights, strict=True)]).sum(dim=0)


def difference(first: Pair, second: Pair) -> Pair:
    """One pair whose product is that of the first less that of the second."""
    return stack((first, second), (1.0, -1.0))


def pad(pair: Pair, rank: int) -> Pair:
    """The pair with zero columns of B and zero rows of A up to the rank."""
    b, a = pair
    more = rank - a.shape[0]
    return torch.nn.functional.pad(b.double(), (0, more)), torch.nn.functional.pad(a.double(), (0, 0, 0, more))


def filled(pair: Pair, others: Pair) -> Pair:
    """The pair with the components of another one from its own rank on."""
    b, a = (t.double() for t in pair)
    return torch.cat([b, others[0].double()[:, len(a) :]], dim=1), torch.cat([a, others[1].double()[len(a) :]])


def svd(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of B A by way of its small core.

    B = Q_1 R_1, A^T = Q_2 R_2, and R_1 R_2^T has at most r x r numbers. Of each u the largest entry is positive, so
    that the result does not depend on the library.

    Returns:
        u (d_out, k), s (k,) descending, v (d_in, k), k = min(r, d_out, d_in).
    """
    b, a = (t.double() for t in pair)
    q1, r1 = torch.linalg.qr(b)
    q2, r2 = torch.linalg.qr(a.T)
    inner_u, s, inner_vt = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    u, v = q1 @ inner_u, q2 @ inner_vt.T
    sign = torch.sign(u.gather(0, u.abs().argmax(dim=0, keepdim=True)))
    sign[sign == 0] = 1
    return u * sign, s, v * sign


NEGLIGIBLE = 1e-6  # a singular value over the largest, which is zero to the rounding of float32


def truncate(pair: Pair, rank: int, negligible: float = NEGLIGIBLE) -> Pair:
    """The best pair of this rank (Eckart & Young 1936): B = U_r diag(s_r), A = V_r^T; zeros where B A has less rank."""
    u, s, v = _largest(pair, rank, negligible)
    return pad((u * s, v.T), rank)


def revived(pair: Pair, a: Tensor) -> Pair:
    """The pair with the rows of another A wherever its own are zero, and zero columns of B there.

    The product stays; a component whose row and column are both zero would have no gradient, and never train.
    """
    left, right = (t.double() for t in pair)
    dead = ~right.any(dim=1)
    return torch.where(dead, 0.0, left), torch.where(dead[:, None], a.double(), right)


def halves(pair: Pair, rank: int, negligible: float = NEGLIGIBLE) -> Pair:
    """The best pair of this rank whose factors share the singular values: B = U_r s_r^1/2, A = s_r^1/2 V_r^T.

    Zeros where there is no singular value, or one of at most `negligible` times the largest.
    """
    u, s, v = _largest(pair, rank, negligible)
    return pad((u * s.sqrt(), (v * s.sqrt()).T), rank)


def _largest(pair: Pair, rank: int, negligible: float) -> tuple[Tensor, Tensor, Tensor]:
    """The decomposition's largest components, as many as the rank, without negligible ones."""
    u, s, v = svd(pair)
    kept = min(rank, int((s > negligible * s[:1]).sum()))
    return u[:, :kept], s[:kept], v[:, :kept]


def compressed(pair: Pair, cap: int) -> Pair:
    """The same product by as few components as it has rank, at least one, and at most `cap`; see `halves`."""
    b, a = pair
    left, right = halves(pair, min(cap, len(b), a.shape[1], len(a)))
    used = max(1, int(right.any(dim=1).sum()))
    return left[:, :used], right[:used]


def tail(pair: Pair, ranks: Sequence[int], weights: Sequence[float]) -> Pair:
    """What those who train only the first r_i components leave as it was: sum over i of w_i B_k A_k for k >= r_i.

    Args:
        pair: the components that everybody was given.
        ranks: r_i, how many of the first ones each trained.
        weights: w_i, which sit on B.
    """
    b, a = pair
    left = [sum(w for r, w in zip(ranks, weights, strict=True) if r <= k) for k in range(len(a))]
    return b.double() * torch.tensor(left, dtype=torch.float64, device=b.device), a.double()


def slices(pairs: Sequence[Pair], weights: Sequence[float], before: Pair) -> Pair:
    """Component by component the weighted mean of the factors of those who have it; as before where nobody has it."""
    top, n = len(before[1]), len(pairs)
    padded = [pad(pair, top) for pair in pairs]
    has = torch.tensor([[float(len(a) > k) for k in range(top)] for _, a in pairs], dtype=torch.float64)
    share = has * torch.tensor(list(weights), dtype=torch.float64)[:, None]
    total = share.sum(dim=0)
    share = share / torch.where(total > 0, total, torch.ones_like(total))
    old = (total == 0).double()
    b = sum((padded[i][0] * share[i] for i in range(n)), before[0].double() * old)
    a = sum((padded[i][1] * share[i][:, None] for i in range(n)), before[1].double() * old[:, None])
    return torch.as_tensor(b), torch.as_tensor(a)


def refit(pair: Pair, a: Tensor, ridge: float) -> Tensor:
    """What to add to B so that (B + ΔB) A comes nearest to the pair's product M, less what B A gives already.

    ΔB = (M - B A) A^T (A A^T + λ I)^-1 minimises ||M - (B + ΔB) A||² + λ ||ΔB||². Give the pair M - B A.

    Args:
        pair: factors of the residual M - B A.
        a: (r, d_in)
        ridge: λ, not negative; 0 needs rows of A that are independent (else the least solution is taken).

    Returns:
        (d_out, r)
    """
    left, right = (t.double() for t in pair)
    own = a.double()
    gram = own @ own.T + ridge * torch.eye(len(own), dtype=torch.float64, device=own.device)
    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
    return left @ (right @ own.T) @ inverse


def turn(pair: Pair, towards: Pair, ridge: float) -> Tensor:
    """What to add to B so that (B + ΔB) A points the way of another product M: descent on its cosine.

    ΔB makes 1 - cos((B + ΔB) A, M) + λ ||ΔB|| small, by proximal gradient steps from ΔB = 0 whose length is found by
    trial, so that no step makes it larger; at most `TURN_STEPS` of them. On random pairs (6 x 2, 2 x 5, three clients)
    the value they end with was at most 1.5e-3 above the least one for λ = .01, 3e-5 for .1, 3e-4 for .001. Where the
    first gradient is at most λ long, ΔB = 0 is the answer. A product of zeros has no direction: ΔB is 0 then too. Where
    B A points away from M the least value lies at B + ΔB near 0, which has any direction, and is not reached.

    Args:
        pair: (B, A)
        towards: factors of M.
        ridge: λ, not negative.

    Returns:
        (d_out, r)
    """
    b, a = (t.double() for t in pair)
    left, right = (t.double() for t in towards)
    gram, cross, size = a @ a.T, left @ (right @ a.T), norm(towards)  # <X A, M> = <X, cross> for every X
    change = torch.zeros_like(b)

    def cosine(x: Tensor) -> tuple[float, Tensor]:
        inner, own = float((x * cross).sum()), x @ gram
        length = float((x * own).sum().clamp_min(0).sqrt())
        if not (length and size):
            return 0.0, torch.zeros_like(x)
        return inner / (length * size), cross / (length * size) - own * (inner / (length**3 * size))

    value, slope = cosine(b)
    if not bool(slope.any()):
        return change
    step = norm(pair) / float(slope.norm())
    for _ in range(TURN_STEPS):
        for _ in range(TRIALS):
            tried = _shrunk(change + step * slope, step * ridge)
            moved = tried - change
            new, there = cosine(b + tried)
            if new >= value + float((slope * moved).sum()) - float(moved.square().sum()) / (2 * step):
                break
            step /= 2
        else:
            return change
        change, value, slope = tried, new, there
        if float(moved.norm()) <= NEGLIGIBLE * NEGLIGIBLE * float(b.norm() + change.norm()):
            break
        step *= 2
    return change


TURN_STEPS, TRIALS = 500, 60  # of `turn`: steps of descent, and lengths that are tried for one


def _shrunk(t: Tensor, by: float) -> Tensor:
    """The tensor, shorter by so much; zero where it is no longer than that."""
    length = float(t.norm())
    return t * (max(0.0, 1 - by / length) if length else 0.0)


def norm(pair: Pair) -> float:
    """||B A||_F, from the small Gram matrices."""
    b, a = (t.double() for t in pair)
    return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())
