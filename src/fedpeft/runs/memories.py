"""Client memories between exchanges: on disk, two versions at most, the committed one and the staged one."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import quote

from fedpeft.core import records
from fedpeft.core.errors import RecordError, StoreError
from fedpeft.core.exchange import ClientId, Nothing, Record
from fedpeft.runs.files import TEMPORARY, make_folder, storing, write_file

_SUFFIX = ".safetensors"
_LARGE = 2**16  # bytes from which on equal memories are one file
_PLAIN_NAME = re.compile(r"[a-z0-9_-]{1,100}")
_REMEDY = "Restore it from a copy of the run folder, or start the run again."


class MemoryStore:
    """The memories of all clients of one run: a `core.memories.Memories` on disk.

    An exchange stages new versions; which version counts is what the run's ledger (`Start.versions`) says, so a staged
    version that was never folded is as good as absent. A memory of type Nothing takes no file.

    Args:
        folder: holds a folder per client; made when the first memory is staged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._twins: dict[bytes, Path] = {}  # by digest, the newest large file of these bytes

    def load(self, client: ClientId, version: int, cls: type[Record]) -> Record:
        """A client's memory of that version.

        Raises:
            StoreError: the version is missing or damaged.
        """
        if cls is Nothing:
            return Nothing()
        path = self._path(client, version)
        if not path.exists():
            raise StoreError(f"the memory of client {client!r}, version {version}, is missing: {path}. {_REMEDY}")
        with storing(path, "read"):
            data = path.read_bytes()
        try:
            return records.decode(data, cls)
        except RecordError as error:
            raise StoreError(f"the memory of client {client!r}, {path}, is damaged: {error}. {_REMEDY}") from error

    def stage(self, client: ClientId, version: int, record: Record, keep: int | None) -> None:
        """Write a new version and delete every version but it and the committed one.

        Args:
            keep: the committed version, None where there is none yet.

        Raises:
            StoreError: the disk refuses; the versions that were there still are.
        """
        if isinstance(record, Nothing):
            return
        path = self._path(client, version)
        if not path.parent.is_dir():
            make_folder(self._folder)
            make_folder(path.parent)
        self._write(path, records.encode(record))
        wanted = {path.name, f"{keep}{_SUFFIX}"}
        with storing(path.parent, "clean up"):
            for other in path.parent.iterdir():
                if other.name not in wanted:
                    other.unlink()

    def versions(self, client: ClientId) -> tuple[int, ...]:
        """The versions that are held, ascending."""
        return tuple(sorted(int(path.stem) for path in self._path(client, 0).parent.glob(f"*{_SUFFIX}")))

    def _write(self, path: Path, data: bytes) -> None:
        """Write a file, or a second name of another client's that is the very same: base deltas are large."""
        self._twins = {digest: twin for digest, twin in self._twins.items() if twin != path}  # it has other bytes now
        digest = hashlib.sha256(data).digest() if len(data) >= _LARGE else b""
        if digest not in self._twins or not _linked(self._twins[digest], path):
            write_file(path, data)
        if digest:
            self._twins[digest] = path

    def _path(self, client: ClientId, version: int) -> Path:
        return self._folder / folder_name(client) / f"{version}{_SUFFIX}"


def _linked(twin: Path, path: Path) -> bool:
    """Whether the path now is another name of the twin; not where that is gone, or no file has second names."""
    draft = path.with_name(path.name + TEMPORARY)
    try:
        draft.unlink(missing_ok=True)
        os.link(twin, draft)
        os.replace(draft, path)
        draft.unlink(missing_ok=True)  # still there where the path was a name of the twin already
    except OSError:
        return False
    return True


def folder_name(client: ClientId) -> str:
    """A name for a client's folder that is safe on every file system and differs for different ids.

    Short lower-case ids stay as they are; others are percent-encoded, cut, and told apart by a digest, because file
    systems may ignore case and limit the length.
    """
    if _PLAIN_NAME.fullmatch(client):
        return client
    digest = hashlib.sha256(client.encode()).hexdigest()[:16]
    return f"{quote(client, safe='').replace('.', '%2E')[:100]}%%{digest}"
