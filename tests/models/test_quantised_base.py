"""Quantised bases: what is packed and shared, and adapters that act and train on them as on rounded weights."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fedpeft.core.adapter import Bottleneck, Lora, Prefix
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.fit import SGD, Fit
from fedpeft.core.train import stack_params
from fedpeft.models import load
from fedpeft.models.families import block_linears, linear_size, slots
from fedpeft.models.hf import HFModel
from fedpeft.models.merge import merge
from fedpeft.models.quantize import QuantisedLinear


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_the_blocks_linear_weights_are_packed_and_the_rest_is_shared(family):
    base = tiny.base(family)
    packed = base.at("nf4")
    assert packed is base.at("nf4") and packed.precision == "nf4" and base.precision == "float64"
    paths = block_linears(base.module, family)
    assert {slot.path for slot in slots(base.module, family).values()} == set(paths)
    for path in paths:
        assert isinstance(packed.module.get_submodule(path), QuantisedLinear)
        assert not isinstance(base.module.get_submodule(path), QuantisedLinear)
    own = dict(base.module.named_parameters())
    for name, weight in packed.module.named_parameters():
        assert weight is own[name], "embeddings, norms and biases are the base's own"
    assert own.keys() - dict(packed.module.named_parameters()).keys() == {f"{path}.weight" for path in paths}
    assert slots(packed.module, family) == slots(base.module, family)
    assert packed.weights == base.weights
    blocks = sum(math.prod(linear_size(base.module.get_submodule(path)) or ()) for path in paths)
    scales = sum(4 * math.ceil(math.prod(linear_size(m) or ()) / 64) for m in map(base.module.get_submodule, paths))
    assert packed.weight_bytes == base.weight_bytes - 8 * blocks + blocks // 2 + scales


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", ["int8", "nf4", "nf4dq"])
def test_a_packed_base_computes_what_rounded_weights_do(family, name):
    base, data = tiny.base(family), tiny.examples(tiny.place(), 6)
    packed, simulated = (HFModel(base.at(own), Lora(4), 3) for own in (name, f"{name}:simulated"))
    params = tiny.params(packed, tiny.place(1))
    torch.testing.assert_close(packed.logits(params, data), simulated.logits(params, data), atol=1e-6, rtol=1e-5)
    assert not torch.equal(packed.logits(params, data), HFModel(base, Lora(4), 3).logits(params, data))
    assert simulated.base.weight_bytes == base.weight_bytes > packed.base.weight_bytes


SPECS = {
    "lora": Lora(4, 6.0, targets=("query", "value", "down")),
    "prefix": Prefix(length=3),
    "bottleneck": Bottleneck(size=4),
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("kind", SPECS)
def test_adapters_train_on_a_packed_base_as_on_rounded_weights(family, kind):
    """By Fit.base, from one model on the full base; forward hooks, prefixes and the backward pass are the same."""
    model = HFModel(tiny.base(family), SPECS[kind], 3)
    data = tiny.examples(tiny.place(), 8)
    start = {name: t.double() + 0.01 for name, t in model.init(tiny.place(1)).items()}
    fits = [
        Fit(start, data, [[0, 1, 2], [3, 4], [5, 6, 7]], SGD(0.1), base=own) for own in ("nf4", "nf4:simulated", "")
    ]
    packed, simulated, full = (model.fit(fit) for fit in fits)
    for name in start:
        torch.testing.assert_close(packed.params[name], simulated.params[name], atol=1e-9, rtol=1e-9)
    assert packed.losses != full.losses and any(not torch.equal(packed.params[n], full.params[n]) for n in start)
    together = model.fit_many(fits)
    for alone, beside in zip((packed, simulated, full), together, strict=True):
        assert not isinstance(beside, Exception)
        assert all(torch.equal(alone.params[name], beside.params[name]) for name in start), "groups by precision"


def test_a_base_delta_acts_on_a_packed_base():
    model = HFModel(tiny.base("gpt2").at("nf4"), Lora(4), 3)
    data, params = tiny.examples(tiny.place(), 4), tiny.params(model, tiny.place(1))
    name = "block.1.value"
    dense = torch.from_numpy(tiny.place(2).normal(0, 0.2, size=(tiny.WIDTH, tiny.WIDTH)))
    changed = model.logits({**params, f"delta.{name}.dense": dense}, data)
    plain = tiny.base("gpt2").at("nf4:simulated")
    weight = plain.module.get_submodule(model.places[name].path).weight
    kept = weight.detach().clone()
    try:
        weight[:, 2 * tiny.WIDTH :] += dense.T  # Conv1D, the third of query, key and value
        torch.testing.assert_close(changed, HFModel(plain, Lora(4), 3).logits(params, data), atol=1e-5, rtol=1e-4)
    finally:
        weight.copy_(kept)


def test_autograd_keeps_no_weight_of_a_packed_base():
    """A whole training pass: nothing that is kept has the size of a block's weight and none of its own."""
    model = HFModel(tiny.base("bert", "float32"), Lora(4), 3)
    params = {name: t.float() for name, t in tiny.params(model, tiny.place()).items()}
    data = tiny.examples(tiny.place(), 4, longest=5)
    stack = stack_params([params], model.device)
    leaves = {name: t.clone().requires_grad_() for name, t in stack.params.items()}
    items = [model.readout.training(0, data, row) for row in range(4)]

    def run(name: str) -> Any:
        def passed() -> None:
            with model.seen(model.base.at(name), replace(stack, params=leaves), items, 0) as seen:
                model.readout.losses(seen).sum().backward()

        return passed

    weights = {(tiny.WIDTH, tiny.WIDTH), (tiny.WIDTH, 48), (48, tiny.WIDTH)}
    assert weights & {tuple(shape) for shape in tiny.saved_shapes(run("nf4:simulated"))}, "plain layers keep theirs"
    assert not weights & {tuple(shape) for shape in tiny.saved_shapes(run("nf4"))}


def test_errors_name_the_remedy():
    model = tiny.model()
    data, params = tiny.examples(tiny.place(), 2), tiny.params(tiny.model(), tiny.place())
    with pytest.raises(FitError, match=r"Fit.base: precision 'nf9' is not known; use one of float32, .*int8, nf4"):
        model.check(Fit(params, data, [[0]], SGD(0.1), base="nf9"))
    with pytest.raises(ModelError, match=r"quantised as nf4 and cannot be had as int8; use model.quantize none"):
        tiny.base("bert").at("nf4").at("int8")
    with pytest.raises(ModelError, match=r"model.quantize 'nf9' is not known; use none, int8, nf4"):
        load.load_base("demo", quantize="nf9")
    broken = load.freeze(tiny.module("bert"), None, "broken", tiny.CPU)
    broken.module.encoder.layer[1].output.dense.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"encoder.layer.1.output.dense is not finite"):
        broken.at("nf4")


def test_a_family_that_is_not_known_is_packed_where_its_blocks_are():
    base = load.freeze(tiny.module("gpt_neox"), None, "tiny", tiny.CPU)
    packed = base.at("nf4")
    names = [path for path, module in packed.module.named_modules() if isinstance(module, QuantisedLinear)]
    assert len(names) == 4 * tiny.BLOCKS and all(name.startswith("layers.") for name in names)


def test_another_dtype_of_a_packed_base_has_the_same_codes():
    packed = tiny.base("llama", "float32").at("nf4")
    half = packed.at("bfloat16")
    assert half.precision == "nf4" and half.dtype is torch.bfloat16 and packed.at("float32") is packed
    path = block_linears(packed.module, "llama")[0]
    ours, theirs = (b.module.get_submodule(path).packed for b in (packed, half))
    assert all(theirs[name] is part for name, part in ours.items()), "not copied either"
    hidden = half.module(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state
    assert hidden.dtype is torch.bfloat16 and bool(torch.isfinite(hidden).all())


def test_a_model_is_merged_into_the_full_base():
    """Trained on rounded weights, folded into those that they were rounded from."""
    full, packed = tiny.model("bert"), HFModel(tiny.base("bert").at("nf4"), Lora(4, 6.0), 3)
    params = tiny.params(full, tiny.place())
    for ours, theirs in zip(
        merge(packed, params).state_dict().values(), merge(full, params).state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    packed.base.unquantized, kept = None, packed.base.unquantized
    try:
        with pytest.raises(ModelError, match="quantised as nf4, and nothing is known of its full weights"):
            merge(packed, params)
    finally:
        packed.base.unquantized = kept


def test_a_base_that_is_loaded_quantised_keeps_no_full_weights(tmp_path: Path, monkeypatch):
    """The full ones are read again where they are needed, and given up again."""
    seen: list[Any] = []
    read = load._read

    def watched(*args: str) -> Any:
        base = read(*args)
        module = base.module.get_submodule("encoder.layer.0.output.dense")
        seen.append(weakref.ref(module.weight))
        return base

    monkeypatch.setattr(load, "_read", watched)
    load._load.cache_clear()
    try:
        base = load.load_base("demo", device="cpu", quantize="nf4dq")
        gc.collect()
        assert seen[0]() is None, "the full weight is still held"
        assert load.load_base("demo", device="cpu", quantize="nf4dq") is base
        full = load.load_base("demo", device="cpu")
        assert base.weights == full.weights and base.weight_bytes < full.weight_bytes
        assert base.sha256 != full.sha256
        assert base.unquantized is not None and base.unquantized().sha256 == full.sha256
    finally:
        load._load.cache_clear()
