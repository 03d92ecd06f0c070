"""Late prompt tuning: a prompt made of a middle layer's states, and put in there.

Liu, Sun, Huang, Qiu: Late Prompt Tuning: A Late Prompt Could Be Better Than Many Prompts, Findings of EMNLP 2022,
arXiv 2210.11292, under federated averaging.

Paper to code

| paper | here |
|---|---|
| prompt generator at the middle layer: down, pooling to P, up | `adapter`: parameters `late.{l}.*` |
| no backward pass below the prompt layer | so it is: nothing trains below |
| training of the parameters on a client's rows | `train` |
| aggregation | `average`, weighted by examples |

Departures: the paper is not federated; the server is FedAvg. The generator is the paper's with pooling (down to 256);
its dropout is left out. Rate ours.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.core.adapter import AdapterSpec, LatePrompt
from fedpeft.core.averaging import Averaging


@dataclass(frozen=True)
class LPT(Averaging):
    """Late prompt tuning (Liu et al. 2022b) under federated averaging."""

    lr: float = 1e-3  # local learning rate of AdamW
    head_lr: float | None = 3e-3  # local learning rate of the classification head; null: lr

    def adapter(self) -> AdapterSpec:
        """5 soft tokens in front of the middle block."""
        return LatePrompt()


METHOD = LPT
