"""The format `head`: a trained classification head on the pooled last hidden state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.core.errors import FitError
from fedpeft.core.examples import Examples
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Shape, head
from fedpeft.models.readouts import Item, Seen
from fedpeft.models.readouts.text import TextReadout, check_labels


class HeadReadout(TextReadout):
    """Cross-entropy of a linear head; encoders pool the mean over a row's tokens, decoders take the last.

    Args:
        classes: number of labels of a fresh head; parameters may have another number.
        width: d of the base.
        last: whether the last token is taken.
    """

    params = frozenset({head.WEIGHT, head.BIAS})

    def __init__(self, classes: int, width: int, last: bool) -> None:
        self.classes = classes
        self.width = width
        self.last = last

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """See `head.init`."""
        return head.init(self.classes, self.width, rng)

    def shapes(self) -> Mapping[str, Shape]:
        """The number of classes may differ between clients."""
        return {head.WEIGHT: (None, self.width), head.BIAS: (None,)}

    def check(self, params: Params, data: Examples) -> None:
        """The head is there, and every label has a row in it."""
        if head.WEIGHT not in params:
            raise FitError(f"a Fit has no {head.WEIGHT!r}; send the head with the adapter")
        check_labels(data, params[head.WEIGHT].shape[0], "the head has")

    def projected(self, item: Item) -> int:
        """None."""
        return 0

    def losses(self, seen: Seen) -> Tensor:
        """Cross-entropy."""
        logits = self.logits(seen)
        labels = torch.tensor([int(item.data.labels[item.row]) for item in seen.items], device=logits.device)
        return F.cross_entropy(logits, labels, reduction="none")

    def logits(self, seen: Seen) -> Tensor:
        """The head's outputs."""
        pooled = head.pool(seen.hidden, seen.batch.mask, seen.batch.lengths, self.last)
        classes = [size[0] if size else 0 for size in seen.stack.sizes[head.WEIGHT]]
        return head.apply(seen.stack.params, pooled, seen.rows, classes)
