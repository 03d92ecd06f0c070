"""Greedy decoding with adapters in place: the likeliest token at every step, until the end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.core.examples import Examples
from fedpeft.core.train import Stack, stack_params
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Rows
from fedpeft.models.parts import cut
from fedpeft.models.readouts import Item

if TYPE_CHECKING:
    from fedpeft.models.hf import HFModel
    from fedpeft.models.lm_head import LmHead

Tokens = NDArray[np.int32]


class _Spoken(Protocol):
    """A readout over a causal language model's head."""

    lm: LmHead


def generate(
    model: HFModel, params: Params, prompts: Sequence[Tokens], new_tokens: int, end: int, positions: int | None = None
) -> list[list[int]]:
    """What the model says behind each prompt, without the end token, in the order of the prompts.

    Prompts of like length go through together, padded on the left, and each token is computed once: keys and values
    are kept. With an adapter that puts tokens into the sequence, every step computes the whole sequence anew.

    Args:
        model: whose readout has a language model's head (`lm`).
        params: the adapter; empty: the base alone.
        prompts: token ids, at least one each.
        new_tokens: most tokens of an answer.
        end: the end token's id.
        positions: how many tokens the model can read; None: no bound.
    """
    found: list[list[int]] = [[] for _ in prompts]
    lengths = np.fromiter(map(len, prompts), dtype=np.int64, count=len(prompts))
    if not len(lengths):
        return found
    stack = stack_params([params], model.device)
    with torch.no_grad():
        for part in cut(lengths + new_tokens, model.token_budget):
            own = [prompts[i] for i in part]
            room = new_tokens if positions is None else min(new_tokens, positions - int(lengths[part].max()))
            with model.acting(model.base, stack, Rows(None, 0)):
                whole = model.base.acting.virtual is not None
                said = [] if whole else _with_cache(model, own, room, end)
            if whole:
                said = _anew(model, stack, own, room, end)
            for i, tokens in zip(part, said, strict=True):
                found[i] = tokens
    return found


def _with_cache(model: HFModel, prompts: Sequence[Tokens], room: int, end: int) -> list[list[int]]:
    """Answers of one batch; the adapters are in place."""
    base, longest = model.base, max(map(len, prompts))
    ids = torch.full((len(prompts), longest), end, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    said: list[list[int]] = [[] for _ in prompts]
    open_rows, cache = set(range(len(prompts))), None
    for _ in range(room):
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "use_cache": True}
        if base.acting.prefixes:
            inputs["prefixes"] = base.acting.prefixes
        out = base.module(**inputs, past_key_values=cache)
        cache = out.past_key_values
        ids = _likeliest(model, out.last_hidden_state[:, -1])
        _take(ids, said, open_rows, end)
        if not open_rows:
            break
        ids, places = ids[:, None], places[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return said


def _anew(model: HFModel, stack: Stack, prompts: Sequence[Tokens], room: int, end: int) -> list[list[int]]:
    """Answers of one batch, the whole sequence computed at every step."""
    said: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for _ in range(room):
        if not open_rows:
            break
        rows = sorted(open_rows)
        tokens = tuple(np.concatenate([prompts[i], np.asarray(said[i], np.int32)]) for i in rows)
        starts = np.array([len(prompts[i]) for i in rows], np.int64)
        data = Examples(tokens, np.zeros(len(rows), np.int64), starts=starts)
        with model.seen(model.base, stack, [Item(0, data, k, 0) for k in range(len(rows))], 0) as seen:
            last = torch.from_numpy(data.lengths - 1).to(seen.hidden.device)
            chosen = _likeliest(model, seen.hidden[torch.arange(len(rows), device=last.device), last])
        every = torch.full((len(prompts),), end)
        every[rows] = chosen.cpu()
        _take(every, said, open_rows, end)
    return said


def _likeliest(model: HFModel, states: Tensor) -> Tensor:
    """(rows,) token ids."""
    return cast(_Spoken, model.readout).lm.logits(states).argmax(dim=-1)


def _take(chosen: Tensor, said: list[list[int]], open_rows: set[int], end: int) -> None:
    """Write down each open row's token; the end token closes a row."""
    for row in sorted(open_rows):
        token = int(chosen[row])
        if token == end:
            open_rows.discard(row)
        else:
            said[row].append(token)
