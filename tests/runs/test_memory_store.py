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


def large(value: float) -> State:
    return State({"w": torch.full((2**15,), value)}, 1)


def files(store: MemoryStore, folder, clients: str = "abc") -> list[int]:
    """The inode of every client's newest version."""
    return [(folder / c / f"{store.versions(c)[-1]}.safetensors").stat().st_ino for c in clients]


def test_equal_memories_are_one_file_until_they_differ(tmp_path):
    store = MemoryStore(tmp_path)
    for client in "abc":
        store.stage(client, 1, large(1.0), None)
    assert len(set(files(store, tmp_path))) == 1
    store.stage("a", 1, large(2.0), None)  # the same version of the first one, with other bytes
    store.stage("b", 2, large(1.0), 1)
    assert [float(store.load(c, v, State).params["w"][0]) for c, v in (("a", 1), ("b", 2), ("c", 1))] == [2.0, 1.0, 1.0]
    assert files(store, tmp_path)[1] == files(store, tmp_path)[2] != files(store, tmp_path)[0]
    store.stage("c", 1, large(1.0), None)  # staged again
    store.stage("a", 2, large(1.0), None)
    assert len(set(files(store, tmp_path))) == 1 and store.versions("a") == (2,)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    for client in "bc":  # the last name keeps what all had
        store.stage(client, 3, large(4.0), None)
    assert float(store.load("a", 2, State).params["w"][0]) == 1.0


def test_small_memories_and_file_systems_without_second_names_have_files_of_their_own(tmp_path, monkeypatch):
    store = MemoryStore(tmp_path / "small")
    for client in "abc":
        store.stage(client, 1, State(params(1), 1), None)
    assert len(set(files(store, tmp_path / "small"))) == 3

    def refused(*args, **kwargs):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", refused)
    store = MemoryStore(tmp_path / "large")
    for client in "abc":
        store.stage(client, 1, large(1.0), None)
    assert len(set(files(store, tmp_path / "large"))) == 3 and store.load("c", 1, State).steps == 1


def test_clients_that_fold_the_same_into_the_base_keep_it_once(tmp_path):
    """Three copies of one change of the base take the room of one."""
    from fedpeft.core.changes import Copy

    store, delta = MemoryStore(tmp_path), {"delta.block.0.query.dense": torch.ones(200, 200)}
    for client in "abc":
        store.stage(client, 5, Copy(delta, 3), None)
    held = sum(path.stat().st_size / path.stat().st_nlink for path in tmp_path.rglob("*.safetensors"))
    assert held < 1.01 * 4 * 200 * 200
