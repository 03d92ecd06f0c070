from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft.core.errors import StoreError
from fedpeft.core.tree import Params
from fedpeft.runs.files import append_file, from_lines, to_json, write_file
from fedpeft.runs.store import Checkpoint, RunFolder


@dataclass(frozen=True)
class State:
    params: Params
    steps: int


@dataclass(frozen=True)
class Other:
    name: str


def params(value: float, n: int = 3) -> dict[str, torch.Tensor]:
    return {"w": torch.full((n,), value), "h": torch.full((2,), value, dtype=torch.bfloat16)}


def checkpoint(n: int, best=None) -> Checkpoint:
    progress = {"bytes_down": 2**40 + n, "seconds": 0.1 + n, "best": None}
    return Checkpoint(n, n - 1, State(params(n), n), {"a": 16 * n + 1}, progress, best)


@pytest.fixture
def run(tmp_path):
    with RunFolder.create(tmp_path / "run") as folder:
        folder.save_config({"run": {"rounds": 3}})
        yield folder


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


class FullDisk:
    """Refuses the n-th write to a file from now on, after taking half of it; counts from 1."""

    def __init__(self, monkeypatch, nth: int) -> None:
        self.left, self.real = nth, os.write
        monkeypatch.setattr("fedpeft.runs.files.os.write", self)

    def __call__(self, fd: int, data) -> int:
        self.left -= 1
        if self.left > 0:
            return self.real(fd, data)
        if self.left == 0:
            return self.real(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


# --- the folder ---


def test_create_takes_a_new_or_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "deep/er/new"):
        with RunFolder.create(tmp_path / name) as run:
            run.save_config({"run": {}})
    with pytest.raises(StoreError, match=r"empty exists and is not an empty folder; .*--out.*fedpeft resume"):
        RunFolder.create(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="not an empty folder"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(StoreError, match=r"cannot write .*file/run: .* Check the path"):
        RunFolder.create(tmp_path / "file" / "run")


def test_create_begins_anew_what_was_killed_before_it_was_a_run(tmp_path):
    with RunFolder.create(tmp_path / "run") as run:
        run.update_manifest(label="old")
        run.save_partition({"labels": ["a"]})
    with RunFolder.create(tmp_path / "run") as run:
        assert (run.manifest(), run.partition()) == ({}, {})
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "manifest.json").write_text("{}")  # of somebody else
    with pytest.raises(StoreError, match="not an empty folder"):
        RunFolder.create(tmp_path / "own")


def test_open_needs_a_run(tmp_path):
    with pytest.raises(StoreError, match="is not a folder"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(StoreError, match="holds no run"):
        RunFolder.open(tmp_path)


def test_configuration_manifest_and_partition_come_back(run):
    config = {"method": {"name": "fedavg", "lr": 1e-05}, "run": {"text": "Überlänge: ja", "trackers": ("wandb",)}}
    run.save_config(config)
    again = RunFolder.open(run.path)
    assert again.load_config() == {"method": config["method"], "run": {"text": "Überlänge: ja", "trackers": ["wandb"]}}
    assert again.manifest() == {}
    run.update_manifest(status="running", seed=np.int64(3))
    run.update_manifest(status="finished", loss=float("nan"))
    assert again.manifest() == {"status": "finished", "seed": 3, "loss": None}
    run.save_partition({"clients": {"a": {"rows": np.arange(2)}}})
    assert again.partition() == {"clients": {"a": {"rows": [0, 1]}}}
    with pytest.raises(StoreError, match="a bytes cannot be written as JSON"):
        run.update_manifest(data=b"x")
    (run.path / "manifest.json").write_text('{"status": ')
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        again.manifest()


def test_state_is_readable_by_its_owner_alone(run):
    run.update_manifest(status="running")
    run.append_metrics({"round": 0})
    run.append_exchanges([{"number": 1}])
    run.save_partition({})
    run.save_checkpoint(checkpoint(1, best=params(1)))
    run.memories().stage("a", 1, State(params(0), 0), None)
    assert {p.name for p in run.path.iterdir()} == {
        ".lock", "run.log", "config.yaml", "manifest.json", "partition.json", "metrics.jsonl", "exchanges.jsonl",
        "checkpoint",
    }  # fmt: skip
    for path in (run.path, *run.path.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_one_writer_many_readers(run):
    second = RunFolder.open(run.path)
    assert second.metrics() == []
    with pytest.raises(StoreError, match=f"being written by process {os.getpid()}; wait"):
        second.append_metrics({"round": 0})
    run.close()
    second.append_metrics({"round": 0})
    second.close()
    assert RunFolder.open(run.path).metrics() == [{"round": 0}]


# --- lines ---


def fill(run, rounds):
    for r in rounds:
        run.append_exchanges([{"number": r + 1, "client": c} for c in "ab"])
        run.append_metrics({"round": r, "loss": float("inf") if r == 1 else 0.1 * r})


def test_truncated_and_written_again_equals_uninterrupted(run):
    fill(run, range(4))
    whole = files(run.path)
    run.truncate_after(3, 4)
    assert files(run.path) == whole
    run.append_metrics({"round": 4})
    run.truncate_after(1, 3)
    assert [line["round"] for line in run.metrics()] == [0, 1]
    assert run.metrics()[1]["loss"] is None
    assert [line["number"] for line in run.exchanges()] == [1, 1, 2, 2, 3, 3]
    run.truncate_after(1, 2)
    fill(run, (2, 3))
    assert files(run.path) == whole
    run.truncate_after(-1, 0)
    assert (run.metrics(), run.exchanges()) == ([], [])


def test_a_torn_last_line_is_no_line(run):
    fill(run, range(2))
    run.close()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "lo')
    again = RunFolder.open(run.path)
    assert [line["round"] for line in again.metrics()] == [0, 1]
    with again:
        again.append_metrics({"round": 2})
        assert [line["round"] for line in again.metrics()] == [0, 1, 2]


def test_a_damaged_line_in_the_middle_is_an_error(run):
    path = run.path / "metrics.jsonl"
    path.write_text('{"round": 0}\n{"rou\n{"round": 2}\n')
    with pytest.raises(StoreError, match=r"metrics\.jsonl, line 2, is not JSON"):
        run.metrics()
    path.write_text("[1]\n")
    with pytest.raises(StoreError, match="line 1, holds list"):
        from_lines(path)


def test_lines_without_their_key_are_refused(run):
    with pytest.raises(StoreError, match="needs a whole number 'number', got None"):
        run.append_exchanges([{"number": 1}, {"client": "a"}])
    assert run.exchanges() == []


# --- checkpoints ---


def test_a_checkpoint_comes_back_and_the_older_one_goes(run):
    assert run.load_checkpoint(State) is None
    for n in (1, 2, 2, 3):  # the same number again: after an evaluation, or after a resume
        run.save_checkpoint(checkpoint(n, best=params(n) if n > 1 else None))
    found = RunFolder.open(run.path).load_checkpoint(State)
    assert (found.number, found.round, found.versions) == (3, 2, {"a": 49})
    assert found.progress == {"bytes_down": 2**40 + 3, "seconds": 3.1, "best": None}
    assert found.state.steps == 3
    for name, t in params(3).items():
        assert torch.equal(found.state.params[name], t) and found.state.params[name].dtype == t.dtype
        assert torch.equal(found.best[name], t)
    assert (found.start.number, found.start.versions) == (3, {"a": 49})
    assert [p.name for p in (run.path / "checkpoint").iterdir()] == ["000004"]


def test_unchanged_best_parameters_are_not_written_again(run):
    def inode():
        (path,) = (run.path / "checkpoint").glob("*/best.safetensors")
        return path.stat().st_ino

    best = params(1)
    run.save_checkpoint(checkpoint(1, best))
    first = inode()
    run.save_checkpoint(checkpoint(2, best))
    assert inode() == first
    run.close()
    with RunFolder.open(run.path) as again:
        loaded = again.load_checkpoint(State).best
        again.save_checkpoint(checkpoint(3, loaded))
        assert inode() == first
        again.save_checkpoint(checkpoint(4, params(1)))
        assert inode() != first
        again.save_checkpoint(checkpoint(5))
        assert again.load_checkpoint(State).best is None


def test_a_damaged_or_foreign_checkpoint_is_named(run):
    run.save_checkpoint(checkpoint(1))
    with pytest.raises(StoreError, match=r"000001 is damaged or belongs to another method .*'State'.*'Other'"):
        run.load_checkpoint(Other)
    (run.path / "checkpoint/000001/progress.json").write_text("{}")
    with pytest.raises(StoreError, match="000001 is damaged"):
        run.load_checkpoint(State)
    (run.path / "checkpoint/000001/progress.json").unlink()
    with pytest.raises(StoreError, match=r"cannot read .*000001"):
        run.load_checkpoint(State)


def test_a_reader_survives_the_checkpoint_being_replaced(run, monkeypatch):
    run.save_checkpoint(checkpoint(1))
    reader = RunFolder.open(run.path)
    read = reader._read_checkpoint

    def replaced_meanwhile(folder, state):
        if folder.name == "000001":
            run.save_checkpoint(checkpoint(2))
        return read(folder, state)

    monkeypatch.setattr(reader, "_read_checkpoint", replaced_meanwhile)
    assert reader.load_checkpoint(State).number == 2


def test_opening_clears_what_a_kill_left(run):
    run.save_checkpoint(checkpoint(1))
    run.close()
    folder = run.path / "checkpoint"
    (folder / "000002.tmp").mkdir()
    (folder / "000002.tmp" / "state.safetensors").write_text("half")
    (run.path / "manifest.json.tmp").write_text("{")
    (folder / "000000").mkdir()  # an older one whose deletion was not finished
    again = RunFolder.open(run.path)
    assert again.load_checkpoint(State).number == 1
    assert (run.path / "manifest.json.tmp").exists()  # reading changes nothing
    with again:
        again.lock()
        assert [p.name for p in folder.iterdir()] == ["000001"]
        assert not (run.path / "manifest.json.tmp").exists()


# --- what the disk refuses ---


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_full_disk_keeps_the_checkpoint_before(run, monkeypatch, nth):
    run.save_checkpoint(checkpoint(1, params(1)))
    before = files(run.path)
    with monkeypatch.context() as patch:
        FullDisk(patch, nth)
        with pytest.raises(StoreError, match=r"No space left on device \([\d,]+ MB free\)\. Free space .* resume"):
            run.save_checkpoint(checkpoint(2, params(2)))
    assert files(run.path) == before
    run.save_checkpoint(checkpoint(2, params(2)))
    assert run.load_checkpoint(State).number == 2


def test_full_disk_leaves_no_half_file_or_line(run, monkeypatch):
    run.update_manifest(status="running")
    run.append_metrics({"round": 0})
    run.memories().stage("a", 1, State(params(1), 1), None)
    before = files(run.path)
    for write in (
        lambda: run.update_manifest(status="failed"),
        lambda: run.append_metrics({"round": 1, "loss": 0.5}),
        lambda: run.save_partition({"rows": [1]}),
        lambda: run.memories().stage("a", 2, State(params(2), 2), 1),
    ):
        with monkeypatch.context() as patch:
            FullDisk(patch, 1)
            with pytest.raises(StoreError, match="No space left"):
                write()
        assert files(run.path) == before


def test_refused_permission_says_what_to_do(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fedpeft.runs.files.os.open", refuse)
    for write in (write_file, append_file):
        with pytest.raises(StoreError, match=r"cannot write .*/x: Permission denied .*--out"):
            write(tmp_path / "x", b"1")


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import State, checkpoint, params
from fedpeft.runs.store import RunFolder
with RunFolder.open(Path(sys.argv[1])) as run:
    done = run.load_checkpoint(State)
    n = done.number if done else 0
    run.truncate_after(n - 1, n)
    print("ready", flush=True)
    while True:
        n += 1
        run.memories().stage("a", 16 * n + 1, State(params(n, 100_000), n), 16 * (n - 1) + 1 if n > 1 else None)
        run.append_exchanges([{"number": n}])
        run.append_metrics({"round": n - 1})
        run.save_checkpoint(checkpoint(n, params(n, 100_000)))
"""


def test_killed_at_any_moment_the_newest_state_is_whole(run):
    run.close()
    number = 0
    for seed in range(2):
        command = [sys.executable, "-c", KILLED, str(run.path), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.1 + 0.3 * random.Random(seed).random())
            process.send_signal(signal.SIGKILL)
        again = RunFolder.open(run.path)
        found = again.load_checkpoint(State)
        assert found.number > number
        number = found.number
        assert found.state.steps == number and torch.equal(found.best["w"], params(number, 100_000)["w"])
        memory = again.memories().load("a", found.versions["a"], State)
        assert memory.steps == number
        with again:
            again.truncate_after(found.round, found.number)
            assert [line["round"] for line in again.metrics()] == list(range(number))
            assert [line["number"] for line in again.exchanges()] == list(range(1, number + 1))
            assert len(list((run.path / "checkpoint").iterdir())) == 2  # one checkpoint and the memories


def test_json_lines_hold_plain_numbers_only():
    value = {"a": np.float32(0.5), "b": torch.tensor([1, 2]), "c": (1.0, float("nan")), 3: Path("x"), "s": {"b", "a"}}
    assert json.loads(to_json(value)) == {"a": 0.5, "b": [1, 2], "c": [1.0, None], "3": "x", "s": ["a", "b"]}
