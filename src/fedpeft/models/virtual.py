"""Forward passes with tokens before those of the text: soft prompts, and prompts that are made of the text.

A prompt at the embeddings takes the first positions and moves the text's, as in PEFT's prompt tuning; the text's token
types stay, those of a prompt are 0. Where clients' prompts are of unequal length, each row is moved together to
[own prompt, text, padding], so that every row has the positions that it has alone, in any family.

A late prompt is put before the states that enter a middle block and taken away after the last one. The text keeps its
positions there; with rotary embeddings all tokens of the prompt are at position 0 (ours: the papers' models have
absolute positions, which are in the states already). In a causal model the prompt comes first: its tokens see those
before them in the prompt, and the text sees all of them; in an encoder all see all.

The states that come back are the text's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpeft.core.adapter import AdapterSpec, InstancePrompt, MixedPrompt, Prompt
from fedpeft.models.adapters import Acting, Text, Virtual, head
from fedpeft.models.families import block_paths, is_decoder
from fedpeft.models.load import Base
from fedpeft.models.parts import Batch

Making = Callable[[Tensor], Tensor]


def positions(spec: AdapterSpec) -> int:
    """How many of a model's positions the adapter takes, and so how much shorter the longest text must be."""
    return spec.length if isinstance(spec, Prompt | InstancePrompt | MixedPrompt) else 0


def run(base: Base, batch: Batch, inputs: Mapping[str, Any], virtual: Virtual, known: Tensor | None = None) -> Tensor:
    """(rows, tokens, d) last hidden states of the text's own tokens.

    Args:
        inputs: what the base takes without the prompt.
        known: (rows,) how many tokens stand before the answer, where an answer is part of the sequence. A prompt is
            made of these alone: one made of the answer would give it away to the tokens before it. None: all.
    """
    ahead = batch.mask if known is None else torch.arange(batch.mask.shape[1], device=known.device) < known[:, None]
    sentence = partial(_sentence, base, ahead, inputs)
    if virtual.block is not None:
        with _inserted(base, _Insertion(virtual, batch.mask, ahead, is_decoder(base.family), sentence)):
            return cast(Tensor, base.module(**inputs).last_hidden_state)
    embedded = base.module.get_input_embeddings()(inputs["input_ids"])
    prompt = virtual.make(Text(embedded, ahead, sentence))
    place = _Place.of(batch, virtual)
    given = {k: v for k, v in inputs.items() if k != "input_ids"}
    given["inputs_embeds"] = place.put(torch.cat([prompt.to(embedded.dtype), embedded], dim=1))
    given["attention_mask"] = place.mask.to(torch.int64)
    if "token_type_ids" in given:
        types = given["token_type_ids"]
        given["token_type_ids"] = place.put(torch.cat([types.new_zeros(len(types), virtual.count), types], dim=1))
    return place.text(cast(Tensor, base.module(**given).last_hidden_state))


def _sentence(base: Base, known: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """(rows, d) mean state of each row's known tokens in the frozen base, without any adapter.

    An answer is part of the sequence in causal models alone, where the states before it do not see it.
    """
    acting, base.acting = base.acting, Acting()  # the hooks read what acts at the moment
    try:
        with torch.no_grad():
            hidden = base.module(**{k: v for k, v in inputs.items() if k != "prefixes"}).last_hidden_state
    finally:
        base.acting = acting
    return head.pool(hidden, known, known.sum(dim=1), last=False)


# --- at the embeddings ---


@dataclass(frozen=True)
class _Place:
    """Where the tokens of prompt and text lie in the sequence that goes through the model.

    Attributes:
        count: P.
        mask: (rows, width) True at tokens of the row's own prompt and text.
        order: (rows, width) which of the P + tokens places stands there; None: they stand as they are.
        back: (rows, tokens) where the text's tokens stand; None: behind P.
    """

    count: int
    mask: Tensor
    order: Tensor | None = None
    back: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, virtual: Virtual) -> _Place:
        """Rows whose prompt is shorter are moved together."""
        rows, tokens = batch.mask.shape
        count, device = virtual.count, batch.mask.device
        if virtual.seen is None:
            whole = torch.ones(rows, count, dtype=torch.bool, device=device)
            return cls(count, torch.cat([whole, batch.mask], dim=1))
        own = virtual.seen.sum(dim=1)[:, None]
        ends = own + batch.lengths[:, None]
        places = torch.arange(int(ends.max()), device=device)
        order = torch.where(places < own, places, places + count - own).clamp(max=count + tokens - 1)
        back = (own + torch.arange(tokens, device=device)).clamp(max=len(places) - 1)
        return cls(count, places < ends, order, back)

    def put(self, x: Tensor) -> Tensor:
        """(rows, width, ...) from (rows, P + tokens, ...)."""
        return x if self.order is None else _take(x, self.order)

    def text(self, x: Tensor) -> Tensor:
        """(rows, tokens, d) from (rows, width, d); at padding it is of no meaning."""
        return x[:, self.count :] if self.back is None else _take(x, self.back)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index if x.dim() == 2 else index[:, :, None].expand(-1, -1, x.shape[2]))


# --- at a middle block ---


@dataclass
class _Insertion:
    """What the blocks from the prompt's on are given instead of what was made for the text alone.

    Attributes:
        mask: (rows, tokens) True at real tokens of the text.
        known: (rows, tokens) True at those that the prompt is made of.
        causal: whether the model reads left to right.
        made: what was given and what became of it: most models give every block the same.
    """

    virtual: Virtual
    mask: Tensor
    known: Tensor
    causal: bool
    sentence: Callable[[], Tensor]
    made: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    no_mask: Tensor | None = None

    def enter(self, state: Tensor) -> Tensor:
        """The states that enter the prompt's block, with the prompt before them."""
        prompt = self.virtual.make(Text(state, self.known, self.sentence))
        return torch.cat([prompt.to(state.dtype), state], dim=1)

    def attention(self, given: Tensor | None) -> Tensor | None:
        """The mask for prompt and text; None where a block needs none."""
        if given is not None:
            return self._once(given, self._attention)
        if self.virtual.seen is None:
            return None
        if self.no_mask is None:
            tokens = self.mask.shape[1]
            every = torch.ones(tokens, tokens, dtype=torch.bool, device=self.mask.device)
            self.no_mask = self._attention((every.tril() if self.causal else every)[None, None])
        return self.no_mask

    def rotary(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Cosines and sines, (rows, P + tokens, head size) each; the prompt is where the text's first token is."""

        def before(x: Tensor) -> Tensor:
            return torch.cat([x[:, :1].expand(-1, self.virtual.count, -1), x], dim=1)

        return tuple(self._once(x, before) for x in given)

    def _once(self, given: Tensor, make: Making) -> Tensor:
        for known, made in self.made:
            if known is given:
                return made
        self.made.append((given, make(given)))
        return self.made[-1][1]

    def _attention(self, given: Tensor) -> Tensor:
        """(rows, heads, P + tokens, P + tokens) from (rows or 1, heads or 1, tokens, tokens), booleans or addends."""
        rows, tokens = self.mask.shape
        count, device = self.virtual.count, self.mask.device
        seen = self.virtual.seen
        seen = torch.ones(rows, count, dtype=torch.bool, device=device) if seen is None else seen
        among = seen[:, None].expand(rows, count, count)
        if self.causal:
            among = among.tril()
        among = among | torch.eye(count, dtype=torch.bool, device=device)  # no query is left without a key
        ahead = self.mask[:, None].expand(rows, count, tokens)
        if self.causal:
            ahead = torch.zeros_like(ahead)
        top = _like(given, torch.cat([among, ahead], dim=2)[:, None])
        left = _like(given, seen[:, None, None].expand(rows, 1, tokens, count))
        heads = given.shape[1]
        own = given.expand(rows, heads, tokens, tokens)
        bottom = torch.cat([left.expand(-1, heads, -1, -1), own], dim=3)
        return torch.cat([top.expand(-1, heads, -1, -1), bottom], dim=2)


def _like(given: Tensor, allowed: Tensor) -> Tensor:
    """A boolean mask in the form of the given one, which may hold addends."""
    if given.dtype == torch.bool:
        return allowed
    closed = torch.full((), torch.finfo(given.dtype).min, dtype=given.dtype, device=given.device)
    return torch.where(allowed, torch.zeros_like(closed), closed)


@contextmanager
def _inserted(base: Base, insertion: _Insertion) -> Iterator[None]:
    """The prompt is put in before its block and taken away after the last one, as long as the context lasts."""
    place, count = insertion.virtual.block, insertion.virtual.count
    assert place is not None, "a late prompt has a block"
    blocks = [base.module.get_submodule(path) for path in block_paths(base.module, base.family)[place:]]

    def taken(module: nn.Module, args: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][:, count:], *output[1:])
        return output[:, count:]

    handles = [
        block.register_forward_pre_hook(partial(_given, insertion, i == 0), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    handles.append(blocks[-1].register_forward_hook(taken))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _given(
    insertion: _Insertion, enters: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with the prompt in them; models give the mask by name or by place."""
    names = list(inspect.signature(module.forward).parameters)
    values = dict(zip(names, args, strict=False)) | kwargs
    if enters:
        values["hidden_states"] = insertion.enter(values["hidden_states"])
    values["attention_mask"] = insertion.attention(values.get("attention_mask"))
    if values.get("position_embeddings") is not None:
        values["position_embeddings"] = insertion.rotary(values["position_embeddings"])
    if "position_ids" in values:  # of no use inside a block, where positions are in the states or the rotary embeddings
        values["position_ids"] = None
    placed = tuple(values.pop(name) for name in names[: len(args)])
    return placed, values
