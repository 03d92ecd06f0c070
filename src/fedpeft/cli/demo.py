"""`fedpeft demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Json


def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the runs and the report go.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Run the methods side by side on embedded data; needs no network."""
    from fedpeft import app
    from fedpeft.cli import render
    from fedpeft.cli.exits import FAILED, working_in
    from fedpeft.cli.watching import Watch
    from fedpeft.config import free_folder

    folder = out or free_folder("demo")
    working_in(folder, f"fedpeft demo --out {folder}")
    if not json:
        typer.echo(f"folder: {folder}")
    with Watch() as watch:
        comparison = app.demo(out=folder, progress=watch)
    render.print_comparison(comparison, json)
    if comparison.failures:
        raise typer.Exit(FAILED)
