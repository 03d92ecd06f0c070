"""Base deltas: what they add is what changed weights would give."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from fedpeft.core.adapter import HeadOnly
from fedpeft.models.adapters import Rows, delta
from fedpeft.models.families import Slot
from fedpeft.models.hf import HFModel
from fedpeft.models.load import freeze


def draw(of: HFModel, form: str) -> dict[str, Tensor]:
    """A change of every projection of block 1: in factors, dense, or both."""
    rng = tiny.place(3)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, slot in of.places.items():
        if name.startswith("block.1.") and form != "dense":
            shapes |= {f"delta.{name}.left": (slot.d_out, 3), f"delta.{name}.right": (3, slot.d_in)}
        if name.startswith("block.1.") and form != "factors":
            shapes |= {f"delta.{name}.dense": (slot.d_out, slot.d_in)}
    return {name: torch.from_numpy(rng.normal(0, 0.1, size=shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("form", ["factors", "dense", "both"])
def test_a_delta_is_a_change_of_the_weights(family: str, form: str) -> None:
    model = tiny.model(family, HeadOnly())
    head = tiny.params(model, tiny.place())
    data = tiny.examples(tiny.place(1), 7)
    changes = draw(model, form)
    changed = copy.deepcopy(tiny.module(family))
    with torch.no_grad():
        for name, slot in model.places.items():
            weight = changed.get_submodule(slot.path).weight
            rows = weight if isinstance(changed.get_submodule(slot.path), nn.Linear) else weight.T
            own = rows[slot.offset : slot.offset + slot.d_out]
            if f"delta.{name}.left" in changes:
                own += changes[f"delta.{name}.left"] @ changes[f"delta.{name}.right"]
            if f"delta.{name}.dense" in changes:
                own += changes[f"delta.{name}.dense"]
    expected = HFModel(freeze(changed, None, "changed", tiny.CPU), HeadOnly(), 3).logits(head, data)
    got = model.logits(head | changes, data)
    assert (got - expected).abs().max() < 1e-6
    assert (got - model.logits(head, data)).abs().max() > 0.05


def test_every_row_gets_its_own_clients_delta_and_a_shared_one_has_no_client_axis() -> None:
    rng = np.random.default_rng(0)
    slot = Slot("s", "s", 5, 4, 2, 9)
    layer = {
        "delta.s.left": torch.from_numpy(rng.normal(size=(3, 4, 2))),
        "delta.s.right": torch.from_numpy(rng.normal(size=(2, 5))).expand(3, 2, 5),
        "delta.s.dense": torch.from_numpy(rng.normal(size=(3, 4, 5))),
    }
    x, y = torch.from_numpy(rng.normal(size=(3, 6, 5))), torch.from_numpy(rng.normal(size=(3, 6, 9)))
    whose = [2, 0, 2]
    got = delta.apply(layer, slot, Rows(torch.tensor(whose)))(x, y)
    for row, client in enumerate(whose):
        weight = layer["delta.s.left"][client] @ layer["delta.s.right"][client] + layer["delta.s.dense"][client]
        expected = y[row].clone()
        expected[:, 2:6] += x[row] @ weight.T
        assert torch.allclose(got[row], expected, atol=1e-12)


def test_shapes() -> None:
    assert delta.shapes({"s": Slot("s", "s", 5, 4)}) == {
        "delta.s.left": (4, None),
        "delta.s.right": (None, 5),
        "delta.s.dense": (4, 5),
    }
