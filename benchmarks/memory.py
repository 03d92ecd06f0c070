"""Peak memory of a round with few and with many clients, each in a process of its own.

    python -m benchmarks.memory --clients 10 100 1000

All clients take part in the round; they train `--cohort-batching` at a time under the token budget. The rows are the
same number in all, so that every process trains as much: an allocator's heap grows with the number of passes, whoever
they are for. The first number of clients is the measure that the others are compared with. Beside the peak stands what
the process held before the round began, with the base model and all data loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

SHORTEST = 8  # tokens


def one(options: argparse.Namespace, clients: int) -> dict[str, int]:
    """Bytes before the round and at the peak, of a process that runs one round with so many clients."""
    command = [sys.executable, "-m", "benchmarks.memory", "--inside", "--clients", str(clients)]
    for name in ("model", "rows", "length", "rank", "token_budget", "cohort_batching", "threads"):
        value = getattr(options, name)
        if name == "rows":  # the same rows in all, dealt to fewer clients: so many steps cut up the heap alike
            value = value * max(options.clients) // clients
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=record.RESULTS.parents[1])
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def inside(options: argparse.Namespace) -> dict[str, int]:
    """Run the round here."""
    from benchmarks import workload
    from fedpeft.core.federate import federate
    from fedpeft.engines.inprocess import InProcess
    from fedpeft.methods.fedavg import FedAvg
    from fedpeft.models.hf import HFModel

    workload.use_threads(options.threads)
    base = workload.make_base(options.model, "float32", "cpu")
    model = HFModel(base, workload.lora(options.rank), 6, options.token_budget)
    vocabulary = int(base.config["vocab_size"])
    names = [f"client-{i:04d}" for i in range(options.clients[0])]
    rows = {c: workload.random_rows(c, options.rows, options.length, vocabulary, SHORTEST) for c in names}
    method = FedAvg(cohort=0)
    engine = InProcess(
        lambda: method, model, {c: {"train": own} for c, own in rows.items()}, 0, batch=options.cohort_batching
    )
    before = peak_bytes()
    (done,) = federate(method, engine, model, rounds=1, seed=0)
    assert len(done.answered) == len(names), [receipt.lost for receipt in done.receipts][:3]
    return {"before": before, "peak": peak_bytes()}


def peak_bytes() -> int:
    """The most memory that this process has held so far.

    Linux's own counter is read, because `getrusage` starts from the memory of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--model", default="minilm", help="minilm, demo or tiny")
    parser.add_argument("--rows", type=int, default=4, help="per client where there are most clients")
    parser.add_argument("--length", type=int, default=32, help=f"most tokens of a row; the least are {SHORTEST}")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--cohort-batching", type=int, default=16, help="what `auto` comes to at most")
    parser.add_argument("--inside", action="store_true", help="run one round in this process and print its bytes")
    options = parser.parse_args(arguments)
    if options.inside:
        measured = inside(options)
        print(json.dumps(measured))
        return dict(measured)
    found = {clients: one(options, clients) for clients in options.clients}
    first = found[options.clients[0]]["peak"]
    result = {str(n): {**m, "over_first": m["peak"] - first} for n, m in found.items()}
    megabytes = [[n, *(round(b / 1e6) for b in m.values())] for n, m in result.items()]
    record.show([["clients", "before, MB", "peak, MB", "over the first, MB"], *megabytes])
    return record.keep("memory", options, result)


if __name__ == "__main__":
    main()
