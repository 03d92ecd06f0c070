"""Prompt tuning: embeddings before those of the text are all that trains.

Lester, Al-Rfou, Constant: The Power of Scale for Parameter-Efficient Prompt Tuning, EMNLP 2021, arXiv 2104.08691,
under federated averaging.

Paper to code

| paper | here |
|---|---|
| P_e, the soft prompt of p tokens | `adapter`: parameters `prompt.tokens`, started from rows of the vocabulary |
| training of the parameters on a client's rows | `train` |
| aggregation | `average`, weighted by examples |

Departures: the paper is not federated; the server is FedAvg. The paper's rate of .3 belongs to Adafactor on T5; the
default here, for AdamW, is ours. A classification head, where the format has one, is trained with the prompt and
averaged.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.core.adapter import AdapterSpec, Prompt
from fedpeft.core.averaging import Averaging


@dataclass(frozen=True)
class PromptTuning(Averaging):
    """Prompt tuning (Lester et al. 2021) under federated averaging."""

    lr: float = 3e-2  # local learning rate of AdamW
    head_lr: float | None = 3e-3  # local learning rate of the classification head; null: lr

    def adapter(self) -> AdapterSpec:
        """20 soft tokens, started from rows of the vocabulary."""
        return Prompt(start="vocabulary")


METHOD = PromptTuning
