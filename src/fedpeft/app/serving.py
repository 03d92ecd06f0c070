"""`fedpeft serve RUN_DIR`: a run's artefact behind the endpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedpeft.core.errors import RequestError

GRACE_S = 10.0  # in which answers may come to their end when the server is stopped
SPARE = 32  # connections beside those of requests: the page, health, metrics


@dataclass(frozen=True)
class Serving:
    """How a run is served; the defaults are those of the command.

    Attributes:
        large: the large model, by the specification that `--large` takes; None: that of the run, if it had one;
            "none": the tuned small one alone.
        alpha: how far the small models steer; None: as the run chose it.
        speculate: tokens that are drafted ahead; 0: none; None: as the run was configured, where the large model can.
        key_env: the environment variable that holds the clients' key; None: no key, and this machine alone.
        token_env: the environment variable that holds the token of the large model's server.
        expert_prompt: what the tuned small model alone reads around a prompt; None: as the run was configured.
    """

    large: str | None = None
    alpha: float | None = None
    speculate: int | None = None
    max_batch: int = 8
    max_queue: int = 64
    max_tokens_limit: int = 1024
    timeout_s: float = 300.0
    host: str = "127.0.0.1"
    port: int = 8000
    key_env: str | None = None
    token_env: str | None = None
    expert_prompt: str | None = None


def serve(folder: Path | str, serving: Serving, begun: Callable[[str, str], None] = lambda name, url: None) -> int:
    """Serve until SIGINT or SIGTERM.

    Args:
        folder: a run, or what a run wrote as its artefact.
        begun: told the model's name and the URL before the first request.

    Returns:
        the number of the signal that ended it.

    Raises:
        RequestError: a host without a key, an address that is taken, or what `open_artefact` refuses.
    """
    from fedpeft.app.holding import key_of
    from fedpeft.app.proxying import open_artefact
    from fedpeft.proxy.desk import Options
    from fedpeft.proxy.engine import PATIENCE_S, Engine
    from fedpeft.proxy.guard import check_host
    from fedpeft.proxy.listening import bind, listen, reached
    from fedpeft.proxy.serving import make_app

    key = key_of(serving.key_env, "--api-key-env")
    check_host(serving.host, key)
    if serving.speculate is not None and serving.speculate < 0:
        raise RequestError(f"--speculate {serving.speculate} drafts nothing; use 0 for none, or 4")
    options = Options(key, serving.max_tokens_limit, serving.timeout_s)
    with bind(serving.host, serving.port) as sock:
        artefact = open_artefact(
            Path(folder),
            serving.large,
            alpha=serving.alpha,
            token=key_of(serving.token_env, "--token-env"),
            expert_prompt=serving.expert_prompt,
        )
        drafts = artefact.speculate if serving.speculate is None else serving.speculate
        patience_s = min(PATIENCE_S, serving.timeout_s / 2)  # so that who asks hears of it, and not of the time limit
        engine = Engine(serving.max_batch, serving.max_queue, drafts, patience_s=patience_s)
        try:
            app = make_app(artefact, engine, options)
            begun(artefact.name, reached(sock))
            connections = 2 * serving.max_batch + serving.max_queue + SPARE  # rows here and elsewhere
            return listen(app, sock, engine.stop, engine.close, GRACE_S, connections)
        finally:
            engine.close()
