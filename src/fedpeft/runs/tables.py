"""Tables of a state: fields of type Mapping[str, record], one row per client, stored row by row.

A round changes the rows of its cohort; the others are the same objects as before, and their files are linked from the
checkpoint before instead of written again. So a state with a control variate per client costs its cohort's bytes per
checkpoint, not everybody's.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedpeft.core import records
from fedpeft.core.exchange import Record
from fedpeft.runs.files import make_folder, sync_folder, write_new

Rows = Mapping[str, Record]
_SUFFIX = ".safetensors"


def row_types(state: type[Record]) -> dict[str, type[Record]]:
    """The tables of a type of state: the record type of each one's rows by field."""
    found: dict[str, type[Record]] = {}
    hints = typing.get_type_hints(state)
    for field in dataclasses.fields(state):
        hint = hints[field.name]
        row = typing.get_args(hint)[1:]
        if typing.get_origin(hint) is typing.get_origin(Mapping[str, int]) and row and dataclasses.is_dataclass(row[0]):
            found[field.name] = typing.cast("type[Record]", row[0])
    return found


class Tables:
    """Writes and reads the tables of the newest checkpoint, and remembers which row objects its files hold."""

    def __init__(self) -> None:
        self._written: dict[tuple[str, str], tuple[Record, Path]] = {}

    def write(self, folder: Path, state: Record) -> tuple[Record, dict[str, list[str]]]:
        """Store every table beneath the folder.

        Returns:
            the state without its rows, and the rows' keys by field in the order of their files.

        Raises:
            OSError: the disk refuses.
        """
        self._draft: dict[tuple[str, str], tuple[Record, Path]] = {}
        keys: dict[str, list[str]] = {}
        for name in row_types(type(state)):
            rows: Rows = getattr(state, name)
            keys[name] = list(rows)
            if rows:
                make_folder(folder / name)
            for i, (key, row) in enumerate(rows.items()):
                path = folder / name / f"{i}{_SUFFIX}"
                self._store(path, row, self._written.get((name, key)))
                self._draft[name, key] = row, path
            if rows:
                sync_folder(folder / name)
        return dataclasses.replace(state, **{name: {} for name in keys}) if keys else state, keys

    def _store(self, path: Path, row: Record, before: tuple[Record, Path] | None) -> None:
        if before is not None and before[0] is row:
            with suppress(OSError):  # a file system without links, or a file that is gone: write it
                os.link(before[1], path)
                return
        write_new(path, records.encode(row), durable=True)

    def moved(self, draft: Path, target: Path) -> None:
        """The folder that was written last has got its final name."""
        self._written = {key: (row, target / path.relative_to(draft)) for key, (row, path) in self._draft.items()}

    def read(self, folder: Path, state: Record, keys: Mapping[str, Sequence[str]]) -> Record:
        """The state with the rows of its tables.

        Raises:
            RecordError, OSError: a row cannot be read.
        """
        self._written = {}
        full: dict[str, Any] = {}
        for name, row_type in row_types(type(state)).items():
            rows: dict[str, Record] = {}
            for i, key in enumerate(keys.get(name, ())):
                path = folder / name / f"{i}{_SUFFIX}"
                rows[key] = typing.cast(Record, records.decode(path.read_bytes(), row_type))
                self._written[name, key] = rows[key], path
            full[name] = rows
        return dataclasses.replace(state, **full) if full else state
