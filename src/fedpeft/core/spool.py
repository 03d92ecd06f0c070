"""Answers of a large cohort: the first ones as records in memory, the rest as bytes in a temporary file."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping

from fedpeft.core import records
from fedpeft.core.errors import StoreError
from fedpeft.core.exchange import ClientId, Record

IN_MEMORY_BYTES = 128 * 2**20


class Spool(Mapping[ClientId, Record]):
    """Answers by client; those beyond `limit` bytes wait on disk and are decoded whenever they are asked for.

    A fold that goes through the answers one by one (`tree.mean` over a generator) then needs the memory of one. The
    file has no name and is gone with the spool.

    Args:
        cls: type of the answers.
        limit: bytes of encoded answers that stay in memory.
    """

    def __init__(self, cls: type[Record], limit: int = IN_MEMORY_BYTES) -> None:
        self._cls = cls
        self._limit = limit
        self._used = 0
        self._kept: dict[ClientId, Record] = {}
        self._places: dict[ClientId, tuple[int, int]] = {}  # offset and length in the file
        self._file: int | None = None  # its descriptor
        self._end = 0

    def add(self, client: ClientId, record: Record, data: bytes) -> None:
        """Keep an answer; `data` is its encoding.

        Raises:
            StoreError: there is no room for it on disk.
        """
        self._used += len(data)
        if self._used <= self._limit:
            self._kept[client] = record
            return
        try:
            self._places[client] = (self._append(data), len(data))
        except OSError as error:
            raise StoreError(
                f"cannot keep the answers of a large cohort in {tempfile.gettempdir()}: {error.strerror or error}; "
                "free space there or set TMPDIR, then resume the run"
            ) from error

    def _append(self, data: bytes) -> int:
        if self._file is None:
            self._file, name = tempfile.mkstemp(prefix="fedpeft-")
            weakref.finalize(self, os.close, self._file)
            os.unlink(name)
        start = self._end
        write_at(self._file, data, start)
        self._end += len(data)
        return start

    def __getitem__(self, client: ClientId) -> Record:
        if client in self._kept:
            return self._kept[client]
        start, size = self._places[client]
        assert self._file is not None, "an answer with a place lies in the file"
        return records.decode(os.pread(self._file, size, start), self._cls)

    def __contains__(self, client: object) -> bool:  # without decoding
        return client in self._kept or client in self._places

    def __iter__(self) -> Iterator[ClientId]:
        yield from self._kept
        yield from self._places

    def __len__(self) -> int:
        return len(self._kept) + len(self._places)


def write_at(file: int, data: bytes, place: int) -> None:
    """Write every byte from a place of an open file on; one call to the system may take fewer. Raises OSError."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, place)
        place, rest = place + written, rest[written:]
