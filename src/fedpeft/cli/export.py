"""`fedpeft export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Client, Json, RunDir


def export(
    folder: RunDir,
    to: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="A new folder, or one with an earlier export of the same.", show_default=False
        ),
    ],
    client: Client = None,
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapter into the model; no peft needed.")] = False,
    rank: Annotated[
        int | None,
        typer.Option(metavar="N", help="Write the nearest LoRA of this rank, for peft.", show_default=False),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace an earlier export of other parameters in DIR.")
    ] = False,
    json: Json = False,
) -> None:
    """Write an adapter (PEFT's form where peft has its kind, else fedpeft's own), or a merged model."""
    from fedpeft import app
    from fedpeft.cli import render
    from fedpeft.cli.folders import run_folder

    render.print_export(app.export(run_folder(folder), to, client, merge, replace, rank), json)
