"""SLW: sequence-length warm-up. Rows are cut short at first and grow to their length in half of the rounds.

Li, Zhang, He: The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models, NeurIPS
2022, arXiv 2108.06084, on LoRA under federated averaging.

Paper to code

| paper | here |
|---|---|
| sequences cut to a length that grows linearly | `train`; `maths.curriculum.tokens_at`, from 8 tokens on |
| full length from half of the training on | `train` |
| aggregation | `average`, weighted by examples |

Departures: the paper is not federated; lengths follow the federation's rounds, and the longest row is the client's own.
A mask that stands for the label is never cut, and a row's last token, which may be a special one, stays.

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
class Slw(Averaging):
    """Sequence-length warm-up (Li et al. 2022), on LoRA."""

    plans_by_rounds: ClassVar[bool] = True

    def accepts_schedule(self, kind: str) -> str | None:
        """No other one: the method is a schedule."""
        return "method slw is a schedule itself"

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train on rows of this round's length."""
        tokens = curriculum.tokens_at(env.round - 1, env.rounds, int(env.data.lengths.max(initial=1)))
        fitted = yield ordinary_fit(self, down.params, replace(env, longest=tokens))
        return Update(fitted.params, len(env.data), fitted.loss), memory


METHOD = Slw
