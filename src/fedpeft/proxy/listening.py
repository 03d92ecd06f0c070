"""An ASGI application on a socket, until a signal says that it is enough."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

from fedpeft.core.errors import RequestError

IDLE_S = 5  # after which a connection without a request is closed
BACKLOG = 128  # connections that may wait to be taken
LAST_S = 5  # beyond the grace, in which streams that were ended must have said so


def bind(host: str, port: int) -> socket.socket:
    """A socket of its own, not yet listening. Raises RequestError: the address is taken, or is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY where this is said
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        raise RequestError(f"cannot listen at {host}, port {port}: {error}; choose another --port or --host") from error
    return made


def reached(sock: socket.socket) -> str:
    """Where it is reached from now on, as a URL; who connects before the application runs waits for it."""
    sock.listen(BACKLOG)
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(
    app: Any, sock: socket.socket, stop: Callable[[], None], end: Callable[[], None], grace_s: float, connections: int
) -> int:
    """Serve until SIGINT or SIGTERM; the signal's number.

    At the signal no further connection is taken and `stop` is called; what is being answered goes on for `grace_s`
    seconds. Then `end` is called, which must end what is left. A second signal ends everything at once.

    Args:
        connections: beyond these a client is answered with status 503.

    Raises:
        RequestError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise RequestError("serving needs uvicorn: pip install 'fedpeft[proxy]'") from error
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", ws="none", server_header=False,
        limit_concurrency=connections, timeout_keep_alive=IDLE_S, timeout_graceful_shutdown=int(grace_s + LAST_S),
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]  # it would raise them once more
    return asyncio.run(_serve(server, sock, stop, end, grace_s))


async def _serve(
    server: Any, sock: socket.socket, stop: Callable[[], None], end: Callable[[], None], grace_s: float
) -> int:
    loop = asyncio.get_running_loop()
    seen: list[int] = []

    def ended() -> None:
        stop()
        loop.call_later(grace_s, loop.run_in_executor, None, end)

    def heard(number: int, frame: Any) -> None:
        if seen:
            server.force_exit = True
            loop.call_soon_threadsafe(loop.run_in_executor, None, end)
        else:
            server.should_exit = True
            loop.call_soon_threadsafe(ended)
        seen.append(number)

    with _handling(heard):
        await server.serve([sock])
    return seen[0] if seen else 0


@contextlib.contextmanager
def _handling(heard: Callable[[int, Any], None]) -> Iterator[None]:
    """Signals go to `heard` meanwhile."""
    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
