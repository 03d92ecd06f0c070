"""A merged model against its base: forward passes take as long, and the logits are those of base and adapter.

    python -m benchmarks.merged --threads 1

Three ways to predict the same batch of equal rows: the base with a fresh head (an adapter that changes nothing,
merged), the trained adapter merged into the weights, and base and adapter apart, as in training. Ratios to the base.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import record, timing, workload
from fedpeft.core.adapter import Lora
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params
from fedpeft.models.hf import HFModel
from fedpeft.models.merge import merge

CLASSES = 6
TARGETS = ("query", "key", "value", "output", "up", "down")


def changed(params: Params) -> dict[str, Tensor]:
    """The parameters as if they had been trained: no factor is zero."""
    rng = rng_for(0, "benchmark")
    return {name: t + 0.02 * torch.from_numpy(rng.standard_normal(t.shape)).to(t) for name, t in params.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one comparison."""
    base = workload.make_base(options.model, options.dtype, options.device)
    model = HFModel(base, Lora(options.rank, 2.0 * options.rank, targets=TARGETS), CLASSES, 10**9)
    fresh = model.init(rng_for(0, "adapter"))
    trained = changed(fresh)
    rows = workload.random_rows("all", options.batch, options.length, int(base.config["vocab_size"]))
    ids = torch.from_numpy(np.stack(rows.tokens).astype(np.int64)).to(base.device)
    plain, merged = merge(model, fresh), merge(model, trained)

    def predict(module: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits.mean(dim=1) if model.pooling == "mean" else logits[:, -1]

    works = {
        "base": lambda: predict(plain),
        "merged": lambda: predict(merged),
        "adapter": lambda: model.logits(trained, rows),
    }
    times = timing.in_turns(works, options.repeats)
    apart, together = model.logits(trained, rows), predict(merged).float().cpu()
    return {
        "ratio": {name: timing.ratios(times[name], times["base"]) for name in ("merged", "adapter")},
        "seconds": {name: statistics.median(each) for name, each in times.items()},
        "largest_difference": float((apart - together).abs().max()),
        "largest_logit": float(apart.abs().max()),
        "parameters": {
            name: sum(p.numel() for p in m.parameters()) for name, m in (("base", plain), ("merged", merged))
        },
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    workload.add_options(parser, clients=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.set_defaults(data="random", batch=16)
    options = parser.parse_args(arguments)
    workload.use_threads(options.threads)
    result = measure(options)
    for name, ratio in result["ratio"].items():
        print(f"{name}: {ratio['median']:.3f} of the base's time ({ratio['min']:.3f} to {ratio['max']:.3f})")
    print(f"largest difference of a logit {result['largest_difference']:.2g} of {result['largest_logit']:.2g}")
    return record.keep("merged", options, result)


if __name__ == "__main__":
    main()
