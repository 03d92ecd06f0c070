"""HetLoRA: clients of unequal rank; the server pads with zeros, weights by norms and averages the factors.

Cho, Liu, Xu, Fahrezi, Joshi: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024,
arXiv 2401.06432.

Paper to code

| paper | here |
|---|---|
| rank r_k of client k | `ranks`, or the devices file; `RankedState.ranks` |
| zero-padding to the largest rank, mean of the factors | `combine`; `maths.lowrank.pad` |
| sparsity-weighted aggregation: weights by the norm of the client's product | `combine`, slot by slot |
| truncation: client k gets the first r_k rows and columns | `send` |

Departures: the weight of a client in a slot is ||B_k A_k||_F over the sum of all; where all are zero the weights are
equal. Rows that nobody of the cohort has stay as they were. Rank self-pruning, in which clients give up rows while they
train, is left out. The head is averaged by examples.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.core.ranks import RankedAveraging
from fedpeft.maths import lowrank


@dataclass(frozen=True)
class HetLora(RankedAveraging):
    """HetLoRA (Cho et al. 2024): unequal ranks, zero-padding, weights by norms."""

    def combine(self, own: Sequence[lowrank.Pair], examples: Sequence[int], before: lowrank.Pair) -> lowrank.Pair:
        """Padded factors, weighted by ||B_k A_k||_F; rows that nobody has stay as they were."""
        top = max(len(a) for _, a in own)
        weights = lowrank.shares([lowrank.norm(pair) for pair in own])
        b, a = lowrank.mean([lowrank.pad(pair, top) for pair in own], weights)
        return lowrank.filled((b, a), before)


METHOD = HetLora
