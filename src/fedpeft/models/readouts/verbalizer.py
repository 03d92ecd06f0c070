"""The format `verbalizer`: which answer does a causal language model find likeliest behind the text?

A row's sequence is its context (the text and the template before the answer) and an answer: label word, rest of the
template, end token. The loss is the mean negative log-likelihood of the gold answer's tokens, and a label is predicted
by the least of these means (FedPepTAO's `gpt2_evaluations.py`). That the mean is taken over the tokens of each row
first, and over rows then, is ours: a long answer does not weigh more than a short one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.core.examples import Examples
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Shape
from fedpeft.models.lm_head import LmHead
from fedpeft.models.readouts import Item, Seen
from fedpeft.models.readouts.answers import answer_losses
from fedpeft.models.readouts.text import LabelReadout, check_labels


class VerbalizerReadout(LabelReadout):
    """Mean negative log-likelihood of an answer; only states that predict its tokens go through the head.

    Args:
        lm: the head of the base's language model.
        answers: the tokens of each label's answer.
    """

    params: frozenset[str] = frozenset()

    def __init__(self, lm: LmHead, answers: Sequence[Sequence[int]]) -> None:
        self.lm = lm
        self.answers = tuple(np.asarray(answer, dtype=np.int32) for answer in answers)
        self.classes = len(self.answers)
        self.candidates = self.classes

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def shapes(self) -> Mapping[str, Shape]:
        """Nothing."""
        return {}

    def check(self, params: Params, data: Examples) -> None:
        """Every label has an answer."""
        check_labels(data, self.classes, "answers are for the")

    def training(self, client: int, data: Examples, row: int) -> Item:
        """The context with the row's own answer."""
        return Item(client, data, row, int(data.labels[row]))

    def predicting(self, client: int, data: Examples, row: int) -> Sequence[Item]:
        """The context with each answer."""
        return tuple(Item(client, data, row, c) for c in range(self.classes))

    def length(self, item: Item) -> int:
        """Tokens of context and answer."""
        return len(item.data.tokens[item.row]) + self.projected(item)

    def known(self, item: Item) -> int | None:
        """Tokens of the context, where an answer stands behind it."""
        return len(item.data.tokens[item.row]) if item.candidate >= 0 else None

    def projected(self, item: Item) -> int:
        """The answer's tokens; none where an item has no answer."""
        return len(self.answers[item.candidate]) if item.candidate >= 0 else 0

    def sequence(self, item: Item) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
        """Context and answer; the context alone where an item has no answer."""
        context = item.data.tokens[item.row]
        return context if item.candidate < 0 else np.concatenate([context, self.answers[item.candidate]]), None

    def losses(self, seen: Seen) -> Tensor:
        """(items,) mean negative log-likelihood of the answers' tokens, each predicted by the state before it."""
        starts = [len(item.data.tokens[item.row]) for item in seen.items]
        return answer_losses(self.lm, seen.hidden, starts, [self.answers[item.candidate] for item in seen.items])

    def logits(self, seen: Seen) -> Tensor:
        """(items, 1) minus the losses: every class is a candidate of its own."""
        return -self.losses(seen)[:, None]
