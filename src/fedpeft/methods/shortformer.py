"""Shortformer's two stages: short rows in the first half of the training, whole ones in the second.

Press, Smith, Lewis: Shortformer: Better Language Modeling using Shorter Inputs, ACL 2021, arXiv 2012.15832, on LoRA
under federated averaging.

Paper to code

| paper | here |
|---|---|
| stage 1: short inputs, stage 2: full length | `train`; `maths.curriculum.two_stages`: a quarter, then all |
| stages are halves of the training | `train` |
| aggregation | `average`, weighted by examples |

Departures: the paper is not federated; stages follow the federation's rounds, the full length is that of the client's
longest row, and a quarter of it at least 8 tokens. Its change of the attention, which is about language modelling, is
left out. A mask that stands for the label is never cut, and a row's last token stays.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import ClassVar

from fedpeft.core.averaging import Averaging
from fedpeft.core.exchange import ClientEnv, Nothing, Update, Weights
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import ordinary_fit
from fedpeft.maths import curriculum


@dataclass(frozen=True)
class Shortformer(Averaging):
    """Two stages of length (Press et al. 2021), on LoRA."""

    plans_by_rounds: ClassVar[bool] = True

    def accepts_schedule(self, kind: str) -> str | None:
        """No other one: the method is a schedule."""
        return "method shortformer is a schedule itself"

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train on rows of this stage's length."""
        tokens = curriculum.two_stages(env.round - 1, env.rounds, int(env.data.lengths.max(initial=1)))
        fitted = yield ordinary_fit(self, down.params, replace(env, longest=tokens))
        return Update(fitted.params, len(env.data), fitted.loss), memory


METHOD = Shortformer
