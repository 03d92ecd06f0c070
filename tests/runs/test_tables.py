"""Rows of a state are stored one by one, and only where they changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from fedpeft.core import records
from fedpeft.core.errors import StoreError
from fedpeft.core.tree import Params
from fedpeft.runs.store import Checkpoint, RunFolder
from fedpeft.runs.tables import row_types


@dataclass(frozen=True)
class Row:
    params: Params
    weight: float


@dataclass(frozen=True)
class State:
    params: Params
    rows: Mapping[str, Row] = field(default_factory=dict)
    others: Mapping[str, Row] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)


def row(value: float) -> Row:
    return Row({"w": torch.full((1000,), value)}, value)


STATE = State({"w": torch.ones(3)}, {"b/..": row(1.0), "A": row(2.0), "a": row(3.0)}, {}, {"x": 0.5})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder.create(tmp_path / "run")
    made.save_config({})
    return made


def files(folder: RunFolder) -> dict[str, int]:
    """Inode by content of every row's file."""
    found = sorted((folder.path / "checkpoint").rglob("rows/*.safetensors"))
    return {str(records.decode(path.read_bytes(), Row).weight): path.stat().st_ino for path in found}


def test_tables_are_mappings_of_records() -> None:
    assert row_types(State) == {"rows": Row, "others": Row}
    assert row_types(Row) == {}


def test_a_state_with_tables_comes_back_in_the_same_order(folder: RunFolder) -> None:
    folder.save_checkpoint(Checkpoint(1, 0, STATE))
    read = RunFolder(folder.path).load_checkpoint(State)
    assert read is not None and list(read.state.rows) == ["b/..", "A", "a"]
    assert records.encode(read.state) == records.encode(STATE)


def test_only_changed_rows_are_written_anew(folder: RunFolder) -> None:
    """The others' files are links to those of the checkpoint before, also after the run was opened again."""
    folder.save_checkpoint(Checkpoint(1, 0, STATE))
    first = files(folder)
    state = replace(STATE, rows={**STATE.rows, "A": row(4.0), "new": row(5.0)})
    folder.save_checkpoint(Checkpoint(2, 0, state))
    second = files(folder)
    assert second.keys() == {"1.0", "3.0", "4.0", "5.0"}
    assert second["1.0"] == first["1.0"] and second["3.0"] == first["3.0"]
    folder.close()
    again = RunFolder.open(folder.path)
    read = again.load_checkpoint(State)
    assert read is not None and records.encode(read.state) == records.encode(state)
    again.save_checkpoint(Checkpoint(3, 0, replace(read.state, rows={k: read.state.rows[k] for k in ("a", "A")})))
    third = files(again)
    assert third == {"3.0": first["3.0"], "4.0": second["4.0"]}


def test_a_missing_or_damaged_row_is_an_error(folder: RunFolder) -> None:
    folder.save_checkpoint(Checkpoint(1, 0, STATE))
    (path,) = (folder.path / "checkpoint").rglob("rows/1.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="damaged"):
        RunFolder(folder.path).load_checkpoint(State)
    path.unlink()
    with pytest.raises(StoreError, match="cannot read"):
        RunFolder(folder.path).load_checkpoint(State)
