"""`fedpeft run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Config, Json, Set


def run(
    config: Config,
    set_: Set = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The run folder, new or empty; else runs/METHOD-TASK-TIME.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Run one configuration; prints its folder first and its result last."""
    from fedpeft.cli.folders import new_folder
    from fedpeft.config import default_folder, load_config, parse_overrides

    resolved = load_config(config, parse_overrides(set_ or []))
    folder = default_folder(resolved) if out is None else new_folder(out, f"fedpeft resume {out}")
    from fedpeft import app
    from fedpeft.cli import render
    from fedpeft.cli.exits import working_in
    from fedpeft.cli.watching import Watch

    def begun(made: Path) -> None:
        if not json:
            typer.echo(f"folder: {made}")
        watch.begin()

    working_in(folder, f"fedpeft resume {folder}")
    with Watch() as watch:
        finished = app.run(resolved, out=folder, progress=watch, begun=begun)
    render.print_run(finished, json)
