"""`fedpeft resume`."""

from __future__ import annotations

import typer

from fedpeft.cli.options import Json, RunDir, Set


def resume(folder: RunDir, set_: Set = None, json: Json = False) -> None:
    """Go on where a run stopped; same bits as if it had never stopped."""
    from fedpeft import app
    from fedpeft.cli import render
    from fedpeft.cli.exits import working_in
    from fedpeft.cli.folders import finished_rounds, run_folder
    from fedpeft.cli.watching import Watch
    from fedpeft.config import parse_overrides

    overrides = parse_overrides(set_ or [])
    working_in(run_folder(folder), f"fedpeft resume {folder}")
    if not json:
        typer.echo(f"folder: {folder}")
    if not overrides and (done := finished_rounds(folder)):
        typer.echo(f"finished already, after {done}; to go on, raise run.rounds with --set run.rounds=N", err=True)
    with Watch() as watch:
        watch.begin()
        finished = app.resume(folder, overrides, progress=watch)
    render.print_run(finished, json)
