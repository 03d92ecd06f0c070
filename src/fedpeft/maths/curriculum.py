"""Curricula: an order of examples from easy to hard, and how many of them a round may use.

`sqrt` is the pacing of Platanios et al. 2019 (arXiv 1903.09848), whose competence orders words too; the other forms,
and that FibecFed (arXiv 2410.00131) is paced by them, are ours. What is whose is said in the methods that use it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedpeft.core.counts import ROUNDING, round_up
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params

Pacing: TypeAlias = Literal["linear", "sqrt", "exp", "quad", "step"]
RowRule: TypeAlias = Literal["fixed", "energy"]
LEAST_COMPETENCE = 0.01  # c0, share of the rows at first where common words come first
LEAST_TOKENS = 8  # that rows are cut to (ours)
LEAST_ROWS = 0.1  # of a matrix, that the rule `energy` keeps (ours)


def pace(t: int, rounds: int, parts: int, kind: Pacing, beta: float, alpha: float) -> int:
    """n_t: how many of N parts are in use, at least 1 and growing to N.

    n_t = clamp(ceil(c_t N), 1, N) with tau = min(1, t / (alpha T)) and c_t: linear beta + (1 - beta) tau; sqrt
    sqrt(beta² + (1 - beta²) tau); exp beta^(1 - tau); quad beta + (1 - beta) tau²; step beta, and 1 when tau is.

    Args:
        t: rounds that are over, from 0.
        rounds: T.
        parts: N.
        beta: the share in use at first.
        alpha: the share of the rounds after which everything is in use.
    """
    tau = min(1.0, t / (alpha * rounds))
    share = {
        "linear": beta + (1 - beta) * tau,
        "sqrt": math.sqrt(beta**2 + (1 - beta**2) * tau),
        "exp": math.pow(beta, 1 - tau),
        "quad": beta + (1 - beta) * tau**2,
        "step": 1.0 if tau == 1 else beta,
    }[kind]
    return max(1, min(round_up(share * parts), parts))


def competence(t: int, rounds: int, least: float) -> float:
    """min(1, sqrt(t (1 - c0²) / T + c0²)): the share of the examples that may be drawn (Platanios et al. 2019).

    Args:
        t: rounds that are over, from 0.
        rounds: T, after which everything may be.
        least: c0, the share at first.
    """
    return min(1.0, math.sqrt(t * (1 - least**2) / rounds + least**2))


def tokens_at(t: int, rounds: int, longest: int, least: int = LEAST_TOKENS) -> int:
    """Tokens that rows are cut to: from `least` to the longest row in the first half of the rounds (Li et al. 2022).

    Args:
        t: rounds that are over, from 0.
        rounds: T.
        longest: tokens of the longest row.
    """
    return least + math.floor(max(0, longest - least) * min(1.0, 2 * t / rounds))


def common_words(rarities: Sequence[float], t: int, rounds: int, least: int) -> list[int]:
    """The rows whose rarity is within the competence: those of the most common words (Platanios et al. 2019).

    A row may be drawn where the share of rows that are no rarer than it is at most the competence.

    Args:
        rarities: of every row.
        t: rounds that are over, from 0.
        rounds: T.
        least: how many rows are in use at least, as far as there are so many.
    """
    order = easy_first(rarities)
    within = math.floor(competence(t, rounds, LEAST_COMPETENCE) * len(order) + ROUNDING)
    return order[: max(least, within)]


def two_stages(t: int, rounds: int, longest: int) -> int:
    """Tokens: a quarter of the longest row in the first half of the rounds, then all of it (Press et al. 2021)."""
    return longest if 2 * t >= rounds else max(LEAST_TOKENS, longest // 4)


def easy_first(difficulty: Sequence[float]) -> list[int]:
    """The rows from easy to hard; equal ones in their order."""
    return sorted(range(len(difficulty)), key=lambda row: difficulty[row])


def stratified(order: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The rows in an order whose beginnings have the labels in their own proportions; within a label as before.

    The k-th of n rows of a label comes at (k + 1/2) / n.
    """
    count: dict[int, int] = {}
    for row in order:
        count[labels[row]] = count.get(labels[row], 0) + 1
    seen: dict[int, int] = {}
    places: dict[int, float] = {}
    for row in order:
        k = seen[labels[row]] = seen.get(labels[row], -1) + 1
        places[row] = (k + 0.5) / count[labels[row]]
    rank = {row: i for i, row in enumerate(order)}
    return sorted(order, key=lambda row: (places[row], rank[row]))


def some_of(rows: Sequence[int], most: int, rng: Rng) -> list[int]:
    """At most so many of the rows, drawn by chance, in their order."""
    places = rng.choice(len(rows), size=min(most, len(rows)), replace=False)
    return [rows[i] for i in sorted(places.tolist())]


def ranked_batches(batches: Sequence[Sequence[int]], difficulty: Sequence[float]) -> tuple[list[int], list[int]]:
    """Whole batches from easy to hard, by their rows' mean difficulty: the rows in a row, and where batches end."""
    means = [sum(difficulty[row] for row in batch) / len(batch) for batch in batches]
    ranked = [batches[i] for i in easy_first(means)]
    return [row for batch in ranked for row in batch], list(accumulate(len(batch) for batch in ranked))


def parted(rows: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
    """The batches that end there."""
    return [list(rows[begin:end]) for begin, end in pairwise((0, *ends))]


def whole_batches(
    rows: Sequence[int], ends: Sequence[int], epochs: int, steps: int | None, rng: Rng
) -> list[list[int]]:
    """The batches that end there, each epoch in an order of its own.

    Args:
        steps: so many batches, of as many epochs as that takes; None: `epochs` epochs.
    """
    whole = parted(rows, ends)
    passes = epochs if steps is None else math.ceil(steps / len(whole))
    return [whole[i] for _ in range(passes) for i in rng.permutation(len(whole)).tolist()][:steps]


def ends(rows: int, size: int) -> list[int]:
    """Where the batches of so many rows end; the last may be short."""
    return [*range(size, rows, size), rows]


def kept_rows(scores: Tensor, share: float, rule: RowRule = "fixed", energy: float = 0.9) -> Tensor:
    """Which rows of a matrix are updated: those of the largest score, ties to the lower index.

    Args:
        scores: (rows,), not negative. Where all are zero, every row is kept.
        share: of the rows, for `fixed`; ceil(share rows) are kept.
        rule: `energy` keeps the fewest rows that hold this share of the scores' sum, at least a tenth of the rows.

    Returns:
        (rows,) bool
    """
    kept = torch.zeros(len(scores), dtype=torch.bool)
    if not bool(scores.any()):
        return ~kept
    order = torch.argsort(scores.double(), descending=True, stable=True)
    count = round_up(share * len(scores))
    if rule == "energy":
        count = max(round_up(LEAST_ROWS * len(scores)), enough(scores[order].tolist(), energy))
    kept[order[: max(1, count)]] = True
    return kept


def row_masks(
    params: Params, scores: Params, share: float, rule: RowRule = "fixed", energy: float = 0.9
) -> dict[str, Tensor]:
    """1 in the rows that `kept_rows` keeps of each scored matrix, in its layout; nothing where that is every row.

    Args:
        params: has the matrices.
        scores: (rows,) of some of them.
    """
    made = {}
    for name, own in scores.items():
        kept = kept_rows(own, share, rule, energy)
        if not bool(kept.all()):
            made[name] = kept[:, None].expand_as(params[name]).to(params[name].dtype)
    return made


def blended(before: Params, now: Params, gamma: float) -> dict[str, Tensor]:
    """gamma F + (1 - gamma) of this visit's, by name; this visit's alone where there is no earlier one."""
    return {name: gamma * before[name] + (1 - gamma) * t if name in before else t for name, t in now.items()}


def enough(descending: Sequence[float], energy: float) -> int:
    """The least N whose first N values reach this share of the sum of all, to rounding, however large they are."""
    total, reached = math.fsum(descending), 0.0
    for n, value in enumerate(descending, 1):
        reached += value
        if reached >= energy * total * (1 - ROUNDING):
            return n
    return len(descending)
