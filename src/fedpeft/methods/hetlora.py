"""HetLoRA: clients of unequal rank; the server pads with zeros, weights by norms and averages the factors.

Cho, Liu, Xu, Fahrezi, Joshi: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024,
arXiv 2401.06432.

Paper to code

| paper | here |
|---|---|
| rank r_k of client k | `ranks`, or the devices file; `RankedState.ranks` |
| zero-padding to the largest rank, mean of the factors | `average`; `maths.lowrank.pad` |
| sparsity-weighted aggregation: weights by the norm of the client's product | `average`, slot by slot |
| truncation: client k gets the first r_k rows and columns | `send` |

Departures: the weight of a client in a slot is ||B_k A_k||_F over the sum of all; where all are zero the weights are
equal. Rows that nobody of the cohort has stay as they were. Rank self-pruning, in which clients give up rows while they
train, is left out. The head is averaged by examples.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedpeft.core import pairs, tree
from fedpeft.core.exchange import ClientId, ServerEnv, Update
from fedpeft.core.method import mean_loss
from fedpeft.core.ranks import RankedAveraging, RankedState, client_ranks
from fedpeft.maths import lowrank


@dataclass(frozen=True)
class HetLora(RankedAveraging):
    """HetLoRA (Cho et al. 2024): unequal ranks, zero-padding, weights by norms."""

    def average(self, state: RankedState, ups: Mapping[ClientId, Update], env: ServerEnv) -> RankedState:
        """Padded factors, weighted by ||B_k A_k||_F, and the mean of the head."""
        updates = list(ups.values())

        def padded(own: Sequence[lowrank.Pair], before: lowrank.Pair) -> lowrank.Pair:
            top = max(len(a) for _, a in own)
            weights = lowrank.shares([lowrank.norm(pair) for pair in own])
            b, a = lowrank.mean([lowrank.pad(pair, top) for pair in own], weights)
            return torch.cat([b, before[0][:, top:]], dim=1), torch.cat([a, before[1][top:]])

        mean = tree.mean((pairs.others(up.params), up.examples) for up in updates)
        factors = pairs.combined([up.params for up in updates], padded, state.params)
        return RankedState(tree.overlay(mean, factors), client_ranks(self, env), mean_loss(updates))


METHOD = HetLora
