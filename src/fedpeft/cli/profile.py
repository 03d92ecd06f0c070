"""`fedpeft profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Json


def profile(
    model: Annotated[
        str | None, typer.Option(help="Whose shape is measured, with random weights; default: a small one.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ..")] = "auto",
    server: Annotated[str | None, typer.Option(metavar="URL", help="Measure the bandwidth to this address.")] = None,
    name: Annotated[str, typer.Option(help="Of the machine, in the file.")] = "here",
    examples: Annotated[int | None, typer.Option(help="Rows that this machine holds, for fedpeft plan.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Where the profile is written.")] = None,
    json: Json = False,
) -> None:
    """Measure this machine: memory, training speed, formats, disk, bandwidth; as a device profile."""
    from fedpeft.app import profiling
    from fedpeft.cli import render_plan
    from fedpeft.planner.device import as_device

    told = profiling.profile(model, device, server, name)
    text = as_device(told["profile"], examples)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    render_plan.print_profile(told, text, out, json)
