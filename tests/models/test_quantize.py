"""Quantised bases: number formats by hand and by formula, packed layers, and adapters that act and train on them."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from fedpeft.core.adapter import Bottleneck, Lora, Prefix
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.fit import SGD, Fit
from fedpeft.core.train import stack_params
from fedpeft.models import load, quantize
from fedpeft.models.families import block_linears, linear_size, slots
from fedpeft.models.hf import HFModel
from fedpeft.models.merge import merge
from fedpeft.models.quantize import Format, QuantisedLinear, format_of, normal_float, pack, rounded, unpack

NF4 = (
    "-1 -.696193 -.525073 -.394917 -.284441 -.184773 -.091050 0 "
    ".079580 .160930 .246112 .337915 .440710 .562617 .722957 1"
)
NAMES = ["int8", "nf2", "nf3", "nf4", "nf4dq", "nf5", "nf8"]


def form(name: str) -> Format:
    found = format_of(name)
    assert found is not None
    return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """N(0, .02²), float32."""
    return torch.from_numpy(tiny.place(seed).normal(0, 0.02, size=shape)).float()


def error(weight: Tensor, name: str) -> float:
    """Relative error in the Frobenius norm."""
    return float((rounded(weight, form(name)) - weight).norm() / weight.norm())


# --- formats ------------------------------------------------------------------------------------------------------


def test_nf4_has_the_levels_of_bitsandbytes():
    """The specification's golden test 2, by hand: six digits of bitsandbytes' table."""
    expected = torch.tensor([float(x) for x in NF4.split()])
    torch.testing.assert_close(normal_float(4), expected, atol=5.1e-7, rtol=0)


def test_a_block_takes_the_nearest_level_times_its_largest_number():
    """.8 (1, -.525073, .160930, 0); the zeros of the rest stay zeros."""
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([0.8, -0.4, 0.1, 0.0])
    for name in ("nf4", "nf4:simulated"):
        found = rounded(weight, form(name))
        torch.testing.assert_close(found[0, :4], torch.tensor([0.8, -0.420058, 0.128744, 0.0]), atol=1e-6, rtol=0)
        assert not found[0, 4:].any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_of_any_width_ascend_from_minus_one_to_one_through_zero(bits):
    levels = normal_float(bits)
    assert len(levels) == 2**bits and levels[0] == -1 and levels[-1] == 1 and (levels == 0).sum() == 1
    assert bool((levels.diff() > 0).all()) and int((levels > 0).sum()) == 2 ** (bits - 1)


@pytest.mark.parametrize(
    ("name", "expected"), [("nf2", 0.564), ("nf3", 0.197), ("nf4", 0.0919), ("nf8", 0.0142), ("int8", 0.0059)]
)
def test_errors_on_normal_weights_are_those_of_the_specification(name, expected):
    """Section 4.5. The figure of int8 is that of 64 numbers to a scale; by rows it depends on their length."""
    assert error(drawn(2048, 64), name) == pytest.approx(expected, rel=0.01)


def test_double_quantisation_costs_less_than_one_percent_of_the_error():
    weight = drawn(512, 512)
    assert error(weight, "nf4dq") == pytest.approx(error(weight, "nf4"), rel=0.01)
    assert error(weight, "nf4dq") != error(weight, "nf4")


def test_the_code_of_the_scales_has_seven_decades():
    code = quantize.dynamic_code()
    assert len(code.unique()) == 256 and code[-1] == 1 and 0.98 < -float(code[0]) < 1
    assert [int(((code > 10.0**-d) & (code < 10.0 ** (1 - d))).sum()) for d in range(1, 8)] == [64, 32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize("name", NAMES)
def test_packing_keeps_the_bytes_that_the_format_says(name):
    """256 x 4096 weights are whole blocks of all kinds; beside them 4 bytes a row, or 4 a tensor for the mean."""
    weight, shape = drawn(256, 4096), (256, 4096)
    own = form(name)
    parts = pack(weight, own)
    held = sum(part.numel() * part.element_size() for part in parts.values())
    assert held - own.bytes_per_weight * weight.numel() == {"int8": 4 * 256, "nf4dq": 4}.get(name, 0)
    assert parts["codes"].dtype == (torch.int8 if name == "int8" else torch.uint8)
    torch.testing.assert_close(unpack(parts, shape, own), rounded(weight, own), atol=0, rtol=0)


def test_bytes_a_weight():
    assert [form(f"nf{k}").bytes_per_weight for k in (2, 4, 8)] == [2.5 / 8, 4.5 / 8, 8.5 / 8]
    assert form("nf4dq").bytes_per_weight == pytest.approx(0.515869, abs=5e-7) and form("int8").bytes_per_weight == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (5, 77), (33, 130)])
def test_sizes_that_are_no_whole_blocks(name, shape):
    """Equal to a plain table look-up, block by block."""
    weight, own = drawn(*shape), form(name)
    found = rounded(weight, own)
    assert found.shape == weight.shape and found.dtype == weight.dtype
    if own.double:
        return
    levels = torch.arange(-127, 128) / 127 if name == "int8" else normal_float(own.bits)
    groups = weight if name == "int8" else weight.flatten().split(64)
    plain = [levels[((g / g.abs().max())[:, None] - levels).abs().argmin(dim=1)] * g.abs().max() for g in groups]
    torch.testing.assert_close(found.flatten(), torch.cat(plain), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_rounding_twice_changes_nothing(name):
    weight = drawn(8, 64)
    weight[2:4] = 0
    once = rounded(weight, form(name))
    assert not once[2:4].any() and bool(torch.isfinite(once).all())
    if not form(name).double:  # quantised scales are other scales the second time
        torch.testing.assert_close(rounded(once, form(name)), once, atol=1e-9, rtol=1e-6)


def test_names_that_are_no_format():
    for name in (
        "",
        "none",
        "float32",
        "nf1",
        "nf9",
        "int4",
        "int8dq",
        "nf4:other",
        "nf3:bitsandbytes",
        "int8:bitsandbytes",
    ):
        assert format_of(name) is None, name


# --- bitsandbytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_gives_the_same_weights(double):
    theirs = pytest.importorskip("bitsandbytes.functional")
    weight = drawn(96, 128)
    packed, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    name = "nf4dq" if double else "nf4"
    torch.testing.assert_close(normal_float(4), state.code.cpu().float(), atol=1e-6, rtol=0)
    parts = pack(weight, form(name))
    assert torch.equal(parts["codes"], packed.flatten())
    expected = theirs.dequantize_4bit(packed, state)
    for own in (name, f"{name}:bitsandbytes"):
        torch.testing.assert_close(unpack(parts, (96, 128), form(own)), expected, atol=1e-7, rtol=1e-5)


def test_bitsandbytes_that_is_not_there_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ModelError, match=r"bitsandbytes cannot be used here .*fedpeft\[quant\]"):
        tiny.base("gpt2").at("nf4dq:bitsandbytes")


# --- layers -------------------------------------------------------------------------------------------------------


def layer(name: str = "nf4", bias: bool = True) -> tuple[QuantisedLinear, nn.Linear]:
    """A packed layer, float64 inputs, and the plain one with the same rounded weight."""
    plain = nn.Linear(24, 16, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(drawn(16, 24))
        packed = QuantisedLinear(plain.weight, plain.bias, form(name))
        plain.weight.copy_(rounded(plain.weight, form(name)))
    return packed.requires_grad_(False), plain.requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_layer_is_a_linear_layer_with_rounded_weights(name):
    packed, plain = layer(name)
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(packed(x), plain(x), atol=0, rtol=0)
    (ours,) = torch.autograd.grad(packed(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(plain(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-15, rtol=1e-12)
    assert linear_size(packed) == linear_size(plain) == (24, 16)
    assert torch.autograd.gradcheck(packed, x) and torch.autograd.gradgradcheck(lambda x: packed(x).square(), x)


def saved_numbers(run: Any) -> list[tuple[int, ...]]:
    """Shapes of the tensors that autograd keeps."""
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        run()
    return kept


@pytest.mark.parametrize("bias", [False, True])
def test_autograd_keeps_no_dequantised_weight(bias):
    """What `F.linear(x, dequantised)` would keep, and a packed layer does not."""
    packed, _ = layer(bias=bias)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert (24, 16) in saved_numbers(lambda: nn.functional.linear(x, packed.dequantised(x.dtype), packed.bias))
    assert saved_numbers(lambda: packed(x)) == []


def test_another_dtype_leaves_codes_and_scales_alone():
    packed, _ = layer("nf4dq")
    before = {name: part.clone() for name, part in packed.packed.items()}
    packed.to(torch.bfloat16)
    assert packed.bias is not None and packed.bias.dtype is torch.bfloat16
    for name, part in packed.packed.items():
        assert part.dtype is before[name].dtype and torch.equal(part, before[name])
    assert packed(torch.zeros(1, 24, dtype=torch.bfloat16)).dtype is torch.bfloat16


# --- bases --------------------------------------------------------------------------------------------------------


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
        from dataclasses import replace

        def passed() -> None:
            with model.seen(model.base.at(name), replace(stack, params=leaves), items, 0) as seen:
                model.readout.losses(seen).sum().backward()

        return passed

    weights = {(tiny.WIDTH, tiny.WIDTH), (tiny.WIDTH, 48), (48, tiny.WIDTH)}
    assert weights & {tuple(shape) for shape in saved_numbers(run("nf4:simulated"))}, "plain layers keep theirs"
    assert not weights & {tuple(shape) for shape in saved_numbers(run("nf4"))}


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
