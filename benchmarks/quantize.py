"""What a quantised base saves and costs: bytes of the base, and time of a training step against float32.

    python -m benchmarks.quantize
    python -m benchmarks.quantize --data random --length 64 --steps 2

Every step dequantises each weight twice, forward and backward, whatever the batch; so what a step costs more shrinks as
batches grow. One repetition is the local training of a whole cohort, from the same start and on the same batches; the
formats run in turns, and ratios are medians over neighbours. Gradient checkpointing on the full base stands beside
them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import record, timing, workload
from fedpeft.core.examples import Examples
from fedpeft.core.fit import AdamW, Fit, Fitted, alone
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params
from fedpeft.models.hf import HFModel

FORMATS = ("int8", "nf4", "nf4dq")
FULL, AGAIN = "full", "full, checkpointing"


def make_fits(model: HFModel, data: Mapping[str, Examples], options: argparse.Namespace) -> dict[str, list[Fit]]:
    """The same local training of every client, by base."""
    start = model.init(rng_for(0, "adapter"))
    batches = {c: own.epochs(1, options.batch, rng_for(0, "batches", client=c)) for c, own in data.items()}
    plain = [Fit(start, own, batches[client][: options.steps], AdamW(1e-3)) for client, own in data.items()]
    ways = {FULL: plain, AGAIN: [replace(fit, checkpointing=True) for fit in plain]}
    return ways | {name: [replace(fit, base=name) for fit in plain] for name in FORMATS}


def train(model: HFModel, fits: Sequence[Fit]) -> list[Fitted]:
    """The whole cohort in the same passes."""
    return [alone([result]) for result in model.fit_many(fits)]


def kept_bytes(model: HFModel, fits: Sequence[Fit]) -> int:
    """The most that autograd keeps of one part of one step, besides the base's own weights."""
    own = {p.untyped_storage().data_ptr() for p in model.base.module.parameters()}
    held: dict[int, int] = {}
    most = 0

    def keep(t: torch.Tensor) -> torch.Tensor:
        nonlocal most
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            most = max(most, sum(held.values()))
        return t

    class Part(HFModel):
        def seen(self, *args: Any) -> Any:
            held.clear()
            return super().seen(*args)

    watched = Part(model.base, model.spec, model.classes, model.token_budget, model.readout)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        train(watched, [replace(fit, batches=fit.batches[:1]) for fit in fits])
    return most


def change(params: Params, start: Params, full: Params) -> float:
    """How far training ended from where it ends on the full base, as a share of that way."""
    apart = sum(float((params[name] - full[name]).double().square().sum()) for name in full)
    way = sum(float((full[name] - start[name]).double().square().sum()) for name in full)
    return float((apart / way) ** 0.5)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one comparison."""
    base = workload.make_base(options.model, options.dtype, options.device)
    data, classes = workload.make_data(options, base)
    model = HFModel(base, workload.lora(options.rank), classes, options.token_budget)
    fits = make_fits(model, data, options)
    times = timing.in_turns({name: partial(train, model, own) for name, own in fits.items()}, options.repeats)
    ends = {name: train(model, own)[0] for name, own in fits.items()}
    start, full = fits[FULL][0].params, ends[FULL].params
    return {
        "bytes": {name: base.at(name).weight_bytes for name in ("", *FORMATS)} | {"weights": base.weights},
        "ratio": {name: timing.ratios(times[name], times[FULL]) for name in fits if name != FULL},
        "seconds": {name: statistics.median(each) for name, each in times.items()},
        "kept_bytes": {name: kept_bytes(model, fits[name]) for name in (FULL, AGAIN)},
        "change": {name: change(done.params, start, full) for name, done in ends.items()},
        "steps": [fit.steps for fit in fits[FULL]],
        "tokens": sum(done.tokens for done in train(model, fits[FULL])),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    workload.add_options(parser, clients=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    workload.use_threads(options.threads)
    result = measure(options)
    rows: list[list[Any]] = [["", "MB of the base", "seconds", "over full", "least", "greatest", "apart"]]
    for name, seconds in result["seconds"].items():
        ratio = result["ratio"].get(name, {"median": 1.0, "min": 1.0, "max": 1.0})
        held = result["bytes"].get(name, result["bytes"][""]) / 1e6
        rows.append([name, held, seconds, ratio["median"], ratio["min"], ratio["max"], result["change"][name]])
    record.show(rows)
    return record.keep("quantize", options, result)


if __name__ == "__main__":
    main()
