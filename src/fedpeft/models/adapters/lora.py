"""LoRA with a client axis: y = W x + (alpha / rank) B A x, A and B of the row's own client.

Parameters of slot s: `s.A` (rank, d_in), `s.B` (d_out, rank). Reference: Hu et al. 2021, arXiv 2106.09685.
Clients of unequal rank are padded with zero rows of A and zero columns of B, which stay zero under any optimizer:
the gradient of each is a product with the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.core.adapter import Lora
from fedpeft.core.rng import Rng
from fedpeft.models.adapters import Applied, Rows
from fedpeft.models.families import Slot
from fedpeft.models.noise import keep


def init(spec: Lora, slots: Mapping[str, Slot], rng: Rng) -> dict[str, Tensor]:
    """A Kaiming-uniform with a = sqrt(5), that is U(-1, 1) / sqrt(d_in), as in PEFT; B = 0."""
    params: dict[str, Tensor] = {}
    for name, slot in slots.items():
        bound = 1 / math.sqrt(slot.d_in)
        a = rng.uniform(-bound, bound, size=(spec.rank, slot.d_in))
        params[f"{name}.A"] = torch.from_numpy(a.astype(np.float32))
        params[f"{name}.B"] = torch.zeros(slot.d_out, spec.rank)
    return params


def shapes(spec: Lora, slots: Mapping[str, Slot]) -> dict[str, tuple[int | None, ...]]:
    """What each parameter's shape must be; None stands for the rank, which may differ between clients."""
    want: dict[str, tuple[int | None, ...]] = {}
    for name, slot in slots.items():
        want[f"{name}.A"] = (None, slot.d_in)
        want[f"{name}.B"] = (slot.d_out, None)
    return want


def apply(a: Tensor, b: Tensor, scale: float, slot: Slot, rows: Rows) -> Applied:
    """What the adapter adds to its projection's output.

    Args:
        a: (clients, rank, d_in)
        b: (clients, d_out, rank)
    """
    own_a, own_b = rows.pick(a), rows.pick(b)

    def applied(x: Tensor, y: Tensor) -> Tensor:
        # x (rows, tokens, d_in), y (rows, tokens, width)
        if rows.keys is not None and rows.drop is not None:
            x = (x * keep(rows.keys, slot.name, (x.shape[1], x.shape[2]), rows.drop)).to(x.dtype)
        low, high = own_a.to(x.dtype), own_b.to(x.dtype)
        if rows.client is None:
            return _add(y, F.linear(F.linear(x, low), high), scale, slot)
        return _add(y, torch.bmm(torch.bmm(x, low.transpose(1, 2)), high.transpose(1, 2)), scale, slot)

    return applied


def _add(y: Tensor, change: Tensor, scale: float, slot: Slot) -> Tensor:
    if slot.d_out != slot.width:
        change = F.pad(change, (slot.offset, slot.width - slot.offset - slot.d_out))
    return torch.add(y, change, alpha=scale)
