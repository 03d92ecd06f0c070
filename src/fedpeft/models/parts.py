"""Cut the rows of a step into parts: little padding, few parts, bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.core.errors import FitError

PART_COST_TOKENS = 48  # what the fixed cost of one more forward and backward pass is worth, in padded tokens


def cut(lengths: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Rows sorted by length, shortest first, in consecutive parts of least total cost.

    A part costs its padded tokens (rows times longest) plus a constant; none exceeds the budget unless it is one row.

    Args:
        lengths: (rows,) tokens of each row.
        budget: most padded tokens of a part.

    Returns:
        index arrays; together each row once.
    """
    order = np.argsort(lengths, kind="stable")
    sizes = lengths[order]
    ends = np.flatnonzero(np.diff(sizes, append=-1)) + 1  # a part may end where the length changes ...
    ends = _with_inner_ends(ends, sizes, budget)  # ... or where the budget forces it
    best = np.zeros(len(ends) + 1)
    back = np.zeros(len(ends) + 1, dtype=np.int64)
    starts = np.concatenate([[0], ends])
    for j in range(1, len(starts)):
        rows = starts[j] - starts[:j]
        padded = rows * sizes[starts[j] - 1]
        total = best[:j] + padded + PART_COST_TOKENS
        total[(padded > budget) & (rows > 1)] = np.inf
        back[j] = int(np.argmin(total))
        best[j] = total[back[j]]
    parts, j = [], len(starts) - 1
    while j:
        parts.append(order[starts[back[j]] : starts[j]])
        j = int(back[j])
    return parts[::-1]


def _with_inner_ends(ends: NDArray[np.int64], sizes: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Further ends inside a run of equal lengths, at every multiple of what fits the budget."""
    inner: list[int] = []
    start = 0
    for end in ends.tolist():
        step = max(1, budget // max(1, int(sizes[end - 1])))
        inner += range(start + step, end, step)
        start = end
    return np.unique(np.concatenate([ends, np.asarray(inner, dtype=np.int64)]))


@dataclass(frozen=True)
class Batch:
    """A part as tensors, padded on the right."""

    inputs: dict[str, Tensor]  # what the transformer takes: (rows, tokens) each
    mask: Tensor  # (rows, tokens) True at real tokens
    lengths: Tensor  # (rows,)


def collate(
    rows: Sequence[tuple[NDArray[np.int32], NDArray[np.int32] | None]], pad: int, device: torch.device, segments: bool
) -> Batch:
    """Pad the given rows to the longest of them.

    Args:
        rows: token ids and token types (None: all 0) of each row.
        pad: token id of padding.
        segments: whether the model takes token types.
    """
    lengths = np.fromiter((len(tokens) for tokens, _ in rows), dtype=np.int64, count=len(rows))
    if not lengths.all():
        raise FitError("a row has no tokens; drop empty texts from the data")
    longest = int(lengths.max())
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    types = np.zeros_like(ids) if segments else None
    for i, (tokens, own) in enumerate(rows):
        ids[i, : len(tokens)] = tokens
        if types is not None and own is not None:
            types[i, : len(tokens)] = own
    mask = torch.from_numpy(np.arange(longest) < lengths[:, None]).to(device)
    inputs = {"input_ids": torch.from_numpy(ids).to(device)}
    if types is not None:
        inputs["token_type_ids"] = torch.from_numpy(types).to(device)
    if int(lengths.min()) < longest:
        inputs["attention_mask"] = mask.to(torch.int64)
    return Batch(inputs, mask, torch.from_numpy(lengths).to(device))
