"""The exact logit server, `fedpeft serve --logits MODEL`: scores of a model over HTTP, for those who may ask it.

Routes and records are in `protocol.py`. One thread works on the model, request after request; the others wait for their
turn. Prompts and scores are written nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from fedpeft.core import records
from fedpeft.core.errors import RecordError, RequestError
from fedpeft.proxy.guard import App, Guard, read_body
from fedpeft.proxy.logit_sessions import LogitSessions
from fedpeft.proxy.protocol import RECORD, Begin, Begun, Step
from fedpeft.proxy.refusal import OVERLOADED, Refusal, refusal_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    Handler = Callable[[Request], Awaitable[Response]]

R = TypeVar("R")
SWEEP_S = 10.0  # at most between looks for idle sessions

log = logging.getLogger("fedpeft")


class LogitServer:
    """The server's routes.

    Args:
        sessions: over the model.
        key: what clients must send as `Authorization: Bearer KEY`; None: nothing, see `Guard`.
    """

    def __init__(self, sessions: LogitSessions, key: str | None = None) -> None:
        self.sessions, self.limits = sessions, sessions.limits
        self._key = key
        self._hello = records.encode(sessions.hello)
        self._worker = ThreadPoolExecutor(1, "model")
        self._waiting = 0

    def app(self) -> App:
        """The server as an ASGI application; its sessions end with it.

        Raises:
            RequestError: FastAPI is not installed.
        """
        try:
            from fastapi import FastAPI
        except ImportError as error:
            raise RequestError("serving needs FastAPI: pip install 'fedpeft[proxy]'") from error
        from starlette.exceptions import HTTPException

        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._life)
        app.add_route("/health", self._health, methods=["GET"])
        app.add_route("/v1/model", self._model, methods=["GET"])
        app.add_route("/v1/sessions", _answering(self._begin), methods=["POST"])
        app.add_route("/v1/sessions/{name}", _answering(self._step), methods=["POST"])
        app.add_route("/v1/sessions/{name}", _answering(self._end), methods=["DELETE"])
        app.add_exception_handler(HTTPException, _unknown)
        return Guard(app, self._key, _told, RECORD)

    @contextlib.asynccontextmanager
    async def _life(self, _: Any) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            self._worker.submit(self.sessions.close)
            self._worker.shutdown()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(self.limits.idle_s / 4, SWEEP_S))
            await asyncio.wrap_future(self._worker.submit(self.sessions.sweep))

    async def _health(self, request: Request) -> Response:
        told = {"status": "ok", "sessions": len(self.sessions.held), "waiting": self._waiting}
        return _json(told)

    async def _model(self, request: Request) -> Response:
        return _record(self._hello)

    async def _begin(self, request: Request) -> Response:
        told = await self._read(request, Begin)
        begun: list[Begun] = []

        def job() -> bytes:
            begun.append(self.sessions.begin(told))
            return records.encode(begun[0])

        def forget() -> None:
            for own in begun:
                self.sessions.end(own.session)

        try:
            return _record(await self._work(job))
        except Exception:  # it may have begun, or begin yet, and nobody will know its name
            self._worker.submit(forget)
            raise

    async def _step(self, request: Request) -> Response:
        told, name = await self._read(request, Step), request.path_params["name"]
        return _record(await self._work(lambda: records.encode(self.sessions.step(name, told))))

    async def _end(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self._work(lambda: self.sessions.end(name))
        return _record(b"", 204)

    async def _read(self, request: Request, cls: type[R]) -> R:
        body = await read_body(request.scope, request.receive, self.limits.max_body_bytes, self.limits.body_s)
        return records.decode(body, cls)

    async def _work(self, job: Callable[[], R]) -> R:
        """The job's result, when its turn has come."""
        if self._waiting >= self.limits.max_waiting:
            raise Refusal(f"{self._waiting} requests wait already; try again later", None, "busy", 503, OVERLOADED)
        self._waiting += 1
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                return await asyncio.wrap_future(self._worker.submit(job))
        except TimeoutError:
            late = f"the request was not done within {self.limits.timeout_s:g} s; try again later"
            raise Refusal(late, None, "timeout", 503, OVERLOADED) from None
        finally:
            self._waiting -= 1


def _answering(handle: Handler) -> Handler:
    """The handler, with what goes wrong turned into an answer."""

    async def answer(request: Request) -> Response:
        try:
            return await handle(request)
        except RecordError as error:
            refusal = Refusal(str(error), None, "bad_record")
        except ConnectionResetError:
            refusal = Refusal("the client has gone", None, "gone")
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                log.error("a request failed with %s", type(error).__name__)
        return _json(refusal.body(), refusal.status, {"retry-after": "1"} if refusal.kind == OVERLOADED else None)

    return answer


def _told(method: str, path: str, status: int) -> None:
    """Nothing of a request is written down but that there was one, and that only where debugging is on."""
    log.debug("%s %s: %d", method, path.partition("/sessions/")[0], status)


def _record(body: bytes, status: int = 200) -> Response:
    from starlette.responses import Response

    return Response(body or None, status, media_type=RECORD)


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    from starlette.responses import Response

    return Response(json.dumps(body), status, headers=headers, media_type="application/json")


async def _unknown(request: Request, error: Any) -> Response:
    message = "there are /health, /v1/model and /v1/sessions, which fedpeft's own client asks"
    code = "not_found" if error.status_code == 404 else "wrong_method"
    return _json(Refusal(message, None, code).body(), error.status_code)
