"""The format `cloze`: the language model's own head fills the mask of a template.

The loss is the cross-entropy of the label word at the mask over the whole vocabulary; a label is predicted by the
logits of the label words alone (FedPepTAO's `evaluations.py`). Nothing of it is trained, so nothing of it travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    """Cross-entropy over the vocabulary at the mask; predictions among the label words.

    Args:
        lm: the head of the base's language model.
        words: the token of each label.
    """

    params: frozenset[str] = frozenset()

    def __init__(self, lm: LmHead, words: Sequence[int]) -> None:
        self.lm = lm
        self.words = tuple(words)
        self.classes = len(self.words)

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
        """Cross-entropy over the whole vocabulary."""
        words = [self.words[int(item.data.labels[item.row])] for item in seen.items]
        logits = wide(self.lm.logits(_at_mask(seen)))
        return F.cross_entropy(logits, torch.tensor(words, device=logits.device), reduction="none")

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
