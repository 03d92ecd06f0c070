"""SE: self-evolution learning. Rows that the model finds hard learn from a mix of their label and its own opinion.

Peng, Ding, Zhong, Ouyang, Rong, Xiong, Tao: Token-Level Self-Evolution Training for Sequence-to-Sequence Learning, ACL
2023 (short papers), DOI 10.18653/v1/2023.acl-short.73, on LoRA under federated averaging.

Paper to code

| paper | here |
|---|---|
| hard tokens: those with a loss above a threshold | `train`, `threshold`; rows here, whose label is one token |
| target: a mix of the label and the model's own distribution, held fixed | `train`, `share`; `core.fit.Soften` |
| aggregation | `average`, weighted by examples |

Departures: the paper is about sequences and not federated; the unit is a row. Where the model's own distribution is
that of the same pass, as here, the mix makes the gradient of a hard row (1 - `share`) times as large, and nothing else.
The threshold and the share are ours.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from fedpeft.core.averaging import Averaging
from fedpeft.core.exchange import ClientEnv, Nothing, Update, Weights
from fedpeft.core.fit import Fit, Fitted, Soften
from fedpeft.core.method import check_ranges, ordinary_fit


@dataclass(frozen=True)
class SE(Averaging):
    """Self-evolution learning (Peng et al. 2023), on LoRA."""

    threshold: float = 1.0  # loss above which a row is hard
    share: float = 0.1  # of the model's own distribution in a hard row's target

    def __post_init__(self) -> None:
        check_ranges(self, at_least={"threshold": 0, "share": 0}, below={"share": 1})

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train with softened targets of hard rows."""
        fitted = yield ordinary_fit(self, down.params, env, soften=Soften(self.threshold, self.share))
        return Update(fitted.params, len(env.data), fitted.loss), memory


METHOD = SE
