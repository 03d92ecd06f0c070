"""Bottleneck adapters with a client axis: h + up(s(down(h))) after attention and after the feed-forward part.

Parameters of block l, for each half (`attention`, `ffn`): `block.{l}.{half}.down.weight` (m, d), `.down.bias`
(m,), `.up.weight` (d, m), `.up.bias` (d,), and where the blocks' own layer norms are trained `.norm.gain` (d,) and
`.norm.shift` (d,) (no shift in RMS norms). Reference: Houlsby et al. 2019, arXiv 1902.00751.

The adapter stands behind the half's last projection, before the sum with the residual. down starts at N(0, .01^2) as in
the paper, up at zero (ours), so a fresh adapter leaves the base's outputs unchanged; norms start at the base's own
values. Clients of unequal m are padded with zeros, which stay zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpeft.core.adapter import Bottleneck
from fedpeft.core.errors import ModelError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Applied, Layer, Network, Partner, Rows, Shape, Sizes
from fedpeft.models.adapters.prefix import choose_blocks
from fedpeft.models.adapters.prompt import at_least_one, complete, linear
from fedpeft.models.families import KNOWN_MODELS, Slot, block_paths, norm_paths, slots
from fedpeft.models.load import Base

DEVIATION = 0.01
HALVES = {"attention": "output", "ffn": "down"}  # the projection that ends each half of a block
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
_NETWORK = ("down.weight", "down.bias", "up.weight", "up.bias")


class BottleneckAdapter:
    """Two bottlenecks in every chosen block, and its layer norms where the specification says so.

    Raises:
        ModelError: a family whose blocks are not known, a size below 1, an unknown activation or block.
    """

    slots: Mapping[str, Slot] = {}
    partners: Mapping[str, Partner] = {"gain": ("shift", 0, 0), "shift": ("gain", 0, 0)}

    def __init__(self, spec: Bottleneck, base: Base) -> None:
        at_least_one("size", spec.size)
        paths = block_paths(base.module, base.family)
        if not paths:
            raise ModelError(
                f"bottlenecks need a family whose blocks are known, not {base.family!r}; use {KNOWN_MODELS}, "
                "or method fedavg with adapter.kind 'lora' and patterns in adapter.targets"
            )
        if spec.activation not in ACTIVATIONS:
            raise ModelError(f"adapter.activation {spec.activation!r} is not known; use {' or '.join(ACTIVATIONS)}")
        self.spec = spec
        self.chosen = choose_blocks(spec.blocks, len(paths))
        known = slots(base.module, base.family)
        self._halves: dict[str, Slot] = {}
        self._norms: dict[str, str] = {}
        self._values: dict[str, Tensor] = {}
        for block in range(len(paths)):
            for half, path in zip(HALVES, norm_paths(base.module, base.family, block), strict=True):
                stem = f"block.{block}.{half}"
                self._halves[stem] = known[f"block.{block}.{HALVES[half]}"]
                self._norms[stem] = path
                norm = base.module.get_submodule(path)
                self._values[f"{stem}.norm.gain"] = gain(norm)
                if isinstance(norm, nn.LayerNorm):
                    self._values[f"{stem}.norm.shift"] = norm.bias
        self.networks: Sequence[Network] = [_network(stem) for stem in self._halves]
        if not any(name.endswith("shift") for name in self._values):
            self.partners = {}

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """See the module's docstring; drawn block by block."""
        params: dict[str, Tensor] = {}
        for stem, slot in self._halves.items():
            if int(stem.split(".")[1]) not in self.chosen:
                continue
            m, d = self.spec.size, slot.d_out
            weight = rng.normal(0, DEVIATION, size=(m, d)).astype(np.float32)
            params[f"{stem}.down.weight"] = torch.from_numpy(weight)
            params[f"{stem}.down.bias"] = torch.zeros(m)
            params[f"{stem}.up.weight"] = torch.zeros(d, m)
            params[f"{stem}.up.bias"] = torch.zeros(d)
            for name in (f"{stem}.norm.gain", f"{stem}.norm.shift") if self.spec.norms else ():
                if name in self._values:
                    params[name] = self._values[name].detach().float().cpu().clone()
        return params

    def shapes(self) -> Mapping[str, Shape]:
        """None stands for m, which may differ between clients."""
        want: dict[str, Shape] = {}
        for stem, slot in self._halves.items():
            d = slot.d_out
            sizes: tuple[Shape, ...] = ((None, d), (None,), (d, None), (d,))
            want |= {f"{stem}.{name}": size for name, size in zip(_NETWORK, sizes, strict=True)}
        return want | {name: tuple(value.shape) for name, value in self._values.items()}

    def bind(self, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> None:
        """Add every bottleneck that is there to its half, and put every norm that is there in place of the base's."""
        for stem, slot in self._halves.items():
            names, down, up = _network(stem)
            if any(complete(names, down, up, layer, sizes)):
                base.change_output(slot.path, self._bottleneck([layer[name] for name in names], rows))
            if f"{stem}.norm.gain" in layer:
                base.change_output(self._norms[stem], self._norm(stem, layer, sizes, rows, base))

    def _bottleneck(self, weights: list[Tensor], rows: Rows) -> Applied:
        activation = ACTIVATIONS[self.spec.activation]
        down, down_bias, up, up_bias = weights

        def applied(x: Tensor, y: Tensor) -> Tensor:
            low = activation(linear(y, down, down_bias, rows))
            return y + linear(low, up, up_bias, rows).to(y.dtype)

        return applied

    def _norm(self, stem: str, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> Applied:
        norm = base.module.get_submodule(self._norms[stem])
        scale = self._own(f"{stem}.norm.gain", gain(norm), layer, sizes, rows)
        shift = None
        if f"{stem}.norm.shift" in layer:
            shift = self._own(f"{stem}.norm.shift", norm.get_parameter("bias"), layer, sizes, rows)

        def applied(x: Tensor, y: Tensor) -> Tensor:
            changed = normalised(norm, x) * scale
            return (changed if shift is None else changed + shift).to(y.dtype)

        return applied

    def _own(self, name: str, base_value: Tensor, layer: Layer, sizes: Sizes, rows: Rows) -> Tensor:
        """(rows or 1, 1, d) each row's own values; the base's for a client that has none."""
        stacked = layer[name]
        lacking = [client for client, size in enumerate(sizes[name]) if size is None]
        if lacking:
            there = torch.ones(len(stacked), 1, dtype=torch.bool, device=stacked.device)
            there[lacking] = False
            stacked = torch.where(there, stacked, base_value.to(stacked.dtype))
        own = rows.pick(stacked)
        return own if own.dim() == 1 else own[:, None]

    def context(self, params: Params) -> tuple[float, float]:
        """No token and no key more."""
        return 0.0, 0.0


def _network(stem: str) -> Network:
    names = tuple(f"{stem}.{name}" for name in _NETWORK)
    return names, names[0], names[2]


def gain(norm: nn.Module) -> Tensor:
    """What a norm multiplies its normalised input with; Gemma keeps it minus one."""
    weight = norm.get_parameter("weight")
    return weight + 1 if type(norm).__name__.startswith("Gemma") else weight


def normalised(norm: Any, x: Tensor) -> Tensor:
    """The norm without gain and shift; RMS norms in float32, as transformers computes them at any precision."""
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, norm.normalized_shape, None, None, norm.eps)
    wide = x.float()
    epsilon = getattr(norm, "variance_epsilon", None)
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + (norm.eps if epsilon is None else epsilon))).to(x.dtype)
