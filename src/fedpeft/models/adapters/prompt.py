"""Prompt tuning with a client axis: trained embeddings before those of the text.

Parameter: `prompt.tokens` (P, d), d the width of the base's word embeddings; P may differ between clients.
Reference: Lester et al. 2021, arXiv 2104.08691. What the other kinds of prompt share is here too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.core.adapter import Prompt
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Layer, Network, Partner, Rows, Shape, Sizes, Text, Virtual
from fedpeft.models.families import Slot
from fedpeft.models.load import Base

TOKENS = "prompt.tokens"
COMMON = 5000  # of how many of the commonest tokens a prompt starts; Lester et al., section 3.2
DEVIATION = 0.02  # as in BERT; ours
_UNUSED = re.compile(r"^[\[<|]*(unused|madeupword|reserved_special_token_|extra_id_)\d+[\]>|]*$")

Make = Callable[[Text], Tensor]  # gives (rows, P or more, d), or without rows where they are of one client


class PromptAdapter:
    """A prompt at the input embeddings, the same for every row of a client.

    Raises:
        ModelError: a length below 1, or a base that takes no embeddings.
    """

    slots: Mapping[str, Slot] = {}
    partners: Mapping[str, Partner] = {}
    networks: Sequence[Network] = ()

    def __init__(self, spec: Prompt, base: Base) -> None:
        check(spec.length, base)
        self.spec = spec
        self.base = base
        self.width = width(base)

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Rows of the vocabulary, or N(0, 0.02^2)."""
        if self.spec.start == "vocabulary":
            return {TOKENS: vocabulary(self.base, self.spec.length, rng)}
        return {TOKENS: normal((self.spec.length, self.width), rng)}

    def shapes(self) -> dict[str, Shape]:
        """None stands for P."""
        return {TOKENS: (None, self.width)}

    def bind(self, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> None:
        """Put each row's prompt before its text."""
        if TOKENS in layer:
            own = rows.pick(layer[TOKENS])
            put(lambda text: own, [size[0] if size else 0 for size in sizes[TOKENS]], rows, base)

    def context(self, params: Params) -> tuple[float, float]:
        """P tokens more in every block."""
        return float(params[TOKENS].shape[0]) if TOKENS in params else 0.0, 0.0


def put(make: Make, counts: Sequence[int], rows: Rows, base: Base, block: int | None = None) -> None:
    """Let the pass that is going on have a prompt.

    Args:
        counts: P of each client; 0: it has no prompt.
        block: where the prompt is put in; None: at the embeddings.

    Raises:
        FitError: the pass has a prompt already.
    """
    most = counts[rows.only] if rows.client is None else max(counts)
    if not most:
        return
    if base.acting.virtual is not None:
        raise FitError("a forward pass has one prompt; there are two among Fit.params and Fit.also")
    seen = None
    if rows.client is not None and min(counts) < most:
        own = torch.tensor(counts, device=base.device).index_select(0, rows.client)
        seen = torch.arange(most, device=base.device) < own[:, None]

    def made(text: Text) -> Tensor:
        return make(text)[..., :most, :].expand(len(text.states), -1, -1)

    base.acting.virtual = Virtual(most, made, seen, block)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows) -> Tensor:
    """(rows, n, d_out), each row through its own client's layer, in the layer's precision.

    Args:
        x: (rows, n, d_in)
        weight: (clients, d_out, d_in)
        bias: (clients, d_out)
    """
    own, shift = rows.pick(weight), None if bias is None else rows.pick(bias)
    x = x.to(own.dtype)
    if rows.client is None:
        return F.linear(x, own, shift)
    turned = own.transpose(1, 2)
    return torch.bmm(x, turned) if shift is None else torch.baddbmm(shift[:, None], x, turned)


def complete(names: Sequence[str], down: str, up: str, layer: Layer, sizes: Sizes) -> list[bool]:
    """Which clients have a network of two layers.

    Args:
        names: all its parameters.
        down, up: those whose inner size must agree: the first dimension of down, the second of up.

    Raises:
        FitError: a client that lacks some of the names, or whose layers do not fit together.
    """
    found = []
    clients = len(next(iter(sizes.values()))) if any(name in layer for name in names) else 0
    for client in range(clients):
        own = {name: sizes[name][client] for name in names if name in sizes and sizes[name][client] is not None}
        if own and (lacking := [name for name in names if name not in own]):
            raise FitError(f"an adapter's network came without {lacking[0]!r}; it needs {', '.join(names)}")
        first, second = own.get(down), own.get(up)
        if first and second and first[0] != second[1]:
            raise FitError(f"parameters {down!r} and {up!r} do not fit together: {first} and {second}")
        found.append(bool(own))
    return found


def check(length: int, base: Base) -> None:
    """Raise ModelError unless a prompt of this length can be put at the embeddings of this base."""
    at_least_one("length", length)
    if "inputs_embeds" not in inspect.signature(base.module.forward).parameters:
        raise ModelError(f"the family {base.family!r} takes no embeddings, so it can have no prompt; use LoRA")


def at_least_one(name: str, value: int) -> None:
    """Raise ModelError for a size of an adapter below 1."""
    if value < 1:
        raise ModelError(f"adapter.{name} is {value}; it must be at least 1")


def width(base: Base) -> int:
    """How wide the word embeddings are, which in some families is not the width of the blocks."""
    return int(base.module.get_input_embeddings().weight.shape[1])


def normal(shape: tuple[int, ...], rng: Rng) -> Tensor:
    """N(0, 0.02^2), float32."""
    return torch.from_numpy(rng.normal(0, DEVIATION, size=shape).astype(np.float32))


def uniform(d_in: int, shape: tuple[int, ...], rng: Rng) -> Tensor:
    """U(-1, 1) / sqrt(d_in), torch's own start of a linear layer, float32."""
    bound = 1 / np.sqrt(d_in)
    return torch.from_numpy(rng.uniform(-bound, bound, size=shape).astype(np.float32))


def vocabulary(base: Base, count: int, rng: Rng) -> Tensor:
    """(count, d) embeddings of words as the base makes them of their ids, drawn from the common tokens, float32.

    Lester et al. draw from the 5,000 commonest tokens of a vocabulary in order of frequency. Most vocabularies are
    roughly in that order, so these are the first 5,000 ids here, without special and unused tokens.
    """
    known = ordinary(base)[:COMMON]
    ids = rng.choice(known, size=count, replace=len(known) < count)
    with torch.no_grad():  # the module, not its table: Gemma scales the rows
        rows: Tensor = base.module.get_input_embeddings()(torch.from_numpy(ids).to(base.device))
    return rows.float().cpu().clone()


def ordinary(base: Base) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Ids of the vocabulary that stand for text, ascending; without a tokenizer all of them."""
    size = int(base.module.get_input_embeddings().weight.shape[0])
    if base.tokenizer is None:
        return np.arange(size, dtype=np.int64)
    special = set(base.tokenizer.all_special_ids)
    special |= {i for i, token in base.tokenizer.added_tokens_decoder.items() if token.special}
    ids = [i for token, i in base.tokenizer.get_vocab().items() if not _UNUSED.match(token)]
    return np.array(sorted(i for i in ids if i < size and i not in special), dtype=np.int64)
