"""`fedpeft serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.core.errors import RequestError


def serve(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN_DIR]", help="The folder of a run, to be served.", show_default=False),
    ] = None,
    large: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="The large model that is steered: a folder, a hub id, http://, vllm+http:// or llamacpp+http://; "
            "without it the tuned small model answers alone.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="How far the small models steer; else as the run chose it.", show_default=False),
    ] = None,
    speculate: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens that the small model drafts ahead; 0: none; else as the run was configured.",
            show_default=False,
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(metavar="ROWS", help="Answers that are decoded at once.")] = 8,
    max_queue: Annotated[int, typer.Option(metavar="ROWS", help="Answers that may wait; more are turned away.")] = 64,
    max_tokens_limit: Annotated[int, typer.Option(metavar="N", help="Most tokens of one answer.")] = 1024,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Most time of one request, queue included.")] = 300,
    host: Annotated[str, typer.Option(help="Where to listen; another than this machine needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0: any that is free.", min=0, max=65535)] = 8000,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The environment variable that holds the key clients must send.", show_default=False
        ),
    ] = None,
    token_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The environment variable that holds the token of the large model's server.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a run: an OpenAI-compatible endpoint, and a chat page at /."""
    if folder is None:
        raise RequestError("say what to serve: fedpeft serve RUN_DIR")
    import signal

    from fedpeft.app.serving import Serving
    from fedpeft.app.serving import serve as serve_run
    from fedpeft.cli.folders import run_folder

    serving = Serving(
        large, alpha, speculate, max_batch, max_queue, max_tokens_limit, timeout, host, port, api_key_env, token_env
    )

    def begun(name: str, url: str) -> None:
        typer.echo(f"serving {name} at {url}; stop with Ctrl+C")

    if serve_run(run_folder(folder), serving, begun) == signal.SIGINT:
        raise KeyboardInterrupt
