"""The run folder: what a run leaves behind, and what it needs to go on after being stopped at any moment.

    config.yaml  manifest.json  partition.json  metrics.jsonl  exchanges.jsonl  run.log  report.html  adapter/
    checkpoint/000012/{progress.json, state.safetensors, best.safetensors}     the newest complete state
    checkpoint/memories/CLIENT/VERSION.safetensors                             client memories, in-process runs only

A checkpoint is written as `000013.tmp`, then renamed, then the older one is deleted: the highest number without a
suffix is the newest complete one. The order that makes a resumed run equal an uninterrupted one: first append what an
exchange (and a finished round) has to report, then save the checkpoint; on resume `truncate_after` removes the lines
that the checkpoint does not know, and they are written again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedpeft.core import records
from fedpeft.core.errors import RecordError, StoreError
from fedpeft.core.exchange import ClientId, Record, Weights
from fedpeft.core.federate import Start
from fedpeft.core.tree import Params
from fedpeft.runs.files import (
    LOCK,
    TEMPORARY,
    Lock,
    append_file,
    from_lines,
    make_folder,
    parsed_lines,
    plain,
    storing,
    sync_folder,
    to_json,
    write_file,
    write_new,
)
from fedpeft.runs.memories import MemoryStore
from fedpeft.runs.tables import Tables

__all__ = ["Checkpoint", "MemoryStore", "RunFolder", "unused"]

_STARTING = ("run.log", "manifest.json", "partition.json", f"config.yaml{TEMPORARY}")  # written before config.yaml


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on, besides its configuration and the client memories."""

    number: int  # exchanges done
    round: int  # newest round whose line stands in metrics.jsonl; -1 before the first
    state: Record
    versions: Mapping[ClientId, int] = field(default_factory=dict)  # newest committed memory per client
    progress: Mapping[str, Any] = field(default_factory=dict)  # totals, best score, standing of the stop rule: JSON
    best: Params | None = None  # the best-validated parameters so far

    @property
    def start(self) -> Start:
        """What `federate` needs to go on from here."""
        return Start(self.number, self.state, self.versions)

    @property
    def best_round(self) -> int:
        """After which round `best` was taken, or the state itself where nothing was validated; 0 is the set-up."""
        found = self.round if self.best is None else self.progress.get("best_round", self.round)
        return max(int(found), 0)


def unused(path: Path) -> bool:
    """Whether a run may begin there: nothing, an empty folder, or what a run left that was killed in its first moment.

    A run writes its `config.yaml` after everything else that it begins with; a folder without one holds no run.
    """
    if not path.is_dir():
        return not path.exists()
    names = {entry.name for entry in path.iterdir()}
    begun = {LOCK, *_STARTING, *(name + TEMPORARY for name in _STARTING)}
    return not names or (LOCK in names and names <= begun)


class RunFolder:
    """One run on disk. Anybody may read it at any time; the first write takes the lock that one process can hold.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: Lock | None = None
        self._best: tuple[Params, Path] | None = None  # the best parameters last stored, and where
        self._tables = Tables()

    @classmethod
    def create(cls, out: Path) -> RunFolder:
        """A new run folder, locked for this process.

        Args:
            out: does not exist yet, or is `unused`.

        Raises:
            StoreError: it holds something, cannot be made, or is in use.
        """
        run = cls(out)
        with storing(run.path, "use"):
            if not unused(run.path):
                raise StoreError(
                    f"{out} exists and is not an empty folder; choose a new folder with --out, or go on with the run "
                    f"in it: fedpeft resume {out}"
                )
        make_folder(run.path)
        run.lock()
        with storing(run.path, "clean up"):
            for name in _STARTING:
                (run.path / name).unlink(missing_ok=True)
        append_file(run.log, b"")
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder, for reading; writing to it locks it.

        Raises:
            StoreError: it is not there or holds no run.
        """
        run = cls(path)
        if not (run.path / "config.yaml").is_file():
            what = "holds no run (no config.yaml)" if run.path.is_dir() else "is not a folder"
            raise StoreError(f"{path} {what}; give the folder that `fedpeft run` printed")
        return run

    def lock(self) -> None:
        """Take the right to write, and clear what a killed process has left half done.

        Raises:
            StoreError: another process holds it.
        """
        if self._lock is None:
            lock = Lock(self.path)
            try:
                with storing(self.path, "clean up"):
                    self._clear()
            except BaseException:
                lock.close()
                raise
            self._lock = lock

    def close(self) -> None:
        """Give the right to write back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- where things are ---

    @property
    def log(self) -> Path:
        """The log of everything."""
        return self.path / "run.log"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.path / "report.html"

    @property
    def adapter(self) -> Path:
        """The folder of the best-validated adapter."""
        return self.path / "adapter"

    def memories(self) -> MemoryStore:
        """The client memories of this run."""
        return MemoryStore(self._checkpoints / "memories")

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoint"

    # --- configuration, manifest, partition ---

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration."""
        text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
        self._write("config.yaml", text.encode())

    def load_config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return self._mapping("config.yaml", yaml.safe_load, yaml.YAMLError)

    def update_manifest(self, **fields: Any) -> None:
        """Set fields of the manifest; the others stay."""
        self._write("manifest.json", _pretty(self.manifest() | fields), durable=False)

    def manifest(self) -> dict[str, Any]:
        """The manifest; empty before its first field is set."""
        return self._mapping("manifest.json", json.loads, ValueError)

    def save_partition(self, partition: Mapping[str, Any]) -> None:
        """Write which rows each client has."""
        self._write("partition.json", to_json(partition).encode() + b"\n")

    def partition(self) -> dict[str, Any]:
        """Which rows each client has; empty where that was not written."""
        return self._mapping("partition.json", json.loads, ValueError)

    def save_clients(self, clients: Mapping[ClientId, Any]) -> None:
        """Write every client's rows, scores and losses."""
        self._write("clients.json", to_json(clients).encode() + b"\n", durable=False)

    def clients(self) -> dict[ClientId, Any]:
        """What `save_clients` wrote; empty where nothing was."""
        path = self.path / "clients.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} is damaged: {error}. Evaluate the run again, or remove the file.") from error

    def save_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """What models said for some test rows: one JSON object a line."""
        self._write("samples.jsonl", "".join(f"{to_json(one)}\n" for one in samples).encode(), durable=False)

    def samples(self) -> list[dict[str, Any]]:
        """What `save_samples` wrote; nothing where nothing was."""
        path = self.path / "samples.jsonl"
        if not path.is_file():
            return []
        try:
            return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error}); evaluate the run again, or remove the file") from error

    def _write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        self.lock()
        write_file(self.path / name, data, durable=durable)

    def _mapping(self, name: str, parse: Callable[[str], Any], wrong: type[Exception]) -> dict[str, Any]:
        path = self.path / name
        with storing(path, "read"):
            text = path.read_text(encoding="utf-8") if path.exists() else "{}"
        try:
            value = parse(text)
        except wrong as error:
            raise StoreError(f"{path} is damaged: {error}. Restore it from a copy.") from error
        if not isinstance(value, dict):
            raise StoreError(f"{path} holds {type(value).__name__} where keys and values were expected; restore it")
        return value

    # --- what each round and exchange reported ---

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append the line of a finished round; it has a `round`."""
        self._append("metrics.jsonl", [line], "round")

    def append_exchanges(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append the lines of a finished exchange; each has a `number`, the exchanges done with it (`Done.number`)."""
        self._append("exchanges.jsonl", list(lines), "number")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of all finished rounds."""
        return from_lines(self.path / "metrics.jsonl")

    def exchanges(self) -> list[dict[str, Any]]:
        """The lines of all finished exchanges."""
        return from_lines(self.path / "exchanges.jsonl")

    def truncate_after(self, round: int, number: int) -> None:
        """Remove the lines of later rounds and later exchanges: what was reported after the newest checkpoint."""
        self.lock()
        for name, key, newest in (("metrics.jsonl", "round", round), ("exchanges.jsonl", "number", number)):
            path = self.path / name
            kept = b"".join(line for line, value in parsed_lines(path) if value[key] <= newest)
            if path.exists() and path.stat().st_size != len(kept):
                write_file(path, kept, durable=True)

    def _append(self, name: str, lines: Sequence[Mapping[str, Any]], key: str) -> None:
        self.lock()
        for line in lines:
            if not isinstance(line.get(key), int):
                raise StoreError(f"a line for {self.path / name} needs a whole number {key!r}, got {line.get(key)!r}")
        append_file(self.path / name, "".join(to_json(line) + "\n" for line in lines).encode())

    # --- checkpoints ---

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Store the newest state; the one before is deleted when this one is complete and safe on disk."""
        self.lock()
        make_folder(self._checkpoints)
        older = self._complete()
        serial = int(older[-1].name) + 1 if older else 1
        target = self._checkpoints / f"{serial:06d}"
        draft = target.with_name(target.name + TEMPORARY)
        figures: dict[str, Any] = {
            "number": checkpoint.number,
            "round": checkpoint.round,
            "versions": checkpoint.versions,
            "progress": checkpoint.progress,
        }
        try:
            make_folder(draft)
            with storing(target):
                state, figures["tables"] = self._tables.write(draft, checkpoint.state)
                write_new(draft / "state.safetensors", records.encode(state), durable=True)
                write_new(draft / "progress.json", _pretty(figures), durable=True)
                if checkpoint.best is not None:
                    self._store_best(checkpoint.best, draft / "best.safetensors")
                sync_folder(draft)
                os.rename(draft, target)
                sync_folder(self._checkpoints)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        self._tables.moved(draft, target)
        self._best = None if checkpoint.best is None else (checkpoint.best, target / "best.safetensors")
        for folder in older:
            shutil.rmtree(folder, ignore_errors=True)

    def _store_best(self, best: Params, path: Path) -> None:
        """Link to the file of the checkpoint before where the parameters are the same object, else write them."""
        if self._best is not None and self._best[0] is best:
            with suppress(OSError):  # a file system without links, or a file that is gone: write it
                os.link(self._best[1], path)
                return
        write_new(path, records.encode(Weights(best)), durable=True)

    def load_checkpoint(self, state: type[Record]) -> Checkpoint | None:
        """The newest complete checkpoint, None where there is none yet.

        Args:
            state: the method's type of state.

        Raises:
            StoreError: it cannot be read, or holds another state.
        """
        while complete := self._complete():
            try:
                return self._read_checkpoint(complete[-1], state)
            except StoreError:
                if complete[-1] in self._complete():
                    raise
                # the run that is going on has replaced it meanwhile: read the newer one
        return None

    def _read_checkpoint(self, folder: Path, state: type[Record]) -> Checkpoint:
        best_path = folder / "best.safetensors"
        try:
            with storing(folder, "read"):
                figures = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
                bare = records.decode((folder / "state.safetensors").read_bytes(), state)
                found = self._tables.read(folder, bare, figures.get("tables", {}))
                best = records.decode(best_path.read_bytes(), Weights).params if best_path.exists() else None
            checkpoint = Checkpoint(
                figures["number"], figures["round"], found, figures["versions"], figures["progress"], best
            )
        except (RecordError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"the checkpoint {folder} is damaged or belongs to another method ({error}); restore it from a copy, "
                f"or start the run again"
            ) from error
        self._best = None if best is None else (best, best_path)
        return checkpoint

    def _complete(self) -> list[Path]:
        """The folders of complete checkpoints, oldest first."""
        with storing(self._checkpoints, "read"):
            names = os.listdir(self._checkpoints) if self._checkpoints.is_dir() else []
        return [self._checkpoints / name for name in sorted(filter(str.isdigit, names), key=int)]

    def _clear(self) -> None:
        for path in (*self.path.glob(f"*{TEMPORARY}"), *self._checkpoints.glob(f"*{TEMPORARY}")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for folder in self._complete()[:-1]:
            shutil.rmtree(folder, ignore_errors=True)
        for name in ("metrics.jsonl", "exchanges.jsonl"):
            path = self.path / name
            whole = sum(len(line) for line, _ in parsed_lines(path))
            if path.exists() and path.stat().st_size > whole:
                os.truncate(path, whole)


def _pretty(value: Mapping[str, Any]) -> bytes:
    return json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False).encode() + b"\n"
