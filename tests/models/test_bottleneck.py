"""Bottlenecks against plain modules put into a copy of the base, for every family, and as a cohort."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from cohorts import OPTIMIZERS, alone, assert_close, cohort, together
from fedpeft.core.adapter import Bottleneck, HeadOnly
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.fit import SGD, Fit
from fedpeft.core.rng import Rng
from fedpeft.models.families import block_paths, norm_paths, slots
from fedpeft.models.hf import HFModel
from fedpeft.models.load import freeze

SPEC = Bottleneck(size=5)


def params_of(model: HFModel, rng: Rng, **_: Any) -> dict[str, Tensor]:
    """Every number matters; norms near the base's own."""
    fresh = model.init(rng)
    noise = {name: torch.from_numpy(rng.normal(0, 0.2, size=t.shape)) for name, t in fresh.items()}
    return {name: (t + noise[name]).to(model.base.dtype) for name, t in fresh.items()}


class Behind(nn.Module):
    """A projection with a bottleneck behind it."""

    def __init__(self, inner: nn.Module, params: dict[str, Tensor], stem: str, relu: bool) -> None:
        super().__init__()
        self.inner, self.params, self.stem, self.relu = inner, params, stem, relu

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        down, down_bias, up, up_bias = (
            self.params[f"{self.stem}.{name}"] for name in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        low = h @ down.T + down_bias
        return h + (low.clamp_min(0) if self.relu else F.gelu(low)) @ up.T + up_bias


def changed(model: HFModel, params: dict[str, Tensor], relu: bool = False) -> Any:
    """A copy of the base with the bottlenecks and the norms as modules of its own."""
    family, body = model.base.family, model.base.copy_module(model.base.dtype)
    known = slots(body, family)
    for block in range(len(block_paths(body, family))):
        for half, kind, path in zip(
            ("attention", "ffn"), ("output", "down"), norm_paths(body, family, block), strict=True
        ):
            stem, slot = f"block.{block}.{half}", known[f"block.{block}.{kind}"].path
            if f"{stem}.up.weight" in params:
                parent, _, last = slot.rpartition(".")
                setattr(body.get_submodule(parent), last, Behind(body.get_submodule(slot), params, stem, relu))
            if f"{stem}.norm.gain" in params:
                norm = body.get_submodule(path)
                norm.weight.data = params[f"{stem}.norm.gain"].clone()
                if f"{stem}.norm.shift" in params:
                    norm.bias.data = params[f"{stem}.norm.shift"].clone()
    return freeze(body, None, "changed", tiny.CPU)


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
@pytest.mark.parametrize("norms", [True, False])
def test_logits_are_those_of_plain_modules(family: str, norms: bool) -> None:
    model = tiny.model(family, replace(SPEC, norms=norms))
    params, data = params_of(model, tiny.place()), tiny.examples(tiny.place(1), 9)
    assert any("norm" in name for name in params) is norms
    head = {name: t for name, t in params.items() if "head" in name}
    plain = HFModel(changed(model, params), HeadOnly(), 3)
    got = model.logits(params, data)
    assert torch.allclose(got, plain.logits(head, data), atol=1e-5)
    assert (got - model.logits(head, data)).abs().max() > 0.05, "it must matter, or this test shows nothing"


def test_the_activation_is_the_one_asked_for() -> None:
    model = tiny.model("bert", replace(SPEC, activation="relu"))
    params, data = params_of(model, tiny.place()), tiny.examples(tiny.place(1), 5)
    head = {name: t for name, t in params.items() if "head" in name}
    plain = HFModel(changed(model, params, relu=True), HeadOnly(), 3)
    assert torch.allclose(model.logits(params, data), plain.logits(head, data), atol=1e-6)


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
def test_a_fresh_adapter_leaves_the_base_alone(family: str) -> None:
    model = tiny.model(family, SPEC, dtype="float32")
    params, data = model.init(tiny.place()), tiny.examples(tiny.place(1), 5)
    head = {name: t for name, t in params.items() if "head" in name}
    assert torch.allclose(model.logits(params, data), model.logits(head, data), atol=1e-5)
    assert params["block.0.ffn.down.weight"].std() == pytest.approx(0.01, rel=0.2)
    assert not params["block.0.ffn.up.weight"].any()


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_cohort_trains_as_its_clients_alone(family: str, optimizer: str) -> None:
    """Unequal sizes, one client without norms, one without the upper block's bottlenecks."""
    model = tiny.model(family, SPEC)
    rng = tiny.place()
    fits = cohort(model, OPTIMIZERS[optimizer], rng)
    own = [
        params_of(tiny.model(family, spec), rng)
        for spec in (SPEC, replace(SPEC, size=2), replace(SPEC, norms=False), replace(SPEC, blocks=(0, 1)))
    ]
    fits = [replace(fit, params=params) for fit, params in zip(fits, own, strict=True)]
    assert_close(together(model, fits), alone(model, fits), 1e-9)


def test_gradients_reach_every_parameter_and_end_at_the_lowest_block() -> None:
    model = tiny.model("bert", replace(SPEC, blocks=(1, 2)))
    params, data = params_of(model, tiny.place()), tiny.examples(tiny.place(1), 6)
    fitted = model.fit(Fit(params, data, [[0, 1, 2], [3, 4, 5]], SGD(0.1)))
    assert all(not torch.equal(t, params[name]) for name, t in fitted.params.items())
    assert model.lowest_block(params) == 1


def test_what_does_not_fit_is_refused() -> None:
    model = tiny.model("bert", SPEC)
    params, data = params_of(model, tiny.place()), tiny.examples(tiny.place(1), 3)
    lacking = {name: t for name, t in params.items() if name != "block.0.ffn.up.bias"}
    with pytest.raises(FitError, match=r"'block.0.ffn.up.weight' came without its partner block.0.ffn.up.bias"):
        model.check(Fit(lacking, data, [[0]], SGD(0.1)))
    odd = copy.copy(params) | {"block.0.ffn.up.weight": torch.zeros(tiny.WIDTH, 4, dtype=torch.float64)}
    with pytest.raises(FitError, match="do not fit together"):
        model.fit(Fit(odd, data, [[0]], SGD(0.1)))
    for spec, words in (
        (Bottleneck(size=0), "adapter.size is 0"),
        (Bottleneck(activation="tanh"), "adapter.activation 'tanh'"),  # type: ignore[arg-type]
        (Bottleneck(blocks=(7,)), "adapter.blocks names block 7"),
    ):
        with pytest.raises(ModelError, match=words):
            tiny.model("bert", spec)
    with pytest.raises(ModelError, match="not 'distilbert'"):
        HFModel(freeze(tiny.module("distilbert"), None, "own", tiny.CPU), SPEC, 3)


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
def test_a_change_of_the_base_comes_before_the_bottleneck(family: str) -> None:
    """A base delta is a change of the frozen weight, whose output the bottleneck then takes."""
    model = tiny.model(family, SPEC)
    params, data = params_of(model, tiny.place()), tiny.examples(tiny.place(1), 9)
    slot = model.places["block.1.output"]
    dense = torch.from_numpy(tiny.place(2).normal(0, 0.3, size=(slot.d_out, slot.d_in)))
    body = model.base.copy_module(model.base.dtype)
    with torch.no_grad():
        weight = body.get_submodule(slot.path).weight
        weight += dense if isinstance(body.get_submodule(slot.path), nn.Linear) else dense.T
    merged = HFModel(freeze(body, None, "merged", tiny.CPU), SPEC, 3)
    got = model.logits(params | {"delta.block.1.output.dense": dense}, data)
    assert torch.allclose(got, merged.logits(params, data), atol=1e-5)
    assert (got - model.logits(params, data)).abs().max() > 0.05
