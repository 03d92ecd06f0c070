"""`fedpeft compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Json


def compare(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the study; cells that are finished there are kept.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Run every cell of a study; ends with one table and one report."""
    from fedpeft.config import cells, free_folder, load_study, slug

    cells(load_study(study))  # everything that is wrong is told before anything starts
    from fedpeft import app
    from fedpeft.cli import render
    from fedpeft.cli.exits import FAILED, working_in
    from fedpeft.cli.watching import Watch

    folder = out or free_folder(slug(study.stem))
    working_in(folder, f"fedpeft compare {study} --out {folder}")
    if not json:
        typer.echo(f"folder: {folder}")
    with Watch() as watch:
        comparison = app.compare(study, out=folder, progress=watch)
    render.print_comparison(comparison, json)
    if comparison.failures:
        raise typer.Exit(FAILED)
