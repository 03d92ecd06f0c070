"""A small federation for whole runs: a text task that a tiny random BERT learns in seconds, and what a run leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.core.rng import rng_for
from fedpeft.methods import load
from fedpeft.runs import files
from fedpeft.runs.store import Checkpoint, RunFolder

WORDS = {
    "cooking": ["boil", "soup", "salt", "butter", "pot", "oven"],
    "sailing": ["hoist", "sail", "steer", "boat", "wind", "anchor"],
    "weaving": ["loom", "thread", "warp", "weft", "yarn", "cloth"],
}
FILLER = ["the", "a", "of", "and", "with", "into", "slowly"]
LABELS = tuple(WORDS)
TIMES = ("seconds",)  # measured, so never equal twice


def rows(n: int, place: str, pairs: bool = False) -> list[dict[str, str]]:
    """Texts of five words, three of them of the label's own; a pair tells whether both texts are of one kind."""
    rng = rng_for(0, "small", place)
    found = []
    for i in range(n):
        label = LABELS[i % len(LABELS)]
        if not pairs:
            found.append({"text": _text(rng, label), "label": label})
            continue
        same = i % 2 == 0
        other = label if same else LABELS[(i + 1) % len(LABELS)]
        found.append(
            {"sentence1": _text(rng, label), "sentence2": _text(rng, other), "label": "same" if same else "other"}
        )
    return found


def _text(rng: np.random.Generator, label: str) -> str:
    words = [*rng.choice(WORDS[label], size=3), *rng.choice(FILLER, size=2)]
    return " ".join(str(word) for word in rng.permutation(words))


def write_rows(path: Path, values: Sequence[Mapping[str, Any]]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return path


def write_model(folder: Path, blocks: int = 2) -> Path:
    """A random BERT of so many blocks of width 32 with a WordPiece for the words above, in Hugging Face format."""
    from transformers import BertConfig, BertModel, BertTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder.mkdir()
    words = sorted({word for kind in WORDS.values() for word in kind} | set(FILLER))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = BertConfig(
        vocab_size=5 + len(words), hidden_size=32, num_hidden_layers=blocks, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(shape, add_pooling_layer=False).save_pretrained(folder)
    return folder


def make_place(folder: Path) -> Path:
    """A folder with the model `tiny`, single texts (train, test) and pairs (pairs, pairs_test)."""
    folder.mkdir(exist_ok=True)
    write_model(folder / "tiny")
    write_rows(folder / "train.jsonl", rows(120, "train"))
    write_rows(folder / "test.jsonl", rows(42, "test"))
    write_rows(folder / "pairs.jsonl", rows(80, "pairs", pairs=True))
    write_rows(folder / "pairs_test.jsonl", rows(30, "pairs_test", pairs=True))
    return folder


def changed(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with other values; `run__rounds` is `run.rounds`."""
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return values


def config(place: Path, **changes: Any) -> dict[str, Any]:
    """Six clients, four per round, three rounds of FedAvg; `run__rounds=5` changes one key."""
    values: dict[str, Any] = {
        "model": {"name": str(place / "tiny"), "device": "cpu"},
        "task": {
            "name": "trades", "train": str(place / "train.jsonl"), "test": str(place / "test.jsonl"), "max_length": 16,
        },
        "partition": {"clients": 6, "alpha": 5.0, "size_alpha": 20.0},
        "method": {"name": "fedavg", "cohort": 4, "epochs": 2, "batch_size": 8, "lr": 2e-2},
        "adapter": {"rank": 4},
        "run": {"rounds": 3, "evaluate_every": 1, "threads": 1},
    }  # fmt: skip
    changed(values, changes)
    if values["method"]["name"] == "centralized":  # it has one client
        del values["method"]["cohort"]
    if values["method"]["name"] == "scaffold":  # plain SGD
        values["method"]["lr"] = 0.5
    return values


def sha(folder: Path) -> str:
    """The hash of the final parameters."""
    return str(RunFolder.open(folder).manifest()["params_sha256"])


def checkpoint(folder: Path, method: str = "fedavg") -> Checkpoint:
    """The newest state."""
    found = RunFolder.open(folder).load_checkpoint(load(method).state)
    assert found is not None
    return found


def memory(folder: Path, client: str, method: str) -> Any:
    """A client's committed memory."""
    version = checkpoint(folder, method).versions[client]
    return RunFolder.open(folder).memories().load(client, version, load(method).memory)


def timeless(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl or exchanges.jsonl without measured times."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def story(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a run reported, without measured times."""
    run = RunFolder.open(folder)
    return timeless(run.metrics()), timeless(run.exchanges())


def params(folder: Path, method: str = "fedavg") -> dict[str, torch.Tensor]:
    """The final global parameters."""
    return dict(load(method)().result(checkpoint(folder, method).state))


# --- processes that end early ---------------------------------------------------------------------------------------


def command(*arguments: Any) -> subprocess.Popen[str]:
    """`fedpeft ARGUMENTS` as a process of its own."""
    code = "from fedpeft.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def killed(action: Callable[[], object], at: int) -> bool:
    """Do it in a process of its own that SIGKILL ends at its write number `at`; whether it came to that.

    The process is a fork of this one, so it starts at once. A write is torn: half of it is on disk.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks
        child = os.fork()
    if child == 0:
        kill = on_write(lambda number: number == at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        with contextlib.suppress(BaseException), kill:
            action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


class Writes:
    """Counts what a run does to the disk."""

    def __init__(self) -> None:
        self.number = 0


@contextlib.contextmanager
def on_write(when: Callable[[int], bool], then: Callable[[], object]) -> Iterator[Writes]:
    """Before a file is renamed, replaced or removed, and in the middle of a write, call `then` if it is time.

    Args:
        when: told the number of the event, from 0.
    """
    events = Writes()

    def event() -> None:
        events.number += 1
        if when(events.number - 1):
            then()

    def before(act: Callable[..., Any]) -> Callable[..., Any]:
        def acting(*arguments: Any, **named: Any) -> Any:
            event()
            return act(*arguments, **named)

        return acting

    def write_all(fd: int, data: bytes) -> None:
        whole(fd, data[: len(data) // 2])
        event()
        whole(fd, data[len(data) // 2 :])

    whole = files.write_all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_all", write_all)
        for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
            patch.setattr(module, name, before(getattr(module, name)))
        yield events
