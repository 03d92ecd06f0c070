"""FlexLoRA: every client has the rank that it can afford; the server averages products and cuts them by SVD.

Bai, Chen, Qian, Yao, Li: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources, NeurIPS 2024, arXiv 2402.11505.

Paper to code

| paper | here |
|---|---|
| rank r_k of client k | `ranks`, or the devices file; `RankedState.ranks` |
| mean of the clients' products B_k A_k | `combine` |
| SVD of the mean; each client gets its own rank of it | `combine`, `send`; `maths.lowrank.truncate` |

Departures: the SVD is taken of the small core of the stacked factors, which gives the same. The server keeps the
adapter's rank of it, which is the largest that a client has; where the mean has less rank than that, a component keeps
its old row of A, without which it would never train again. The mean is weighted by examples.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.core.ranks import RankedAveraging
from fedpeft.maths import lowrank


@dataclass(frozen=True)
class FlexLora(RankedAveraging):
    """FlexLoRA (Bai et al. 2024): unequal ranks, mean of products, SVD."""

    def combine(self, own: Sequence[lowrank.Pair], examples: Sequence[int], before: lowrank.Pair) -> lowrank.Pair:
        """The SVD of sum_k p_k B_k A_k."""
        mean = lowrank.stack(own, lowrank.shares(examples))
        return lowrank.revived(lowrank.truncate(mean, len(before[1])), before[1])


METHOD = FlexLora
