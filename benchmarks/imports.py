"""How long `import fedpeft` and `fedpeft --help` take in a fresh process, beside an interpreter that does nothing.

python -m benchmarks.imports
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import record

COMMANDS = {
    "python": "pass",
    "import fedpeft": "import fedpeft",
    "fedpeft --help": "from fedpeft.cli import main; main(['--help'])",
}


def wall_seconds(code: str) -> float:
    """Seconds that a fresh interpreter takes for the code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure in turns, print and keep."""
    parser = record.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args(arguments)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.repeats):
        for name, code in COMMANDS.items():
            times[name].append(wall_seconds(code))
    result = {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}
    record.show([["seconds", "median", "min", "max"], *([name, *r.values()] for name, r in result.items())])
    return record.keep("imports", options, result)


if __name__ == "__main__":
    main()
