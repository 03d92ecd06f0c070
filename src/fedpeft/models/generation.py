"""Greedy decoding with adapters in place: the likeliest token at every step, until the end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.core.examples import Examples
from fedpeft.core.train import Stack, stack_params
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Rows
from fedpeft.models.parts import cut
from fedpeft.models.readouts import Item
from fedpeft.models.sessions import Speaker

if TYPE_CHECKING:
    from fedpeft.models.hf import HFModel
    from fedpeft.models.lm_head import LmHead

Tokens = NDArray[np.int32]


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
    speaker = None if _puts_tokens(model, stack) else Speaker(model, params)
    for part in cut(lengths + new_tokens, model.token_budget):
        own = [prompts[i] for i in part]
        room = new_tokens if positions is None else min(new_tokens, positions - int(lengths[part].max()))
        if room < 1:
            continue
        said = _anew(model, stack, own, room, end) if speaker is None else _with_cache(speaker, own, room, end)
        for i, tokens in zip(part, said, strict=True):
            found[i] = tokens
    return found


def _puts_tokens(model: HFModel, stack: Stack) -> bool:
    with model.acting(model.base, stack, Rows(None, 0)):
        return model.base.acting.virtual is not None


def _with_cache(speaker: Speaker, prompts: Sequence[Tokens], room: int, end: int) -> list[list[int]]:
    """Answers of one batch; rows that are done leave it."""
    said: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    session = speaker.open([prompt.tolist() for prompt in prompts])
    chosen = session.first[:, -1].argmax(dim=-1).tolist()
    while True:
        kept = [i for i, token in enumerate(chosen) if token != end]
        for i in kept:
            said[rows[i]].append(chosen[i])
        kept = [i for i in kept if len(said[rows[i]]) < room]
        if not kept:
            return said
        session.keep(kept)
        rows = [rows[i] for i in kept]
        chosen = session.logits([[said[row][-1]] for row in rows])[:, -1].argmax(dim=-1).tolist()


def _anew(model: HFModel, stack: Stack, prompts: Sequence[Tokens], room: int, end: int) -> list[list[int]]:
    """Answers of one batch, the whole sequence computed at every step."""
    said: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    lm: LmHead | None = model.lm
    assert lm is not None, "only a model with a language model's head is asked for texts"
    for _ in range(room):
        if not rows:
            break
        tokens = tuple(np.concatenate([prompts[i], np.asarray(said[i], np.int32)]) for i in rows)
        starts = np.array([len(prompts[i]) for i in rows], np.int64)
        data = Examples(tokens, np.zeros(len(rows), np.int64), starts=starts)
        items = [Item(0, data, k, 0) for k in range(len(rows))]
        with torch.no_grad(), model.seen(model.base, stack, items, 0) as seen:
            last = torch.from_numpy(data.lengths - 1).to(seen.hidden.device)
            states = seen.hidden[torch.arange(len(rows), device=last.device), last]
            chosen = lm.logits(states).argmax(dim=-1).tolist()
        for row, token in zip(rows, chosen, strict=True):
            if token != end:
                said[row].append(token)
        rows = [row for row, token in zip(rows, chosen, strict=True) if token != end]
    return said
