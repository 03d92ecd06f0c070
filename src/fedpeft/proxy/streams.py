"""From the engine's thread to a connection: news of a request, and a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fedpeft.proxy.batch import New, News
from fedpeft.proxy.guard import Receive, Send
from fedpeft.proxy.refusal import Refusal

EVERY_S = 0.02  # between two chunks of a stream at the least; people see no difference


class Mailbox:
    """News of one request, delivered in any thread and read in the event loop.

    The event loop is woken only while a reader waits, and a reader of a stream comes back no sooner than `EVERY_S`
    after its last visit, unless all is there: tokens that come faster travel together, and the engine's thread is left
    alone.

    Args:
        rows: answers that are waited for.
        stream: give what there is; otherwise everything at once, when all of it is there.
    """

    def __init__(self, rows: int, stream: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._open, self._stream = rows, stream
        self._lock = threading.Lock()
        self._kept: list[New] = []
        self._error: BaseException | None = None
        self._waiting = self._resting = False  # for news; until the next visit, or the end
        self._woken = asyncio.Event()
        self._next_s = 0.0

    def deliver(self, news: News) -> None:
        """Take news; in the engine's thread."""
        with self._lock:
            if isinstance(news, BaseException):
                self._error = news
            else:
                self._kept += news
                self._open -= sum(each.done is not None for each in news)
            wake = (self._waiting and self._ready) or (self._resting and self._ended)
            if wake:
                self._waiting = self._resting = False
        if wake:
            self._loop.call_soon_threadsafe(self._woken.set)

    @property
    def _ended(self) -> bool:
        return self._error is not None or not self._open

    @property
    def _ready(self) -> bool:
        return self._ended or (self._stream and bool(self._kept))

    async def read(self) -> Sequence[New]:
        """What came since the last time. Raises what ended the request, behind the news before it."""
        await self._rest(self._next_s - self._loop.time())
        with self._lock:
            self._resting = False
            self._waiting = waits = not self._ready
        if waits:
            await self._woken.wait()
        self._woken.clear()
        with self._lock:
            news, self._kept = self._kept, []
        if not news and self._error is not None:
            raise self._error
        self._next_s = self._loop.time() + EVERY_S
        return news

    async def _rest(self, seconds: float) -> None:
        """Wait so long, or until all is there."""
        with self._lock:
            self._resting = rests = seconds > 0 and not self._ended
        if rests:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), seconds)


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
