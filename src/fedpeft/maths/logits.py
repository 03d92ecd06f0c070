"""Arithmetic on scores of next tokens: combining, filtering, drawing, accepting drafts, choosing alpha, distilling.

Proxy-tuning (Liu et al. 2024, arXiv 2401.08565) adds what tuning changed in a small model to a large one's scores:
z = z_L + alpha (z_T - z_B). Logits and log-probabilities may stand for each other in it: they differ by one constant
per position. Everything is float32 unless said; V is the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NO_TOKEN = -100  # of targets, where a position has none

# --- combining --------------------------------------------------------------------------------------------------


def offsets(tuned: Tensor, base: Tensor, vocab: int | None = None) -> Tensor:
    """z_T - z_B where both are finite, 0 elsewhere and for tokens that one of them lacks.

    Args:
        tuned, base: (..., their own V) logits or log-probabilities.
        vocab: V of the result; None: that of `tuned`.
    """
    size = tuned.shape[-1] if vocab is None else vocab
    known = min(size, tuned.shape[-1], base.shape[-1])
    change = (tuned[..., :known] - base[..., :known]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return change if known == size else F.pad(change, (0, size - known))


def combine(large: Tensor, change: Tensor, alpha: Tensor | float) -> Tensor:
    """z_L + alpha d.

    Args:
        large: (..., V) z_L; minus infinity stays.
        change: (..., V) d, from `offsets`.
        alpha: a number, or one that broadcasts against them.
    """
    return large + alpha * change


def scatter(values: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """(..., V) scores of the candidates at their places, minus infinity elsewhere.

    Args:
        values, ids: (..., n) scores and whose they are; ids beyond V are left out.
    """
    full = values.new_full((*values.shape[:-1], vocab + 1), -math.inf)
    return full.scatter(-1, ids.clamp(max=vocab), values)[..., :vocab]


def plausible(scores: Tensor, large: Tensor, beta: Tensor | float) -> Tensor:
    """Minus infinity where p_L < beta max p_L (contrastive decoding, Li et al. 2023, arXiv 2210.15097).

    Args:
        scores: (rows, V) combined.
        large: (rows, V) z_L.
        beta: in [0, 1], (rows,) or one number; 0 leaves all.
    """
    least = large.amax(dim=-1, keepdim=True) + _column(beta, large).log()
    return scores.masked_fill(large < least, -math.inf)


# --- penalties and filters --------------------------------------------------------------------------------------


def penalise_repeats(scores: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Scores of seen tokens divided by the penalty where positive, multiplied where negative.

    CTRL (Keskar et al. 2019, arXiv 1909.05858), as in transformers. It depends on the constant of the scores.

    Args:
        scores, seen: (rows, V); seen is boolean.
        penalty: (rows,) or one number, above 0; 1 leaves all.
    """
    by = _column(penalty, scores)
    return torch.where(seen, torch.where(scores > 0, scores / by, scores * by), scores)


def penalise_counts(scores: Tensor, counts: Tensor, presence: Tensor | float, frequency: Tensor | float) -> Tensor:
    """Scores less `presence` where a token was said, and `frequency` for each time (OpenAI's two penalties).

    Args:
        scores, counts: (rows, V); how often each token was said.
        presence, frequency: (rows,) or one number.
    """
    return scores - _column(presence, scores) * (counts > 0) - _column(frequency, scores) * counts


def keep_top_k(scores: Tensor, k: Tensor | int) -> Tensor:
    """Minus infinity outside the k greatest; of equal ones the lower ids stay.

    Args:
        scores: (rows, V).
        k: (rows,) or one number; 0 or V and more keep all.
    """
    count = torch.as_tensor(k, device=scores.device).expand(scores.shape[:-1])
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    out = (rank >= count[..., None]) & (count[..., None] > 0)
    return scores.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -math.inf)


def keep_top_p(scores: Tensor, p: Tensor | float) -> Tensor:
    """Minus infinity outside the shortest prefix of the sorted probabilities with mass p (Holtzman et al. 2020).

    Args:
        scores: (rows, V).
        p: in (0, 1], (rows,) or one number; 1 keeps all.
    """
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    mass = ordered.double().softmax(dim=-1)
    share = _column(p, mass)
    out = (mass.cumsum(dim=-1) - mass >= share) & (share < 1)
    return scores.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -math.inf)


def keep_min_p(scores: Tensor, p: Tensor | float) -> Tensor:
    """Minus infinity where a probability is below p times the greatest (Nguyen et al. 2024, arXiv 2407.01082).

    Args:
        scores: (rows, V).
        p: in [0, 1], (rows,) or one number; 0 keeps all.
    """
    return plausible(scores, scores, p)


def draw(probabilities: Tensor, uniform: float) -> int:
    """The first token whose cumulative probability exceeds a share of the total: the inverse of the distribution.

    Args:
        probabilities: (V,) not negative, any positive total.
        uniform: in [0, 1).
    """
    heap = probabilities.double().cumsum(dim=0)
    target = heap[-1] * uniform
    found = int(torch.searchsorted(heap, target, right=True))
    return found if found < len(heap) else int(probabilities.nonzero()[-1])  # the product was rounded up to the total


# --- speculation ------------------------------------------------------------------------------------------------


def acceptable(target: Tensor, draft: Tensor, token: int) -> float:
    """The probability that a drafted token is accepted: min(1, c/q) (Leviathan et al. 2023, arXiv 2211.17192).

    Args:
        target, draft: (V,) probabilities c and q.
    """
    return min(1.0, float(target[token]) / float(draft[token]))


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """(V,) what is drawn from after a rejection: max(c - q, 0) over its sum; c itself where that is 0."""
    rest = (target - draft).clamp(min=0)
    total = rest.sum()
    return rest / total if float(total) > 0 else target


# --- alpha curve ------------------------------------------------------------------------------------------------


def losses(scores: Tensor, targets: Tensor) -> Tensor:
    """(n,) negative log-likelihoods lse(z) - z[y].

    Args:
        scores: (n, V).
        targets: (n,) int64 tokens y.
    """
    return scores.logsumexp(dim=-1) - scores.gather(-1, targets[:, None])[:, 0]


def curve_terms(large: Tensor, change: Tensor, targets: Tensor, grid: Sequence[float]) -> Tensor:
    """(grid,) float64 summed negative log-likelihood of the combined model, for every alpha of a grid.

    Args:
        large, change: (n, V) z_L and d.
        targets: (n,) int64 tokens y.
    """
    return torch.stack([losses(combine(large, change, alpha), targets).double().sum() for alpha in grid])


# --- distillation -----------------------------------------------------------------------------------------------


def teacher(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """(n, V) or (n, candidates) log-probabilities log softmax(z / tau): over the candidates alone where scores are.

    Args:
        scores: combined.
        temperature: tau.
    """
    return (scores / temperature).log_softmax(dim=-1)


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0, ids: Tensor | None = None) -> Tensor:
    """(n,) tau^2 KL(teacher^(1/tau) || student^(1/tau)) (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        teacher: from the function of this name at the same temperature.
        student: (n, V) logits, with a gradient.
        ids: (n, candidates) whose the teacher's columns are; None: all V in order.
    """
    own = (student / temperature).log_softmax(dim=-1)
    own = own if ids is None else own.gather(-1, ids)
    terms = torch.where(teacher > -math.inf, teacher.exp() * (teacher - own), 0.0)
    return temperature**2 * terms.sum(dim=-1)


def distillation_loss(
    teacher: Tensor,
    student: Tensor,
    targets: Tensor | None = None,
    share: float = 1.0,
    temperature: float = 1.0,
    ids: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """lambda tau^2 KL(teacher^(1/tau) || student^(1/tau)) + (1 - lambda) CE(y), the mean or the sum over positions.

    Args:
        teacher, student, temperature, ids: see `divergence`.
        targets: (n,) int64 tokens y, `NO_TOKEN` where a position has none: its cross-entropy is 0. None: no position
            has one.
        share: lambda.
        reduction: `mean` counts every position, those without a token too.
    """
    loss = share * divergence(teacher, student, temperature, ids).sum()
    if share < 1 and targets is not None:
        loss = loss + (1 - share) * F.cross_entropy(student, targets, ignore_index=NO_TOKEN, reduction="sum")
    return loss if reduction == "sum" else loss / len(student)


def _column(value: Tensor | float, like: Tensor) -> Tensor:
    """One number per row as a column; a plain number as it is."""
    number = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return number[..., None] if number.dim() else number
