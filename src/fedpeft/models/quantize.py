"""Weights in the number formats of `core/packing.py`, and the linear layer that computes with them, in plain torch.

`:bitsandbytes` behind nf4 and nf4dq lets bitsandbytes turn codes into weights where rows are whole blocks; codes and
scales are laid out as there.

References: NormalFloat and double quantisation Dettmers et al. 2023, arXiv 2305.14314; the 8-bit dynamic code of the
scales Dettmers 2016, arXiv 1511.04561, as bitsandbytes has it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpeft.core.errors import ModelError
from fedpeft.core.packing import BLOCK, KERNEL, OUTER, Format

Packed = Mapping[str, Tensor]


# --- codes --------------------------------------------------------------------------------------------------------


@cache
def normal_float(bits: int) -> Tensor:
    """(2^bits,) float32, ascending: quantiles of the normal distribution, scaled to [-1, 1], with an exact 0.

    With n levels and off = 1 - (1 / (2 (n - 1)) + 1 / (2 n)) / 2, n / 2 positive ones are ppf of equal steps from off
    to .5, and n / 2 - 1 negative ones likewise. For 4 bits this is bitsandbytes' table.
    """
    n = 2**bits
    off = 1 - (1 / (2 * (n - 1)) + 1 / (2 * n)) / 2

    def half(count: int) -> Tensor:
        quantiles: Tensor = torch.special.ndtri(torch.linspace(off, 0.5, count + 1, dtype=torch.float64)[:-1])
        return quantiles

    levels = torch.cat([half(n // 2), torch.zeros(1, dtype=torch.float64), -half(n // 2 - 1)]).sort().values
    scaled: Tensor = levels / levels.abs().max()
    return scaled.float()


@cache
def dynamic_code() -> Tensor:
    """(256,) float32, ascending: seven decades, each with twice as many equal steps as the one below, 0 and 1."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (decade - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """uint8 index of the nearest of the ascending levels."""
    return torch.bucketize(values, ((levels[:-1] + levels[1:]) / 2).to(values.device)).to(torch.uint8)


def _blocks(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(blocks, size) with zeros behind the last number, and (blocks,) the absmax of each."""
    cut = F.pad(flat, (0, -len(flat) % size)).view(-1, size)
    return cut, cut.abs().amax(dim=1)


def _scaled(cut: Tensor, absmax: Tensor) -> Tensor:
    """Within [-1, 1]; a block of zeros stays one."""
    return (cut * (1 / torch.where(absmax > 0, absmax, 1.0))[:, None]).clamp(-1, 1)


def _bits_together(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, a multiple of 8 of them, as bytes; the first code has the highest bits (bitsandbytes too)."""
    if bits == 8:
        return codes
    if bits == 4:
        return codes[::2] << 4 | codes[1::2]
    places = torch.arange(bits - 1, -1, -1, dtype=torch.uint8, device=codes.device)
    single = ((codes[:, None] >> places) & 1).view(-1, 8)
    weights = 2 ** torch.arange(7, -1, -1, device=codes.device)
    return (single * weights).sum(dim=1).to(torch.uint8)


def _bits_apart(packed: Tensor, bits: int) -> Tensor:
    """The codes of `_bits_together`, int32."""
    if bits == 8:
        return packed.int()
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    single = ((packed[:, None] >> places) & 1).view(-1, bits)
    weights = 2 ** torch.arange(bits - 1, -1, -1, dtype=torch.int32, device=packed.device)
    return (single * weights).sum(dim=1, dtype=torch.int32)


@cache
def _pairs(device: torch.device) -> Tensor:
    """(256, 2) the two NF4 levels of every byte."""
    levels, byte = normal_float(4), torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1).to(device)


# --- weights ------------------------------------------------------------------------------------------------------


def pack(weight: Tensor, form: Format) -> dict[str, Tensor]:
    """Codes and scales of a weight.

    Args:
        weight: (d_out, d_in), finite.

    Returns:
        int8: `codes` int8 (d_out, d_in), `scale` (d_out, 1). NormalFloat: `codes` uint8, and `scale` (blocks,), or
        where they are quantised `scale_codes` uint8 (blocks,), `scale_step` (blocks of blocks,), `scale_mean` (1,).
    """
    wide = weight.detach().float()
    if not form.normal:
        absmax = wide.abs().amax(dim=1, keepdim=True)
        steps = wide * (127 / torch.where(absmax > 0, absmax, 1.0))
        return {"codes": steps.round().to(torch.int8), "scale": absmax / 127}
    cut, absmax = _blocks(wide.flatten(), BLOCK)
    codes = _nearest(_scaled(cut, absmax), normal_float(form.bits)).flatten()
    codes = codes[: weight.numel() + -weight.numel() % 8]  # whole bytes, not whole blocks
    parts = {"codes": _bits_together(codes, form.bits)}
    if not form.double:
        return parts | {"scale": absmax}
    mean = absmax.mean()
    outer, step = _blocks(absmax - mean, OUTER)
    scale_codes = _nearest(_scaled(outer, step), dynamic_code()).flatten()[: len(absmax)]
    return parts | {"scale_codes": scale_codes, "scale_step": step, "scale_mean": mean[None]}


def unpack(parts: Packed, shape: tuple[int, int], form: Format) -> Tensor:
    """(d_out, d_in) float32, the rounded weight."""
    codes = parts["codes"]
    if not form.normal:
        return codes * parts["scale"]
    scale = _scales(parts)
    n = shape[0] * shape[1]
    if form.kernel == KERNEL and shape[1] % BLOCK == 0:  # its kernels count rows in whole blocks
        theirs = _bitsandbytes()
        size = torch.Size(shape)
        state = theirs.QuantState(scale, size, dtype=torch.float32, blocksize=BLOCK, quant_type="nf4")
        return cast(Tensor, theirs.dequantize_4bit(codes[: n // 2, None], state))
    if form.bits == 4:
        values = F.embedding(codes.int(), _pairs(codes.device)).flatten()
    else:
        values = normal_float(form.bits).to(codes.device)[_bits_apart(codes, form.bits)]
    if n % BLOCK:
        values = F.pad(values[:n], (0, -n % BLOCK))
    return values.view(-1, BLOCK).mul_(scale[:, None]).view(-1)[:n].view(shape)


def _scales(parts: Packed) -> Tensor:
    """(blocks,) float32."""
    if "scale" in parts:
        return parts["scale"]
    codes, step = parts["scale_codes"], parts["scale_step"]
    values = dynamic_code().to(codes.device)[codes.int()]
    return values * step.repeat_interleave(OUTER)[: len(codes)] + parts["scale_mean"]


def rounded(weight: Tensor, form: Format) -> Tensor:
    """The weight as the format keeps it, in its own dtype."""
    shape = (weight.shape[0], weight.shape[1])
    return unpack(pack(weight, form), shape, form).to(weight.dtype)


def _bitsandbytes() -> Any:
    """Its functions.

    Raises:
        ModelError: it is not installed, or does not load here.
    """
    try:
        return importlib.import_module("bitsandbytes.functional")
    except Exception as error:  # a wrong build fails in many ways
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"bitsandbytes cannot be used here ({reason}); install fedpeft[quant], or leave ':{KERNEL}' out: plain "
            "torch gives the same weights"
        ) from None


# --- layers -------------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """y = x W^T + b, or x W where `turned`; the graph keeps the packed layer and neither x nor W.

    The derivative is the same function turned round, so it can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear, turned: bool, bias: Tensor | None) -> Tensor:
        ctx.layer, ctx.turned = layer, turned
        weight = layer.dequantised(x.dtype)
        return x @ weight if turned else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _product(gradients[0], ctx.layer, not ctx.turned, None), None, None, None


def _product(x: Tensor, layer: QuantisedLinear, turned: bool, bias: Tensor | None) -> Tensor:
    return cast(Tensor, _Product.apply(x, layer, turned, bias))  # type: ignore[no-untyped-call]


class QuantisedLinear(nn.Module):
    """A frozen linear layer whose weight is packed; it is dequantised for each product, forward and backward.

    Args:
        weight: (d_out, d_in).
        bias: (d_out,), kept as it is.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, form: Format) -> None:
        super().__init__()
        self.form = form
        self.out_features, self.in_features = (int(n) for n in weight.shape)
        self.bias = bias
        for name, part in pack(weight, form).items():
            self.register_buffer(name, part)

    @property
    def packed(self) -> dict[str, Tensor]:
        """Codes and scales."""
        return {name: part for name, part in self._buffers.items() if part is not None}

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(d_out, d_in), made anew."""
        return unpack(self.packed, (self.out_features, self.in_features), self.form).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return _product(x, self, False, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """Scales stay float32 where the rest of a model takes another dtype."""
        before = self.packed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != part.dtype:
                self._buffers[name] = part.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.in_features}, {self.out_features}, {self.form.name}"


def quantise(module: nn.Module, paths: Sequence[str], form: Format) -> None:
    """Put packed layers in the places of these linear ones (GPT-2's transposed ones too), or round their weights.

    Weights are replaced, never changed in place: another model may have the same.

    Raises:
        ModelError: there are no linear layers, a weight is not finite, or bitsandbytes is asked for and cannot be used.
    """
    if not paths:
        raise ModelError("the model has no linear layers in blocks that could be quantised; use model.quantize none")
    if form.kernel == KERNEL:
        _bitsandbytes()
    for path in paths:
        linear = module.get_submodule(path)
        own = linear.get_parameter("weight").detach()
        straight = isinstance(linear, nn.Linear)
        weight = own if straight else own.T  # Conv1D keeps (d_in, d_out)
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"the weight of {path} is not finite, so it cannot be quantised; use model.quantize none")
        if form.simulated:
            new = rounded(weight, form)
            linear.weight = nn.Parameter(new if straight else new.T.contiguous(), requires_grad=False)
            continue
        stem, _, name = path.rpartition(".")
        bias = getattr(linear, "bias", None)
        setattr(module.get_submodule(stem), name, QuantisedLinear(weight.contiguous(), bias, form))
