"""FedPrompt: soft prompts are all that travels in a federation.

Zhao, Du, Li, Li, Liu: FedPrompt: Communication-Efficient and Privacy-Preserving Prompt Tuning in Federated Learning,
ICASSP 2023, arXiv 2208.12268.

Paper to code

| paper | here |
|---|---|
| soft prompt parameters theta_P | `adapter`: parameters `prompt.tokens`, started from a normal distribution |
| training of the parameters on a client's rows | `train` |
| aggregation | `average`, weighted by examples |

Departures: in our setting it differs from `prompt_tuning` in the start of the prompt alone, N(0, .02^2) instead of
rows of the vocabulary: that only prompts are sent and averaged holds for both, and for every adapter here. Number of
tokens and rate are ours. A classification head, where the format has one, is trained and averaged with the prompt; the
formats `cloze` and `verbalizer` have none, and there the prompt alone travels.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.core.adapter import AdapterSpec, Prompt
from fedpeft.core.averaging import Averaging


@dataclass(frozen=True)
class FedPrompt(Averaging):
    """FedPrompt (Zhao et al. 2022): soft prompts, split from the model and averaged."""

    lr: float = 3e-2  # local learning rate of AdamW
    head_lr: float | None = 3e-3  # local learning rate of the classification head; null: lr

    def adapter(self) -> AdapterSpec:
        """20 soft tokens, started from N(0, .02^2)."""
        return Prompt(start="normal")


METHOD = FedPrompt
