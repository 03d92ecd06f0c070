"""Adapters: small bottlenecks inside the frozen blocks.

Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly: Parameter-Efficient Transfer
Learning for NLP, ICML 2019, arXiv 1902.00751, under federated averaging.

Paper to code

| paper | here |
|---|---|
| adapters of size m after attention and feed-forward part | `adapter`: `block.{l}.attention.*`, `block.{l}.ffn.*` |
| layer norms of the blocks, trained too | the same, `.norm` |
| training of the parameters on a client's rows | `train` |
| aggregation | `average`, weighted by examples |

Departures: the paper is not federated; the server is FedAvg. A fresh adapter changes nothing: its second layer starts
at zero, in the paper near zero. The rate is ours.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.core.adapter import AdapterSpec, Bottleneck
from fedpeft.core.averaging import Averaging


@dataclass(frozen=True)
class Adapter(Averaging):
    """Bottleneck adapters (Houlsby et al. 2019) under federated averaging."""

    lr: float = 1e-3  # local learning rate of AdamW
    head_lr: float | None = 3e-3  # local learning rate of the classification head; null: lr

    def adapter(self) -> AdapterSpec:
        """Bottlenecks of width 64 in every block, with the layer norms."""
        return Bottleneck()


METHOD = Adapter
