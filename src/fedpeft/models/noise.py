"""Dropout noise by place: a hash of (seed, step, example, module, position), the same in any batch, part or order."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64 (Steele, Lea & Flood 2014), here over int64 with wrap-around
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(number: int) -> int:
    number &= _MASK64
    return number - (1 << 64) if number >> 63 else number


def row_keys(seeds: Sequence[int], step: int, rows: Sequence[int], device: torch.device) -> Tensor:
    """(rows,) int64: one key per example of a step, from its client's seed and its row in that client's data."""
    keys = [_mix_int(_mix_int(seed ^ (step * _GOLDEN)) ^ row) for seed, row in zip(seeds, rows, strict=True)]
    return torch.tensor([_signed(key) for key in keys], dtype=torch.int64, device=device)


def keep(keys: Tensor, module: str, shape: tuple[int, int], probability: Tensor) -> Tensor:
    """(rows, tokens, channels) float32: 1 / (1 - p) where a number is kept, 0 where it is dropped.

    Args:
        keys: (rows,) from `row_keys`.
        module: the name of the place in the model.
        shape: (tokens, channels); longer padding does not change the noise of the tokens before it.
        probability: (rows,) of dropping, in [0, 1).
    """
    tokens, channels = shape
    counter = torch.arange(tokens * channels, dtype=torch.int64, device=keys.device) * _signed(_GOLDEN)
    mixed = _mix((keys ^ _signed(_mix_int(zlib.crc32(module.encode()))))[:, None] + counter)
    uniform = _shift(mixed, 40).to(torch.float32) * 2.0**-24
    p = probability.to(torch.float32)[:, None]
    return ((uniform >= p) / (1 - p)).view(len(keys), tokens, channels)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    x &= _MASK64
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK64
    return x ^ (x >> 31)
