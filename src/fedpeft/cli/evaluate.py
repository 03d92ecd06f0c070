"""`fedpeft evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Json, RunDir


def evaluate(
    folder: RunDir,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows to score; else the run's own.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Score a finished run's model."""
    from fedpeft import app
    from fedpeft.cli import render
    from fedpeft.cli.folders import run_folder

    scores = app.evaluate(run_folder(folder), data)
    render.print_scores(scores, json)
