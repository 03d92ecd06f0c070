"""Where a round's time goes, method by method: samples per second, and the share that is not training arithmetic.

    python -m benchmarks.shares --threads 1

Forward passes (adapters and readout included), backward passes and the optimizer's update are timed where they happen;
everything else of the rounds after the set-up is overhead: records, codec, checks, memories, batches, stacking and
folding. Methods are the twelve of the study of FibecFed and the LoRA family.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import record, workload
from fedpeft.core import train
from fedpeft.core.exchange import Method
from fedpeft.core.federate import Done, federate
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods import build
from fedpeft.models.hf import HFModel
from fedpeft.models.readouts.head import HeadReadout

METHODS: Mapping[str, Mapping[str, Any]] = {
    "fibecfed": {},
    "fedavg": {},
    "ffa_lora": {},
    "fedsa_lora": {},
    "rolora": {},
    "flexlora": {"ranks": (4, 8)},
    "slora": {},
    "adalora": {},
    "fedalt": {},
    "voc": {},
    "slw": {},
    "shortformer": {},
}


class Stopwatch:
    """Seconds by what they went into; a part that runs inside another counts as the other."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        self._inside = False

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to a part."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, begun = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[part] += time.perf_counter() - begun

        return call

    @contextmanager
    def watching(self, model: HFModel) -> Iterator[None]:
        """Time the parts as long as the context lasts."""
        places: Sequence[tuple[Any, str, str]] = (
            (type(model.base.module), "forward", "forward"),
            (HeadReadout, "losses", "forward"),
            (HeadReadout, "logits", "forward"),
            (torch.Tensor, "backward", "backward"),
            (torch.autograd, "grad", "backward"),
            (train._Sweep, "_update", "optimizer"),
        )
        with ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(patch.object(owner, name, self.timed(part, getattr(owner, name))))
            yield


def rounds_of(method: Method, model: HFModel, options: argparse.Namespace, data: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by part, samples per second and the share of overhead, of all rounds after the set-up."""
    engine = InProcess(lambda: method, model, data, 0, batch=options.clients)
    steps = federate(method, engine, model, rounds=options.rounds, seed=0)
    for _ in method.setup():
        next(steps)
    watch, begun = Stopwatch(), time.perf_counter()
    with watch.watching(model):
        done: list[Done] = list(steps)
    whole = time.perf_counter() - begun
    lost = [receipt.lost for one in done for receipt in one.receipts if receipt.lost]
    assert not lost, lost
    samples = sum(receipt.meter.examples for one in done for receipt in one.receipts)
    parts = sum(watch.seconds.values())
    shares = {f"{part}_share": spent / whole for part, spent in watch.seconds.items()}
    return {"seconds": whole, "samples_per_s": samples / whole, **shares, "overhead_share": 1 - parts / whole}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures by method."""
    base = workload.make_base(options.model, options.dtype, options.device)
    rows, classes = workload.make_data(options, base)
    data = {client: {"train": own} for client, own in rows.items()}
    found: dict[str, Any] = {}
    for name in options.methods:
        common = {"cohort": options.clients, "epochs": 1, "batch_size": options.batch}
        method = build(name, {**METHODS[name], **common})
        found[name] = rounds_of(method, HFModel(base, method.adapter(), classes, options.token_budget), options, data)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    workload.add_options(parser, clients=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    options = parser.parse_args(arguments)
    workload.use_threads(options.threads)
    result = measure(options)
    names = ["samples_per_s", "forward_share", "backward_share", "optimizer_share", "overhead_share"]
    record.show([["", *names], *([name, *(own[key] for key in names)] for name, own in result.items())])
    return record.keep("shares", options, result)


if __name__ == "__main__":
    main()
