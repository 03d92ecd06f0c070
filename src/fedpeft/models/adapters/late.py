"""Late prompt tuning with a client axis: a prompt made of a middle layer's states and put in there.

    prompt = up(relu(down(pool(states)))),   down: d -> m, up: m -> d, with biases

`states` are those of the row's real tokens as they enter block l; `pool` is the adaptive average over P stretches of
them: the i-th is from floor(i n / P) to ceil((i + 1) n / P) of n tokens. Reference: Liu et al. 2022b, arXiv 2210.11292,
the pooling prompt generator with average pooling. There `down` comes before the pooling; both are linear and the
weights of a stretch sum to 1, so the result is the same, and P tokens go through `down` in place of all. As in the
authors' code, the non-linearity is after the pooling, and both layers start as torch's linear layers do. Their dropout
on the prompt is left out.

Parameters: `late.{l}.down.weight` (m, d), `late.{l}.down.bias` (m,), `late.{l}.up.weight` (d, m), `late.{l}.up.bias`
(d,); m may differ between clients. P is the specification's: no parameter depends on it. Nothing below block l is
differentiated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedpeft.core.adapter import LatePrompt
from fedpeft.core.errors import ModelError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Layer, Network, Partner, Rows, Shape, Sizes, Text
from fedpeft.models.adapters.prompt import Make, at_least_one, complete, linear, put, uniform
from fedpeft.models.families import KNOWN_MODELS, Slot, block_paths
from fedpeft.models.load import Base

_NAMES = ("down.weight", "down.bias", "up.weight", "up.bias")


class LatePromptAdapter:
    """A generated prompt that enters one block; None: the middle one, after 12 of 24 blocks as in the paper.

    Raises:
        ModelError: a length or size below 1, a family whose blocks are not known, or a block that it does not have.
    """

    slots: Mapping[str, Slot] = {}
    partners: Mapping[str, Partner] = {}

    def __init__(self, spec: LatePrompt, base: Base) -> None:
        at_least_one("length", spec.length)
        at_least_one("size", spec.size)
        self.spec = spec
        self.blocks = len(block_paths(base.module, base.family))
        if not self.blocks:
            raise ModelError(f"the blocks of the family {base.family!r} are not known; use {KNOWN_MODELS}")
        self.block = self.blocks // 2 if spec.block is None else spec.block
        if not 0 <= self.block < self.blocks:
            raise ModelError(f"adapter.block is {self.block}; the model has blocks 0 to {self.blocks - 1}")
        self.width = int(base.module.config.hidden_size)
        self.networks: Sequence[Network] = [_network(block) for block in range(self.blocks)]

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """U(-1, 1) / sqrt(inputs) for weights and biases."""
        stem, size, width = f"late.{self.block}", self.spec.size, self.width
        return {
            f"{stem}.down.weight": uniform(width, (size, width), rng),
            f"{stem}.down.bias": uniform(width, (size,), rng),
            f"{stem}.up.weight": uniform(size, (width, size), rng),
            f"{stem}.up.bias": uniform(size, (width,), rng),
        }

    def shapes(self) -> dict[str, Shape]:
        """None stands for m; a generator may be at any block."""
        want: dict[str, Shape] = {}
        for block in range(self.blocks):
            stem = f"late.{block}"
            want |= {f"{stem}.down.weight": (None, self.width), f"{stem}.down.bias": (None,)}
            want |= {f"{stem}.up.weight": (self.width, None), f"{stem}.up.bias": (self.width,)}
        return want

    def bind(self, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> None:
        """Put each row's prompt before the states that enter the block."""
        for block in self._at(layer):
            names, down, up = _network(block)
            there = complete(names, down, up, layer, sizes)
            counts = [self.spec.length if own else 0 for own in there]
            put(_generator([layer[name] for name in names], self.spec.length, rows), counts, rows, base, block)

    def context(self, params: Params) -> tuple[float, float]:
        """P tokens more in the block and those above, as a mean over all."""
        return float(sum(self.spec.length * (1 - block / self.blocks) for block in self._at(params))), 0.0

    def _at(self, names: Iterable[str]) -> list[int]:
        given = set(names)
        return [block for block in range(self.blocks) if any(f"late.{block}.{name}" in given for name in _NAMES)]


def _network(block: int) -> Network:
    names = tuple(f"late.{block}.{name}" for name in _NAMES)
    return names, names[0], names[2]


def _generator(weights: list[Tensor], length: int, rows: Rows) -> Make:
    down, down_bias, up, up_bias = weights

    def make(text: Text) -> Tensor:
        states = text.states.to(torch.promote_types(text.states.dtype, torch.float32))
        pooled = torch.bmm(stretches(text.mask, length, states.dtype), states)
        low = torch.relu(linear(pooled, down, down_bias, rows))
        return linear(low, up, up_bias, rows)

    return make


def stretches(mask: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(rows, count, tokens) weights of the adaptive average over each row's real tokens, which come first.

    Args:
        mask: (rows, tokens) True at real tokens.
    """
    lengths = mask.sum(dim=1)[:, None]
    bins = torch.arange(count, device=mask.device)
    starts, ends = bins * lengths // count, -(-(bins + 1) * lengths // count)
    places = torch.arange(mask.shape[1], device=mask.device)
    inside = (starts[:, :, None] <= places) & (places < ends[:, :, None])
    return inside.to(dtype) / (ends - starts)[:, :, None]
