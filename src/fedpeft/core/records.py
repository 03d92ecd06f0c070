"""Records as bytes: what travels and what is stored. No code is ever in them.

One record is one safetensors file. Its tensors are named by their path (`params/block.0.query.A`); everything else is
JSON in the file's metadata: `{"fedpeft": "1", "type": "Update", "value": "{...}"}`. See `kinds.py` for the types that
a record may hold and `layout.py` for the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor

from fedpeft.core import layout, tree
from fedpeft.core.errors import RecordError
from fedpeft.core.exchange import Record
from fedpeft.core.kinds import Json, Shelf, record_kind

R = TypeVar("R")

FORMAT = "1"


def encode(record: Record) -> bytes:
    """The record as bytes; equal records give equal bytes.

    Raises:
        RecordError: a value is not of its field's type, or its type cannot travel.
    """
    tensors, value = flatten(record)
    return layout.dump(tensors, {"fedpeft": FORMAT, "type": type(record).__name__, "value": dump_json(value)})


def decode(data: bytes, cls: type[R], *, max_bytes: int | None = None) -> R:
    """The record of class `cls` from its bytes, in memory of its own.

    Args:
        data: what `encode` gave, or what somebody claims to be that: nothing in it is trusted.
        max_bytes: upper limit of the length; None: no limit.

    Raises:
        RecordError: the bytes are anything else than a record of that class.
    """
    tensors, metadata = layout.parse(data, max_bytes=max_bytes)
    if metadata.get("fedpeft") != FORMAT or metadata.keys() != {"fedpeft", "type", "value"}:
        raise RecordError(f"not a record of format {FORMAT}: its metadata is {str(metadata)[:200]}")
    if metadata["type"] != cls.__name__:
        raise RecordError(f"a {metadata['type'][:80]!r} came where a {cls.__name__!r} was expected")
    return unflatten(tensors, layout.parse_json(metadata["value"]), cls)


def flatten(record: Record) -> tuple[dict[str, Tensor], Json]:
    """The record as (tensors by path, JSON value); the tensors are the record's own, not copies."""
    tensors: dict[str, Tensor] = {}
    try:
        return tensors, record_kind(type(record)).split(record, "", tensors)
    except RecursionError as error:
        raise RecordError(f"a {type(record).__name__} is nested too deeply to be written") from error


def unflatten(tensors: Mapping[str, Tensor], value: Json, cls: type[R]) -> R:
    """The record of which `flatten` gave the tensors and the JSON value; it holds these tensors, not copies."""
    shelf = Shelf(tensors)
    try:
        record = record_kind(cls).join(value, "", shelf)
    except RecursionError as error:
        raise RecordError(f"a {cls.__name__} is nested too deeply to be read") from error
    shelf.check_empty()
    return cast(R, record)


def dump_json(value: Json) -> str:
    """Compact JSON; floats come back with the same bits."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError) as error:  # ValueError: an int with thousands of digits
        raise RecordError(f"a value cannot be written as JSON: {error}") from error


def check_finite(record: Record) -> None:
    """Raise RecordError, naming the field or tensor, if a number is NaN, infinite, or an int of more than 64 bits."""
    tensors, value = flatten(record)
    for path, number in _numbers(value, ""):
        if isinstance(number, int) and abs(number) >= 1 << 63:
            raise RecordError(f"{path} of {type(record).__name__} is a whole number of {number.bit_length()} bits")
        if not math.isfinite(number):
            raise RecordError(f"{path} of {type(record).__name__} is {number}, which is not finite")
    if _whole_block_finite(tensors):
        return
    for path, t in tensors.items():
        if not finite(t):
            bad = int((~torch.isfinite(t)).sum())
            raise RecordError(
                f"{path} of {type(record).__name__} holds {bad} numbers that are not finite, of {t.numel()}"
            )


def _whole_block_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether one sum over the memory that `decode` gave all of the tensors together shows that they are finite."""
    found = tree.vector_of(tensors)
    return found is not None and math.isfinite(float(found[0].sum()))


def finite(t: Tensor) -> bool:
    """Whether no number of the tensor is NaN or infinite."""
    if not t.is_floating_point():
        return True
    # One NaN or infinity makes the sum so, and a sum is 20 times as fast; large finite numbers can do it too.
    return math.isfinite(float(t.sum())) or bool(torch.isfinite(t).all())


def _numbers(value: Json, path: str) -> Iterator[tuple[str, float | int]]:
    if isinstance(value, float | int):
        yield path, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, f"{path}/{key}" if path else str(key))
