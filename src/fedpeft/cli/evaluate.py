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
    without_large: Annotated[
        bool, typer.Option("--without-large", help="Leave out the large model that the run steered.")
    ] = False,
    own_proxies: Annotated[
        bool,
        typer.Option(
            "--own-proxies", help="Let every client's own model steer it, too; the mean over clients is told."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Score a finished run's model, and the large model that it steers."""
    from fedpeft import app
    from fedpeft.cli import render
    from fedpeft.cli.folders import run_folder

    scores = app.evaluate(run_folder(folder), data, large=not without_large, own_proxies=own_proxies)
    render.print_scores(scores, json)
