"""Writing files so that a kill, a full disk or a second process never leaves half of one behind."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedpeft.core.errors import StoreError

FILE_MODE = 0o600  # what a run writes is readable by its owner alone
FOLDER_MODE = 0o700
TEMPORARY = ".tmp"  # suffix of what is not complete
LOCK = ".lock"

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@contextmanager
def storing(path: Path, verb: str = "write") -> Iterator[None]:
    """Turn what the operating system refuses into a StoreError with path, free space and remedy."""
    try:
        yield
    except OSError as error:
        raise StoreError(_explain(path, verb, error)) from error


def _explain(path: Path, verb: str, error: OSError) -> str:
    cause = error.strerror or str(error)
    if error.errno in _FULL:
        remedy = "Free space or enlarge the quota there, then resume the run."
    elif error.errno in _FORBIDDEN:
        remedy = "Give yourself permission there, or choose another folder with --out."
    else:
        remedy = "Check the path and the disk, then try again."
    return f"cannot {verb} {path}: {cause}{_free_space(path)}. {remedy}"


def _free_space(path: Path) -> str:
    for place in (path, *path.parents):
        with suppress(OSError):
            return f" ({shutil.disk_usage(place).free / 1e6:,.0f} MB free)"
    return ""


def make_folder(path: Path) -> None:
    """Make a folder for its owner alone, with the parents that it needs; one that exists stays as it is."""
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=FOLDER_MODE)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def write_file(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file completely or not at all; what was there before stays until the new content is complete.

    Args:
        durable: also survive a power failure, not only the end of the process.
    """
    draft = path.with_name(path.name + TEMPORARY)
    with storing(path):
        try:
            write_new(draft, data, durable=durable)
            os.replace(draft, path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
        if durable:
            sync_folder(path.parent)


def write_new(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file in place, for a folder that is not complete itself; raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
    try:
        write_all(fd, data)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write every byte; one call to the system may take fewer."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def append_file(path: Path, data: bytes) -> None:
    """Append all of the data or, where the disk refuses, none of it."""
    with storing(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, FILE_MODE)
        try:
            before = os.fstat(fd).st_size
            try:
                write_all(fd, data)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power failure."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Lock:
    """The right to write a folder, held by one process until `close`, garbage collection or its end."""

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        with storing(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, FILE_MODE)
        self._release = weakref.finalize(self, os.close, fd)
        try:
            with storing(path, "lock"):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except StoreError as error:
            self.close()
            if isinstance(error.__cause__, BlockingIOError):
                raise StoreError(_held(folder, path)) from error
            raise

    def close(self) -> None:
        """Give the right back."""
        self._release()


def _held(folder: Path, path: Path) -> str:
    with suppress(OSError):
        if owner := path.read_text(encoding="ascii").strip():
            return f"{folder} is being written by process {owner}; wait until it ends, or choose another folder"
    return f"{folder} is being written by another process; wait until it ends, or choose another folder"


def to_json(value: Any) -> str:
    """One line of JSON; numbers that are not finite become null, which every reader of JSON understands."""
    return json.dumps(plain(value), allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """The value as dicts, lists, strings and numbers: what JSON and YAML can carry.

    Raises:
        StoreError: it holds something else.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy's and torch's numbers and arrays
        return plain(value.tolist())
    raise StoreError(f"a {type(value).__name__} cannot be written as JSON: {value!r}. Give plain data.")


def from_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line; a last line that was cut off is left out.

    Raises:
        StoreError: another line is not a JSON object, or the file cannot be read.
    """
    return [value for _, value in parsed_lines(path)]


def parsed_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every complete line with its object; see `from_lines`."""
    with storing(path, "read"):
        data = path.read_bytes() if path.exists() else b""
    found = []
    *complete, _torn = data.split(b"\n")
    for i, line in enumerate(complete, start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise StoreError(f"{path}, line {i}, is not JSON ({error}); restore the file from a copy") from error
        if not isinstance(value, dict):
            raise StoreError(f"{path}, line {i}, holds {type(value).__name__}, not an object; restore it from a copy")
        found.append((line + b"\n", value))
    return found
