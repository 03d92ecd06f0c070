"""LoRA-FAIR: the mean of the factors, with a correction of B that makes up for what the mean of products loses.

Bian, Wang, Zhang, Xu: LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, 2024,
arXiv 2411.14961.

Paper to code

| paper | here |
|---|---|
| Ā, B̄, the means of the factors | `average` |
| ΔB, so that (B̄ + ΔB) Ā is near to the mean product M | `average`; `maths.lowrank.refit`, `maths.lowrank.turn` |
| the distance of the two products: 1 - their cosine | `objective` |
| λ, which keeps ΔB small, so that what clients start from stays near to the mean | `ridge` |

Departures: the default, `squared`, is ours: the closed form of the squared distance, ΔB = (M - B̄Ā) Ā^T (Ā Ā^T +
λ I)^-1, which gives M its length too. `cosine` is the paper's objective, 1 - cos((B̄ + ΔB) Ā, M) + λ ||ΔB||; how it is
descended is ours (proximal gradient steps). λ = .01 is ours, and one λ does not weigh the same in both. The mean is
weighted by examples.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedpeft.core import pairs, tree
from fedpeft.core.averaging import Averaged, Averaging
from fedpeft.core.exchange import ClientId, ServerEnv, Update
from fedpeft.core.method import check_ranges, mean_loss
from fedpeft.maths import lowrank


@dataclass(frozen=True)
class LoraFair(Averaging):
    """LoRA-FAIR (Bian et al. 2024): a mean of factors that is refitted to the mean of the products."""

    objective: Literal["squared", "cosine"] = "squared"  # the distance that B is corrected by: ours, or the paper's
    ridge: float = 0.01  # lambda: how small the correction of B is kept; 0: the nearest product

    def __post_init__(self) -> None:
        check_ranges(self, at_least={"ridge": 0})

    def average(self, state: Averaged, ups: Mapping[ClientId, Update], env: ServerEnv) -> Averaged:
        """(B̄ + ΔB, Ā), and the mean of the head."""
        updates = list(ups.values())
        weights = lowrank.shares([up.examples for up in updates])

        def refitted(own: Sequence[lowrank.Pair], before: lowrank.Pair) -> lowrank.Pair:
            b, a = lowrank.mean(own, weights)
            products = lowrank.stack(own, weights)
            if self.objective == "cosine":
                return b + lowrank.turn((b, a), products, self.ridge), a
            return b + lowrank.refit(lowrank.difference(products, (b, a)), a, self.ridge), a

        mean = tree.mean((pairs.others(up.params), up.examples) for up in updates)
        factors = pairs.combined([up.params for up in updates], refitted, state.params)
        return Averaged(tree.overlay(mean, factors), mean_loss(updates))


METHOD = LoraFair
