"""FlexLoRA: every client has the rank that it can afford; the server averages products and cuts them by SVD.

Bai, Chen, Qian, Yao, Li: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources, NeurIPS 2024, arXiv 2402.11505.

Paper to code

| paper | here |
|---|---|
| rank r_k of client k | `ranks`, or the devices file; `RankedState.ranks` |
| mean of the clients' products B_k A_k | `average` |
| SVD of the mean; each client gets its own rank of it | `average`, `send`; `maths.lowrank.truncate` |

Departures: the SVD is taken of the small core of the stacked factors, which gives the same. The server keeps the
adapter's rank of it, which is the largest that a client has; where the mean has less rank than that, a component keeps
its old row of A, without which it would never train again. The mean is weighted by examples.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedpeft.core import pairs, tree
from fedpeft.core.exchange import ClientId, ServerEnv, Update
from fedpeft.core.method import mean_loss
from fedpeft.core.ranks import RankedAveraging, RankedState, client_ranks
from fedpeft.maths import lowrank


@dataclass(frozen=True)
class FlexLora(RankedAveraging):
    """FlexLoRA (Bai et al. 2024): unequal ranks, mean of products, SVD."""

    def average(self, state: RankedState, ups: Mapping[ClientId, Update], env: ServerEnv) -> RankedState:
        """The SVD of sum_k p_k B_k A_k, and the mean of the head."""
        updates = list(ups.values())
        weights = lowrank.shares([up.examples for up in updates])

        def decomposed(own: Sequence[lowrank.Pair], before: lowrank.Pair) -> lowrank.Pair:
            cut = lowrank.truncate(lowrank.stack(own, weights), len(before[1]))
            return lowrank.revived(cut, before[1])

        mean = tree.mean((pairs.others(up.params), up.examples) for up in updates)
        factors = pairs.combined([up.params for up in updates], decomposed, state.params)
        return RankedState(tree.overlay(mean, factors), client_ranks(self, env), mean_loss(updates))


METHOD = FlexLora
