"""What it costs to measure how difficult every example is, over one plain epoch of training on the same data.

    python -m benchmarks.difficulty --clients 10

The difficulty is the trace of the Fisher information of LoRA's factors, sample by sample, by hooks. Beside it stands
the same by a pass of its own per sample. The ways run in turns, client by client; ratios are medians over neighbours.
The second figure is how alike two rankings are that differ in the factors A that LoRA starts from (Spearman's rank
correlation, per client, over the same trained head).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import record, timing, workload
from fedpeft.core import pairs, tree
from fedpeft.core.adapter import Lora
from fedpeft.core.examples import Examples
from fedpeft.core.fit import AdamW, Fit
from fedpeft.core.rng import rng_for
from fedpeft.models.hf import HFModel


def score(model: HFModel, params: Mapping[str, Tensor], data: Mapping[str, Examples]) -> list[Tensor]:
    """The difficulty of every example of every client."""
    return [model.fisher(params, own, range(len(own))).trace for own in data.values()]


def one_by_one(model: HFModel, params: Mapping[str, Tensor], data: Mapping[str, Examples]) -> list[Tensor]:
    """The same with a pass per sample."""
    alone = [torch.cat([model.fisher(params, own, [i]).trace for i in range(len(own))]) for own in data.values()]
    return alone


def train(model: HFModel, params: Mapping[str, Tensor], data: Mapping[str, Examples], batch: int) -> None:
    """One plain epoch of every client, one after another."""
    for client, own in data.items():
        model.fit(Fit(params, own, own.epochs(1, batch, rng_for(0, "batches", client=client)), AdamW(1e-3)))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, without ties."""
    ranks = [t.argsort().argsort().double() for t in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one comparison."""
    base = workload.make_base(options.model, options.dtype, options.device)
    data, classes = workload.make_data(options, base)
    model = HFModel(base, Lora(options.rank, 2.0 * options.rank), classes, options.token_budget)
    start = model.init(rng_for(0, "adapter"))
    ways: dict[str, Callable[[], object]] = {
        "epoch": partial(train, model, start, data, options.batch),
        "difficulty": partial(score, model, start, data),
        "one by one": partial(one_by_one, model, start, data),
    }
    times = timing.in_turns(ways, options.repeats)
    pooled = Examples(
        tuple(t for own in data.values() for t in own.tokens),
        torch.cat([torch.from_numpy(own.labels) for own in data.values()]).numpy(),
    )
    warm = model.fit(Fit(start, pooled, pooled.epochs(1, options.batch, rng_for(0, "warm")), AdamW(1e-3))).params
    head = pairs.others(warm)
    traces = [score(model, tree.overlay(model.init(rng_for(seed, "adapter")), head), data) for seed in (1, 2)]
    alike = [rank_correlation(a, b) for a, b in zip(*traces, strict=True) if len(a) > 2]
    both = zip(score(model, start, data), one_by_one(model, start, data), strict=True)
    largest = max(float(((a - b) / b).abs().max()) for a, b in both)
    return {
        "ratio": {name: timing.ratios(times[name], times["epoch"]) for name in ("difficulty", "one by one")},
        "seconds": {name: statistics.median(each) for name, each in times.items()},
        "rank_correlation": {"median": statistics.median(alike), "min": min(alike), "max": max(alike)},
        "largest_relative_difference": largest,
        "rows": [len(own) for own in data.values()],
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    workload.add_options(parser, clients=10)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    workload.use_threads(options.threads)
    result = measure(options)
    rows: list[list[Any]] = [["", "seconds", "over one epoch", "least", "greatest"]]
    for name, seconds in result["seconds"].items():
        ratio = result["ratio"].get(name, {"median": 1.0, "min": 1.0, "max": 1.0})
        rows.append([name, seconds, ratio["median"], ratio["min"], ratio["max"]])
    alike = result["rank_correlation"]
    rows.append(["rank correlation", "", alike["median"], alike["min"], alike["max"]])
    record.show(rows)
    return record.keep("difficulty", options, result)


if __name__ == "__main__":
    main()
