"""Training prefixes in all blocks against half of them: the upper half, and a half that is drawn at random.

    python -m benchmarks.prefix --clients 10
    python -m benchmarks.prefix --data random --length 64 --steps 2

The backward pass ends at the lowest block that has a prefix, so the upper half saves half of it; a half drawn at random
saves only the keys of the other blocks and what lies below its lowest. One repetition is the local training of a whole
cohort, from the same start and on the same batches; the ways run in turns, and ratios are medians over neighbours. LoRA
on query and value stands beside them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks import record, timing, workload
from fedpeft.core.adapter import AdapterSpec, Lora, Prefix
from fedpeft.core.examples import Examples
from fedpeft.core.fit import AdamW, Fit, Fitted, alone
from fedpeft.core.rng import rng_for
from fedpeft.models.hf import HFModel
from fedpeft.models.load import Base


def make_specs(options: argparse.Namespace, blocks: int) -> dict[str, AdapterSpec]:
    """The adapters that are compared."""
    half = blocks // 2
    drawn = rng_for(0, "benchmark").choice(blocks, size=half, replace=False)
    chosen = {"all": None, "upper half": range(blocks - half, blocks), "random half": sorted(drawn.tolist())}
    prefixes = {
        name: Prefix(options.prefix, None if some is None else tuple(some), options.dropout)
        for name, some in chosen.items()
    }
    return {**prefixes, "lora": Lora(options.rank, 2.0 * options.rank, dropout=options.dropout)}


def make_fits(model: HFModel, data: Mapping[str, Examples], options: argparse.Namespace) -> list[Fit]:
    """One epoch, or some steps, of every client from the same fresh adapter."""
    start = model.init(rng_for(0, "adapter"))
    batches = {c: own.epochs(1, options.batch, rng_for(0, "batches", client=c)) for c, own in data.items()}
    return [
        Fit(start, own, batches[client][: options.steps], AdamW(1e-2), seed=i, dropout=options.dropout)
        for i, (client, own) in enumerate(data.items())
    ]


def train(model: HFModel, fits: Sequence[Fit]) -> list[Fitted]:
    """The whole cohort in the same passes."""
    return [alone([result]) for result in model.fit_many(fits)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one comparison."""
    base: Base = workload.make_base(options.model, options.dtype, options.device)
    data, classes = workload.make_data(options, base)
    specs = make_specs(options, int(base.module.config.num_hidden_layers))
    models = {name: HFModel(base, spec, classes, options.token_budget) for name, spec in specs.items()}
    fits = {name: make_fits(model, data, options) for name, model in models.items()}
    times = timing.in_turns({name: partial(train, models[name], fits[name]) for name in specs}, options.repeats)
    start = fits["all"][0].params
    return {
        "ratio": {name: timing.ratios(times["all"], times[name]) for name in specs if name != "all"},
        "seconds": {name: statistics.median(each) for name, each in times.items()},
        "lowest_block": {name: model.lowest_block(fits[name][0].params) for name, model in models.items()},
        "tokens": sum(fit.tokens for fit in train(models["all"], fits["all"])),
        "numbers": sum(t.numel() for name, t in start.items() if "prefix" in name),
        "steps": [fit.steps for fit in fits["all"]],
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    workload.add_options(parser, clients=10)
    parser.add_argument("--prefix", type=int, default=20, help="virtual tokens per block")
    parser.add_argument("--dropout", type=float, default=0.1, help="on the prefix, and on the input of LoRA")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    workload.use_threads(options.threads)
    result = measure(options)
    rows: list[list[Any]] = [["", "lowest block", "seconds", "times as fast as all", "least", "greatest"]]
    for name, seconds in result["seconds"].items():
        ratio = result["ratio"].get(name, {"median": 1.0, "min": 1.0, "max": 1.0})
        rows.append([name, result["lowest_block"][name], seconds, ratio["median"], ratio["min"], ratio["max"]])
    record.show(rows)
    return record.keep("prefix", options, result)


if __name__ == "__main__":
    main()
