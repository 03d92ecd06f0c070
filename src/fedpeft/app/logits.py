"""`fedpeft serve --logits MODEL`: a model behind the logit server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpeft.core.errors import RequestError

if TYPE_CHECKING:
    from fedpeft.proxy.logit_sessions import Limits

GRACE_S = 10.0  # in which answers may come to their end when the server is stopped
SPARE = 16  # connections beside those of sessions and of requests that wait
MAX_BATCH = 64  # rows of a session


@dataclass(frozen=True)
class LogitServing:
    """How a model is served.

    Attributes:
        model: a shipped model, a folder or a hub name.
        limits: what the server bears; its wires are those that it sends.
        max_batch: rows of a session.
        dtype: what the model computes in.
        key_env: the environment variable that holds the clients' key; None: no key, and this machine alone.
    """

    model: str
    limits: Limits
    max_batch: int = MAX_BATCH
    dtype: str = "float32"
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    key_env: str | None = None


def serve_logits(serving: LogitServing, begun: Callable[[str, str], None] = lambda name, url: None) -> int:
    """Serve until SIGINT or SIGTERM.

    Args:
        begun: told the model's identity and the URL before the first request.

    Returns:
        the number of the signal that ended it.

    Raises:
        RequestError: a host without a key, a key that is not there, an address that is taken.
        ModelError: a model that cannot be loaded.
    """
    from fedpeft.app.holding import key_of
    from fedpeft.proxy.guard import check_host
    from fedpeft.proxy.inprocess import load_inprocess
    from fedpeft.proxy.listening import bind, listen, reached
    from fedpeft.proxy.logit_server import LogitServer
    from fedpeft.proxy.logit_sessions import LogitSessions

    if serving.max_batch < 1:
        raise RequestError(f"--max-batch is {serving.max_batch}; give at least 1")
    key = key_of(serving.key_env, "--api-key-env")
    check_host(serving.host, key)
    with bind(serving.host, serving.port) as sock:
        model = load_inprocess(serving.model, serving.dtype, serving.device, max_batch=serving.max_batch)
        app = LogitServer(LogitSessions(model, serving.limits), key).app()
        begun(model.caps.identity, reached(sock))
        connections = serving.limits.max_sessions + serving.limits.max_waiting + SPARE
        return listen(app, sock, _nothing, _nothing, GRACE_S, connections)


def _nothing() -> None:
    """What is being worked on ends by itself."""
