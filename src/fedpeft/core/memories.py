"""Where a client's memory waits between its turns; the run store keeps it on disk, tests keep it here."""

from __future__ import annotations

from typing import Protocol

from fedpeft.core import records
from fedpeft.core.errors import StoreError
from fedpeft.core.exchange import ClientId, Record


class Memories(Protocol):
    """Versions of every client's memory. A version counts once the server's ledger names it."""

    def load(self, client: ClientId, version: int, cls: type[Record]) -> Record:
        """The memory staged under this version. Raises StoreError where it is missing."""
        ...

    def stage(self, client: ClientId, version: int, record: Record, keep: int | None) -> None:
        """Keep the record under the version, beside the committed version `keep`; forget all others."""
        ...


class InMemory:
    """Memories as encoded bytes in this process."""

    def __init__(self) -> None:
        self._versions: dict[ClientId, dict[int, bytes]] = {}

    def load(self, client: ClientId, version: int, cls: type[Record]) -> Record:
        """See `Memories.load`."""
        data = self._versions.get(client, {}).get(version)
        if data is None:
            raise StoreError(f"the memory of client {client!r}, version {version}, is missing; start the run again")
        return records.decode(data, cls)

    def stage(self, client: ClientId, version: int, record: Record, keep: int | None) -> None:
        """See `Memories.stage`."""
        old = self._versions.get(client, {})
        self._versions[client] = {v: b for v, b in old.items() if v == keep} | {version: records.encode(record)}
