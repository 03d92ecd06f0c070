"""The format `generate`: a causal language model learns the tokens of a row's answer, and nothing before them.

A row is one sequence; `Examples.starts` says where its answer begins. Its loss is the mean negative log-likelihood of
the answer's tokens, and a step's loss is the mean over all answer tokens of the step, as in Alpaca and FedIT
(Zhang et al. 2023, arXiv 2305.05644): transformers gives the same with the label -100 before the answer. Where rows
offer choices, the one with the least mean loss of its tokens is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.examples import Examples
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Shape
from fedpeft.models.lm_head import LmHead
from fedpeft.models.readouts import Item, Passes, Seen
from fedpeft.models.readouts.answers import answer_losses


class GenerateReadout:
    """Mean negative log-likelihood of a row's own answer (candidate 0) or of one of its choices (candidates 1 on).

    Args:
        lm: the head of the base's language model.
        size: bytes of the text that tokens are, for bits per byte; None: not known.
    """

    params: frozenset[str] = frozenset()
    classes = 0
    candidates = 1

    def __init__(self, lm: LmHead, size: Callable[[NDArray[np.int32]], int] | None = None) -> None:
        self.lm = lm
        self.size = size or (lambda tokens: 0)

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def shapes(self) -> Mapping[str, Shape]:
        """Nothing."""
        return {}

    def check(self, params: Params, data: Examples) -> None:
        """Every row has an answer with something before it."""
        if len(data) and data.starts is None:
            raise FitError("the rows have no answers; tokenise them for task.format generate")
        if data.starts is not None and bool(((data.starts < 1) | (data.starts >= data.lengths)).any()):
            raise FitError("a row has no token of an answer, or none before it; drop empty rows from the data")

    def training(self, client: int, data: Examples, row: int) -> Item:
        """The row with its own answer."""
        return Item(client, data, row, 0)

    def predicting(self, client: int, data: Examples, row: int) -> Sequence[Item]:
        """The row with its own answer, and with each of its choices."""
        choices = data.choices[row] if data.choices else None
        return tuple(Item(client, data, row, k) for k in range(1 + len(choices.tokens if choices else ())))

    def length(self, item: Item) -> int:
        """Tokens of context and answer."""
        return self._start(item) + len(self._answer(item))

    def known(self, item: Item) -> int | None:
        """Tokens before the answer; None for an item that is asked for as a whole text."""
        return self._start(item) if item.candidate >= 0 else None

    def weight(self, item: Item) -> int:
        """The answer's tokens."""
        return len(self._answer(item))

    def projected(self, item: Item) -> int:
        """The answer's tokens; none of an item that is a mere text."""
        return len(self._answer(item)) if item.candidate >= 0 else 0

    def sequence(self, item: Item) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
        """Context and answer."""
        tokens = item.data.tokens[item.row]
        if item.candidate < 1:
            return tokens, None
        return np.concatenate([tokens[: self._start(item)], self._answer(item)]), None

    def losses(self, seen: Seen) -> Tensor:
        """(items,) mean negative log-likelihood of the answers' tokens."""
        starts, answers = map(self._start, seen.items), map(self._answer, seen.items)
        return answer_losses(self.lm, seen.hidden, list(starts), list(answers))

    def logits(self, seen: Seen) -> Tensor:
        """Refused: there are no classes."""
        raise ModelError(
            "task.format generate predicts text, and class scores were asked for; use task.format verbalizer for labels"
        )

    def outcomes(self, model: Passes, params: Params | None, data: Examples) -> Tensor:
        """(rows, 5) float64: summed loss of the answer, its tokens, whether there are choices, whether one was hit, and
        the bytes of its text, 0 where they are not known."""
        items = [item for row in range(len(data)) for item in self.predicting(0, data, row)]
        losses = model.item_losses(params or {}, items).double()
        found = torch.zeros(len(data), 5, dtype=torch.float64)
        options: dict[int, list[float]] = {}
        for item, loss in zip(items, losses.tolist(), strict=True):
            if item.candidate:
                options.setdefault(item.row, []).append(loss)
            else:
                tokens = self.weight(item)
                found[item.row, :2] = torch.tensor([loss * tokens, tokens])
                found[item.row, 4] = self.size(self._answer(item))
        for row, costs in options.items():
            choices = data.choices[row] if data.choices else None
            assert choices is not None, "only rows with choices have such items"
            found[row, 2:4] = torch.tensor([1.0, float(int(np.argmin(costs)) == choices.right)])
        return found

    def sums(self, outcomes: Tensor, data: Examples) -> dict[str, Tensor]:
        """Summed negative log-likelihood (float64), answer tokens, rows, rows with choices, right choices, bytes."""
        totals = outcomes.sum(dim=0)
        counts = totals.round().long()
        return {
            "loss": totals[0].clone(),
            "tokens": counts[1].clone(),
            "n": torch.tensor(len(outcomes)),
            "choices": counts[2].clone(),
            "hits": counts[3].clone(),
            "bytes": counts[4].clone(),
        }

    def _start(self, item: Item) -> int:
        assert item.data.starts is not None, "rows of the format generate have answers"
        return int(item.data.starts[item.row])

    def _answer(self, item: Item) -> NDArray[np.int32]:
        if item.candidate < 1:
            return item.data.tokens[item.row][self._start(item) :]
        choices = item.data.choices[item.row] if item.data.choices else None
        assert choices is not None, "only rows with choices have such items"
        return choices.tokens[item.candidate - 1]
