"""`fedpeft serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from fedpeft.cli.options import Alpha, ExpertPrompt, Large, Speculate, TokenEnv
from fedpeft.core.errors import RequestError

if TYPE_CHECKING:
    from fedpeft.app.logits import LogitServing
    from fedpeft.app.serving import Serving

OF_A_RUN = {"large", "alpha", "speculate", "max_queue", "max_tokens_limit", "timeout", "token_env", "expert_prompt"}
OF_SCORES = {"max_sessions", "max_kept", "max_body", "max_answer", "idle", "turn", "wire", "dtype", "device"}
RUN_BATCH = 8  # answers that are decoded at once

# --- of both kinds of server

MaxBatch: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="ROWS",
        help="Answers that are decoded at once (8); with --logits, rows of a session (64).",
        show_default=False,
    ),
]
Host: TypeAlias = Annotated[str, typer.Option(help="Where to listen; another than this machine needs a key.")]
Port: TypeAlias = Annotated[int, typer.Option(help="The port; 0: any that is free.", min=0, max=65535)]
ApiKeyEnv: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The environment variable that holds the key clients must send.", show_default=False
    ),
]

# --- of a run's endpoint

Folder: TypeAlias = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RUN_DIR]", help="The folder of a run or of an exported adapter, to be served.", show_default=False
    ),
]
MaxQueue: TypeAlias = Annotated[int, typer.Option(metavar="ROWS", help="Answers that may wait; more are turned away.")]
MaxTokensLimit: TypeAlias = Annotated[int, typer.Option(metavar="N", help="Most tokens of one answer.")]
Timeout: TypeAlias = Annotated[float, typer.Option(metavar="SECONDS", help="Most time of one request, queue included.")]

# --- of a server of scores

Logits: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Serve this model's exact scores for proxy-tuning elsewhere, in place of a run: a shipped model, a "
        "folder or a hub name.",
        show_default=False,
    ),
]
MaxSessions: TypeAlias = Annotated[int, typer.Option(help="With --logits: sessions at a time.", min=1)]
MaxKept: TypeAlias = Annotated[
    int, typer.Option(metavar="TOKENS", help="With --logits: tokens in the caches of all sessions.", min=1)
]
MaxBody: TypeAlias = Annotated[int, typer.Option(metavar="BYTES", help="With --logits: of a request.", min=1)]
MaxAnswer: TypeAlias = Annotated[
    int, typer.Option(metavar="BYTES", help="With --logits: of an answer's scores.", min=1)
]
Idle: TypeAlias = Annotated[
    float, typer.Option(metavar="SECONDS", help="With --logits: until an unused session is closed.")
]
Turn: TypeAlias = Annotated[
    float, typer.Option(metavar="SECONDS", help="With --logits: until a request has had its turn.")
]
Wire: TypeAlias = Annotated[
    str, typer.Option(help="With --logits: float32, exact, of which a client may ask for less; or float16.")
]
Dtype: TypeAlias = Annotated[str, typer.Option(help="With --logits: what the model computes in, float32 or bfloat16.")]
Device: TypeAlias = Annotated[str, typer.Option(help="With --logits: auto, cpu, cuda, ..")]


def serve(
    folder: Folder = None,
    large: Large = None,
    alpha: Alpha = None,
    speculate: Speculate = None,
    expert_prompt: ExpertPrompt = None,
    max_batch: MaxBatch = None,
    max_queue: MaxQueue = 64,
    max_tokens_limit: MaxTokensLimit = 1024,
    timeout: Timeout = 300,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_env: ApiKeyEnv = None,
    token_env: TokenEnv = None,
    logits: Logits = None,
    max_sessions: MaxSessions = 16,
    max_kept: MaxKept = 1 << 18,
    max_body: MaxBody = 16 << 20,
    max_answer: MaxAnswer = 256 << 20,
    idle: Idle = 300,
    turn: Turn = 60,
    wire: Wire = "float32",
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Serve a run: an OpenAI-compatible endpoint, and a chat page at /. Or a model's exact scores (--logits)."""
    if folder is not None and logits is not None:
        raise RequestError(f"{folder} and --logits {logits} are two things to serve; start one server for each")
    _check_options(logits is not None)
    if logits is not None:
        from fedpeft.app.logits import MAX_BATCH, LogitServing
        from fedpeft.proxy.logit_sessions import limits_of

        limits = limits_of(wire, max_sessions, max_kept, max_body, max_answer, idle, turn)
        rows = MAX_BATCH if max_batch is None else max_batch
        _serve_scores(LogitServing(logits, limits, rows, dtype, device, host, port, api_key_env))
    elif folder is not None:
        from fedpeft.app.serving import Serving

        rows = RUN_BATCH if max_batch is None else max_batch
        limited = (rows, max_queue, max_tokens_limit, timeout)
        _serve_run(
            folder, Serving(large, alpha, speculate, *limited, host, port, api_key_env, token_env, expert_prompt)
        )
    else:
        raise RequestError("say what to serve: fedpeft serve RUN_DIR, or fedpeft serve --logits MODEL")


def _serve_run(folder: Path, serving: Serving) -> None:
    from fedpeft.app.serving import serve

    _end(serve(folder, serving, _begun))


def _serve_scores(serving: LogitServing) -> None:
    from fedpeft.app.logits import serve_logits

    _end(serve_logits(serving, lambda name, url: _begun(f"the scores of {name}", url)))


def _begun(what: str, url: str) -> None:
    typer.echo(f"serving {what} at {url}; stop with Ctrl+C")


def _end(number: int) -> None:
    """Be interrupted where a signal was the interruption of a terminal."""
    import signal

    if number == signal.SIGINT:
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
