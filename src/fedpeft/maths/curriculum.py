"""Curricula: an order of examples from easy to hard, and how many of them a round may use.

Pacing after Platanios et al. 2019 (arXiv 1903.09848) and FibecFed (arXiv 2410.00131); what is whose is said in the
methods that use it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from fedpeft.core.exchange import ClientEnv, TokenNorm
from fedpeft.core.tree import Params

Difficulty: TypeAlias = Literal["fisher", "loss", "length", "random", "reverse"]
Pacing: TypeAlias = Literal["linear", "sqrt", "exp", "quad", "step"]
RowRule: TypeAlias = Literal["fixed", "energy"]
LEAST_COMPETENCE = 0.01  # c0, share of the rows at first where common words come first
LEAST_TOKENS = 8  # that rows are cut to
LEAST_ROWS = 0.1  # of a matrix, that the rule `energy` keeps


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
    return max(1, min(math.ceil(share * parts - 1e-9), parts))


def competence(t: int, rounds: int, least: float) -> float:
    """min(1, sqrt(t (1 - c0²) / T + c0²)): the share of the examples that may be drawn (Platanios et al. 2019).

    Args:
        t: rounds that are over, from 0.
        rounds: T, after which everything may be.
        least: c0, the share at first.
    """
    return min(1.0, math.sqrt(t * (1 - least**2) / rounds + least**2))


def tokens_at(t: int, rounds: int, longest: int, least: int = LEAST_TOKENS) -> int:
    """Tokens that rows are cut to: from `least` to the longest row in the first half of the rounds (Li et al. 2022)."""
    return least + math.floor(max(0, longest - least) * min(1.0, 2 * t / rounds))


class Sized(Protocol):
    """What `common_words` reads of a method."""

    @property
    def batch_size(self) -> int: ...


def common_words(method: Sized, env: ClientEnv) -> list[int]:
    """A client's rows of the most common words, as far as the competence goes; at least one batch (VOC)."""
    order = easy_first(env.data.rarities.tolist())
    share = competence(env.round - 1, env.rounds, LEAST_COMPETENCE)
    return order[: max(min(method.batch_size, len(order)), math.ceil(share * len(order) - 1e-9))]


def warm_up(t: int, env: ClientEnv) -> int:
    """Tokens that a client's rows are cut to in sequence-length warm-up: of its longest row (SLW)."""
    return tokens_at(t, env.rounds, int(env.data.lengths.max()))


def two_stages(t: int, env: ClientEnv) -> int:
    """A quarter of the client's longest row in the first half of the rounds, then all of it (Shortformer)."""
    longest = int(env.data.lengths.max())
    return longest if 2 * t >= env.rounds else max(LEAST_TOKENS, longest // 4)


def difficulties(kind: Difficulty, params: Params, env: ClientEnv, token_norm: TokenNorm = "sqrt") -> list[float]:
    """Of every example of a client: the trace of its Fisher information at the params, or a control."""
    rows = range(len(env.data))
    if kind == "length":
        return [float(n) for n in env.data.lengths]
    if kind == "random":
        return [float(u) for u in env.rng("order").random(len(rows))]
    if kind == "loss":
        return [float(loss) for loss in env.model.losses(params, env.data, rows)]
    sign = -1.0 if kind == "reverse" else 1.0
    return [sign * float(f) for f in env.model.fisher(params, env.data, rows, token_norm).trace]


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
    count = math.ceil(share * len(scores) - 1e-9)
    if rule == "energy":
        count = max(math.ceil(LEAST_ROWS * len(scores) - 1e-9), enough(scores[order].tolist(), energy))
    kept[order[: max(1, count)]] = True
    return kept


def enough(descending: Sequence[float], energy: float) -> int:
    """The least N whose first N values reach this share of the sum of all."""
    total, reached = math.fsum(descending), 0.0
    for n, value in enumerate(descending, 1):
        reached += value
        if reached >= energy * total - 1e-9:
            return n
    return len(descending)
