"""Reduced precision on the wire, as a Transport that wraps a Transport.

| wire | how float32 and float64 travel | error of a number x |
|---|---|---|
| `float32` | every record travels as it is | none |
| `bfloat16` | rounded to bfloat16 | at most 2^-8 |x|, for normal numbers below 3.38e38 |
| `int8` | in blocks of 64 numbers: s = max |x| / 127 as float32, and round(x / s) as int8 | s / 2, to rounding |

Numbers are rounded to the nearest, and parameters travel, not their changes: a change of less than half a step of the
grid (bfloat16: 2^-9 to 2^-8 of |x|; int8: 1/254 of the block's largest) does not arrive, and such errors do not average
out over rounds. With adapters and usual learning rates that was not seen to matter; with small rates and many rounds it
will: use float32 then.

Everything else travels as it is: records of a class that says `exact = True` (changes that clients add up for good, and
that must not differ from the server's), integers, 16-bit floats, tensors with fewer than 64 numbers (sums of a score,
biases), values that are no tensors. Every tensor comes back in the dtype it had. A number that is not finite comes back
not finite, in `int8` with its whole block, so that the checks of an answer still see it.

Reference: Dettmers et al. 2022, arXiv 2110.02861, section 2.1 (block-wise absmax quantisation).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from fedpeft.core import layout, records
from fedpeft.core.errors import RecordError, RequestError
from fedpeft.core.exchange import (
    Answers,
    Call,
    ClientEnv,
    ClientId,
    Exchange,
    Record,
    ServerEnv,
    Steps,
    Transport,
    Work,
)
from fedpeft.core.tree import Params

R = TypeVar("R")
Seen = dict[int, "tuple[Tensor, Tensor, Tensor | None]"]  # by id: the tensor (kept, so that its id stays its own),
# what travels instead of it, and its scales

WIRES = ("float32", "bfloat16", "int8")
BLOCK = 64  # numbers that share a scale; smaller tensors are not narrowed

_NARROWED = (torch.float32, torch.float64)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in layout.DTYPES}


@dataclass(frozen=True)
class Packed:
    """A record in reduced precision."""

    tensors: Params  # by the path in the record
    scales: Tensor  # float32, (blocks,): those of all int8 tensors, in the order of their paths
    value: str  # JSON: wire, type, value of the record; dtypes that are not float32, by path


def check_wire(wire: str) -> None:
    """Raise RequestError, listing the wires that exist, unless this is one."""
    if wire not in WIRES:
        raise RequestError(f"the wire {wire!r} does not exist; use one of {', '.join(WIRES)}")


def pack(record: Record, wire: str, seen: Seen | None = None) -> Packed:
    """The record in the precision of the wire; tensors that are not narrowed are shared with it.

    Args:
        record: what is to travel.
        wire: one of WIRES.
        seen: filled with each narrowed tensor, so that records which share tensors narrow them once.
    """
    check_wire(wire)
    seen = {} if seen is None else seen
    tensors, value = records.flatten(record)
    packed: dict[str, Tensor] = {}
    scales: list[Tensor] = []
    dtypes: dict[str, str] = {}
    exact = exact_paths(type(record))
    for path in sorted(tensors):
        t = tensors[path]
        if t.dtype is not torch.float32:
            dtypes[path] = str(t.dtype).removeprefix("torch.")
        if path.startswith(exact):
            packed[path] = t.detach()
            continue
        if id(t) not in seen:
            seen[id(t)] = t, *_narrow(t, wire)
        _, packed[path], scale = seen[id(t)]
        if scale is not None:
            scales.append(scale)
    head = {"wire": wire, "type": type(record).__name__, "value": value, "dtypes": dtypes}
    return Packed(packed, torch.cat(scales) if scales else torch.empty(0), records.dump_json(head))


def unpack(packed: Packed, cls: type[R], wire: str) -> R:
    """The record of class `cls` that `pack` was given, to the precision of the wire.

    Raises:
        RecordError: another wire, another class, or tensors that do not fit together.
    """
    check_wire(wire)
    head = layout.parse_json(packed.value)
    if not isinstance(head, dict) or head.keys() != {"wire", "type", "value", "dtypes"}:
        raise RecordError(f"a packed record needs wire, type, value and dtypes: {packed.value[:200]}")
    if head["wire"] != wire or head["type"] != cls.__name__:
        came = f"{str(head['type'])[:80]} by the wire {str(head['wire'])[:80]}"
        raise RecordError(f"{came} came where {cls.__name__} by {wire} was expected; set run.wire alike everywhere")
    dtypes = head["dtypes"]
    if not isinstance(dtypes, dict) or not dtypes.keys() <= packed.tensors.keys():
        raise RecordError(f"the dtypes of a packed record are not those of its tensors: {str(dtypes)[:200]}")
    scales = packed.scales
    if scales.dim() != 1 or scales.dtype is not torch.float32:
        raise RecordError(f"scales must be float32 in one dimension, but are {scales.dtype} of {tuple(scales.shape)}")
    tensors: dict[str, Tensor] = {}
    exact, used = exact_paths(cls), 0
    for path in sorted(packed.tensors):
        t, name = packed.tensors[path], dtypes.get(path, "float32")
        dtype = _DTYPES.get(name) if isinstance(name, str) else None
        if dtype is None or t.dtype is not carried(dtype, t.numel(), "float32" if path.startswith(exact) else wire):
            raise RecordError(f"{path} came as {t.dtype}; that is not how {str(name)[:80]} travels by {wire}")
        blocks = -(-t.numel() // BLOCK) if t.dtype is torch.int8 and dtype is not torch.int8 else 0
        tensors[path] = _widen(path, t, scales[used : used + blocks], blocks, dtype)
        used += blocks
    if len(scales) != used:
        raise RecordError(f"{len(scales)} scales came where {used} were expected")
    return records.unflatten(tensors, head["value"], cls)


def exact_paths(cls: type[Record]) -> tuple[str, ...]:
    """How the paths of a record's tensors begin that must arrive as they are."""
    hints = get_type_hints(cls)
    return tuple(f"{f.name}/" for f in fields(cls) if getattr(hints[f.name], "exact", False))


def carried(dtype: torch.dtype, numel: int, wire: str) -> torch.dtype:
    """The dtype in which a tensor of `numel` numbers travels."""
    if wire == "float32" or dtype not in _NARROWED or numel < BLOCK:
        return dtype
    return torch.bfloat16 if wire == "bfloat16" else torch.int8


def _narrow(t: Tensor, wire: str) -> tuple[Tensor, Tensor | None]:
    dtype = carried(t.dtype, t.numel(), wire)
    if dtype is t.dtype or dtype is not torch.int8:
        return t.detach().to(dtype), None
    blocks = _in_blocks(t.detach().to(torch.float32))
    largest = blocks.abs().amax(dim=1)
    scale = torch.where(largest.isfinite(), largest / 127, torch.nan)
    divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(1)  # a block of zeros, or one that is not finite
    rounded = (blocks / divisor).round_().nan_to_num_(0.0).clamp_(-127, 127)
    return rounded.to(torch.int8).flatten()[: t.numel()].view(t.shape), scale


def _widen(path: str, t: Tensor, scales: Tensor, blocks: int, dtype: torch.dtype) -> Tensor:
    if not blocks:
        return t.to(dtype)
    if len(scales) != blocks:
        raise RecordError(f"{path} needs {blocks} scales; {len(scales)} are left")
    numbers = _in_blocks(t.to(torch.float32)).mul_(scales.unsqueeze(1))
    return numbers.flatten()[: t.numel()].view(t.shape).to(dtype)


def _in_blocks(t: Tensor) -> Tensor:
    """(blocks, BLOCK) the numbers of t in order, then zeros."""
    return torch.nn.functional.pad(t.flatten(), (0, -t.numel() % BLOCK)).view(-1, BLOCK)


def wired(exchange: Exchange, wire: str) -> Exchange:
    """The exchange as both ends of the wire see it: the same name and work, between packed records.

    Its `accept` also checks that all numbers are finite, which cannot be seen in a packed record.
    """
    check_wire(wire)
    if wire == "float32":
        return exchange

    def send(state: Any, client: ClientId) -> Packed:
        return pack(exchange.send(state, client), wire)

    def work(down: Packed, memory: Record, env: ClientEnv) -> Work:
        inner = exchange.work(unpack(down, exchange.down, wire), memory, env)
        if isinstance(inner, Generator):
            return finish(inner)
        up, after = inner
        return pack(up, wire), after

    def finish(inner: Steps) -> Steps:
        up, after = yield from inner
        return pack(up, wire), after

    def fold(state: Any, ups: Mapping[ClientId, Packed], env: ServerEnv) -> Any:
        return exchange.fold(state, Unpacked(ups, exchange.up, wire), env)

    def accept(down: Packed, up: Packed) -> None:
        got = unpack(up, exchange.up, wire)
        records.check_finite(got)
        exchange.accept(unpack(down, exchange.down, wire), got)

    return replace(exchange, down=Packed, up=Packed, send=send, work=work, fold=fold, accept=accept)


class Unpacked(Mapping[ClientId, Any]):
    """Records by client, each unpacked when it is asked for."""

    def __init__(self, packed: Mapping[ClientId, Packed], cls: type[Record], wire: str) -> None:
        self._packed = packed
        self._cls = cls
        self._wire = wire

    def __getitem__(self, client: ClientId) -> Record:
        return unpack(self._packed[client], self._cls, self._wire)

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, client: object) -> bool:  # without unpacking
        return client in self._packed


@dataclass(frozen=True)
class Wired:
    """A Transport whose records travel in reduced precision by another Transport.

    Where clients look their work up by name (`client.protocol`), they must wrap it by `wired` too.
    """

    transport: Transport
    wire: str

    def clients(self) -> Sequence[ClientId]:
        """The clients of the transport inside."""
        return self.transport.clients()

    def exchange(self, call: Call, downs: Mapping[ClientId, Record]) -> Answers:
        """Carry the records packed; the answers unpack when they are asked for."""
        seen: Seen = {}
        packed = {client: pack(down, self.wire, seen) for client, down in downs.items()}
        answers = self.transport.exchange(replace(call, exchange=wired(call.exchange, self.wire)), packed)
        return replace(answers, ups=Unpacked(answers.ups, call.exchange.up, self.wire))


def with_wire(transport: Transport, wire: str) -> Transport:
    """The transport with this wire; `float32` is the transport itself. RequestError for a wire that does not exist."""
    check_wire(wire)
    return transport if wire == "float32" else Wired(transport, wire)
