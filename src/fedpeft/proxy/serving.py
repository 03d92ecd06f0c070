"""The endpoint: OpenAI's routes over a steered model, health, metrics, and the chat page.

GET  /                     the chat page       GET /health    GET /metrics
GET  /v1/models            what can be asked: the steered model, and the large and the tuned small one by themselves
POST /v1/completions       POST /v1/chat/completions
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from importlib import resources
from typing import TYPE_CHECKING, Any

from fedpeft.core.errors import RequestError
from fedpeft.proxy.desk import Artefact, Desk, Options
from fedpeft.proxy.engine import Engine
from fedpeft.proxy.guard import App, Guard
from fedpeft.proxy.refusal import Refusal
from fedpeft.proxy.replies import Reply

if TYPE_CHECKING:
    from fastapi import Request, Response

PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


def make_app(artefact: Artefact, engine: Engine, options: Options) -> App:
    """The endpoint as an ASGI application; the engine ends with it.

    Raises:
        RequestError: fastapi is not installed.
    """
    try:
        from fastapi import FastAPI
    except ImportError as error:
        raise RequestError("serving needs FastAPI: pip install 'fedpeft[proxy]'") from error
    desk = Desk(artefact, engine, options)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for path, (name, kind) in PAGE.items():
        app.add_route(path, _file(name, kind), methods=["GET"])
    app.add_route("/health", _health(desk), methods=["GET"])
    app.add_route("/metrics", _metrics(desk), methods=["GET"])
    app.add_route("/v1/models", _models(desk), methods=["GET"])
    app.add_route("/v1/models/{name:path}", _models(desk), methods=["GET"])
    app.add_route("/v1/completions", _reply(desk, "completions"), methods=["POST"])
    app.add_route("/v1/chat/completions", _reply(desk, "chat"), methods=["POST"])
    for status in (404, 405):
        app.add_exception_handler(status, _unknown)
    return Guard(app, options.key, desk.observe)


def _json(body: dict[str, Any], status: int = 200) -> Response:
    from fastapi import Response

    return Response(json.dumps(body, ensure_ascii=False), status, media_type="application/json")


def _file(name: str, kind: str) -> Any:
    content = resources.files("fedpeft.proxy").joinpath(name).read_bytes()

    async def page(request: Request) -> Response:
        from fastapi import Response

        return Response(content, headers={"content-type": kind})

    return page


def _health(desk: Desk) -> Any:
    async def health(request: Request) -> Response:
        alive = desk.engine.alive
        load = {"waiting": desk.engine.waiting, "running": desk.engine.running}
        return _json({"status": "ok" if alive else "stopping", **load}, 200 if alive else 503)

    return health


def _metrics(desk: Desk) -> Any:
    async def metrics(request: Request) -> Response:
        from fastapi import Response

        return Response(desk.metrics(), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    return metrics


def _models(desk: Desk) -> Any:
    async def models(request: Request) -> Response:
        name = request.path_params.get("name")
        if name is None:
            return _json({"object": "list", "data": [desk.described(view) for view in desk.views.values()]})
        try:
            return _json(desk.described(desk.view(name)))
        except Refusal as refusal:
            return _json(refusal.body(), refusal.status)

    return models


def _reply(desk: Desk, route: str) -> Any:
    reply = Reply(desk, route)

    async def serve(request: Request) -> Reply:
        return reply

    return serve


async def _unknown(request: Request, error: Any) -> Response:
    """Paths and methods that are not served."""
    status = error.status_code
    what = "no such path" if status == 404 else f"no {request.method} there"
    message = (
        f"{what}; there are /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics and the page at /"
    )
    return _json(Refusal(message, None, "not_found" if status == 404 else "wrong_method").body(), status)
