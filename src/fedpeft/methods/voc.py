"""VOC: rows of common words first, rarer ones as the competence grows.

Platanios, Stretcu, Neubig, Poczos, Mitchell: Competence-based Curriculum Learning for Neural Machine Translation, NAACL
2019, arXiv 1903.09848, on LoRA under federated averaging.

Paper to code

| paper | here |
|---|---|
| difficulty: -sum of log p(word), words counted | `train`; `Data.rarities`, over the client's own rows and tokens |
| competence sqrt(t (1 - c0²) / T + c0²), c0 = .01 | `train`; `maths.curriculum.common_words` |
| batches drawn from the rows within the competence | `train` |
| aggregation | `average`, weighted by examples |

Departures: the paper is not federated; t counts the federation's rounds, words are tokens, and a client counts its own
rows alone. At least one batch of rows is in use.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.core.averaging import Averaging
from fedpeft.core.exchange import ClientEnv, Nothing, Update, Weights
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import local_batches, ordinary_fit
from fedpeft.maths import curriculum


@dataclass(frozen=True)
class Voc(Averaging):
    """Common words first (Platanios et al. 2019), on LoRA."""

    plans_by_rounds: ClassVar[bool] = True
    chooses_rows: ClassVar[bool] = True

    def accepts_schedule(self, kind: str) -> str | None:
        """No other one: the method is a schedule."""
        return "method voc is a schedule itself"

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train on the rows within the competence."""
        rarities = env.data.rarities.tolist()
        rows = curriculum.common_words(rarities, env.round - 1, env.rounds, self.batch_size)
        fitted = yield ordinary_fit(self, down.params, env, batches=local_batches(self, env, among=rows))
        return Update(fitted.params, len(env.data), fitted.loss), memory


METHOD = Voc
