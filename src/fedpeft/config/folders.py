"""What runs are called on disk."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

from fedpeft.config.sections import RunConfig

RUNS = Path("runs")


def slug(text: str) -> str:
    """The text as part of a folder name: letters, digits, dots and underscores."""
    return re.sub(r"[^a-z0-9._]+", "_", text.lower()).strip("_.") or "_"


def default_folder(config: RunConfig) -> Path:
    """`runs/METHOD-TASK-TIME` of local time, with a number behind it where that is taken."""
    return free_folder(f"{slug(config.method.name)}-{slug(config.task.name or 'task')}")


def free_folder(name: str) -> Path:
    """`runs/NAME-TIME` of local time, with a number behind it where that is taken."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := RUNS / name).exists())
