"""Distillation over the vocabulary: a student learns what a teacher would say at every position of a text's answer.

Of one step, the mean over its positions, with t the teacher's and s the student's logits, p(z, tau) = softmax(z / tau):

    loss = share tau^2 KL(p(t, tau) || p(s, tau)) + (1 - share) (-log p(s, 1)[y])

(Hinton et al. 2015, arXiv 1503.02531, with tau^2 so that gradients keep their size.) The teacher of a few candidates is
renormalised over them; the student of more tokens than the teacher's vocabulary over that. A row without an answer
counts at its last position, where there is no y and the second term is 0. The gradients go through the loop of every
Fit (`core/train.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.core.errors import FitError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import Fit, Fitted, alone
from fedpeft.core.model import Target, Teacher
from fedpeft.core.train import Stack, stack_params, train_many
from fedpeft.core.tree import Params
from fedpeft.maths import logits
from fedpeft.models.readouts import Item, Seen, wide

if TYPE_CHECKING:
    from fedpeft.models.hf import HFModel
    from fedpeft.models.lm_head import LmHead


def token_logits(model: HFModel, params: Params | None, data: Examples, rows: Sequence[int] | None = None) -> Tensor:
    """See `Model.token_logits`.

    Raises:
        FitError: the model predicts labels, or the rows do not say where their answers begin.
    """
    lm, own = _lm(model, data), params or {}
    model.check_params(own)
    index = range(len(data)) if rows is None else [int(i) for i in rows]
    counts = positions(data)
    places = np.concatenate([[0], np.cumsum(counts[list(index)])]).astype(np.int64)
    found = torch.empty(int(places[-1]), lm.vocabulary)
    items = [Item(0, data, row, 0) for row in index]
    stack = stack_params([own], model.device)
    with torch.no_grad():
        for part in model.parts(items):
            with model.seen(model.base, stack, [items[i] for i in part], 0) as seen:
                said = _logits(lm, seen).float().cpu()
            spans = [range(int(places[i]), int(places[i + 1])) for i in part]
            found[[place for span in spans for place in span]] = said
    return found


def distil(model: HFModel, fit: Fit, teach: Teacher, temperature: float = 1.0, share: float = 1.0) -> Fitted:
    """See `Model.distil`; only what the Fit trains changes.

    Args:
        fit: `params` where the student starts, `data` rows with or without answers.
        teach: asked before every part of a step, for the rows of that part.
        temperature: tau, above 0.
        share: of the teacher, in [0, 1].

    Raises:
        FitError: a Fit that the model cannot train, a temperature or share out of range.
        DivergedError: the loss or the parameters are no longer finite.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise FitError(f"the temperature of a distillation is {temperature}; it must be finite and above 0")
    if not 0 <= share <= 1:
        raise FitError(f"the teacher's share of the loss is {share}; it must lie in [0, 1]")
    data = cast(Examples, fit.data)
    lesson = _Lesson(model, _lm(model, data), teach, temperature, share)
    return alone(train_many([fit], lesson, lambda own: model.check_params(own.params)))


def positions(data: Examples) -> NDArray[np.int64]:
    """(rows,) at how many positions something is predicted: one a token of the answer, one where there is none."""
    assert data.starts is not None, "`_lm` has asked for starts"
    found: NDArray[np.int64] = np.maximum(1, data.lengths - data.starts)
    return found


def answers(data: Examples, rows: Sequence[int]) -> Tensor:
    """(positions,) the token of the answer at each position of these rows; `NO_TOKEN` where there is none."""
    assert data.starts is not None, "`_lm` has asked for starts"
    parts = []
    for row in rows:
        answer = data.tokens[row][int(data.starts[row]) :].astype(np.int64)
        parts.append(answer if len(answer) else np.array([logits.NO_TOKEN]))
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))


@dataclass(frozen=True)
class _Lesson:
    """What distillation adds to the training loop; an `Objective` of one client."""

    model: HFModel
    lm: LmHead
    teach: Teacher
    temperature: float
    share: float

    @property
    def device(self) -> torch.device:
        return self.model.device

    def backward(self, stack: Stack, rows: Sequence[Sequence[int]], step: int) -> Tensor:
        """Part by part, so that no more logits are there than a part has positions."""
        data, (own,) = cast(Examples, stack.fits[0].data), rows
        items = [Item(0, data, row, 0) for row in own]
        n, losses = int(positions(data)[list(own)].sum()), []
        for part in self.model.parts(items):
            members = [items[i] for i in part]
            target = self.teach([item.row for item in members])  # before the student acts on the base
            said = answers(data, [item.row for item in members]).to(self.device)
            with self.model.seen(self.model.base.at(stack.fits[0].base), stack, members, step) as seen:
                loss = self._loss(_logits(self.lm, seen), target, said) / n
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return torch.stack(losses).sum()[None]

    def _loss(self, student: Tensor, target: Target, said: Tensor) -> Tensor:
        """The sum over positions."""
        teacher = logits.teacher(target.logits.to(student), self.temperature)
        ids = None if target.ids is None else target.ids.to(student.device)
        real = teacher.shape[1] if target.vocab is None and ids is None else target.vocab
        own = student[:, :real]
        return logits.distillation_loss(teacher, own, said, self.share, self.temperature, ids, reduction="sum")

    def cost(self, fit: Fit) -> tuple[int, int, int]:
        """As of a Fit: the student's passes."""
        return self.model.cost(fit)


def _logits(lm: LmHead, seen: Seen) -> Tensor:
    """(positions, vocabulary) of the items' positions, item after item."""
    rows: list[int] = []
    columns: list[int] = []
    for i, item in enumerate(seen.items):
        assert item.data.starts is not None, "`_lm` has asked for starts"
        start, length = int(item.data.starts[item.row]), len(item.data.tokens[item.row])
        own = range(start - 1, max(start, length - 1))
        rows += [i] * len(own)
        columns += own
    return wide(lm.logits(seen.hidden[torch.tensor(rows), torch.tensor(columns)]))


def _lm(model: HFModel, data: Examples) -> LmHead:
    if model.lm is None:
        raise FitError("tokens are predicted by task.format generate alone, and this model predicts labels")
    if len(data) and data.starts is None:
        raise FitError("the rows do not say where their answers begin; tokenise them for task.format generate")
    if data.starts is not None and bool((data.starts < 1).any()):
        raise FitError("a row has no token before its answer; drop empty rows from the data")
    return model.lm


__all__ = ["answers", "distil", "positions", "token_logits"]
