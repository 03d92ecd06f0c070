"""The exact logit server, `fedpeft serve --logits MODEL`: scores of a model over HTTP, for those who may ask it.

Routes and records are in `protocol.py`. One thread works on the model, request after request; the others wait for their
turn. Prompts and scores are written nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from fedpeft.core import records
from fedpeft.core.errors import RecordError, RequestError
from fedpeft.proxy.connection import is_loopback
from fedpeft.proxy.logit_sessions import Denied, LogitSessions
from fedpeft.proxy.protocol import RECORD, Begin, Step

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    Handler = Callable[[Request], Awaitable[Response]]

R = TypeVar("R")

_INSTALL = "the logit server needs FastAPI and uvicorn: pip install 'fedpeft[proxy]'"


class LogitServer:
    """The server's routes.

    Args:
        sessions: over the model.
        key: what clients must send as `Authorization: Bearer KEY`; None: nothing, and then the header `Host` must
            name this machine, so that no web page can ask under another name.
    """

    def __init__(self, sessions: LogitSessions, key: str | None = None) -> None:
        self.sessions, self.limits = sessions, sessions.limits
        self._key = None if key is None else key.encode()
        self._hello = records.encode(sessions.hello)
        self._worker = ThreadPoolExecutor(1, "model")
        self._waiting = 0

    def app(self) -> Any:
        """The server as an ASGI application.

        Raises:
            RequestError: FastAPI is not installed.
        """
        try:
            from fastapi import FastAPI
        except ImportError as error:
            raise RequestError(_INSTALL) from error
        from starlette.exceptions import HTTPException

        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._life)
        app.add_route("/health", _answering(self._health), methods=["GET"])
        app.add_route("/v1/model", _answering(self._model), methods=["GET"])
        app.add_route("/v1/sessions", _answering(self._begin), methods=["POST"])
        app.add_route("/v1/sessions/{name}", _answering(self._step), methods=["POST"])
        app.add_route("/v1/sessions/{name}", _answering(self._end), methods=["DELETE"])
        app.add_exception_handler(HTTPException, _unknown)
        return app

    @contextlib.asynccontextmanager
    async def _life(self, _: Any) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            self._worker.submit(self.sessions.close)
            self._worker.shutdown(wait=True)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(self.limits.idle_s / 4, 10.0))
            await asyncio.wrap_future(self._worker.submit(self.sessions.sweep))

    async def _health(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        self._check_host(request)
        told = {"status": "ok", "sessions": len(self.sessions.held), "waiting": self._waiting}
        return JSONResponse(told)

    async def _model(self, request: Request) -> Response:
        self._admit(request)
        return _record(self._hello)

    async def _begin(self, request: Request) -> Response:
        told = await self._read(request, Begin)
        return _record(await self._work(lambda: records.encode(self.sessions.begin(told))))

    async def _step(self, request: Request) -> Response:
        told, name = await self._read(request, Step), request.path_params["name"]
        return _record(await self._work(lambda: records.encode(self.sessions.step(name, told))))

    async def _end(self, request: Request) -> Response:
        from starlette.responses import Response

        self._admit(request)
        name = request.path_params["name"]
        await self._work(lambda: self.sessions.end(name))
        return Response(status_code=204)

    async def _work(self, job: Callable[[], R]) -> R:
        """The job's result, when its turn has come."""
        if self._waiting >= self.limits.max_waiting:
            raise Denied(f"{self._waiting} requests wait already; try again later", "busy", 503)
        self._waiting += 1
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                return await asyncio.wrap_future(self._worker.submit(job))
        except TimeoutError:
            text = f"the request was not done within {self.limits.timeout_s:g} s; try again later"
            raise Denied(text, "timeout", 503) from None
        finally:
            self._waiting -= 1

    def _admit(self, request: Request) -> None:
        """Refuse who may not ask."""
        self._check_host(request)
        if self._key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            raise Denied("the key is missing or wrong; send the header Authorization: Bearer KEY", "key", 401)

    def _check_host(self, request: Request) -> None:
        if self._key is None and not is_loopback(request.url.hostname or ""):
            raise Denied("without a key this server answers under the names of this machine alone", "host", 403)

    async def _read(self, request: Request, cls: type[R]) -> R:
        """The record in a request's body; a body that is too large or too slow is given up early."""
        self._admit(request)
        if request.headers.get("content-type") != RECORD:
            raise Denied(f"the body must be a record; send the header Content-Type: {RECORD}", "content_type", 415)
        most = self.limits.max_body_bytes
        too_large = Denied(f"the body is larger than {most} bytes; send less", "body_too_large", 413)
        said = request.headers.get("content-length", "0")
        if not said.isdigit() or int(said) > most:
            raise too_large
        found = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for part in request.stream():
                    found += part
                    if len(found) > most:
                        raise too_large
        except TimeoutError:
            raise Denied(f"the body did not come within {self.limits.body_s:g} s", "body_timeout", 408) from None
        return records.decode(bytes(found), cls)


def _answering(handle: Handler) -> Handler:
    """The handler, with what goes wrong turned into an answer."""

    async def answer(request: Request) -> Response:
        from starlette.requests import ClientDisconnect

        try:
            return await handle(request)
        except Denied as error:
            return _error(str(error), error.code, error.status)
        except (RequestError, RecordError) as error:
            return _error(str(error), "bad_request", 400)
        except ClientDisconnect:
            return _error("the client has gone", "gone", 400)

    return answer


def _record(body: bytes) -> Response:
    from starlette.responses import Response

    return Response(body, media_type=RECORD, headers={"cache-control": "no-store"})


def _error(message: str, code: str, status: int) -> Response:
    from starlette.responses import Response

    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}.get(status, {})
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "code": code}})
    return Response(body, status, headers=headers, media_type="application/json")


async def _unknown(request: Request, error: Any) -> Response:
    return _error(
        "there are /health, /v1/model and /v1/sessions, as fedpeft's client asks them", "unknown", error.status_code
    )


def check_host(host: str, key: str | None) -> None:
    """Refuse to listen beyond this machine without a key. Raises RequestError."""
    if not is_loopback(host) and not key:
        raise RequestError(
            f"--host {host} can be reached from other machines, and there is no key; name the variable that holds one "
            "with --api-key-env, or use --host 127.0.0.1"
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: any free one.

    Raises:
        RequestError: the address is taken, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise RequestError(f"cannot listen at {host}:{port} ({error}); choose another --port or --host") from error


def serve(server: LogitServer, at: socket.socket) -> None:
    """Answer until a signal ends it; what is being worked on is finished first.

    Raises:
        RequestError: FastAPI or uvicorn is not installed.
    """
    app = server.app()
    try:
        import uvicorn
    except ImportError as error:
        raise RequestError(_INSTALL) from error
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=10,
        h11_max_incomplete_event_size=1 << 14,
        http="h11",
        ws="none",
    )
    uvicorn.Server(config).run(sockets=[at])
