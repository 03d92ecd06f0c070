"""AdaLoRA's factors with a client axis: y = W x + (alpha / rank) P diag(E) Q x.

Parameters of slot s: `s.P` (d_out, rank), `s.E` (rank,), `s.Q` (rank, d_in). Reference: Zhang et al. 2023,
arXiv 2303.10512. Clients of unequal rank are padded with zeros, which stay zero: every gradient has another as factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedpeft.core.adapter import AdaLora
from fedpeft.core.errors import ModelError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Layer, Network, Partner, Rows, Shape, Sizes, lora
from fedpeft.models.families import Slot, choose, slots
from fedpeft.models.load import Base

DEVIATION = 0.02  # of P and Q at the start


class TripletAdapter:
    """Triplets on the projections that a specification names; parameters on the family's other projections apply too.

    Raises:
        ModelError: a rank below 1, or targets that the base does not have.
    """

    partners: Mapping[str, Partner] = lora.TRIPLET_PARTNERS
    networks: Sequence[Network] = ()

    def __init__(self, spec: AdaLora, base: Base) -> None:
        if spec.rank < 1:
            raise ModelError(f"adapter.rank is {spec.rank}; it must be at least 1")
        self.spec = spec
        self.slots = choose(base.module, base.family, spec.targets, spec.blocks)
        self.places: Mapping[str, Slot] = slots(base.module, base.family) | self.slots
        self.scale = spec.alpha / spec.rank

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """P and Q from N(0, .02²), E = 0: the base's outputs are unchanged."""
        params: dict[str, Tensor] = {}
        for name, slot in self.slots.items():
            for side, shape in (("P", (slot.d_out, self.spec.rank)), ("Q", (self.spec.rank, slot.d_in))):
                drawn = rng.normal(0, DEVIATION, size=shape).astype(np.float32)
                params[f"{name}.{side}"] = torch.from_numpy(drawn)
            params[f"{name}.E"] = torch.zeros(self.spec.rank)
        return params

    def shapes(self) -> dict[str, Shape]:
        """See `lora.triplet_shapes`."""
        return lora.triplet_shapes(self.places)

    def bind(self, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> None:
        """See `lora.bind_triplets`."""
        lora.bind_triplets(layer, self.places, self.scale, rows, base)

    def context(self, params: Params) -> tuple[float, float]:
        """No token and no key more."""
        return 0.0, 0.0
