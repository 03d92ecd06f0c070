"""`fedpeft predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Client, Json, RunDir


def predict(
    folder: RunDir,
    data: Annotated[Path, typer.Option(metavar="FILE", help="Rows to predict.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the predictions go, as JSON lines; else printed.", show_default=False),
    ] = None,
    client: Client = None,
    json: Json = False,
) -> None:
    """Predict labels with probabilities, or say texts, by the global or a client's model."""
    from fedpeft import app
    from fedpeft.cli import render
    from fedpeft.cli.folders import run_folder

    rows = app.predict(run_folder(folder), data, out, client)
    render.print_predictions(rows, out, json)
