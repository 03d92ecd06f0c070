"""How much of the gap between an untuned and a directly tuned large model does a tuned small one close?

    python -m benchmarks.gap --tasks code shakespeare docstrings --seeds 0 1 2 --threads 1

FedPT without distillation on the embedded pair. A task's clients tune `demo-small` federatedly; the same rounds on
`demo-large` are the reference. For every alpha: the mean loss of the answers' tokens under z_L + alpha (z_T - z_B), on
test rows; alpha is chosen on validation rows of the server. Gap closed: (base large - proxy) / (base large - tuned
large).

    code         code of the standard library, which neither model has seen; four clients, split by file
    shakespeare  speeches, a client for each of the roles with at least 20 of them (needs FEDPEFT_DATA)
    docstrings   the first sentence of a docstring behind the head of its function; a client per package. The models
                 have seen the private docstrings in pre-training, without the heads, and none of the test rows'
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import record, workload
from fedpeft.core.adapter import AdapterSpec, Full, Lora
from fedpeft.core.examples import Examples
from fedpeft.core.federate import federate
from fedpeft.core.tree import Params
from fedpeft.data.demo import standard_library
from fedpeft.data.library import LibraryFile, docstrings, read_library
from fedpeft.engines.inprocess import InProcess
from fedpeft.maths.logits import curve_terms, losses, offsets
from fedpeft.methods.fedpt import FedPT
from fedpeft.models.distil import token_logits
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import load_lm_head
from fedpeft.models.load import load_base
from fedpeft.models.readouts.generate import GenerateReadout

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
CONTEXT, CODE_TOKENS, LONG_CODE = 128, 60_000, 4_000
FEWEST_SPEECHES, FEWEST_DOCSTRINGS = 20, 60
RATES = {("small", "lora"): 1e-2, ("large", "lora"): 3e-3, ("small", "full"): 3e-3, ("large", "full"): 1e-3}
CHUNK = 64  # rows whose scores are held at once

Row = tuple[list[int], list[int]]  # prompt and answer


@dataclass(frozen=True)
class Task:
    """Rows of each client, and the server's."""

    clients: Mapping[str, Sequence[Row]]
    validation: Sequence[Row]
    test: Sequence[Row]
    rounds: int
    cohort: int  # clients per round; 0: all


# --- tasks ------------------------------------------------------------------------------------------------------


def code_task(tokenizer: Any, seed: int) -> Task:
    """Windows of code; of validation and test files the first two of each."""
    files = [file for file in read_library() if len(file.code) > LONG_CODE]
    own = [file for file in files if file.split == "train"]
    order = np.random.default_rng((seed, 10)).permutation(len(own))
    clients: dict[str, list[Row]] = {}
    for client in range(4):
        ids = [token for i in order[client::4] for token in _ids(tokenizer, own[i].code)][:CODE_TOKENS]
        clients[str(client)] = _windows(ids)
    held = {split: _first_windows(tokenizer, files, split) for split in ("validation", "test")}
    return Task(clients, held["validation"], held["test"], 5, 0)


def shakespeare_task(tokenizer: Any, seed: int) -> Task:
    """Speeches; of each role's, in an order of this seed, a tenth is validation and a tenth test."""
    folder = Path(os.environ.get("FEDPEFT_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = folder / "tinyshakespeare" / "by_speaker.jsonl.gz"
    if not path.exists():
        raise SystemExit(f"{path} is not there; set FEDPEFT_DATA to the folder of the data sets, or leave it out")
    roles: dict[str, list[str]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            roles.setdefault(row["speaker"], []).append(row["text"])
    clients: dict[str, list[Row]] = {}
    validation: list[Row] = []
    test: list[Row] = []
    rng = np.random.default_rng((seed, 11))
    for role, texts in sorted(roles.items()):
        if len(texts) < FEWEST_SPEECHES:
            continue
        rows = [_plain(_ids(tokenizer, texts[i]), tokenizer.eos_token_id) for i in rng.permutation(len(texts))]
        tenth = len(rows) // 10
        validation, test = validation + rows[:tenth], test + rows[tenth : 2 * tenth]
        clients[role] = rows[2 * tenth :]
    return Task(clients, validation, test, 10, 10)


def docstring_task(tokenizer: Any, seed: int) -> Task:
    """Heads of functions and classes, and what their docstrings say first; the seed deals nothing here."""
    rows: dict[tuple[str, str], list[Row]] = {}
    for file in read_library():
        for head, sentence in docstrings((standard_library() / file.name).read_bytes()):
            prompt = _ids(tokenizer, f"{head}\n")
            answer = [*_ids(tokenizer, sentence), tokenizer.eos_token_id]
            if len(prompt) + len(answer) <= CONTEXT:
                rows.setdefault((file.split, _package(file)), []).append((prompt, answer))
    clients = {package: own for (split, package), own in rows.items() if split == "train"}
    held = {
        split: [row for (where, _), own in rows.items() if where == split for row in own]
        for split in ("validation", "test")
    }
    large = {package: own for package, own in clients.items() if len(own) >= FEWEST_DOCSTRINGS}
    return Task(large, held["validation"], held["test"], 10, 10)


def _package(file: LibraryFile) -> str:
    return file.name.split("/")[0].removesuffix(".py")


def _first_windows(tokenizer: Any, files: Iterable[LibraryFile], split: str) -> list[Row]:
    own = (file for file in files if file.split == split)
    return [row for file in own for row in _windows(_ids(tokenizer, file.code)[: 2 * CONTEXT])]


def _windows(ids: Sequence[int]) -> list[Row]:
    """Whole windows behind each other; all but the first token of each is predicted."""
    starts = range(0, len(ids) - CONTEXT + 1, CONTEXT)
    return [(list(ids[start : start + 1]), list(ids[start + 1 : start + CONTEXT])) for start in starts]


def _plain(ids: list[int], end: int) -> Row:
    whole = [*ids, end][:CONTEXT]
    return whole[:1], whole[1:]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids]


TASKS = {"code": code_task, "shakespeare": shakespeare_task, "docstrings": docstring_task}


# --- models -----------------------------------------------------------------------------------------------------


def model_of(size: str, adapter: str) -> HFModel:
    """`demo-small` or `demo-large` with LoRA on all linear layers, or with all weights."""
    name = f"demo-{size}"
    base = load_base(name, device="cpu")
    spec: AdapterSpec = Full() if adapter == "full" else Lora(8, 16.0, ("all",))
    return HFModel(base, spec, 0, 2048, GenerateReadout(load_lm_head(name, base)))


def tune(model: HFModel, task: Task, seed: int, lr: float, options: argparse.Namespace) -> Params:
    """The adapter after federated tuning."""
    method = FedPT(task.cohort, 1, 8, lr, weight_decay=0.01, clip=None, steps=options.steps, distil=False)
    splits = {client: {"train": examples(rows)} for client, rows in task.clients.items()}
    engine = InProcess(lambda: method, model, splits, seed, batch=10)
    *_, last = federate(method, engine, model, rounds=options.rounds or task.rounds, seed=seed)
    params: Params = method.result(last.state)
    return params


def examples(rows: Sequence[Row]) -> Examples:
    """As the format `generate` reads them."""
    tokens = tuple(np.array(prompt + answer, np.int32) for prompt, answer in rows)
    starts = np.array([len(prompt) for prompt, _ in rows], np.int64)
    return Examples(tokens, np.zeros(len(rows), np.int64), starts=starts)


def scores(small: HFModel, tuned: Params, large: HFModel, direct: Params, rows: Sequence[Row]) -> dict[str, Any]:
    """Mean loss of the answers' tokens: of each model alone, and of the proxy for every alpha."""
    sums = dict.fromkeys(("base_small", "tuned_small", "tuned_large"), 0.0)
    curve, n = torch.zeros(len(GRID), dtype=torch.float64), 0
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        data, targets = examples(part), torch.tensor([token for _, answer in part for token in answer])
        tuned_small, base_small = (token_logits(small, params, data) for params in (tuned, None))
        said = base_small, tuned_small, token_logits(large, direct, data)
        for name, logits in zip(sums, said, strict=True):
            sums[name] += float(losses(logits, targets).double().sum())
        curve += curve_terms(token_logits(large, None, data), offsets(tuned_small, base_small), targets, GRID)
        n += len(targets)
    means = _each(curve / n)
    return {**{name: total / n for name, total in sums.items()}, "base_large": means[0], "proxy": means, "tokens": n}


def _each(values: Tensor) -> list[float]:
    return [float(value) for value in values]


# --- figures ----------------------------------------------------------------------------------------------------


def measure(name: str, adapter: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one task, adapter and seed."""
    begun = time.perf_counter()
    small, large = model_of("small", adapter), model_of("large", adapter)
    task = TASKS[name](small.base.tokenizer, seed)
    if options.rows:
        few = {client: rows[: options.rows] for client, rows in task.clients.items()}
        task = Task(few, task.validation[: options.rows], task.test[: options.rows], task.rounds, task.cohort)
    tuned = tune(small, task, seed, RATES["small", adapter], options)
    direct = tune(large, task, seed, RATES["large", adapter], options)
    chosen = scores(small, tuned, large, direct, task.validation)
    found = scores(small, tuned, large, direct, task.test)
    place = int(np.argmin(chosen["proxy"]))
    gap = found["base_large"] - found["tuned_large"]
    return {
        "task": name,
        "adapter": adapter,
        "seed": seed,
        "clients": len(task.clients),
        "rows": {"clients": sum(map(len, task.clients.values())), "test": len(task.test)},
        "test": found,
        "validation": chosen,
        "alpha": GRID[place],
        "gap_closed": [(found["base_large"] - loss) / gap for loss in found["proxy"]],
        "gap_closed_at_alpha": (found["base_large"] - found["proxy"][place]) / gap,
        "adapter_numbers": {
            "small": sum(t.numel() for t in tuned.values()),
            "large": sum(t.numel() for t in direct.values()),
        },
        "seconds": time.perf_counter() - begun,
    }


def table(cells: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A row per task and adapter: means over seeds."""
    heads = ["task", "adapter", "seeds", "base small", "tuned small", "base large"]
    rows: list[list[Any]] = [[*heads, *(f"alpha {a:g}" for a in GRID[1:]), "tuned large", "alpha*", "gap closed"]]
    for task, adapter in dict.fromkeys((cell["task"], cell["adapter"]) for cell in cells):
        own = [cell for cell in cells if (cell["task"], cell["adapter"]) == (task, adapter)]
        means = {key: _mean(cell["test"][key] for cell in own) for key in ("base_small", "tuned_small", "tuned_large")}
        proxy = [_mean(cell["test"]["proxy"][i] for cell in own) for i in range(len(GRID))]
        line = [task, adapter, len(own), means["base_small"], means["tuned_small"], *proxy, means["tuned_large"]]
        alphas = " ".join(f"{cell['alpha']:g}" for cell in own)
        rows.append([*line, alphas, _mean(cell["gap_closed_at_alpha"] for cell in own)])
    return rows


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=["code", "docstrings"])
    parser.add_argument("--adapters", nargs="+", choices=["lora", "full"], default=["lora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, help="instead of the task's own number")
    parser.add_argument("--steps", type=int, default=15, help="steps of 8 rows per client and round")
    parser.add_argument("--rows", type=int, help="use so many rows of each client, of validation and of test")
    options = parser.parse_args(arguments)
    workload.use_threads(options.threads)
    cells = []
    for task in options.tasks:
        for adapter in options.adapters:
            for seed in options.seeds:
                cells.append(measure(task, adapter, seed, options))
                print(f"{task} {adapter} seed {seed}: gap closed {cells[-1]['gap_closed_at_alpha']:.2f}", flush=True)
    record.show(table(cells))
    return record.keep("gap", options, {"grid": list(GRID), "cells": cells})


if __name__ == "__main__":
    main()
