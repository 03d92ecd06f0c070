"""From the engine's thread to a connection: news of a request, and a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fedpeft.proxy.engine import New, News
from fedpeft.proxy.guard import Receive, Send
from fedpeft.proxy.refusal import Refusal


class Mailbox:
    """News of one request, delivered in any thread and read in the event loop.

    Args:
        rows: answers that are waited for.
        stream: wake the reader for every piece of news; otherwise once, when all of it is there.
    """

    def __init__(self, rows: int, stream: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._open, self._stream = rows, stream
        self._kept: list[New] = []
        self._queue: asyncio.Queue[News] = asyncio.Queue()

    def deliver(self, news: News) -> None:
        """Take news; in the engine's thread."""
        if isinstance(news, BaseException) or self._stream:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, news)
            return
        self._kept += news
        self._open -= sum(each.done is not None for each in news)
        if not self._open:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, self._kept)

    async def read(self) -> Sequence[New]:
        """The next news, and all that came since. Raises what ended the request."""
        news = await self._queue.get()
        if isinstance(news, BaseException):
            raise news
        found = list(news)
        while not self._queue.empty():
            more = self._queue.get_nowait()
            if isinstance(more, BaseException):
                self._queue.put_nowait(more)
                break
            found += more
        return found


async def disconnected(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def event(body: dict[str, Any]) -> bytes:
    """An object as a server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, allow_nan=False).encode(errors="replace") + b"\n\n"


DONE = b"data: [DONE]\n\n"
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]


class EventStream:
    """Server-sent events over one connection; the status is sent with the first."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def write(self, content: bytes) -> None:
        """Send events."""
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(EVENTS)})
        await self._send({"type": "http.response.body", "body": content, "more_body": True})

    async def end(self, refusal: Refusal | None = None) -> None:
        """Send the error that ended it, if one did, and the last event."""
        await self.write((event(refusal.body()) if refusal else b"") + DONE)
        await self._send({"type": "http.response.body", "body": b""})


async def batches(mailbox: Mailbox, rows: int) -> AsyncIterator[Sequence[New]]:
    """News until every row is finished."""
    while rows:
        news = await mailbox.read()
        rows -= sum(each.done is not None for each in news)
        yield news
