"""ATTEMPT: a prompt of one's own, and a mixture of prompts that others have tuned.

Asai, Salehi, Peters, Hajishirzi: ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft
Prompts, EMNLP 2022, arXiv 2205.11961, under federated averaging.

Paper to code

| paper | here |
|---|---|
| source prompts P_1 .. P_t, frozen | `sources`: earlier runs of prompt_tuning; every site needs these folders |
| target prompt, attention network G | `adapter`: parameters `prompt.*` |
| training of the parameters on a client's rows | `train` |
| aggregation | `average`, weighted by examples |

Departures: the paper is not federated and trains several tasks together; here it is one task, and the server is
FedAvg. Sources are what the user has tuned before: there are none by default, and the adapter refuses to be built
without. Rate ours.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.core.adapter import AdapterSpec, MixedPrompt
from fedpeft.core.averaging import Averaging


@dataclass(frozen=True)
class Attempt(Averaging):
    """ATTEMPT (Asai et al. 2022) under federated averaging."""

    lr: float = 1e-2  # local learning rate of AdamW
    head_lr: float | None = 3e-3  # local learning rate of the classification head; null: lr
    sources: tuple[str, ...] = ()  # run folders of prompt_tuning whose prompts are mixed in

    def adapter(self) -> AdapterSpec:
        """A target prompt and attention over the sources."""
        return MixedPrompt(sources=self.sources)


METHOD = Attempt
