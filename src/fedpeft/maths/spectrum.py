"""The spectrum of a symmetric operator that is only known by its products, and what FedPepTAO reads from it.

Lanczos' method with full re-orthogonalisation gives Ritz values and the weights of a Gauss quadrature of the spectral
density (Golub & Welsch 1969; Ghorbani, Krishnan, Xiao 2019, arXiv 1901.10159). All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import Tensor

from fedpeft.core.rng import Rng

Operator = Callable[[Tensor], Tensor]  # (n,) float64 -> (n,) float64

USABLE = (0.05, 0.95)  # ratios of the eigengap rule that say something
GRID = 10_000  # points of the density of the plateau rule
VARIANCE = 1e-5  # of its kernels, relative to the grid's span where that is above 1
STEP, STILL, HALVINGS = 0.1, 0.005, 40  # first step, change below which a plateau lies, most halvings of the step


def rademacher(size: int, rng: Rng) -> Tensor:
    """(size,) of +1 and -1."""
    return torch.from_numpy(2.0 * rng.integers(0, 2, size=size) - 1.0)


def lanczos(operator: Operator, size: int, steps: int, rng: Rng, probes: int = 1) -> tuple[Tensor, Tensor]:
    """Ritz values, ascending, and their weights (squared first components, sum 1), over all probes.

    Args:
        operator: symmetric.
        size: n.
        steps: products per probe; fewer where the Krylov space of a probe is exhausted.
        probes: random sign vectors; the weights of each are divided by their number.
    """
    found = [tridiagonal(operator, rademacher(size, rng), steps) for _ in range(probes)]
    theta = torch.cat([values for values, _ in found])
    omega = torch.cat([weights for _, weights in found]) / probes
    order = torch.argsort(theta, stable=True)
    return theta[order], omega[order]


def tridiagonal(operator: Operator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Ritz values and weights from one start vector; NaN where a product was not finite."""
    basis = [start / start.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    scale = 0.0
    for _ in range(min(steps, len(start))):
        product = operator(basis[-1])
        alphas.append(float(basis[-1] @ product))
        rest = product
        for _ in range(2):  # once is not enough: rounding leaves parts of the converged directions
            rest = rest - sum((vector * (vector @ rest) for vector in basis), torch.zeros_like(rest))
        beta = float(rest.norm())
        if not (np.isfinite(alphas[-1]) and np.isfinite(beta)):
            return torch.full((1,), np.nan, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        scale = max(scale, abs(alphas[-1]), beta)
        if beta <= 1e-10 * scale:
            break
        betas.append(beta)
        basis.append(rest / beta)
    off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    theta, vectors = torch.linalg.eigh(matrix)
    return theta, vectors[0].square()


def largest(operator: Operator, size: int, steps: int, rng: Rng) -> float:
    """The absolute value of the eigenvalue that is largest by it, by power iteration from a random sign vector."""
    vector = rademacher(size, rng)
    norm = 0.0
    for _ in range(steps):
        vector = operator(vector / vector.norm())
        norm = float(vector.norm())
        if not norm:
            break
    return norm


@dataclass(frozen=True)
class Kept:
    """The share of the spectrum that counts as large.

    Attributes:
        usable: False where the rule says nothing; the share is then 0.
        low, high: eigenvalues at the two ends of the gap; 0 where there is none.
    """

    ratio: float = 0.0
    usable: bool = False
    low: float = 0.0
    high: float = 0.0


def eigengap(theta: Tensor, omega: Tensor, lipschitz: float) -> Kept:
    """The weight above the first gap between positive Ritz values that is wider than four Lipschitz constants.

    After FedDUAP (arXiv 2204.13300), where pruning rates are found so; the form for Ritz values is ours:

        tol = 1e-6 max |theta|;  m = first index with theta[m+1] > tol and theta[m+1] - theta[m] > 4 max(lip, tol)
        ratio = sum of omega[j], j > m;  usable where m exists, all is finite and .05 <= ratio <= .95

    Args:
        theta: Ritz values, ascending.
        omega: their weights.
        lipschitz: of the Hessian around the point where it was taken.
    """
    if not (bool(torch.isfinite(theta).all() & torch.isfinite(omega).all()) and np.isfinite(lipschitz)):
        return Kept()
    least, most = USABLE
    tol = 1e-6 * float(theta.abs().max())
    wide = (theta[1:] > tol) & (theta[1:] - theta[:-1] > 4 * max(lipschitz, tol))
    if not bool(wide.any()):
        return Kept()
    m = int(wide.to(torch.int8).argmax())
    ratio = min(float(omega[m + 1 :].sum()), 1.0)
    return Kept(ratio, least <= ratio <= most, float(theta[m]), float(theta[m + 1]))


def plateau_of_sizes(theta: Tensor, omega: Tensor) -> float | None:
    """`plateau` of the eigenvalues' absolute values; None where it gives nothing."""
    order = torch.argsort(theta.abs(), stable=True)
    kept = plateau(theta.abs()[order], omega[order])
    return kept.ratio if kept.usable else None


def first_gap(values: Tensor, lipschitz: float) -> float | None:
    """1 - m / R, with m the first place of a gap above four Lipschitz constants between R values; None without one.

    The rule of `eigengap` for the plain order of the values, which is ours.

    Args:
        values: (R,) ascending.
    """
    wide = torch.nonzero(values[1:] - values[:-1] > 4 * lipschitz)
    return 1 - (int(wide[0]) + 1) / len(values) if len(wide) else None


def steepest(points: Sequence[tuple[Tensor, Tensor]]) -> float:
    """max ||b - b'|| / ||x - x'|| over all pairs of points (x, b)."""
    return max(float((b - other).norm() / (x - at).norm()) for (x, b), (at, other) in combinations(points, 2))


def plateau(theta: Tensor, omega: Tensor) -> Kept:
    """The share of the smoothed spectral density above a threshold from which raising it changes little.

    From the authors' code. Its kernel is wider than the bulk of a prompt's Hessian, so that it mostly returns the
    kernel's own shape; it is here to compare with.

        density: 10,000 points on [min - .01, max + .01], Gaussian kernels of variance 1e-5 max(1, span), sum 1
        keep(t) = 1 - sum of the cells whose right end is <= t;  t = 0, s, 2 s, ..., s = .1
        at each t: keep < keep(0) / 2 -> halve s, start again; the last three changes all < .005 -> keep(t)
    """
    if not bool(torch.isfinite(theta).all() & torch.isfinite(omega).all()):
        return Kept()
    grid = torch.linspace(float(theta.min()) - 0.01, float(theta.max()) + 0.01, GRID, dtype=torch.float64)
    variance = VARIANCE * max(1.0, float(grid[-1] - grid[0]))
    density = torch.zeros(GRID, dtype=torch.float64)
    for value, weight in zip(theta.tolist(), omega.tolist(), strict=True):
        density += weight * torch.exp(-((grid - value) ** 2) / (2 * variance))
    below = torch.cat([torch.zeros(1, dtype=torch.float64), (density / density.sum()).cumsum(0)])
    ends = grid[1:].contiguous()

    def keep(t: float) -> float:
        return 1.0 - float(below[int(torch.searchsorted(ends, t, right=True))])

    step = STEP
    for _ in range(HALVINGS + 1):
        history = [keep(0.0)]
        while history[-1] >= history[0] / 2:
            changes = [abs(after - before) for before, after in pairwise(history)][-3:]
            if len(changes) == 3 and max(changes) < STILL:
                return Kept(history[-1], 0.0 < history[-1] <= 1.0)
            history.append(keep(len(history) * step))
        step /= 2
    return Kept()
