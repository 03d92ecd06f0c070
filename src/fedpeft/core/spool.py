"""Answers of a large cohort: the first ones as records in memory, the rest as bytes in a temporary file."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO

from fedpeft.core import records
from fedpeft.core.exchange import ClientId, Record

IN_MEMORY_BYTES = 64 * 2**20


class Spool(Mapping[ClientId, Record]):
    """Answers by client; those beyond `limit` bytes wait on disk and are decoded whenever they are asked for.

    A fold that goes through the answers one by one (`tree.mean` over a generator) then needs the memory of one.
    """

    def __init__(self, cls: type[Record], limit: int = IN_MEMORY_BYTES) -> None:
        self._cls = cls
        self._limit = limit
        self._used = 0
        self._kept: dict[ClientId, Record] = {}
        self._places: dict[ClientId, tuple[int, int]] = {}
        self._file: IO[bytes] | None = None

    def add(self, client: ClientId, record: Record, data: bytes) -> None:
        """Keep an answer; `data` is its encoding."""
        self._used += len(data)
        if self._used <= self._limit:
            self._kept[client] = record
            return
        if self._file is None:
            self._file = _scratch()
        self._places[client] = (self._file.seek(0, 2), len(data))
        self._file.write(data)

    def __getitem__(self, client: ClientId) -> Record:
        if client in self._kept:
            return self._kept[client]
        start, size = self._places[client]
        assert self._file is not None
        self._file.seek(start)
        return records.decode(self._file.read(size), self._cls)

    def __contains__(self, client: object) -> bool:
        return client in self._kept or client in self._places

    def __iter__(self) -> Iterator[ClientId]:
        yield from self._kept
        yield from self._places

    def __len__(self) -> int:
        return len(self._kept) + len(self._places)


def _scratch() -> IO[bytes]:
    """A file without a name; it is gone when the spool is."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        stack.pop_all()
    return file
