"""What was trained in the base's projections as one LoRA of a chosen rank, which plain peft loads.

A LoRA, AdaLoRA's triplets and a base delta all add a matrix to a projection. Their sum M is a LoRA of its own rank; the
best one of a lower rank has M's largest singular values (Eckart & Young 1936). What it leaves out is told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.core.adapter import AdaLora, Lora
from fedpeft.core.errors import ModelError
from fedpeft.core.pairs import Pair
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params
from fedpeft.maths import lowrank
from fedpeft.models.adapters import delta
from fedpeft.models.hf import HFModel
from fedpeft.models.merge import dense, low_rank


@dataclass(frozen=True)
class Factored:
    """A LoRA in the place of what was trained.

    Attributes:
        model: on the same base, whose adapter it is.
        params: its factors, with the head as it was.
        rank: of every projection.
        left_out: the norm of what it leaves out over the norm of the whole change; 0: nothing but rounding.
    """

    model: HFModel
    params: Mapping[str, Tensor]
    rank: int
    left_out: float

    def facts(self) -> dict[str, float]:
        """What an export says of it."""
        return {"rank": self.rank, "left_out": self.left_out}


def factored(model: HFModel, params: Params, rank: int) -> Factored:
    """The nearest LoRA of a rank; the same scale alpha / rank as before.

    Both factors share the singular values. Where the change has a lower rank, the rest of B is zeros and of A a fresh
    draw, so that one can go on training it; so it is in a projection that has an adapter and was never trained.

    Raises:
        ModelError: a rank below 1 or above what a projection has, or parameters that are no change of projections.
    """
    spec = model.spec
    if not isinstance(spec, Lora | AdaLora):
        raise ModelError(
            f"an adapter of kind {spec.kind!r} is no change of projections, and has no LoRA that does the same; export "
            "it without --rank"
        )
    acting = {name: slot for name in params if (slot := _slot(name)) in model.places}
    names = sorted({*acting.values(), *model.slots})
    most = min(min(model.places[name].d_out, model.places[name].d_in) for name in names)
    if not 1 <= rank <= most:
        raise ModelError(f"--rank {rank}: give a rank from 1 to {most}, the smallest side of what was trained")
    lora = Lora(rank, model.scale * rank, spec.targets, spec.blocks, getattr(spec, "dropout", 0.0))
    twin = HFModel(model.base, lora, model.classes, model.token_budget, model.readout)
    fresh = twin.adapter.init(rng_for(0, "adapter"))
    kept = {n: t.detach() for n, t in params.items() if n not in acting}
    total = lost = 0.0
    for name in names:
        whole = _change(params, name, model)
        b, a = lowrank.halves(whole, rank)
        total += lowrank.norm(whole) ** 2
        lost += lowrank.norm(lowrank.difference(whole, (b, a))) ** 2
        if f"{name}.A" in fresh:
            b, a = lowrank.revived((b, a), fresh[f"{name}.A"])
        kept |= {f"{name}.A": a.float().contiguous(), f"{name}.B": (b / model.scale).float().contiguous()}
    return Factored(twin, kept, rank, math.sqrt(lost / total) if total else 0.0)


def _change(params: Params, name: str, model: HFModel) -> Pair:
    """One pair whose product is all that is added to a projection, on the CPU; of rank 0 where nothing is."""
    slot = model.places[name]
    parts = low_rank(params, name, model.scale)
    parts += [(t, torch.eye(t.shape[1], dtype=t.dtype, device=t.device)) for t in dense(params, name)]
    none = torch.zeros(slot.d_out, 0), torch.zeros(0, slot.d_in)
    b, a = lowrank.stack([(b.cpu(), a.cpu()) for b, a in parts] or [none], [1.0] * max(1, len(parts)))
    return b, a


def _slot(name: str) -> str:
    """The slot that a parameter would act in: `s` of s.A, s.E or delta.s.left."""
    return name.removeprefix(delta.PREFIX).rpartition(".")[0]
