"""Importance of adapters in SVD form, W + c P diag(E) Q: smoothed sensitivity times its uncertainty.

Zhang et al. 2023 (AdaLoRA, arXiv 2303.10512), equations 8 to 12: with I = |w dL/dw| of a number w at one step,

    Ī <- b1 Ī + (1 - b1) I;   U <- b2 U + (1 - b2) |I - Ī|, with the new Ī;   s(w) = Ī U

and a triplet k scores s(E_k) + mean_j s(Q_kj) + mean_j s(P_jk). That a matrix scores the sum of its triplets is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.fit import AdamW, Moments
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params

DEVIATION = 0.02  # of P and Q at the start


@dataclass(frozen=True)
class Smoothed:
    """Ī and U of every number (or of every triplet), by name; empty before the first step."""

    mean: Params = field(default_factory=dict)
    spread: Params = field(default_factory=dict)

    def after(self, sensitivity: Params, beta1: float, beta2: float) -> Smoothed:
        """One step further.

        Args:
            sensitivity: I by name.
            beta1, beta2: momentum of Ī and of U.
        """
        zeros = tree.zeros_like(sensitivity)
        mean = tree.map2(lambda old, new: beta1 * old + (1 - beta1) * new, self.mean or zeros, sensitivity)
        change = tree.map2(lambda new, smooth: (new - smooth).abs(), sensitivity, mean)
        spread = tree.map2(lambda old, new: beta2 * old + (1 - beta2) * new, self.spread or zeros, change)
        return Smoothed(mean, spread)

    @property
    def scores(self) -> dict[str, Tensor]:
        """s = Ī U by name."""
        return tree.map2(lambda mean, spread: mean * spread, self.mean, self.spread)


def fresh_triplets(
    seed: int, sizes: Mapping[str, tuple[int, int]], rank: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """P and Q from N(0, .02²), the same wherever they are drawn; E = 0, so that nothing changes.

    Args:
        sizes: (d_out, d_in) by slot.
    """
    made: dict[str, Tensor] = {}
    for stem, (d_out, d_in) in sizes.items():
        rng = rng_for(seed, "triplets", client=stem)
        for side, shape in (("P", (d_out, rank)), ("Q", (rank, d_in))):
            made[f"{stem}.{side}"] = torch.from_numpy(rng.normal(0, DEVIATION, size=shape)).to(dtype)
        made[f"{stem}.E"] = torch.zeros(rank, dtype=dtype)
    return made


def stems(names: Iterable[str]) -> tuple[str, ...]:
    """The slots that have triplets, sorted."""
    return tuple(sorted(name.removesuffix(".E") for name in names if name.endswith(".E")))


def triplet_scores(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(rank,) by slot: the score of E's number, and the means over P's column and over Q's row.

    Args:
        scores: of the numbers: `s.P` (d_out, rank), `s.E` (rank,), `s.Q` (rank, d_in) of every slot s.
    """
    return {
        stem: scores[f"{stem}.E"] + scores[f"{stem}.P"].mean(dim=0) + scores[f"{stem}.Q"].mean(dim=1)
        for stem in stems(scores)
    }


def matrix_scores(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """By slot, the sum over its triplets; not normalised."""
    return {stem: float(own.double().sum()) for stem, own in triplet_scores(scores).items()}


def grams(params: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """P^T P - I and Q Q^T - I of every slot, (clients, rank, rank): zero where the triplets are orthonormal.

    Args:
        params: stacked, each (clients, ...).
    """
    for stem in stems(params):
        p, q = params[f"{stem}.P"], params[f"{stem}.Q"]
        for square in (p.transpose(1, 2) @ p, q @ q.transpose(1, 2)):
            yield square - torch.eye(square.shape[1], dtype=square.dtype, device=square.device)


@dataclass(frozen=True)
class Orthonormal:
    """A penalty: weight * mean over slots of ||P^T P - I||_F and ||Q Q^T - I||_F, as PEFT has it."""

    weight: float

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """(clients,) from stacked params, each (clients, ...)."""
        norms = [(rest.square().sum(dim=(1, 2)) + 1e-12).sqrt() for rest in grams(params)]
        return self.weight * torch.stack(norms).mean(dim=0)


def products(params: Params, after: Moments, before: Moments, optimizer: AdamW) -> dict[str, Tensor]:
    """I = |w dL/dw| of the triplets' numbers at one step of Adam, whose first moment tells the gradient.

    m' = b1 m + (1 - b1) g, so g = (m' - b1 m) / (1 - b1).

    Args:
        params: before the step.
        after, before: moments after and before it.
    """
    beta = optimizer.betas[0]
    found = {}
    for stem in stems(params):
        for name in (f"{stem}.P", f"{stem}.E", f"{stem}.Q"):
            own = after.first[name] - beta * before.first[name] if name in before.first else after.first[name]
            found[name] = (params[name] * own / (1 - beta)).abs()
    return found
