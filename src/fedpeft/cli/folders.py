"""Checks of the folders that people name on the command line."""

from __future__ import annotations

from pathlib import Path

from fedpeft.core.errors import RequestError


def run_folder(path: Path) -> Path:
    """The path, if it holds a run. Raises RequestError where it does not."""
    if (path / "config.yaml").is_file():
        return path
    what = "is a folder without a run (no config.yaml)" if path.is_dir() else "is not a folder"
    raise RequestError(f"{path} {what}; give the folder that `fedpeft run` printed first")


def new_folder(path: Path, go_on: str) -> Path:
    """The path, if a run may begin there. Raises RequestError, naming `go_on`, where there is something already."""
    from fedpeft.runs.store import unused

    if not unused(path):
        raise RequestError(f"--out {path}: there is something already; choose a new folder, or go on with it: {go_on}")
    return path
