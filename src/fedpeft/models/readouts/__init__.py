"""How a task format makes a loss and class scores of the base's last hidden state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.core.examples import Examples
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Rows, Shape

if TYPE_CHECKING:
    from fedpeft.core.train import Stack
    from fedpeft.models.load import Base
    from fedpeft.models.parts import Batch


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence that goes through the model for one row of a client's data.

    Attributes:
        client: on the client axis.
        candidate: which answer stands behind the text, where the format has answers; -1: none.
    """

    client: int
    data: Examples
    row: int
    candidate: int = -1


@dataclass(frozen=True)
class Seen:
    """What a readout is given after a forward pass: whose items they were, and the states of their own tokens.

    Attributes:
        hidden: (items, tokens, d) last hidden states, tokens of a prompt taken away.
    """

    base: Base
    stack: Stack
    items: Sequence[Item]
    batch: Batch
    rows: Rows
    hidden: Tensor


class Passes(Protocol):
    """What a readout asks of its model to score rows, without gradient and dropout."""

    def logits(self, params: Params | None, data: Examples, rows: Sequence[int] | None = None) -> Tensor:
        """(rows, classes) class scores."""
        ...

    def item_losses(self, params: Params, items: Sequence[Item]) -> Tensor:
        """(items,) the loss of each."""
        ...


class Readout(Protocol):
    """A task format over one base; immutable.

    Attributes:
        classes: how many labels there are; 0 where the format predicts text.
        params: names of its own parameters, which are trained and travel; empty where the format has none.
        candidates: sequences per row when labels are predicted.
    """

    @property
    def classes(self) -> int: ...

    @property
    def params(self) -> frozenset[str]: ...

    @property
    def candidates(self) -> int: ...

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Fresh parameters."""
        ...

    def shapes(self) -> Mapping[str, Shape]:
        """Its parameters' shapes."""
        ...

    def check(self, params: Params, data: Examples) -> None:
        """Raise FitError unless the format can train these parameters on these rows."""
        ...

    def training(self, client: int, data: Examples, row: int) -> Item:
        """What goes through the model for a row whose label is learnt."""
        ...

    def predicting(self, client: int, data: Examples, row: int) -> Sequence[Item]:
        """What goes through the model for a row whose label is asked: `candidates` items."""
        ...

    def length(self, item: Item) -> int:
        """Tokens of an item."""
        ...

    def sequence(self, item: Item) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
        """Token ids of an item, and token types where the data have them."""
        ...

    def known(self, item: Item) -> int | None:
        """How many tokens stand before the item's answer; None: no answer is part of it."""
        ...

    def weight(self, item: Item) -> int:
        """What the item's loss counts for in the mean of its client's step: 1, or its answer tokens."""
        ...

    def projected(self, item: Item) -> int:
        """How many states of an item go through the language model's head, for counted costs."""
        ...

    def losses(self, seen: Seen) -> Tensor:
        """(items,) the loss of each item's own label."""
        ...

    def logits(self, seen: Seen) -> Tensor:
        """(items, classes) scores before the softmax; (items, 1) where every class is a candidate of its own."""
        ...

    def outcomes(self, model: Passes, params: Params | None, data: Examples) -> Tensor:
        """(rows, ..) what became of each row, on the CPU; `sums` says what of it is counted."""
        ...

    def sums(self, outcomes: Tensor, data: Examples) -> dict[str, Tensor]:
        """Sums over the rows that pool over clients by addition; see `runs/metrics.py` for what follows from them."""
        ...


def wide(logits: Tensor) -> Tensor:
    """Logits over a vocabulary in a precision in which their exponentials can be added up: float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
