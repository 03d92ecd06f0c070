"""Rows of a data set as dicts, from a file, a folder with one file per client, or the Hugging Face hub."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeAlias

from fedpeft.core.errors import DataError
from fedpeft.core.hub import loading_from_hub

Row: TypeAlias = dict[str, Any]

ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True)
class HubRows:
    """One split of a hub data set: its rows, and the label names of the columns that declare some."""

    rows: list[Row]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The raw rows of one split and where they are from."""

    where: str
    rows: list[Row]
    parts: tuple[tuple[str, int, str], ...] = ()  # (file, first row, client id) of a folder's files

    @cached_property
    def columns(self) -> list[str]:
        """The names of all columns."""
        return column_names(self.rows)

    def row(self, index: int) -> str:
        """What an error message calls a row; rows count from 1 in their own file."""
        for file, first, _ in reversed(self.parts):
            if first <= index:
                return f"row {index - first + 1} of {file}"
        return f"row {index + 1} of {self.where}"

    def files(self) -> tuple[str, ...] | None:
        """The client id of each row, None for a single file."""
        ends = [first for _, first, _ in self.parts[1:]] + [len(self.rows)]
        clients: list[str] = []
        for (_, first, client), end in zip(self.parts, ends, strict=bool(self.parts)):
            clients += [client] * (end - first)
        return tuple(clients) if self.parts else None


def read_rows(source: str | Path) -> list[Row]:
    """The rows of a `.jsonl[.gz]`, `.csv[.gz]` or `.parquet` file, in file order.

    JSON lines and parquet keep their types, every value of a CSV file is a string; blank lines are left out.

    Raises:
        DataError: no such file, an ending that is not read, a line that is not a row (named), no row at all, or parquet
            without pyarrow.
    """
    path = Path(source).expanduser()
    ending = _ending(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder where one file was expected; name a file in it")
    if not path.is_file():
        raise DataError(f"there is no data file {path}; check the path (it is relative to {Path.cwd()})")
    if not ending:
        raise DataError(f"data file {path} has an ending that is not read; use {', '.join(ENDINGS)}")
    if ending == ".parquet":
        rows = _parquet_rows(path)
    else:
        read = _json_rows if ending.startswith(".jsonl") else _csv_rows
        try:
            with _open_text(path) as file:
                rows = list(read(file, path))
        except UnicodeDecodeError as error:
            raise DataError(f"data file {path} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"data file {path} cannot be read: {error}; check permissions or copy it anew") from error
    if not rows:
        raise DataError(f"data file {path} is empty: it has no row; give a file with data")
    return rows


def client_files(source: str | Path) -> dict[str, Path] | None:
    """The files of a folder or glob pattern by client id (the name without its ending), sorted; None for one file.

    In a folder, files with an ending that is not read (`meta.json`) are left out, and so are hidden ones.

    Raises:
        DataError: a folder or pattern without data files, or two files that would be the same client.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [p for p in path.iterdir() if _ending(p) and not p.name.startswith(".")]
    elif glob.has_magic(str(path)) and not path.exists():
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
    else:
        return None
    files: dict[str, Path] = {}
    for file in sorted(found):
        client = file.name.removesuffix(_ending(file))
        if client in files:
            raise DataError(f"{files[client]} and {file} would both be client {client!r}; rename one of them")
        files[client] = file
    if not files:
        raise DataError(f"{path} holds no data file ({', '.join(ENDINGS)}); give a folder with one file per client")
    return dict(sorted(files.items()))


def read_hub(name: str, split: str) -> HubRows:
    """One split of a hub data set; `name` is `owner/name`, or `owner/name:configuration`.

    Raises:
        DataError: `datasets` is not installed, or the hub cannot be reached, or it has no such data set or split.
    """
    datasets = _datasets(name)
    path, _, configuration = name.partition(":")
    try:
        with loading_from_hub(path):
            data = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as error:  # the library raises errors of its own, of its parts and of the network
        raise DataError(_hub_failed(f"split {split!r} of hub data set {name!r}", error)) from error
    labels = {column: tuple(kind.names) for column, kind in data.features.items() if getattr(kind, "names", None)}
    rows: list[Row] = data.to_list()
    if not rows:
        raise DataError(f"split {split!r} of hub data set {name!r} is empty; name another split")
    return HubRows(rows, labels)


def hub_splits(name: str) -> tuple[str, ...]:
    """The names of the splits of a hub data set. Raises DataError as `read_hub` does."""
    datasets = _datasets(name)
    path, _, configuration = name.partition(":")
    try:
        with loading_from_hub(path):
            return tuple(datasets.get_dataset_split_names(path, configuration or None))
    except Exception as error:  # as in read_hub
        raise DataError(_hub_failed(f"hub data set {name!r}", error)) from error


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(cache: Path | None = None) -> Path | None:
    """Where derived data may be kept: `cache`, else `$FEDPEFT_CACHE`, else `~/.cache/fedpeft`; None without a home."""
    if cache is not None:
        return cache
    if named := os.environ.get("FEDPEFT_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "fedpeft"
    except RuntimeError:
        return None


def _ending(path: Path) -> str:
    return next((e for e in ENDINGS if path.name.lower().endswith(e) and len(path.name) > len(e)), "")


def _open_text(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _json_rows(file: IO[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of {path} is not JSON ({error}): {_short(line)}; mend the line") from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {path} is not a JSON object: {_short(line)}; write one object per line")
        yield row


def _csv_rows(file: IO[str], path: Path) -> Iterator[Row]:
    with _long_csv_fields():
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"the header of {path} names a column twice: {', '.join(header)}; rename one")
            for values in reader:
                if values and len(values) != len(header):
                    raise DataError(
                        f"the row that ends in line {reader.line_num} of {path} has {len(values)} fields, the header "
                        f"{len(header)}; put fields that hold commas or line breaks in double quotes"
                    )
                if values:
                    yield dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} of {path} is not CSV: {error}; mend the line") from error


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    """Lift csv's limit of 128 kB per field, which is process-wide, while a file is read."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet_rows(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"reading {path} needs pyarrow: install fedpeft[data] (pip install 'fedpeft[data]'), "
            "or convert the file to .jsonl"
        ) from error
    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data file {path} cannot be read as parquet: {error}; check the file") from error
    return rows


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"hub data set {name!r} needs the library datasets: install fedpeft[data] (pip install 'fedpeft[data]'), "
            "or give files in task.train"
        ) from error
    return datasets


def _hub_failed(what: str, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{what} cannot be loaded ({reason}); check the name and the network, or give files in task.train"


def _short(line: str) -> str:
    text = line.strip()
    return repr(text if len(text) <= 40 else text[:37] + "...")


def column_names(rows: Sequence[Row]) -> list[str]:
    """The names of all columns that occur in any row, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))
