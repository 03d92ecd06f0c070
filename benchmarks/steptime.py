"""Time of a training step against what the planner predicts from a measured profile, in one process.

    python -m benchmarks.steptime --threads 1

In every turn speed, overhead and the speed of unpacking are measured as `fedpeft profile --model` does it, on a model
of the family's shape with few layers, and then one step of every setting: predicted over measured is a ratio of
neighbours in time. Settings differ in rows, tokens, rank, matrices, lowest trained block, base and loss; nearly all are
other steps than those that the profile was measured on. One client with LoRA trains on a transformer with random
weights. All times are processor time, divided by the threads, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import peak, record, timing, workload
from benchmarks.peak import Setting
from fedpeft.app.profiling import REPEATS, measure_speed, random_model, step_seconds, unpacking_speed
from fedpeft.models.hf import HFModel
from fedpeft.planner.cost import shape_of
from fedpeft.planner.device import Profile

EVERY = "query key value output up down"
SETTINGS = {
    "bert, 8 rows of 64": Setting("bert", "query value", 0, 8, 8, 64),
    "bert, 1 row of 64": Setting("bert", "query value", 0, 8, 1, 64),
    "bert, 32 rows of 32": Setting("bert", "query value", 0, 8, 32, 32),
    "bert, 2 rows of 256": Setting("bert", "query value", 0, 8, 2, 256),
    "bert, all matrices at rank 16": Setting("bert", EVERY, 0, 16, 8, 64),
    "bert, upper half": Setting("bert", "query value", 3, 8, 8, 64),
    "bert, last block's down": Setting("bert", "down", 5, 8, 8, 64),
    "bert, int8": Setting("bert", "query value", 0, 8, 8, 64, False, "int8"),
    "bert, nf4": Setting("bert", "query value", 0, 8, 8, 64, False, "nf4"),
    "bert, checkpointing": Setting("bert", "query value", 0, 8, 8, 64, False, "", True),
    "gpt2, 8 rows of 64": Setting("gpt2", "query value", 0, 8, 8, 64),
    "gpt2, language model, 4 rows of 128": Setting("gpt2", "query key value output", 0, 4, 4, 128, True),
    "llama, 8 rows of 64": Setting("llama", "query value", 0, 8, 8, 64),
    "llama, last two blocks, 4 rows of 256": Setting("llama", "query value", 4, 16, 4, 256),
    "llama, language model, 4 rows of 128": Setting("llama", f"{EVERY} gate", 0, 16, 4, 128, True),
}
STEPS = 3


def works(options: argparse.Namespace, setting: Setting) -> tuple[Callable[[], object], Callable[[Any], float]]:
    """The steps of a setting, and what the planner predicts one of them to take on a machine."""
    from fedpeft.core.fit import AdamW, Fit
    from fedpeft.core.rng import rng_for
    from fedpeft.planner import prices
    from fedpeft.planner.cost import weights
    from fedpeft.planner.plan import Choices, Job

    model, data, _, shape, trained = peak.prepared(options, setting)
    rows, tokens = len(data), peak.tokens_of(options, setting)
    batches = [list(range(rows))] * STEPS
    start = model.init(rng_for(0, "adapter"))
    fit = Fit(start, data, batches, AdamW(1e-3), base=setting.base, checkpointing=setting.checkpointing)
    classes = None if setting.language_model else peak.CLASSES
    every = weights(shape, tuple(setting.kinds.split()))
    choices = Choices(ranks=(setting.rank,), batches=(rows,), applied=False)
    job = Job(shape, every, {}, tokens, float(tokens), classes, choices=choices)
    ask = prices.Setting(setting.base or "full", rows, 0, setting.checkpointing)
    return (lambda: model.fit(fit)), (lambda machine: prices.Costs(job, machine, rows).seconds(ask, trained))


def profiled(model: HFModel, repeats: int, clock: Callable[[], float]) -> Profile:
    """What `fedpeft profile` measures of a machine's time."""
    speed = measure_speed(model, repeats, clock)
    unpacking = unpacking_speed(step_seconds(model, repeats, clock), shape_of(model.config))
    return Profile(flops_per_s=speed.flops_per_s, step_overhead_s=speed.overhead_s, dequant_bytes_per_s=unpacking)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All ratios of one run."""

    def clock() -> float:
        return time.process_time() / int(options.threads)

    settings = {name: setting for name, setting in SETTINGS.items() if setting.family in options.families}
    short = {
        f: random_model(peak.configuration(options, f).to_dict(), torch.device("cpu"))[0] for f in options.families
    }
    made = {name: works(options, setting) for name, setting in settings.items()}
    for work, _ in made.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in made}
    told: dict[str, list[float]] = {name: [] for name in made}
    machines: dict[str, list[Profile]] = {family: [] for family in options.families}
    for _ in range(options.repeats):
        for family, model in short.items():
            machine = profiled(model, options.profile_repeats, clock)
            machines[family].append(machine)
            for name in (name for name, setting in settings.items() if setting.family == family):
                work, predict = made[name]
                start = clock()
                work()
                seconds[name].append((clock() - start) / STEPS)
                told[name].append(predict(machine))
    ratios = {name: timing.ratios(told[name], seconds[name]) for name in made}
    return {
        "ratio": ratios,
        "seconds": {name: statistics.median(own) for name, own in seconds.items()},
        "predicted_s": {name: statistics.median(own) for name, own in told.items()},
        "flops_per_s": {f: statistics.median(m.flops_per_s for m in own) for f, own in machines.items()},
        "dequant_bytes_per_s": {
            f: statistics.median(m.dequant_bytes_per_s for m in own) for f, own in machines.items()
        },
        "median": statistics.median(own["median"] for own in ratios.values()),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    parser.add_argument("--width", type=int, default=384, help="d; a head has 16, and Llama half as many for keys")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--shrink", type=int, default=1, help="divides the tokens of a row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile-repeats", type=int, default=REPEATS, help="of the steps that a profile is made of")
    families = list(dict.fromkeys(setting.family for setting in SETTINGS.values()))
    parser.add_argument("--families", nargs="+", default=families, choices=families)
    options = parser.parse_args(arguments)
    workload.use_threads(options.threads)
    result = measure(options)
    rows: list[list[Any]] = [
        ["setting", "predicted, ms", "measured, ms", "predicted over measured", "least", "greatest"]
    ]
    for name, own in result["ratio"].items():
        times = 1e3 * result["predicted_s"][name], 1e3 * result["seconds"][name]
        rows.append([name, *times, own["median"], own["min"], own["max"]])
    record.show(rows)
    return record.keep("steptime", options, result)


if __name__ == "__main__":
    main()
