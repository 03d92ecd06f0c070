"""The safetensors layout, written and read directly: one copy in, one copy out.

    8 bytes      length n of the header, little-endian
    n bytes      JSON: {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    the rest     the numbers of all tensors, little-endian, without holes

Files are what the safetensors library writes and reads (tests compare both ways). The library itself copies more often:
1.0 ms against 0.03 ms for 1 MB, and its loader hands out memory at any alignment, on which a matrix product may round
differently. Tensors that are read here have memory of their own, aligned as torch aligns it.

Reference: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.core.errors import RecordError

HEADER_LIMIT = 1 << 24  # bytes; parsed JSON takes ten times as much memory
ALIGNMENT = 64  # bytes
MAX_DIMS = 32

# code in the header, numpy's dtype of the same numbers (bfloat16: its bit pattern)
DTYPES: dict[torch.dtype, tuple[str, np.dtype[Any]]] = {
    torch.float64: ("F64", np.dtype("<f8")),
    torch.float32: ("F32", np.dtype("<f4")),
    torch.float16: ("F16", np.dtype("<f2")),
    torch.bfloat16: ("BF16", np.dtype("<i2")),
    torch.int64: ("I64", np.dtype("<i8")),
    torch.int32: ("I32", np.dtype("<i4")),
    torch.int16: ("I16", np.dtype("<i2")),
    torch.int8: ("I8", np.dtype("|i1")),
    torch.uint8: ("U8", np.dtype("|u1")),
    torch.bool: ("BOOL", np.dtype("|u1")),
}
_CODES = {code: (dtype, kind) for dtype, (code, kind) in DTYPES.items()}
_PATTERN = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}  # numpy lacks the first; the second is checked


def dump(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """One safetensors file; equal content gives equal bytes, whatever the order of the mapping.

    Raises:
        RecordError: a tensor of another dtype or layout, a name that is not text, a header above HEADER_LIMIT.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[Any] = [b"", b""]
    begin = 0
    arrays = [(name, *_array(name, tensors[name])) for name in sorted(tensors)]
    # Wide dtypes first, as the library does: every tensor then starts at a multiple of its own width.
    for name, code, array in sorted(arrays, key=lambda item: -item[2].itemsize):
        end = begin + array.nbytes
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": (begin, end)}
        parts.append(array)
        begin = end
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"a name or text is not valid Unicode ({error.reason}): {error.object[:80]!r}") from error
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise RecordError(
            f"the record has {len(text)} bytes besides its tensors, above the limit of {HEADER_LIMIT}; "
            "keep long sequences of numbers in a tensor"
        )
    parts[:2] = len(text).to_bytes(8, "little"), text
    return b"".join(parts)


def _array(name: str, t: Tensor) -> tuple[str, np.ndarray[Any, Any]]:
    """The code of the tensor's dtype, and its numbers in C order: a view where they lie so already."""
    code, kind = DTYPES.get(t.dtype, ("", None))
    if kind is None or t.layout is not torch.strided or t.is_meta or t.dim() > MAX_DIMS:
        raise RecordError(
            f"tensor {name!r} ({t.dtype}, {t.layout}, {t.device.type}, {t.dim()} dimensions) cannot be written; "
            f"use a dense tensor of at most {MAX_DIMS} dimensions and one of {', '.join(map(str, DTYPES))}"
        )
    array: np.ndarray[Any, Any] = _bits(t).numpy(force=True)
    if not array.flags.c_contiguous or array.dtype is not kind:
        array = array.astype(kind, order="C")
    return code, array


def _bits(t: Tensor) -> Tensor:
    """The same memory in a dtype that numpy has."""
    pattern = _PATTERN.get(t.dtype)
    return t if pattern is None else t.detach().view(pattern)


def parse(data: bytes, *, max_bytes: int | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one safetensors file; everything is checked before a tensor is allocated.

    Args:
        data: the whole file.
        max_bytes: upper limit of its length; None: no limit.

    Raises:
        RecordError: the bytes are not such a file, or are longer than allowed.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise RecordError(f"{len(data)} bytes came where at most {max_bytes} are allowed")
    start, metadata, plan, size = _header(data)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise RecordError("the header's __metadata__ is not a mapping of texts")
    if start + size != len(data):
        raise RecordError(f"the header describes {start + size} bytes, but {len(data)} came")
    return _tensors(data, start, plan), metadata


def _header(data: bytes) -> tuple[int, Any, Plan, int]:
    """Where the tensors begin, the metadata, how to read the tensors, and how many bytes they take together.

    A cohort's records differ in their metadata and hardly in their tensors' names and shapes, which are the long part:
    what that part says is worked out once.
    """
    n = int.from_bytes(data[:8], "little")
    if len(data) < 8 or n > len(data) - 8 or n > HEADER_LIMIT:
        raise RecordError(
            f"{len(data)} bytes with a header of {n} bytes are not a record: truncated, or the header is above "
            f"{HEADER_LIMIT} bytes"
        )
    try:
        text = data[8 : 8 + n].decode()
        if text.startswith(_METADATA_FIRST):
            metadata, end = _DECODER.raw_decode(text, len(_METADATA_FIRST) - 1)
            rest = text[end:].lstrip(" ")
            if rest.startswith(","):
                return 8 + n, metadata, *_spans("{" + rest[1:])
    except (ValueError, RecursionError) as error:
        raise RecordError(f"the header is not JSON: {error}") from error
    header = parse_json(text)
    if not isinstance(header, dict):
        raise RecordError("the header is not a JSON object")
    return 8 + n, header.pop("__metadata__", {}), *_checked(header)


_METADATA_FIRST = '{"__metadata__":{'  # as `dump` writes it
_DECODER = json.JSONDecoder()


@lru_cache(maxsize=32)
def _spans(text: str) -> tuple[Plan, int]:
    header = parse_json(text)
    if not isinstance(header, dict) or "__metadata__" in header:
        raise RecordError("the header is not a JSON object with one __metadata__")
    return _checked(header)


def _checked(header: Mapping[str, Any]) -> tuple[Plan, int]:
    """How to read the tensors, one behind the other without a gap, and the sum of their bytes."""
    spans = {name: _span(name, entry) for name, entry in header.items()}
    begin = 0
    for name, span in sorted(spans.items(), key=lambda item: item[1][2:]):
        if span[2] != begin:
            raise RecordError(f"tensor {name!r} begins at byte {span[2]} where {begin} was expected")
        begin = span[3]
    return Plan.of(spans), begin


@dataclass(frozen=True)
class Piece:
    """Where one tensor lies in the file's data, and where in memory."""

    name: str
    begin: int  # bytes of the data
    end: int
    place: int  # byte of the block of memory
    dtype: torch.dtype
    shape: list[int]
    stride: list[int]
    offset: int  # place in numbers of the dtype


@dataclass(frozen=True)
class Plan:
    """Everything that reading a file takes besides its data: the same for all records of equal layout."""

    pieces: tuple[Piece, ...]
    size: int  # bytes of the block
    booleans: tuple[Piece, ...]

    @classmethod
    def of(cls, spans: Mapping[str, Span]) -> Plan:
        """Tensors in the order of the header, each at a multiple of 64 bytes."""
        pieces, place = [], 0
        for name, (code, shape, begin, end) in spans.items():
            dtype, kind = _CODES[code]
            stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            pieces.append(Piece(name, begin, end, place, dtype, shape, stride, place // kind.itemsize))
            place += -(-(end - begin) // ALIGNMENT) * ALIGNMENT
        return cls(tuple(pieces), place, tuple(piece for piece in pieces if piece.dtype is torch.bool))


def parse_json(text: bytes | str) -> Any:
    """The JSON value. Raises RecordError, whatever is wrong with the text."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, a number with too many digits
        raise RecordError(f"the header is not JSON: {error}") from error


Span = tuple[str, list[int], int, int]  # code of the dtype, shape, first byte, byte after the last


def _span(name: str, entry: Any) -> Span:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        width = _CODES[code][1].itemsize
        whole = len(entry) == 3 and type(shape) is list and {type(n) for n in (*shape, begin, end)} == {int}
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or min(*shape, begin, end) < 0:
        raise RecordError(f"the header's entry of {name!r} is not a tensor's: {str(entry)[:200]}")
    # Empty dimensions count as 1 here, so that no stride of the tensor can overflow.
    if len(shape) > MAX_DIMS or math.prod(d or 1 for d in shape) >= 1 << 48:
        raise RecordError(f"tensor {name!r} is said to have the shape {str(shape)[:200]}, which is too large")
    if end - begin != math.prod(shape) * width:
        raise RecordError(f"tensor {name!r}: shape {shape} of {code} does not take the bytes {begin} to {end}")
    return code, shape, begin, end


def _tensors(data: bytes, start: int, plan: Plan) -> dict[str, Tensor]:
    """Copies of the tensors, together in one new block of memory, each at a multiple of 64 bytes, zeros between them.

    A matrix product may round differently where its operands lie differently; here they always lie alike.
    """
    block = torch.empty(plan.size, dtype=torch.uint8)
    target, source = block.numpy(), np.frombuffer(data, np.uint8, offset=start)
    for piece in plan.booleans:
        numbers = source[piece.begin : piece.end]
        if numbers.size and numbers.max() > 1:
            raise RecordError(f"tensor {piece.name!r} is said to be BOOL but holds the byte {numbers.max()}")
    end = 0
    for piece in plan.pieces:
        if end < piece.place:
            target[end : piece.place] = 0
        end = piece.place + piece.end - piece.begin
        target[piece.place : end] = source[piece.begin : piece.end]
    target[end:] = 0
    views = {dtype: block.view(dtype) for dtype in {piece.dtype for piece in plan.pieces}}
    return {p.name: views[p.dtype].as_strided(p.shape, p.stride, p.offset) for p in plan.pieces}
