"""The likelihood of answers that stand behind their contexts, by a causal language model's own head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.models.lm_head import LmHead
from fedpeft.models.readouts import wide


def answer_losses(lm: LmHead, hidden: Tensor, starts: Sequence[int], answers: Sequence[NDArray[np.int32]]) -> Tensor:
    """(items,) mean negative log-likelihood in nats of each answer's tokens, each predicted by the state before it.

    Only states that predict an answer's token go through the head.

    Args:
        hidden: (items, tokens, d) last hidden states.
        starts: tokens before each item's answer, at least 1.
        answers: token ids, at least one each.
    """
    counts = np.array([len(answer) for answer in answers])
    rows = np.repeat(np.arange(len(answers)), counts)
    within = np.concatenate([np.arange(n) for n in counts])
    row, column, place, target = (
        torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64)).to(hidden.device)
        for index in (rows, np.asarray(starts)[rows] + within - 1, within, np.concatenate(answers))
    )
    losses = F.cross_entropy(wide(lm.logits(hidden[row, column])), target, reduction="none")
    table = losses.new_zeros(len(answers), int(counts.max())).index_put((row, place), losses)
    return table.sum(dim=1) / torch.from_numpy(counts).to(hidden.device)
