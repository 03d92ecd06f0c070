"""`fedpeft serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import ExpertPrompt
from fedpeft.core.errors import RequestError

OF_A_RUN = {"large", "alpha", "speculate", "max_queue", "max_tokens_limit", "timeout", "token_env", "expert_prompt"}
OF_SCORES = {"max_sessions", "max_kept", "max_body", "max_answer", "idle", "turn", "wire", "dtype", "device"}


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
            "else that of the run. none: the tuned small model answers alone.",
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
    expert_prompt: ExpertPrompt = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            metavar="ROWS",
            help="Answers that are decoded at once (8); with --logits, rows of a session (64).",
            show_default=False,
        ),
    ] = None,
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
    logits: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Serve this model's exact scores for proxy-tuning elsewhere, in place of a run: a shipped model, a "
            "folder or a hub name.",
            show_default=False,
        ),
    ] = None,
    max_sessions: Annotated[int, typer.Option(help="With --logits: sessions at a time.", min=1)] = 16,
    max_kept: Annotated[
        int, typer.Option(metavar="TOKENS", help="With --logits: tokens in the caches of all sessions.", min=1)
    ] = 1 << 18,
    max_body: Annotated[int, typer.Option(metavar="BYTES", help="With --logits: of a request.", min=1)] = 16 << 20,
    max_answer: Annotated[int, typer.Option(metavar="BYTES", help="With --logits: of an answer's scores.", min=1)] = 256
    << 20,
    idle: Annotated[
        float, typer.Option(metavar="SECONDS", help="With --logits: until an unused session is closed.")
    ] = 300,
    turn: Annotated[
        float, typer.Option(metavar="SECONDS", help="With --logits: until a request has had its turn.")
    ] = 60,
    wire: Annotated[
        str, typer.Option(help="With --logits: float32, exact, of which a client may ask for less; or float16.")
    ] = "float32",
    dtype: Annotated[
        str, typer.Option(help="With --logits: what the model computes in, float32 or bfloat16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="With --logits: auto, cpu, cuda, ..")] = "auto",
) -> None:
    """Serve a run: an OpenAI-compatible endpoint, and a chat page at /. Or a model's exact scores (--logits)."""
    if folder is not None and logits is not None:
        raise RequestError(f"{folder} and --logits {logits} are two things to serve; start one server for each")
    if folder is None and logits is None:
        raise RequestError("say what to serve: fedpeft serve RUN_DIR, or fedpeft serve --logits MODEL")
    _check_options(logits is not None)
    import signal

    if logits is not None:
        from fedpeft.app.logits import MAX_BATCH, LogitServing, serve_logits
        from fedpeft.proxy.logit_sessions import limits_of

        limits = limits_of(wire, max_sessions, max_kept, max_body, max_answer, idle, turn)
        rows = MAX_BATCH if max_batch is None else max_batch
        lending = LogitServing(logits, limits, rows, dtype, device, host, port, api_key_env)
        if serve_logits(lending, _lending) == signal.SIGINT:
            raise KeyboardInterrupt
        return
    assert folder is not None
    from fedpeft.app.serving import Serving
    from fedpeft.app.serving import serve as serve_run
    from fedpeft.cli.folders import run_folder

    serving = Serving(
        large,
        alpha,
        speculate,
        8 if max_batch is None else max_batch,
        max_queue,
        max_tokens_limit,
        timeout,
        host,
        port,
        api_key_env,
        token_env,
        expert_prompt,
    )

    def begun(name: str, url: str) -> None:
        typer.echo(f"serving {name} at {url}; stop with Ctrl+C")

    if serve_run(run_folder(folder), serving, begun) == signal.SIGINT:
        raise KeyboardInterrupt


def _check_options(scores: bool) -> None:
    """Raise RequestError where an option was given that the other kind of server has."""
    import click
    from click.core import ParameterSource

    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    odd = sorted(given & (OF_A_RUN if scores else OF_SCORES))
    if odd:
        what = "fedpeft serve --logits serves scores alone" if scores else "it belongs to fedpeft serve --logits MODEL"
        raise RequestError(f"--{odd[0].replace('_', '-')} has no effect here: {what}; leave it out")


def _lending(name: str, url: str) -> None:
    typer.echo(f"serving the scores of {name} at {url}; stop with Ctrl+C")
