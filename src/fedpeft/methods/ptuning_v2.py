"""P-tuning v2: trainable keys and values in every layer.

Liu, Ji, Fu, Tam, Du, Yang, Tang: P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales
and Tasks, ACL 2022, arXiv 2110.07602, under federated averaging.

Paper to code

| paper | here |
|---|---|
| continuous prompts in every layer, as prefix keys and values | `adapter`: parameters `prefix.{l}` |
| no reparameterisation by an MLP (an option in the paper) | none here |
| training of the parameters on a client's rows | `train` |
| aggregation | `average`, weighted by examples |

Departures: the paper is not federated; the server is FedAvg. Rates, decay and clipping are those of FedPepTAO's device,
so that with the same `epochs` or `steps` the two differ in what is shared and in the server alone; a lower rate hardly
learns on small encoders.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.core.adapter import AdapterSpec, Prefix
from fedpeft.core.averaging import Averaging


@dataclass(frozen=True)
class PTuningV2(Averaging):
    """P-tuning v2 (Liu et al. 2022) under federated averaging."""

    lr: float = 4e-2  # local learning rate of AdamW
    head_lr: float | None = 3e-3  # local learning rate of the classification head; null: lr
    weight_decay: float = 0.1  # decay of the local optimizer
    clip: float | None = 1.0  # bound on the gradient's norm at every local step; null: none

    def adapter(self) -> AdapterSpec:
        """A prefix of 20 tokens in every layer."""
        return Prefix()


METHOD = PTuningV2
