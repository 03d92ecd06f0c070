"""Prefixes with a client axis: trainable keys and values before those of a layer's own tokens.

The parameter of block l is `prefix.{l}`, (2, P, key/value heads, head size): [0] keys, [1] values, as they are, without
a network in front. References: Li & Liang 2021, arXiv 2101.00190; in every layer Liu et al. 2022, arXiv 2110.07602. Any
blocks may have one; a block without one costs nothing. A prefix of zeros is not the same as none: its keys take a share
of the softmax. So where clients have prefixes of unequal length, or in other blocks, the padding is hidden by the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedpeft.core.adapter import Prefix
from fedpeft.core.errors import ModelError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models import attention
from fedpeft.models.adapters import Layer, Network, Partner, Prefixed, Rows, Shape, Sizes
from fedpeft.models.families import KNOWN_MODELS, Slot, attention_paths, key_value_size
from fedpeft.models.load import Base
from fedpeft.models.noise import keep


class PrefixAdapter:
    """Prefixes in the blocks that a specification names; parameters in the other blocks apply too.

    Raises:
        ModelError: a length below 1, blocks that the base does not have, or a base whose attention takes no prefix.
    """

    slots: Mapping[str, Slot] = {}
    partners: Mapping[str, Partner] = {}
    networks: Sequence[Network] = ()

    def __init__(self, spec: Prefix, base: Base) -> None:
        if spec.length < 1:
            raise ModelError(f"adapter.length is {spec.length}; it must be at least 1")
        if spec.deviation < 0:
            raise ModelError(f"adapter.deviation is {spec.deviation}; it must not be negative")
        self.spec = spec
        self.paths = attention_paths(base.module, base.family)
        if not self.paths:
            raise ModelError(
                f"adapter.kind 'prefix' needs to know the attention of the model, and the family {base.family!r} is "
                f"not known; use {KNOWN_MODELS}, or method fedavg with adapter.kind 'lora' and a "
                "pattern in adapter.targets"
            )
        if not attention.installed(base.module):
            raise ModelError(
                f"adapter.kind 'prefix' needs a base whose attention is {attention.STOCK!r}; this one has "
                f"{base.module.config._attn_implementation!r}. Load it with attn_implementation={attention.STOCK!r}."
            )
        self.blocks = choose_blocks(spec.blocks, len(self.paths))
        self.heads, self.size = key_value_size(base.module.config)

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """N(0, deviation²), drawn in the order of the blocks."""
        shape = (2, self.spec.length, self.heads, self.size)
        return {
            f"prefix.{block}": torch.from_numpy(rng.normal(0, self.spec.deviation, size=shape).astype(np.float32))
            for block in self.blocks
        }

    def shapes(self) -> dict[str, Shape]:
        """None stands for the length P, which may differ between clients."""
        return {f"prefix.{block}": (2, None, self.heads, self.size) for block in range(len(self.paths))}

    def bind(self, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> None:
        """Put every prefix before the keys and values of its block; a second one comes after the first."""
        acting = base.acting.prefixes
        for block, path in enumerate(self.paths):
            name = f"prefix.{block}"
            prefix = gather(name, layer[name], sizes[name], rows) if name in layer else None
            if prefix is not None:
                module = base.module.get_submodule(path)
                acting[module] = join(acting[module], prefix) if module in acting else prefix

    def context(self, params: Params) -> tuple[float, float]:
        """P keys more, as a mean over the blocks."""
        lengths = [t.shape[1] for name, t in params.items() if name.startswith("prefix.")]
        return 0.0, sum(lengths) / len(self.paths)


def choose_blocks(blocks: Sequence[int] | None, count: int) -> list[int]:
    """The blocks that get a prefix, lowest first; None: all.

    Raises:
        ModelError: no block, one twice, or one that is not among the `count` blocks of the model.
    """
    if blocks is None:
        return list(range(count))
    has = f"the model has blocks 0 to {count - 1}"
    if not blocks:
        raise ModelError(f"adapter.blocks selects no block; {has}, or use adapter.kind 'head' to train none")
    if wrong := [b for b in blocks if not 0 <= b < count]:
        raise ModelError(f"adapter.blocks names block {wrong[0]}; {has}")
    if len(set(blocks)) < len(blocks):
        raise ModelError(f"adapter.blocks {tuple(blocks)} names a block twice; name each once, {has}")
    return sorted(blocks)


def gather(name: str, stacked: Tensor, sizes: Sequence[tuple[int, ...] | None], rows: Rows) -> Prefixed | None:
    """Each row's own prefix of one block, or None where no row has one.

    Args:
        name: of the parameter, for the noise of dropout.
        stacked: (clients, 2, P, key/value heads, head size), zeros where a client has fewer.
        sizes: each client's own shape.
    """
    lengths = [0 if size is None else size[1] for size in sizes]
    shared = stacked.shape[0] == 1 or stacked.stride(0) == 0
    own, seen = stacked[:1], None
    if rows.client is None:
        own = rows.pick(stacked)[None, :, : lengths[rows.only]]
    elif not shared:
        own = rows.pick(stacked[:, :, : max(lengths)])
        if min(lengths) < max(lengths):
            most = torch.tensor(lengths, device=own.device)[rows.client]
            seen = torch.arange(own.shape[2], device=own.device) < most[:, None]
    _, _, count, heads, size = own.shape
    if not count:
        return None
    if rows.keys is not None and rows.drop is not None:
        kept = keep(rows.keys, name, (count, 2 * heads * size), rows.drop)
        own = own * kept.view(-1, count, 2, heads, size).transpose(1, 2)
    return Prefixed(own[:, 0].transpose(1, 2), own[:, 1].transpose(1, 2), seen)


def join(first: Prefixed, second: Prefixed) -> Prefixed:
    """Both prefixes, one after the other."""
    both = (first, second)
    rows = max(len(p.key) for p in both)
    seen = None
    if first.seen is not None or second.seen is not None:
        shown = [torch.ones_like(p.key[:, 0, :, 0], dtype=torch.bool) if p.seen is None else p.seen for p in both]
        seen = torch.cat([s.expand(rows, -1) for s in shown], dim=1)
    key, value = (torch.cat([t.expand(rows, -1, -1, -1) for t in pair], dim=2) for pair in _pairs(first, second))
    return Prefixed(key, value, seen)


def _pairs(first: Prefixed, second: Prefixed) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (first.key, second.key), (first.value, second.value)
