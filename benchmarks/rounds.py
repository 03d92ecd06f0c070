"""A whole round of FedPepTAO against one of P-tuning v2: time, bytes, and what the set-up costs besides.

    python -m benchmarks.rounds --clients 10
    python -m benchmarks.rounds --data random --length 64 --clients 10

Everything of a round is in it: records, codec, training, the server's step. Layers are chosen by their score; with
`unselected: local` a device trains prompts in all layers and sends half, with `off` it has prompts in half. The ways
run in turns, from the state after the set-up; ratios are medians over neighbours.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks import record, timing, workload
from fedpeft.core.exchange import Method, Receipt
from fedpeft.core.federate import Done, Start, federate
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods import build
from fedpeft.models.hf import HFModel

FIXED = {"ratio_rule": "fixed", "layers_by": "score"}
WAYS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ptuning_v2": ("ptuning_v2", {}),
    "fedpeptao, local": ("fedpeptao", FIXED),
    "fedpeptao, off": ("fedpeptao", {**FIXED, "unselected": "off"}),
    "fedpeptao, off, last": ("fedpeptao", {**FIXED, "unselected": "off", "layers_by": "last"}),
}


class Federation:
    """One way of training, ready for its first round."""

    def __init__(self, name: str, fields: Mapping[str, Any], options: argparse.Namespace) -> None:
        common = {"cohort": options.clients, "epochs": 1, "batch_size": options.batch, "steps": options.steps}
        self.method: Method = build(name, {**fields, **common})
        base = workload.make_base(options.model, options.dtype, options.device)
        data, classes = workload.make_data(options, base)
        self.model = HFModel(base, self.method.adapter(), classes, options.token_budget)
        rows = {client: {"train": own} for client, own in data.items()}
        self.engine = InProcess(lambda: self.method, self.model, rows, 0, batch=options.cohort_batching)
        self.start: Start | None = None
        for done in self._steps():
            self.start = done.start

    def _steps(self) -> Iterator[Done]:
        """The exchanges of the set-up alone."""
        count = len(self.method.setup())
        steps = federate(self.method, self.engine, self.model, rounds=1, seed=0)
        return (next(steps) for _ in range(count))

    def round(self) -> Done:
        """The first round, from the same state every time."""
        steps = federate(self.method, self.engine, self.model, rounds=1, seed=0, start=self.start)
        *_, done = steps
        return done


def traffic(receipts: Sequence[Receipt]) -> int:
    """Bytes in both directions."""
    return sum(receipt.bytes_down + receipt.bytes_up for receipt in receipts)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one comparison."""
    ways = {label: Federation(name, fields, options) for label, (name, fields) in WAYS.items()}
    times = timing.in_turns({label: partial(Federation.round, way) for label, way in ways.items()}, options.repeats)
    bytes_ = {label: traffic(way.round().receipts) for label, way in ways.items()}
    first = next(iter(WAYS))
    return {
        "ratio": {label: timing.ratios(times[first], times[label]) for label in WAYS if label != first},
        "seconds": {label: statistics.median(each) for label, each in times.items()},
        "bytes": bytes_,
        "share_of_bytes": {label: count / bytes_[first] for label, count in bytes_.items()},
        "layers": {label: list(getattr(way.round().state, "layers", ())) for label, way in ways.items()},
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    workload.add_options(parser, clients=10)
    parser.add_argument("--cohort-batching", type=int, default=16, help="what `auto` comes to at most")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    workload.use_threads(options.threads)
    result = measure(options)
    rows: list[list[Any]] = [["", "layers", "seconds", "times as fast", "least", "greatest", "share of bytes"]]
    for label, seconds in result["seconds"].items():
        ratio = result["ratio"].get(label, {"median": 1.0, "min": 1.0, "max": 1.0})
        layers = ",".join(map(str, result["layers"][label])) or "all"
        rows.append(
            [label, layers, seconds, ratio["median"], ratio["min"], ratio["max"], result["share_of_bytes"][label]]
        )
    record.show(rows)
    return record.keep("rounds", options, result)


if __name__ == "__main__":
    main()
