"""A small language model that speaks: raw scores of next tokens, with its adapter on or off, and a key/value cache.

Several speakers may share one base, whose weights exist once: T of proxy-tuning is a speaker with an adapter, B one
without. What acts is made once and put in place for each pass alone, so speakers may take turns in any order.

Prompts that differ in length are padded on the left, and positions count real tokens only: without explicit positions
a model with learned ones gives other scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedpeft.core.errors import ModelError, RequestError
from fedpeft.core.train import Stack, stack_params
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Acting, Applied, Rows
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import LmHead
from fedpeft.models.parts import cut

Span = tuple[int, int]


class Speaker:
    """A causal language model with one adapter, or without.

    Args:
        model: whose readout has a language model's head (`task.format: generate`).
        params: the adapter that acts; None or empty: the base alone.

    Raises:
        ModelError: a model without a language model's head, or an adapter that puts tokens into the text, which has
            no cache.
        FitError: parameters that the model does not have.
    """

    def __init__(self, model: HFModel, params: Params | None = None) -> None:
        if model.lm is None:
            raise ModelError("a model that predicts labels cannot speak; load it with task.format generate")
        self.model = model
        self.lm: LmHead = model.lm
        self.params: Params = params or {}
        model.check_params(self.params)
        self.bound = _bound(model, stack_params([self.params], model.device))
        if self.bound.virtual is not None:
            raise ModelError(
                f"an adapter of kind {model.spec.kind!r} puts tokens into the text and has no cache; use lora, "
                "prefix or bottleneck"
            )
        self.mixes = not (self.bound.prefixes or self.bound.weights)

    @property
    def vocab(self) -> int:
        """Scores of a position, padding of the embedding matrix included."""
        return self.lm.vocabulary

    @property
    def positions(self) -> int | None:
        """How many tokens it can read; None: no bound is known."""
        found = getattr(self.model.base.module.config, "max_position_embeddings", None)
        return None if found is None else int(found)

    def open(self, prompts: Sequence[Sequence[int]]) -> SpeakerSession:
        """Read the prompts, of at least one token each, side by side.

        Raises:
            RequestError: no prompt, an empty one, or one that the model cannot read.
        """
        return SpeakerSession(self.model, self.bound, self._readable(prompts))

    def open_beside(
        self, prompts: Sequence[Sequence[int]], other: Speaker, others: Sequence[Sequence[int]]
    ) -> SpeakerSession:
        """One session whose first rows are this speaker's and whose last rows are another's, over the same model.

        One pass reads the weights once for both; each half has its own adapter, or none, to the last bit.

        Args:
            other: for which `beside` is true.
            others: its prompts.
        """
        split = _Split(len(prompts))
        own = _side_by_side(self.bound, other.bound, split)
        return SpeakerSession(self.model, own, [*self._readable(prompts), *other._readable(others)], split)

    def beside(self, other: Speaker) -> bool:
        """Whether rows of both can go through the model in one pass."""
        return self.model is other.model and self.mixes and other.mixes

    def scores(self, sequences: Sequence[Sequence[int]], spans: Sequence[Span] | None = None) -> list[Tensor]:
        """Teacher-forced logits behind tokens of whole texts, without gradient.

        Args:
            sequences: token ids, at least one each.
            spans: per text, (first, last + 1) of the tokens behind which scores are wanted; a text's answer that
                begins at token s has the scores of (s - 1, length - 1). None: all.

        Returns:
            per text (last + 1 - first, V) float32, where the model is.

        Raises:
            RequestError: a text that is empty or longer than the model can read, or a span outside it.
        """
        wanted = [(0, len(own)) for own in sequences] if spans is None else list(spans)
        if len(wanted) != len(sequences):
            raise RequestError(f"{len(sequences)} texts came with {len(wanted)} spans; give one for each")
        for own, (first, end) in zip(self._readable(sequences) if sequences else [], wanted, strict=True):
            if not 0 <= first < end <= len(own):
                raise RequestError(f"span ({first}, {end}) lies outside a text of {len(own)} tokens")
        found: list[Tensor] = [torch.empty(0)] * len(sequences)
        for part in self._parts(sequences):
            states = _padded_right([sequences[i] for i in part], self.model.device)
            logits = self._whole(states, [wanted[i] for i in part])
            for i, own_logits in zip(part, logits, strict=True):
                found[i] = own_logits
        return found

    def _parts(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        if sequences:
            lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
            yield from (part.tolist() for part in cut(lengths, self.model.token_budget))

    def _whole(self, ids: Tensor, spans: Sequence[Span]) -> list[Tensor]:
        """(positions, V) of each row; padding on the right is behind all that is read."""
        model = self.model
        with torch.no_grad(), _in_place(model, self.bound):
            states = _states(model, {"input_ids": ids, "use_cache": False})
            return [self.lm.logits(own[first:end]).float() for own, (first, end) in zip(states, spans, strict=True)]

    def _readable(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        if not prompts or not all(map(len, prompts)):
            raise RequestError("a prompt has no tokens; begin with at least one, such as the beginning-of-text token")
        longest, most = max(map(len, prompts)), self.positions
        if most is not None and longest > most:
            raise RequestError(f"a text has {longest} tokens and the model {self.name} reads {most}; shorten it")
        least, greatest = min(map(min, prompts)), max(map(max, prompts))
        if least < 0 or greatest >= self.vocab:
            wrong = least if least < 0 else greatest
            raise RequestError(f"token {wrong} does not exist: the model {self.name} knows 0 to {self.vocab - 1}")
        return prompts

    @property
    def name(self) -> str:
        """Where the base came from."""
        return str(self.model.base.source)


class SpeakerSession:
    """Texts that go on side by side, one row each; see `Speaker.open`.

    Attributes:
        first: (rows, 1, V) float32 logits behind each prompt.
        lengths: tokens that each row has read.
    """

    def __init__(
        self, model: HFModel, bound: Acting, prompts: Sequence[Sequence[int]], split: _Split | None = None
    ) -> None:
        from transformers import DynamicCache

        self._model, self._bound, self._split = model, bound, split
        self._cache = cast(Any, DynamicCache(config=model.base.module.config))
        self.lengths = list(map(len, prompts))
        self._prompts = list(self.lengths)
        longest = max(self.lengths)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.int64)
        own = torch.tensor(self.lengths)[:, None]
        mask = torch.arange(longest) >= longest - own
        self._mask: Tensor | None = None if min(self.lengths) == longest else mask.to(model.device)
        places = (torch.arange(longest) - (longest - own)).clamp(min=0)
        self.first = self._read(ids, places, 1)
        self._cache.activate_past_recording()  # so that a sliding window can be taken back

    def logits(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to each row, as many to every row.

        Returns:
            (rows, positions, V) float32 logits behind each of them.

        Raises:
            RequestError: rows of unequal or no new tokens, or a closed session.
        """
        counts = set(map(len, new))
        if self._cache is None:
            raise RequestError("the session is closed; open another")
        if len(new) != len(self.lengths) or len(counts) != 1 or 0 in counts:
            raise RequestError(f"{len(self.lengths)} rows got {sorted(map(len, new))} tokens; give each as many")
        ids = torch.tensor([list(own) for own in new])
        n = ids.shape[1]
        places = torch.tensor(self.lengths)[:, None] + torch.arange(n)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), n)], dim=1)
        self.lengths = [own + n for own in self.lengths]
        return self._read(ids, places, n)

    def rollback(self, n: int) -> None:
        """Take the last n tokens of every row back.

        Raises:
            RequestError: the prompts would be cut.
        """
        room = min((now - own for now, own in zip(self.lengths, self._prompts, strict=True)), default=0)
        if not 0 <= n <= room:
            raise RequestError(f"{n} tokens cannot be taken back: {room} were added to the prompts")
        if n:
            self._cache.crop(-n)
            self._mask = None if self._mask is None else self._mask[:, :-n]
            self.lengths = [own - n for own in self.lengths]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; of two halves, those of the first come first."""
        if list(rows) == list(range(len(self.lengths))):
            return
        index = torch.tensor(list(rows), dtype=torch.int64, device=self._model.device)
        self._cache.batch_select_indices(index)
        self.lengths = [self.lengths[row] for row in rows]
        self._prompts = [self._prompts[row] for row in rows]
        if self._split is not None:
            self._split.rows = sum(row < self._split.rows for row in rows)
        if self._mask is not None:
            self._mask = self._mask[index]

    def close(self) -> None:
        """Give the cache back; may be called twice."""
        self._cache = None

    def _read(self, ids: Tensor, places: Tensor, last: int) -> Tensor:
        """(rows, last, V) float32 logits of the last positions; what is read stays in the cache."""
        model = self._model
        inputs: dict[str, Any] = {
            "input_ids": ids.to(model.device),
            "position_ids": places.to(model.device),
            "past_key_values": self._cache,
            "use_cache": True,
        }
        if self._mask is not None:
            inputs["attention_mask"] = self._mask.to(torch.int64)
        with torch.no_grad(), _in_place(model, self._bound):
            states = _states(model, inputs)[:, -last:]
            return cast(LmHead, model.lm).logits(states).float()


@dataclass
class _Split:
    """How many rows belong to the first of two speakers."""

    rows: int


def _side_by_side(first: Acting, second: Acting, split: _Split) -> Acting:
    """What acts where the first rows are one speaker's and the others another's."""

    def halves(module: nn.Module) -> Applied:
        def applied(x: Tensor, y: Tensor) -> Tensor:
            parts = []
            for acting, rows in ((first, slice(None, split.rows)), (second, slice(split.rows, None))):
                own, given = y[rows], x[rows]
                for change in acting.outputs.get(module, ()):
                    own = change(given, own)
                parts.append(own)
            return torch.cat(parts)

        return applied

    modules = first.outputs.keys() | second.outputs.keys()
    return Acting({module: [halves(module)] for module in modules})


def _bound(model: HFModel, stack: Stack) -> Acting:
    """What acts in a speaker's passes."""
    with torch.no_grad(), model.acting(model.base, stack, Rows(None, 0)):
        own = model.base.acting
        return replace(own, outputs=dict(own.outputs), prefixes=dict(own.prefixes), weights=dict(own.weights))


@contextmanager
def _in_place(model: HFModel, bound: Acting) -> Iterator[None]:
    """It acts as long as the context lasts; the hooks read what acts at the moment."""
    before, model.base.acting = model.base.acting, bound
    try:
        yield
    finally:
        model.base.acting = before


def _padded_right(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(rows, longest); a causal model's token never sees what stands to its right."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    for row, own in enumerate(sequences):
        ids[row, : len(own)] = torch.as_tensor(own, dtype=torch.int64)
    return ids.to(device)


def _states(model: HFModel, inputs: dict[str, Any]) -> Tensor:
    """(rows, tokens, d) last hidden states, with what acts at the moment."""
    acting, module = model.base.acting, model.base.module
    if acting.prefixes:
        inputs["prefixes"] = acting.prefixes
    if acting.weights:
        return cast(Tensor, functional_call(module, acting.weights, (), inputs).last_hidden_state)
    return cast(Tensor, module(**inputs).last_hidden_state)
