"""`fedpeft check`."""

from __future__ import annotations

from fedpeft.cli.options import Config, Json, Set


def check(config: Config, set_: Set = None, json: Json = False) -> None:
    """Check everything that can be checked without training; estimate memory, bytes and time."""
    from fedpeft.config import load_config, parse_overrides

    overrides = parse_overrides(set_ or [])
    load_config(config, overrides)  # tells all problems of the keys before torch is imported
    from fedpeft import app
    from fedpeft.cli import render

    render.print_facts(app.check(config, overrides), json)
