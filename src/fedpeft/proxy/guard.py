"""What every request to a server of ours passes first: host, key, kind and size of the body; headers of the answer."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias

from fedpeft.core.errors import RequestError
from fedpeft.proxy.refusal import OVERLOADED, Refusal

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_S = 30.0  # in which a body must have come
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


def check_host(host: str, key: str | None) -> None:
    """Refuse to listen beyond this machine without a key. Raises RequestError."""
    if host not in LOOPBACK and not key:
        message = f"--host {host} can be reached from other machines, and there is no key"
        raise RequestError(f"{message}; name a variable that holds one with --api-key-env, or use --host 127.0.0.1")


class Guard:
    """An ASGI application around another.

    Args:
        app: the application within.
        key: what `Authorization: Bearer KEY` must say for paths under `/v1` and for `/metrics`; None: nothing, and then
            the header `Host` must name this machine, so that no foreign page can speak to it under another name.
        observe: told method, path and status of every answer.
        kind: the content type that a body must have; none that a web page may send to another site unasked.
    """

    def __init__(
        self, app: App, key: str | None, observe: Callable[[str, str, int], None], kind: str = "application/json"
    ) -> None:
        self.app, self.observe, self.kind = app, observe, kind
        self.key = key.encode() if key else None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            self.check(scope)
        except Refusal as refusal:
            await refuse(counted, refusal)
        else:
            await self.app(scope, receive, counted)
        finally:
            self.observe(scope["method"], scope["path"], status)

    def check(self, scope: Message) -> None:
        """Raises Refusal."""
        headers = dict(scope["headers"])
        path = scope["path"]
        if self.key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if name.lower() not in LOOPBACK:
                message = "the header Host names another machine; without a key only 127.0.0.1, localhost and ::1 are"
                raise Refusal(f"{message} answered", None, "wrong_host", 403)
        elif path.startswith("/v1") or path == "/metrics":
            given = headers.get(b"authorization", b"")
            kind, _, token = given.partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self.key):
                message = "the key is missing or wrong; send the header Authorization: Bearer KEY"
                raise Refusal(message, None, "invalid_api_key", 401)
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != self.kind.encode():
                message = f"the body must be of another kind; send the header Content-Type: {self.kind}"
                raise Refusal(message, None, "unsupported_media_type", 415)


async def refuse(send: Send, refusal: Refusal) -> None:
    """Answer with an error."""
    more: list[tuple[bytes, bytes]] = []
    if refusal.kind == OVERLOADED:
        more.append((b"retry-after", b"1"))
    if refusal.status == 401:
        more.append((b"www-authenticate", b"Bearer"))
    await answer(send, refusal.body(), refusal.status, more)


async def answer(send: Send, body: dict[str, Any], status: int = 200, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Answer with a JSON object."""
    content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode(errors="replace")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def read_body(scope: Message, receive: Receive, most_bytes: int, within_s: float = BODY_S) -> bytes:
    """The whole body; a larger one, or one that does not come within some seconds, is given up early.

    Raises:
        Refusal: with status 413 or 408.
    """
    too_large = Refusal(f"the body is larger than {most_bytes} bytes; send less", None, "body_too_large", 413)
    said = dict(scope["headers"]).get(b"content-length", b"0")
    if not said.isdigit() or int(said) > most_bytes:
        raise too_large
    found = bytearray()
    try:
        async with asyncio.timeout(within_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionResetError
                found += message.get("body", b"")
                if len(found) > most_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(found)
    except TimeoutError:
        late = f"the body did not come within {within_s:g} s; send it again"
        raise Refusal(late, None, "body_timeout", 408) from None
