"""One thread that decodes for everybody: waiting rows form a left-padded batch, each with settings of its own.

Requests come from any thread. Their rows wait in one bounded queue; rows that wait for the same models are opened
together, as many as there is room for, and a second batch may run beside a long first one, so that a short request
does not wait for the end of a long one. No more than `max_batch` rows are open at once, whatever is asked for.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

from fedpeft.core.errors import FedpeftError, RequestError
from fedpeft.proxy.answers import Completion, Emitted
from fedpeft.proxy.blackbox import BackendError
from fedpeft.proxy.decode import Decoding
from fedpeft.proxy.refusal import FAILED, OVERLOADED, Refusal
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.trio import Trio

log = logging.getLogger("fedpeft.serve")

BATCHES = 2  # that run side by side for the same models
T = TypeVar("T")


class Steps(Protocol):
    """Texts that go on side by side; `proxy/decode.py` has the real one."""

    def step(self) -> Sequence[Emitted]:
        """One more token, or several, for each open row."""
        ...

    def drop(self, row: int) -> None:
        """Go on without a row."""
        ...

    def completions(self) -> Sequence[Completion]:
        """What was said so far, by row."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


Open: TypeAlias = Callable[[Trio, Sequence[Sequence[int]], Sequence[Settings], int], Steps]


@dataclass(frozen=True)
class New:
    """A token for one row of a request, and the whole answer with its last token."""

    row: int
    emitted: Emitted
    done: Completion | None


News: TypeAlias = Sequence[New] | BaseException  # what came, or what ended the request


@dataclass(frozen=True)
class Row:
    """One answer that is wanted."""

    prompt: Sequence[int]
    settings: Settings


@dataclass(eq=False)
class Ticket:
    """A request that the engine has taken.

    Attributes:
        deliver: called from the engine's thread with what is new: tokens of its rows, or the error that ended it.
        open: rows that are not finished.
        cancelled: nothing more is wanted.
    """

    trio: Trio
    rows: Sequence[Row]
    deliver: Callable[[News], None]
    open: set[int]
    cancelled: bool = False


@dataclass(eq=False)
class _Batch:
    trio: Trio
    steps: Steps
    places: list[tuple[Ticket, int]]  # by row of the batch
    open: set[int] = field(default_factory=set)


class Engine:
    """The thread, and the queue before it.

    Args:
        max_batch: rows that are decoded at once.
        max_queue: rows, and texts to score, that may wait.
        speculate: tokens that the tuned small model drafts ahead; 0: none.
        decoding: opens a batch; replaced in tests.
    """

    def __init__(self, max_batch: int = 8, max_queue: int = 64, speculate: int = 0, decoding: Open = Decoding) -> None:
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue)):
            if value < 1:
                raise RequestError(f"{name} {value} serves nobody; use at least 1")
        self.max_batch, self.max_queue, self._speculate, self._decoding = max_batch, max_queue, speculate, decoding
        self._changed = threading.Condition()
        self._rows: deque[tuple[Ticket, int]] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._batches: list[_Batch] = []
        self._stopping = self._closed = False
        self._thread = threading.Thread(target=self._run, name="fedpeft-engine", daemon=True)
        self._thread.start()

    # --- from any thread ---------------------------------------------------------------------------------------

    def submit(self, trio: Trio, rows: Sequence[Row], deliver: Callable[[News], None]) -> Ticket:
        """Have rows decoded. Raises Refusal where the queue is full or the server stops."""
        ticket = Ticket(trio, rows, deliver, set(range(len(rows))))
        with self._changed:
            self._check_room(len(rows))
            self._rows.extend((ticket, i) for i in range(len(rows)))
            self._changed.notify()
        return ticket

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have other work with the models done in the engine's thread, between two steps. Raises as `submit` does."""
        future: Future[T] = Future()
        with self._changed:
            self._check_room(1)
            self._calls.append((future, work))
            self._changed.notify()
        return future

    def cancel(self, ticket: Ticket) -> None:
        """Want no more of a request: waiting rows leave at once, running ones before the next step."""
        with self._changed:
            ticket.cancelled = True
            self._rows = deque(place for place in self._rows if place[0] is not ticket)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Rows and scorings in the queue."""
        return len(self._rows) + len(self._calls)

    @property
    def running(self) -> int:
        """Rows that are decoded now."""
        return sum(len(batch.open) for batch in self._batches)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._stopping

    def stop(self) -> None:
        """Take no more requests; those that are there go on."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def close(self, timeout_s: float = 10.0) -> None:
        """End everything now; what is open or waits is told so."""
        with self._changed:
            self._stopping = self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _check_room(self, n: int) -> None:
        if self._stopping or not self._thread.is_alive():
            raise Refusal("the server is stopping; ask again when it is back", None, "stopping", 503, FAILED)
        if self.waiting + n > self.max_queue:
            message = f"{self.waiting} answers wait already, and {n} more do not fit into the queue of {self.max_queue}"
            raise Refusal(f"{message}; ask again later", None, "queue_full", 429, OVERLOADED)

    # --- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait():
            while self._calls:
                self._answer(*self._calls.popleft())
            self._drop_cancelled()
            self._admit()
            for batch in list(self._batches):
                self._advance(batch)
        self._end()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False: it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._rows or self._calls or self._batches)
            return not self._closed

    @staticmethod
    def _answer(future: Future[Any], work: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:
            _note(error)
            future.set_exception(error)

    def _drop_cancelled(self) -> None:
        for batch in list(self._batches):
            gone = [row for row in batch.open if batch.places[row][0].cancelled]
            try:
                for row in gone:
                    batch.open.discard(row)
                    batch.steps.drop(row)
            except Exception as error:
                self._fail(batch, error)
            if not batch.open:
                self._finish(batch)

    def _admit(self) -> None:
        """Open batches of waiting rows while there is room."""
        while chosen := self._choose():
            try:
                self._open(chosen)
            except Exception as error:
                self._refuse(chosen, error)

    def _open(self, chosen: list[tuple[Ticket, int]]) -> None:
        trio, rows = chosen[0][0].trio, [ticket.rows[i] for ticket, i in chosen]
        steps = self._decoding(trio, [row.prompt for row in rows], [row.settings for row in rows], self._speculate)
        self._batches.append(_Batch(trio, steps, chosen, set(range(len(chosen)))))

    def _choose(self) -> list[tuple[Ticket, int]]:
        """Rows of the next batch, taken out of the queue: those that wait longest for models that have a batch free."""
        with self._changed:
            free = self.max_batch - self.running
            busy = [batch.trio for batch in self._batches]
            first = next((t for t, _ in self._rows if sum(b is t.trio for b in busy) < BATCHES), None)
            if first is None or free < (self.max_batch / 2 if busy else 1):
                return []  # a batch of the few rows that came free would cost a step as a large one does
            large = first.trio.large
            room = free if large is None else min(free, large.caps.max_batch)
            chosen = [place for place in self._rows if place[0].trio is first.trio][:room]
            taken = set(map(id, chosen))
            self._rows = deque(place for place in self._rows if id(place) not in taken)
            return chosen

    def _advance(self, batch: _Batch) -> None:
        try:
            emitted = batch.steps.step()
        except Exception as error:
            self._fail(batch, error)
            return
        told: dict[Ticket, list[New]] = {}
        for each in emitted:
            if each.row not in batch.open:
                continue
            ticket, i = batch.places[each.row]
            done = None if each.finish is None else batch.steps.completions()[each.row]
            told.setdefault(ticket, []).append(New(i, each, done))
            if each.finish is not None:
                batch.open.discard(each.row)
                ticket.open.discard(i)
        for ticket, new in told.items():
            if not ticket.cancelled:
                _deliver(ticket, new)
        if not batch.open:
            self._finish(batch)

    def _refuse(self, chosen: list[tuple[Ticket, int]], error: Exception) -> None:
        """A batch could not be opened: one request is told; several are tried again, each by itself."""
        tickets = list(dict.fromkeys(ticket for ticket, _ in chosen))
        if len(tickets) == 1 or isinstance(error, BackendError):
            self._tell(tickets, error)
            return
        for ticket in tickets:
            try:
                self._open([place for place in chosen if place[0] is ticket])
            except Exception as other:
                self._tell([ticket], other)

    def _fail(self, batch: _Batch, error: BaseException) -> None:
        tickets = list(dict.fromkeys(batch.places[row][0] for row in batch.open))
        batch.open.clear()
        self._finish(batch)
        self._tell(tickets, error)

    def _tell(self, tickets: Sequence[Ticket], error: BaseException) -> None:
        """End requests with an error; their other rows go, too."""
        _note(error)
        for ticket in tickets:
            if not ticket.cancelled:
                self.cancel(ticket)
                _deliver(ticket, error)

    def _finish(self, batch: _Batch) -> None:
        if batch in self._batches:
            self._batches.remove(batch)
            try:
                batch.steps.close()
            except Exception as error:
                _note(error)

    def _end(self) -> None:
        error = Refusal("the server stopped before the answer was complete; ask again", None, "stopping", 503, FAILED)
        tickets = [ticket for ticket, _ in self._rows]
        for batch in list(self._batches):
            tickets += [batch.places[row][0] for row in batch.open]
            self._finish(batch)
        for ticket in dict.fromkeys(tickets):
            if not ticket.cancelled:
                ticket.cancelled = True
                _deliver(ticket, error)
        for future, _ in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._rows.clear()
        self._calls.clear()


def _deliver(ticket: Ticket, news: News) -> None:
    """Tell a request; one that cannot hear is nobody else's trouble."""
    try:
        ticket.deliver(news)
    except Exception as error:
        ticket.cancelled = True
        _note(error)


def _note(error: BaseException) -> None:
    """Log an error without what it may quote: of one that nobody foresaw the kind and the places alone."""
    if isinstance(error, FedpeftError):
        log.warning("%s: %s", type(error).__name__, error)
    else:
        log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
