"""IDPG: a small network makes a prompt for every text.

Wu, Wang, Gu, Hou, Dong, Vydiswaran, Ma: IDPG: An Instance-Dependent Prompt Generation Method, NAACL 2022,
arXiv 2204.04497, under federated averaging.

Paper to code

| paper | here |
|---|---|
| M(x), the frozen model's vector of the text | mean state of the frozen base |
| G, two layers with a bottleneck | `adapter`: parameters `prompt.down.*`, `prompt.up.*` |
| training of the parameters on a client's rows | `train` |
| aggregation | `average`, weighted by examples |

Departures: the paper is not federated; the server is FedAvg. The prompt enters at the embeddings alone (S-IDPG), the
two layers are dense (the paper's PHM layers are not built), the text's vector is a mean over its tokens instead of the
first one. Rate ours.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.core.adapter import AdapterSpec, InstancePrompt
from fedpeft.core.averaging import Averaging


@dataclass(frozen=True)
class IDPG(Averaging):
    """IDPG (Wu et al. 2022) under federated averaging."""

    lr: float = 1e-3  # local learning rate of AdamW
    head_lr: float | None = 3e-3  # local learning rate of the classification head; null: lr

    def adapter(self) -> AdapterSpec:
        """5 soft tokens made by a bottleneck of width 16."""
        return InstancePrompt()


METHOD = IDPG
