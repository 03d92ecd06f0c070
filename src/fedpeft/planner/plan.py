"""What a planner is asked, and what it answers: who trains which weights, at which rank, batch and bits.

Reference: FedPipe (arXiv 2404.06448) for what is planned; the value of a plan, its search and every constant are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.errors import ConfigError
from fedpeft.planner.cost import Shape, Weight
from fedpeft.planner.device import FORMATS

RANKS = (2, 4, 8, 16)
BATCHES = (1, 2, 4, 8, 16, 32)
DEPTHS = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Choices:
    """What a planner may choose among.

    Raises:
        ConfigError: a list that is empty or holds what cannot be, all problems at once.
    """

    ranks: tuple[int, ...] = RANKS
    batches: tuple[int, ...] = BATCHES
    depths: tuple[float, ...] = DEPTHS  # shares of the blocks that stay below the lowest trained one
    checkpointing: tuple[bool, ...] = (False, True)
    bits: str = "largest"  # largest | search | full: the most bits that fit, any bits, or as loaded
    penalty: float = 0.1  # kappa: what the error of a quantised base costs, with bits "search"
    epochs: int = 1  # E
    headroom: float = 0.10  # share of the memory that stays free
    per_weight: bool = True  # whether one machine may have several ranks
    applied: bool = True  # whether components that a machine does not train act on it, frozen

    def __post_init__(self) -> None:
        problems = []
        for name, values in (("ranks", self.ranks), ("batches", self.batches)):
            if not values or any(value < 1 for value in values):
                problems.append(f"{name} is {list(values)}; give whole numbers of at least 1")
        if not self.depths or any(not 0 <= share < 1 for share in self.depths):
            problems.append(f"depths is {list(self.depths)}; give shares in [0, 1)")
        if not 0 <= self.headroom < 1:
            problems.append(f"headroom is {self.headroom}; it must lie in [0, 1)")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Job:
    """What is to be trained, the same for all machines.

    Attributes:
        weights: the candidates.
        scores: S_m by weight, summing to 1.
        longest: tokens of the longest row, which memory is planned for.
        mean: tokens of a mean row, which time is planned for.
        classes: of a trained head; None: a language model's own.
        dtype: of the base as it is loaded, and of activations.
        head_bytes: of the head, each way.
    """

    shape: Shape
    weights: tuple[Weight, ...]
    scores: Mapping[str, float]
    longest: int
    mean: float
    classes: int | None = None
    dtype: str = "float32"
    head_bytes: int = 0
    choices: Choices = field(default_factory=Choices)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """R, ascending."""
        return tuple(sorted(set(self.choices.ranks)))

    @cached_property
    def gains(self) -> NDArray[np.float64]:
        """(weights, 1 + ranks) S_m g(r), with r = 0 first: g(r) = log2(1 + r) / log2(1 + r_max)."""
        top = math.log2(1 + self.ranks[-1])
        values = [0.0, *(math.log2(1 + r) / top for r in self.ranks)]
        own = np.array([self.scores.get(w.name, 0.0) for w in self.weights])
        return np.asarray(own[:, None] * np.array(values)[None, :])

    @cached_property
    def sizes(self) -> NDArray[np.float64]:
        """(weights,) d_in + d_out: numbers of one component."""
        return np.array([w.d_in + w.d_out for w in self.weights], dtype=np.float64)

    @cached_property
    def prices(self) -> dict[Any, Any]:
        """What steps cost that were priced already: the same on every machine."""
        return {}

    @cached_property
    def by_score(self) -> tuple[int, ...]:
        """Places of the weights, the most important first."""
        return tuple(sorted(range(len(self.weights)), key=lambda m: (-self.scores.get(self.weights[m].name, 0.0), m)))

    def named(self, places: Sequence[int]) -> dict[str, int]:
        """Ranks by weight from a place per weight, 0 for none."""
        return {w.name: self.ranks[p - 1] for w, p in zip(self.weights, places, strict=True) if p}

    def loaded(self, bits: str) -> str:
        """The precision that a format stands for."""
        return self.dtype if bits == "full" else bits

    def coverage(self, ranks: Mapping[str, int]) -> float:
        """c = sum of S_m g(r_m)."""
        top = math.log2(1 + self.ranks[-1])
        return math.fsum(self.scores.get(name, 0.0) * math.log2(1 + r) / top for name, r in ranks.items())


@dataclass(frozen=True)
class Predicted:
    """What a plan will cost and bring."""

    peak_bytes: int
    step_s: float
    round_s: float
    up_bytes: int
    down_bytes: int
    under_training: float  # u: share of the examples that the deadline leaves unused
    coverage: float  # c: sum of S_m g(r_m)

    @property
    def value(self) -> float:
        """J = (1 - u) c."""
        return (1 - self.under_training) * self.coverage


@dataclass(frozen=True)
class Plan:
    """What one machine does in a round."""

    bits: str  # one of FORMATS
    batch: int
    steps: int
    depth: int  # lowest block that may train
    checkpointing: bool
    ranks: Mapping[str, int]  # of the weights that it trains
    predicted: Predicted
    why: tuple[str, ...] = ()

    def __str__(self) -> str:
        recompute = ", checkpointing" if self.checkpointing else ""
        return f"{self.bits}, batch {self.batch}, {self.steps} steps{recompute}; {ranks_text(self.ranks)}"


@dataclass(frozen=True)
class Excluded:
    """Why a machine cannot take part, and the cheapest thing that would let it."""

    reason: str
    least_bytes: int  # usable memory that the cheapest configuration needs
    least_s: float  # seconds that one step of it takes, with its messages


def ranks_text(ranks: Mapping[str, int]) -> str:
    """Ranks as people read them: `query, value 0-5 r8; output 3-5 r4`."""
    kinds: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    places: dict[tuple[str, int], list[int]] = {}
    others: list[str] = []
    for name, rank in ranks.items():
        parts = name.split(".", 2)
        if parts[0] == "block" and parts[1].isdigit():
            places.setdefault((parts[2], rank), []).append(int(parts[1]))
        else:
            others.append(f"{name} r{rank}")
    for (kind, rank), blocks in places.items():
        kinds.setdefault((rank, tuple(sorted(blocks))), []).append(kind)
    told = [
        f"{', '.join(names)} {spans(blocks)} r{rank}"
        for (rank, blocks), names in sorted(kinds.items(), key=lambda item: (-item[0][0], item[0][1]))
    ]
    return "; ".join(told + others) or "nothing"


def as_plain(plan: Plan, examples: int, weights: Iterable[Weight]) -> dict[str, Any]:
    """A plan as JSON can carry it, for the record of a run and for `fedpeft plan --json`.

    Args:
        weights: all that a plan may train.
    """
    return {
        "examples": examples,
        "bits": plan.bits,
        "batch": plan.batch,
        "steps": plan.steps,
        "depth": plan.depth,
        "checkpointing": plan.checkpointing,
        "ranks": dict(plan.ranks),
        "weights": ranks_text(plan.ranks),
        "trained_numbers": sum(plan.ranks.get(w.name, 0) * (w.d_in + w.d_out) for w in weights),
        "predicted": {**vars(plan.predicted), "value": plan.predicted.value},
        "why": list(plan.why),
    }


def spans(numbers: Sequence[int]) -> str:
    """`0-3, 5` for 0 1 2 3 5."""
    told: list[str] = []
    start = last = None
    for n in (*numbers, None):
        if last is not None and n == last + 1:
            last = n
            continue
        if start is not None:
            told.append(str(start) if start == last else f"{start}-{last}")
        start = last = n
    return ", ".join(told)


def under_training(plans: Mapping[str, Plan], examples: Mapping[str, int]) -> float:
    """U = sum over the machines that take part of p_i u_i, p_i their shares of the examples."""
    total = sum(examples[name] for name in plans)
    return math.fsum(examples[name] / total * plan.predicted.under_training for name, plan in plans.items())


__all__ = [
    "FORMATS",
    "Choices",
    "Excluded",
    "Job",
    "Plan",
    "Predicted",
    "as_plain",
    "ranks_text",
    "spans",
    "under_training",
]
