"""Arithmetic on named tensors (`Params`): pure functions, float64 inside where sums are long."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from fedpeft.core.errors import RecordError

Params: TypeAlias = Mapping[str, Tensor]

_BLOCK = re.compile(r"^(?:\w+\.)*?(?:(?:block|late)\.(\d+)\.|prefix\.(\d+)$)")


def block_of(name: str) -> int | None:
    """The transformer block that a parameter acts in (`block.3.query.A`, `prefix.3` → 3), or None (`head.weight`)."""
    found = _BLOCK.match(name)
    return int(found.group(1) or found.group(2)) if found else None


def blocks_of(params: Params) -> tuple[int, ...]:
    """The blocks that have parameters, ascending."""
    return tuple(sorted({block for name in params if (block := block_of(name)) is not None}))


def in_blocks(params: Params, blocks: Collection[int | None]) -> dict[str, Tensor]:
    """The parameters of these blocks; None stands for what belongs to no block, such as a head."""
    return select(params, lambda name: block_of(name) in blocks)


def mean(parts: Iterable[tuple[Params, float]]) -> dict[str, Tensor]:
    """The weighted mean of params, summed in float64 in the order given, returned in the first part's dtypes.

    Args:
        parts: pairs of params (equal names and shapes) and weight (not negative, not all zero).

    Raises:
        RecordError: no part at all, weights that sum to zero, or parts whose names or shapes differ.
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    sums = _Sums()
    weights = 0.0
    for params, weight in parts:
        if not total:
            dtypes = {name: t.dtype for name, t in params.items()}
            total = sums.start(params)
        same_layout(total, params)
        for name, t in params.items():
            if t.dtype != dtypes[name]:
                raise RecordError(f"{name!r} is {t.dtype} where the other parts of the mean have {dtypes[name]}")
        sums.add(params, weight)
        weights += weight
    if not weights > 0:
        raise RecordError(f"a mean needs at least one part with a positive weight; the weights sum to {weights}")
    return {name: t.div_(weights).to(dtypes[name]) for name, t in total.items()}


class _Sums:
    """Running sums by name in float64; params that lie alike in one block of memory are added as one vector.

    `records.decode` lays a record's tensors out so, and one addition of a megabyte takes half the time of many small
    ones. The numbers are added one by one either way: the same bits.
    """

    def start(self, like: Params) -> dict[str, Tensor]:
        """Zeros in the shapes of `like`, which the sums live in."""
        found = vector_of(like)
        if found is None:
            self._names = None
            self._total = {name: torch.zeros(t.shape, dtype=torch.float64, device=t.device) for name, t in like.items()}
            return self._total
        vector, self._spans = found
        self._names, self._length = list(like), len(vector)
        self._sum, self._wide = (torch.zeros(len(vector), dtype=torch.float64, device=vector.device) for _ in range(2))
        pairs = zip(like.items(), self._spans, strict=True)
        self._total = {name: self._sum.as_strided(t.shape, t.stride(), begin) for (name, t), (begin, _) in pairs}
        return self._total

    def add(self, params: Params, weight: float) -> None:
        """Add weight times the params."""
        found = vector_of(params) if self._names == list(params) else None
        if found is not None and found[1] == self._spans and len(found[0]) == self._length:
            self._sum.add_(self._wide.copy_(found[0]), alpha=weight)
            return
        for name, t in params.items():
            self._total[name].add_(t, alpha=weight)


def vector_of(params: Params) -> tuple[Tensor, list[tuple[int, int]]] | None:
    """The vector that all the params are separate pieces of (as in a decoded record); where each begins and ends in it.

    None where there is no such vector, where they fill less than half of it, or where it requires a gradient.
    """
    first = next(iter(params.values()), None)
    vector = None if first is None else first._base
    if vector is None or vector.dim() != 1 or not vector.is_floating_point() or not vector.is_contiguous():
        return None
    if vector.requires_grad:  # what is done to the vector must not become part of a graph that its pieces are not in
        return None
    start, dtype = int(vector.storage_offset()), vector.dtype
    spans: list[tuple[int, int]] = []
    for t in params.values():
        if t._base is not vector or t.dtype is not dtype or not t.is_contiguous():
            return None
        place = int(t.storage_offset()) - start
        spans.append((place, place + int(t.numel())))
    end = filled = 0
    for begin, after in sorted(spans):
        if begin < end:  # two names for the same numbers, or numbers before the vector
            return None
        end, filled = after, filled + after - begin
    return (vector, spans) if end <= len(vector) <= 2 * filled else None


def same_layout(a: Params, b: Params) -> None:
    """Raise RecordError, naming the first difference, unless both have equal names and shapes."""
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise RecordError(f"params differ in {len(odd)} names, first: {odd[0]!r}")
    for name, t in a.items():
        if t.shape != b[name].shape:
            raise RecordError(f"{name!r} has shape {tuple(b[name].shape)} where {tuple(t.shape)} was expected")


def same_dtypes(a: Params, b: Params) -> None:
    """Raise RecordError, naming the first difference, unless tensors of equal name have equal dtypes."""
    for name, t in a.items():
        if name in b and b[name].dtype != t.dtype:
            raise RecordError(f"{name!r} is {b[name].dtype} where {t.dtype} was expected")


def map2(f: Callable[[Tensor, Tensor], Tensor], a: Params, b: Params) -> dict[str, Tensor]:
    """f applied name by name to params of equal layout."""
    same_layout(a, b)
    return {name: f(t, b[name]) for name, t in a.items()}


def add(a: Params, b: Params) -> dict[str, Tensor]:
    """a + b."""
    return map2(torch.add, a, b)


def sub(a: Params, b: Params) -> dict[str, Tensor]:
    """a - b."""
    return map2(torch.sub, a, b)


def axpy(alpha: float, x: Params, y: Params) -> dict[str, Tensor]:
    """alpha * x + y."""
    return map2(lambda s, t: torch.add(t, s, alpha=alpha), x, y)


def scale(a: Params, factor: float) -> dict[str, Tensor]:
    """factor * a."""
    return {name: t * factor for name, t in a.items()}


def zeros_like(a: Params) -> dict[str, Tensor]:
    """Zeros in the shapes and dtypes of a."""
    return {name: torch.zeros_like(t) for name, t in a.items()}


def overlay(*layers: Params) -> dict[str, Tensor]:
    """All names of all layers; a later layer wins."""
    merged: dict[str, Tensor] = {}
    for layer in layers:
        merged.update(layer)
    return merged


def select(a: Params, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    """The params whose name passes."""
    return {name: t for name, t in a.items() if keep(name)}


def dot(a: Params, b: Params) -> float:
    """The inner product over all tensors, in float64."""
    same_layout(a, b)
    return math.fsum(float(torch.dot(t.double().flatten(), b[name].double().flatten())) for name, t in a.items())


def norm(a: Params) -> float:
    """The Euclidean norm over all tensors, in float64."""
    return math.sqrt(dot(a, a))


def flatten(a: Params) -> Tensor:
    """All numbers as one float64 vector, name after name in sorted order."""
    return torch.cat([a[name].detach().double().flatten() for name in sorted(a)]) if a else torch.zeros(0).double()


def unflatten(vector: Tensor, like: Params) -> dict[str, Tensor]:
    """The params, in the layout and dtypes of `like`, of which `flatten` gave the vector."""
    names = sorted(like)
    parts = torch.split(vector, [like[name].numel() for name in names])
    return {n: part.view(like[n].shape).to(like[n].dtype) for n, part in zip(names, parts, strict=True)}


def flat(f: Callable[[Params], Params], like: Params) -> Callable[[Tensor], Tensor]:
    """f as a function of the vectors that `flatten` gives, of params in the layout of `like`."""
    return lambda vector: flatten(f(unflatten(vector, like)))


def count(a: Params) -> int:
    """How many numbers the params hold."""
    return sum(t.numel() for t in a.values())


def raw_bytes(t: Tensor) -> bytes:
    """The tensor's numbers as little-endian bytes, bfloat16 included."""
    flat = t.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def sha256(a: Params) -> str:
    """SHA-256 over sorted names and raw little-endian bytes: equal hash, equal bits."""
    digest = hashlib.sha256()
    for name in sorted(a):
        digest.update(name.encode() + b"\0")
        digest.update(raw_bytes(a[name]))
    return digest.hexdigest()
