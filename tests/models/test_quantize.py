"""Number formats of quantised bases, by hand and by formula, and layers with packed weights."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import tiny
from fedpeft.core.errors import ModelError
from fedpeft.core.packing import Format, format_of
from fedpeft.models import quantize
from fedpeft.models.families import linear_size
from fedpeft.models.quantize import QuantisedLinear, normal_float, pack, rounded, unpack

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
        found = unpack(parts, (96, 128), form(own))
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-3 if double else 1e-5)
        blocks = (~torch.isclose(found, expected, atol=1e-7, rtol=1e-5)).view(-1, 64).any(dim=1)
        assert int(blocks.sum()) <= (2 if double else 0), "at the middle of two codes of a scale rounding decides"


def test_bitsandbytes_gives_the_same_int8_codes():
    theirs = pytest.importorskip("bitsandbytes.functional")
    weight = drawn(96, 128)
    codes, absmax, _ = theirs.int8_vectorwise_quant(weight.half())
    parts = pack(weight.half(), form("int8"))
    assert int((parts["codes"].int() - codes.int()).abs().max()) <= 1, "at the middle of two codes rounding decides"
    torch.testing.assert_close(parts["scale"].flatten() * 127, absmax.float(), atol=0, rtol=1e-6)


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


@pytest.mark.parametrize("bias", [False, True])
def test_autograd_keeps_no_dequantised_weight(bias):
    """What `F.linear(x, dequantised)` would keep, and a packed layer does not."""
    packed, _ = layer(bias=bias)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert (24, 16) in tiny.saved_shapes(lambda: nn.functional.linear(x, packed.dequantised(x.dtype), packed.bias))
    assert tiny.saved_shapes(lambda: packed(x)) == []


def test_another_dtype_leaves_codes_and_scales_alone():
    packed, _ = layer("nf4dq")
    before = {name: part.clone() for name, part in packed.packed.items()}
    packed.to(torch.bfloat16)
    assert packed.bias is not None and packed.bias.dtype is torch.bfloat16
    for name, part in packed.packed.items():
        assert part.dtype is before[name].dtype and torch.equal(part, before[name])
    assert packed(torch.zeros(1, 24, dtype=torch.bfloat16)).dtype is torch.bfloat16
