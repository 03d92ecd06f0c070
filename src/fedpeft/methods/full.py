"""Vanilla federated fine-tuning: all weights of the model train and travel.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep Networks from Decentralized
Data, AISTATS 2017, arXiv 1602.05629, Algorithm 1, over every parameter of the transformer.

Paper to code

| paper | here |
|---|---|
| w, all parameters | `adapter`: embeddings, projections, biases and norms, and the task's head |
| C, E, B, eta | `cohort` (a number), `epochs`, `batch_size`, `lr` |
| ClientUpdate | `train` |
| sum of n_k / n w_k | `average` |

Departures: it starts from a pre-trained model, and the local optimizer is AdamW; the rate is ours, a tenth of that of
adapters, with a larger one for the fresh head. No dropout inside the model.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.core.adapter import AdapterSpec, Full
from fedpeft.core.averaging import Averaging


@dataclass(frozen=True)
class FullFineTuning(Averaging):
    """Vanilla fine-tuning (McMahan et al. 2017): federated averaging of all weights."""

    lr: float = 1e-4  # local learning rate of AdamW

    def adapter(self) -> AdapterSpec:
        """All weights of the base."""
        return Full()


METHOD = FullFineTuning
