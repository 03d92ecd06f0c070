"""LoRA with a client axis: y = W x + (alpha / rank) B A x, A and B of the row's own client.

Parameters of slot s: `s.A` (rank, d_in), `s.B` (d_out, rank). Reference: Hu et al. 2021, arXiv 2106.09685.
Clients of unequal rank are padded with zero rows of A and zero columns of B, which stay zero under any optimizer:
the gradient of each is a product with the other.

Where there is an `s.echo` (1,), the projection has the same change once more, that many times and held fixed for the
gradients of A and B: a base that moves along with the factors (Delta-LoRA).

The same change can be trained as triplets, y = W x + (alpha / rank) P diag(E) Q x, `s.P` (d_out, rank), `s.E` (rank,),
`s.Q` (rank, d_in), whose sensitivity tells what a projection is worth (Zhang et al. 2023, arXiv 2303.10512).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.core.adapter import Lora
from fedpeft.core.errors import ModelError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Applied, Layer, Network, Partner, Rows, Shape, Sizes
from fedpeft.models.families import Slot, choose, slots
from fedpeft.models.load import Base
from fedpeft.models.noise import keep

TRIPLET_PARTNERS: Mapping[str, Partner] = {"P": ("Q", 1, 0), "Q": ("E", 0, 0), "E": ("P", 0, 1)}


class LoraAdapter:
    """LoRA on the projections that a specification names; parameters on the family's other projections apply too.

    Raises:
        ModelError: a rank below 1, or targets that the base does not have.
    """

    partners: Mapping[str, Partner] = {"A": ("B", 0, 1), "B": ("A", 1, 0), **TRIPLET_PARTNERS}
    networks: Sequence[Network] = ()

    def __init__(self, spec: Lora, base: Base) -> None:
        if spec.rank < 1:
            raise ModelError(f"adapter.rank is {spec.rank}; it must be at least 1")
        self.spec = spec
        self.slots = choose(base.module, base.family, spec.targets, spec.blocks)
        self.places = slots(base.module, base.family) | self.slots
        self.scale = spec.alpha / spec.rank

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """A Kaiming-uniform with a = sqrt(5), that is U(-1, 1) / sqrt(d_in), as in PEFT; B = 0."""
        params: dict[str, Tensor] = {}
        for name, slot in self.slots.items():
            bound = 1 / math.sqrt(slot.d_in)
            a = rng.uniform(-bound, bound, size=(self.spec.rank, slot.d_in))
            params[f"{name}.A"] = torch.from_numpy(a.astype(np.float32))
            params[f"{name}.B"] = torch.zeros(slot.d_out, self.spec.rank)
        return params

    def shapes(self) -> dict[str, Shape]:
        """None stands for the rank, which may differ between clients."""
        want: dict[str, Shape] = {}
        for name, slot in self.places.items():
            want[f"{name}.A"] = (None, slot.d_in)
            want[f"{name}.B"] = (slot.d_out, None)
            want[f"{name}.echo"] = (1,)
        return want | triplet_shapes(self.places)

    def bind(self, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> None:
        """Add B A x to every projection whose factors are there, P diag(E) Q x where there are triplets."""
        for name, slot in self.places.items():
            if f"{name}.A" in layer:
                echo = layer.get(f"{name}.echo")
                change = apply(layer[f"{name}.A"], layer[f"{name}.B"], self.scale, slot, rows, echo)
                base.change_output(slot.path, change)
        bind_triplets(layer, self.places, self.scale, rows, base)

    def context(self, params: Params) -> tuple[float, float]:
        """No token and no key more."""
        return 0.0, 0.0


def triplet_shapes(places: Mapping[str, Slot]) -> dict[str, Shape]:
    """None stands for the rank, which may differ between clients."""
    want: dict[str, Shape] = {}
    for name, slot in places.items():
        want |= {f"{name}.P": (slot.d_out, None), f"{name}.E": (None,), f"{name}.Q": (None, slot.d_in)}
    return want


def bind_triplets(layer: Layer, places: Mapping[str, Slot], scale: float, rows: Rows, base: Base) -> None:
    """Add P diag(E) Q x to every projection whose triplets are there."""
    for name, slot in places.items():
        if f"{name}.E" in layer:
            low = layer[f"{name}.E"].unsqueeze(2) * layer[f"{name}.Q"]
            base.change_output(slot.path, apply(low, layer[f"{name}.P"], scale, slot, rows))


def apply(a: Tensor, b: Tensor, scale: float, slot: Slot, rows: Rows, echo: Tensor | None = None) -> Applied:
    """What the adapter adds to its projection's output.

    Args:
        a: (clients, rank, d_in)
        b: (clients, d_out, rank)
        echo: (clients, 1) how many times more, without gradients of a and b; None: not at all.
    """
    own_a, own_b = rows.pick(a), rows.pick(b)
    own_echo = None if echo is None else rows.pick(echo)

    def times(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if rows.client is None:
            return F.linear(F.linear(x, low), high)
        return torch.bmm(torch.bmm(x, low.transpose(1, 2)), high.transpose(1, 2))

    def applied(x: Tensor, y: Tensor) -> Tensor:
        # x (rows, tokens, d_in), y (rows, tokens, width)
        if own_echo is not None:
            fixed = times(x, own_a.detach().to(x.dtype), own_b.detach().to(x.dtype))
            y = _add(y, fixed * own_echo.to(x.dtype).view(-1, 1, 1), scale, slot)
        if rows.keys is not None and rows.drop is not None:
            x = (x * keep(rows.keys, slot.name, (x.shape[1], x.shape[2]), rows.drop)).to(x.dtype)
        return _add(y, times(x, own_a.to(x.dtype), own_b.to(x.dtype)), scale, slot)

    return applied


def _add(y: Tensor, change: Tensor, scale: float, slot: Slot) -> Tensor:
    if slot.d_out != slot.width:
        change = F.pad(change, (slot.offset, slot.width - slot.offset - slot.d_out))
    return torch.add(y, change, alpha=scale)
