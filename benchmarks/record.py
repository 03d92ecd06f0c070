"""What every benchmark does with its figures: print them, and append them to a file with command and machine."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of torch")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--note", default="", help="kept with the record, such as 'before' or 'quiet machine'")
    return parser


def machine(threads: int | None = None) -> dict[str, Any]:
    """The machine in words and numbers: processor, cores, memory, system, versions, GPU if torch is in use."""
    import psutil

    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "fedpeft")},
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }
    if threads is not None:
        described["threads"] = threads
    if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def keep(name: str, options: argparse.Namespace, result: Mapping[str, Any]) -> dict[str, Any]:
    """Append a record to `NAME.json` in the results folder, print it, and return it."""
    given = {k: v for k, v in vars(options).items() if k not in ("results", "note")}
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "note": options.note,
        "options": given,
        "machine": machine(options.threads),
        "result": dict(result),
    }
    folder: Path = options.results
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    records = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*records, record], indent=1) + "\n")
    print(json.dumps(record["result"]))
    return record


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip() or None


def show(rows: Sequence[Sequence[Any]]) -> None:
    """Print rows as columns; the first row is the head."""
    cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    """Print the machine as a line for benchmarks/README.md."""
    described = machine()
    del described["load"]
    print("; ".join(f"{key} {value}" for key, value in described.items() if value is not None))


if __name__ == "__main__":
    main()
