"""`fedpeft report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Json


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Runs, or the folder of a study.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; else report.html in the one folder, or here.", show_default=False),
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's heading.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Build the report page again, of one run, of several side by side, or of a study."""
    from fedpeft.cli import render
    from fedpeft.cli.folders import run_folders, study_figures
    from fedpeft.runs.report import write_report

    runs = [run for folder in folders for run in run_folders(folder)]
    page = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    failures, table = study_figures(folders[0]) if len(folders) == 1 else ([], [])
    render.print_path("report", write_report(runs, page, title, failures, table), json)
