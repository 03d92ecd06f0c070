"""A base delta: a change of the frozen weights that travels as parameters and is applied in the forward pass.

Methods that fold something into the base carry it so: `delta.s.left` (d_out, k) and `delta.s.right` (k, d_in) while
that is smaller, `delta.s.dense` (d_out, d_in) afterwards. y = W x + left (right x) + dense x. The base itself is never
changed in place: adding and subtracting does not give the same bits back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.core.changes import PREFIX as PREFIX
from fedpeft.models.adapters import Applied, Layer, Partner, Rows, Shape
from fedpeft.models.families import Slot
from fedpeft.models.load import Base

PARTNERS: Mapping[str, Partner] = {"left": ("right", 1, 0), "right": ("left", 0, 1)}


def shapes(slots: Mapping[str, Slot]) -> dict[str, Shape]:
    """What each parameter's shape must be; None stands for the number of factors."""
    want: dict[str, Shape] = {}
    for name, slot in slots.items():
        want[f"{PREFIX}{name}.left"] = (slot.d_out, None)
        want[f"{PREFIX}{name}.right"] = (None, slot.d_in)
        want[f"{PREFIX}{name}.dense"] = (slot.d_out, slot.d_in)
    return want


def bind(layer: Layer, slots: Mapping[str, Slot], rows: Rows, base: Base) -> None:
    """Add every delta of the layer to its projection."""
    for name, slot in slots.items():
        if any(f"{PREFIX}{name}.{side}" in layer for side in ("left", "dense")):
            base.change_output(slot.path, apply(layer, slot, rows))


def apply(layer: Layer, slot: Slot, rows: Rows) -> Applied:
    """What the delta of one slot adds; a delta that all clients share is applied without a client axis."""
    name = f"{PREFIX}{slot.name}"
    factors = [_own(layer[f"{name}.{side}"], rows) for side in ("right", "left") if f"{name}.{side}" in layer]
    dense = _own(layer[f"{name}.dense"], rows) if f"{name}.dense" in layer else None

    def applied(x: Tensor, y: Tensor) -> Tensor:
        change = torch.zeros((), dtype=y.dtype, device=y.device)
        if len(factors) == 2:
            change = change + _times(_times(x, factors[0]), factors[1])
        if dense is not None:
            change = change + _times(x, dense)
        if slot.d_out != slot.width:
            change = F.pad(change, (slot.offset, slot.width - slot.offset - slot.d_out))
        return y + change

    return applied


def _own(stacked: Tensor, rows: Rows) -> Tensor:
    shared = stacked.shape[0] == 1 or stacked.stride(0) == 0
    return stacked[0] if shared else rows.pick(stacked)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(x.dtype)
    return F.linear(x, weight) if weight.dim() == 2 else torch.bmm(x, weight.transpose(1, 2))
