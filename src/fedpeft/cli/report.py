"""`fedpeft report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Json


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="One run or several.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page; else report.html in the run's folder, or here.", show_default=False
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's heading.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Build the report page again, from one run or from several side by side."""
    from fedpeft.cli import render
    from fedpeft.cli.folders import run_folder
    from fedpeft.runs.report import write_report

    runs = [run_folder(folder) for folder in folders]
    page = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    render.print_path("report", write_report(runs, page, title), json)
