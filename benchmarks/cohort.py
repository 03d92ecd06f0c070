"""Cohort training against sequential training of the same clients on the same batches.

    python -m benchmarks.cohort --clients 30
    python -m benchmarks.cohort --model roberta-large --device cuda --dtype bfloat16 --data random --length 128 \
        --token-budget 16384

One repetition is a whole round of local training: every client's batches, from the same start. Both ways run in turns;
the ratio is the median over neighbours. Reported beside it: real tokens per second, and counted operations per second
as a share of what a matrix product reaches on this machine in this dtype with these threads.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import record, timing, workload
from fedpeft.core import tree
from fedpeft.core.examples import Examples
from fedpeft.core.fit import AdamW, Fit, Fitted, alone
from fedpeft.core.rng import rng_for
from fedpeft.models.hf import HFModel
from fedpeft.planner.cost import shape_of, train_flops


def make_fits(model: HFModel, data: dict[str, Examples], batch: int, steps: int | None) -> list[Fit]:
    """One epoch, or `steps` steps, of every client from the same fresh adapter."""
    start = model.init(rng_for(0, "adapter"))
    batches = {c: own.epochs(1, batch, rng_for(0, "batches", client=c))[:steps] for c, own in data.items()}
    return [Fit(start, own, batches[client], AdamW(1e-3)) for client, own in data.items()]


def together(model: HFModel, fits: Sequence[Fit]) -> list[Fitted]:
    """The whole cohort in the same passes."""
    return [alone([result]) for result in model.fit_many(fits)]


def one_by_one(model: HFModel, fits: Sequence[Fit]) -> list[Fitted]:
    """One client after another."""
    return [model.fit(fit) for fit in fits]


def largest_difference(a: Sequence[Fitted], b: Sequence[Fitted]) -> float:
    """The largest relative distance between a client's parameters in both."""
    return max(tree.norm(tree.sub(x.params, y.params)) / tree.norm(y.params) for x, y in zip(a, b, strict=True))


def profile(model: HFModel, fits: Sequence[Fit], rows: int) -> str:
    """The operations that cohort training spends its time on, as torch's profiler tells them."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profiler(activities=activities) as seen:
        together(model, fits)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return str(seen.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=40))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one comparison."""
    base = workload.make_base(options.model, options.dtype, options.device)
    data, classes = workload.make_data(options, base)
    model = HFModel(base, workload.lora(options.rank), classes, options.token_budget)
    fits = make_fits(model, data, options.batch, options.steps)
    if options.profile:
        print(profile(model, fits, options.profile))
    size = options.matrix or (8192 if model.device.type == "cuda" else 2048)
    rate = timing.matrix_rate(model.device, base.dtype, size)
    works = {"sequential": lambda: one_by_one(model, fits), "cohort": lambda: together(model, fits)}
    times = timing.in_turns(works, options.repeats)
    rate = max(rate, timing.matrix_rate(model.device, base.dtype, size))
    trained = together(model, fits)
    tokens, pairs = sum(f.tokens for f in trained), sum(f.pairs for f in trained)
    flops = train_flops(shape_of(base.config), tokens, pairs)
    median = {name: statistics.median(each) for name, each in times.items()}
    return {
        "ratio": timing.ratios(times["sequential"], times["cohort"]),
        "seconds": median,
        "tokens": tokens,
        "steps": [fit.steps for fit in fits],
        "tokens_per_s": {name: tokens / s for name, s in median.items()},
        "matrix_flops_per_s": rate,
        "share_of_matrix_rate": {name: flops / s / rate for name, s in median.items()},
        "largest_relative_difference": largest_difference(trained, one_by_one(model, fits)),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    workload.add_options(parser, clients=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--matrix", type=int, help="size of the matrix product that rates are compared with")
    parser.add_argument(
        "--profile", type=int, nargs="?", const=15, metavar="ROWS", help="print the costliest operations"
    )
    options = parser.parse_args(arguments)
    workload.use_threads(options.threads)
    result = measure(options)
    rows: list[list[Any]] = [["", "seconds", "tokens/s", "share of matrix rate"]]
    for name in ("sequential", "cohort"):
        rows.append([name, *(result[key][name] for key in ("seconds", "tokens_per_s", "share_of_matrix_rate"))])
    record.show(rows)
    ratio = result["ratio"]
    print(f"cohort is {ratio['median']:.2f} times as fast ({ratio['min']:.2f} to {ratio['max']:.2f})")
    return record.keep("cohort", options, result)


if __name__ == "__main__":
    main()
