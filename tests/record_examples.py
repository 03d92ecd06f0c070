"""Records to try the codec on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedpeft.core import layout
from fedpeft.core.adapter import AdapterSpec, Lora
from fedpeft.core.fit import Moments
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class Inner:
    name: str
    weight: float


@dataclass(frozen=True)
class Everything:
    """One field of each type that may travel."""

    flag: bool
    whole: int
    real: float
    text: str
    nothing: None
    maybe: int | None
    either: int | str | float
    tensor: Tensor
    params: Params
    maybe_params: Params | None
    moments: Moments
    spec: AdapterSpec
    by_name: Mapping[str, float]
    inner_by_name: Mapping[str, Inner]
    moments_by_name: Mapping[str, Moments]
    numbers: tuple[int, ...]
    layers: tuple[Params, ...]
    pair: tuple[str, Tensor]
    names: frozenset[str]
    inner: Inner


@dataclass(frozen=True)
class Chain:
    """A record that holds records of its own class."""

    link: int
    rest: Chain | None = None


def example(**changes: Any) -> Everything:
    given = Everything(
        flag=True, whole=-3, real=0.1, text="naïve ☕", nothing=None, maybe=None, either="three",
        tensor=torch.tensor(2.5), params={"b/c": torch.arange(6.0).view(2, 3), "a%2F": torch.ones(0, 4)},
        maybe_params={}, moments=Moments(2, {"x": torch.ones(2)}, {"x": torch.zeros(2)}), spec=Lora(4, blocks=(0, 2)),
        by_name={"ü": 1.5, "a": -0.0}, inner_by_name={"k/l": Inner("n", 1.0)},
        moments_by_name={"m%/": Moments(1, {"t": torch.ones(1)})},
        numbers=(3, 1, 2), layers=({"x": torch.ones(1)}, {}), pair=("p", torch.tensor([True, False])),
        names=frozenset({"q", "a"}), inner=Inner("", 1e-300),
    )  # fmt: skip
    return replace(given, **changes)


def same(a: Any, b: Any) -> bool:
    """Equal values of equal types, tensors to the bit."""
    if isinstance(a, Tensor):
        bits = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return bits and layout.dump({"t": a}, {}) == layout.dump({"t": b}, {})
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(v, getattr(b, k)) for k, v in vars(a).items())
    if isinstance(a, float):
        return isinstance(b, float) and repr(a) == repr(b)  # tells -0.0 from 0.0, and not nan from nan
    return type(a) is type(b) and a == b


def minilm_lora() -> dict[str, Tensor]:
    """Rank 8 on query and value of six blocks of width 384, and a head of six classes."""
    params = {}
    for block in range(6):
        for name in ("query", "value"):
            params[f"block.{block}.{name}.A"] = torch.randn(8, 384)
            params[f"block.{block}.{name}.B"] = torch.randn(384, 8)
    return params | {"head.weight": torch.randn(6, 384), "head.bias": torch.randn(6)}
