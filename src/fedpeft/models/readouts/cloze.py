"""The format `cloze`: the language model's own head fills the mask of a template.

The loss is the cross-entropy of the label word at the mask over the whole vocabulary; a label is predicted by the
logits of the label words alone (FedPepTAO's `evaluations.py`). The loss may be over the label words alone too, as in
PET (Schick & Schütze 2021, arXiv 2001.07676). Nothing of it is trained, so nothing of it travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.core.errors import FitError
from fedpeft.core.examples import Examples
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Shape
from fedpeft.models.lm_head import LmHead
from fedpeft.models.readouts import Item, Seen, wide
from fedpeft.models.readouts.text import TextReadout, check_labels


class ClozeReadout(TextReadout):
    """Cross-entropy at the mask; predictions among the label words.

    Args:
        lm: the head of the base's language model.
        words: the token of each label.
        loss_over: the logits that the loss's softmax is over: of the whole vocabulary, or of the label words.
    """

    params: frozenset[str] = frozenset()

    def __init__(
        self, lm: LmHead, words: Sequence[int], loss_over: Literal["vocabulary", "labels"] = "vocabulary"
    ) -> None:
        self.lm = lm
        self.words = tuple(words)
        self.classes = len(self.words)
        self.loss_over = loss_over

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def shapes(self) -> Mapping[str, Shape]:
        """Nothing."""
        return {}

    def check(self, params: Params, data: Examples) -> None:
        """Every row has a mask, and every label a word."""
        if data.marks is None:
            raise FitError("the rows have no mask; tokenise them with the task's template")
        check_labels(data, self.classes, "label words are for the")

    def projected(self, item: Item) -> int:
        """The mask."""
        return 1

    def losses(self, seen: Seen) -> Tensor:
        """Cross-entropy over the whole vocabulary, or over the label words."""
        labels = [int(item.data.labels[item.row]) for item in seen.items]
        if self.loss_over == "labels":
            logits, targets = self.logits(seen), labels
        else:
            logits, targets = wide(self.lm.logits(_at_mask(seen))), [self.words[label] for label in labels]
        return F.cross_entropy(logits, torch.tensor(targets, device=logits.device), reduction="none")

    def logits(self, seen: Seen) -> Tensor:
        """The head's outputs for the label words."""
        return wide(self.lm.some(_at_mask(seen), self.words))


def _at_mask(seen: Seen) -> Tensor:
    """(items, d) the states at the masks."""
    places = []
    for item in seen.items:
        assert item.data.marks is not None, "rows of the format cloze have a mask"
        places.append(int(item.data.marks[item.row]))
    device = seen.hidden.device
    return seen.hidden[torch.arange(len(places), device=device), torch.tensor(places, device=device)]
