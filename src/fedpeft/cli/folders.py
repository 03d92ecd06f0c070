"""Checks of the folders that people name on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpeft.core.errors import RequestError


def run_folder(path: Path) -> Path:
    """The path, if it holds a run. Raises RequestError where it does not."""
    if (path / "config.yaml").is_file():
        return path
    if path.is_dir() and (cells := _cells(path)):
        raise RequestError(f"{path} is the folder of a study; give the folder of one of its runs, such as {cells[0]}")
    what = "is a folder without a run (no config.yaml)" if path.is_dir() else "is not a folder"
    raise RequestError(f"{path} {what}; give the folder that `fedpeft run` printed first")


def finished_rounds(path: Path) -> str | None:
    """How long a run was that has come to its end, as words; None for one that has not."""
    import json

    from fedpeft.runs.units import count_text

    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return count_text(int(manifest.get("rounds_done", 0)), "round") if manifest.get("status") == "finished" else None


def run_folders(path: Path) -> list[Path]:
    """The run that the path holds or, of a study, the runs that its page shows. Raises RequestError without any."""
    study = [] if (path / "config.yaml").is_file() or not path.is_dir() else _cells(path)
    return study or [run_folder(path)]


def _cells(study: Path) -> list[Path]:
    """The runs that a study has chosen, as its table says; every run in the folder while there is no table."""
    import json

    try:
        names = json.loads((study / "table.json").read_text(encoding="utf-8"))["runs"]
        chosen = [study / str(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        chosen = sorted(path.parent for path in study.glob("*/config.yaml"))
    return [path for path in chosen if (path / "config.yaml").is_file()]


def new_folder(path: Path, go_on: str) -> Path:
    """The path, if a run may begin there. Raises RequestError, naming `go_on`, where there is something already."""
    from fedpeft.runs.store import unused

    if not unused(path):
        raise RequestError(f"--out {path}: there is something already; choose a new folder, or go on with it: {go_on}")
    return path


def study_figures(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The cells of a study that failed, and the rows of its table; nothing of a folder that is no finished study."""
    import json

    try:
        told = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        return list(told["failures"]), list(told["table"])
    except (OSError, ValueError, KeyError, TypeError):
        return [], []
