from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fedpeft.core.errors import StoreError
from fedpeft.core.exchange import Nothing
from fedpeft.core.tree import Params
from fedpeft.runs.memories import MemoryStore, folder_name


@dataclass(frozen=True)
class State:
    params: Params
    steps: int


def params(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), value), "h": torch.full((2,), value, dtype=torch.bfloat16)}


def test_memories_keep_the_committed_and_the_staged_version(tmp_path):
    store = MemoryStore(tmp_path / "memories")
    store.stage("a", 1, State(params(1), 1), None)
    store.stage("a", 17, State(params(2), 2), 1)
    store.stage("a", 18, State(params(3), 3), 1)  # the exchange was repeated
    assert store.versions("a") == (1, 18)
    assert store.load("a", 1, State).steps == 1
    again = MemoryStore(tmp_path / "memories")
    assert torch.equal(again.load("a", 18, State).params["h"], params(3)["h"])
    store.stage("a", 33, State(params(4), 4), 18)
    assert store.versions("a") == (18, 33)
    assert store.versions("b") == ()


def test_nothing_is_never_written(tmp_path):
    store = MemoryStore(tmp_path / "memories")
    store.stage("a", 1, Nothing(), None)
    assert not (tmp_path / "memories").exists()
    assert store.load("a", 1, Nothing) == Nothing()


def test_missing_and_damaged_memories_are_named(tmp_path):
    store = MemoryStore(tmp_path)
    with pytest.raises(StoreError, match="memory of client 'a', version 1, is missing"):
        store.load("a", 1, State)
    store.stage("a", 1, State(params(1), 1), None)
    (tmp_path / "a" / "1.safetensors").write_bytes(b"half")
    with pytest.raises(StoreError, match=r"memory of client 'a', .*1\.safetensors, is damaged"):
        store.load("a", 1, State)


def test_any_client_id_is_a_folder_of_its_own(tmp_path):
    ids = ["a", "A", "client-001", "..", ".", "", "a/b", "a%2Fb", "New York", "new york", "é" * 300, "é" * 301, "a\n",
           "/etc", "con.x", "-", "x" * 101]  # fmt: skip
    names = [folder_name(c) for c in ids]
    assert len({n.lower() for n in names}) == len(ids)
    assert folder_name("client-001") == "client-001"
    store = MemoryStore(tmp_path / "memories")
    for i, client in enumerate(ids):
        store.stage(client, 1, State(params(i), i), None)
    assert [store.load(client, 1, State).steps for client in ids] == list(range(len(ids)))
    assert len(list((tmp_path / "memories").iterdir())) == len(ids)
    assert [p.name for p in tmp_path.iterdir()] == ["memories"]
