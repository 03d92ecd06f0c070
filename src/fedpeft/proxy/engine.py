"""One thread that decodes for everybody: waiting rows form a left-padded batch, each with settings of its own.

Requests come from any thread. Their rows wait in one bounded queue; rows that wait for the same models are opened
together, as many as there is room for, and a second batch may run beside a long first one, so that a short request
does not wait for the end of a long one. No more than `max_batch` rows are open at once, whatever is asked for, and as
many beside them for each large model on another machine: one that hangs must not take the room of others.

A batch whose large model is on another machine has a thread of its own (`proxy/turns.py`): others go on while it waits
for an answer, and its requests are told where none comes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from fedpeft.core.errors import RequestError
from fedpeft.proxy.batch import Batch, New, News, Open, Row, Steps, Ticket, note
from fedpeft.proxy.blackbox import BackendError, BlackBoxLM, NoAnswer, elsewhere
from fedpeft.proxy.calls import Call
from fedpeft.proxy.decode import Decoding
from fedpeft.proxy.refusal import FAILED, OVERLOADED, Refusal
from fedpeft.proxy.trio import Trio
from fedpeft.proxy.turns import Turn

BATCHES = 2  # that run side by side for the same models, and calls of one large model elsewhere
PATIENCE_S = 120.0
LOOK_S = 0.25  # between looks at what waits for another machine
FAREWELL_S = 1.0  # in which sessions elsewhere may be closed at the end
T = TypeVar("T")


class Engine:
    """The thread, and the queue before it.

    Args:
        max_batch: rows that are decoded at once; each large model on another machine has as many of its own.
        max_queue: rows, and texts to score, that may wait.
        speculate: tokens that are drafted ahead, from what the text said before or by the small model; 0: none.
        decoding: opens a batch; replaced in tests.
        patience_s: in which another machine must have answered one question about a batch.
    """

    def __init__(
        self,
        max_batch: int = 8,
        max_queue: int = 64,
        speculate: int = 0,
        decoding: Open = Decoding,
        patience_s: float = PATIENCE_S,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue)):
            if value < 1:
                raise RequestError(f"{name} {value} serves nobody; use at least 1")
        self.max_batch, self.max_queue, self._speculate, self._decoding = max_batch, max_queue, speculate, decoding
        self._patience_s = patience_s
        self._turn = Turn()  # of working with the models
        self._stirred = False  # something has happened since the last look
        self._changed = threading.Condition()
        self._rows: deque[tuple[Ticket, int]] = deque()
        self._calls: deque[Call] = deque()
        self._away: list[Call] = []  # that are done in threads of their own
        self._batches: list[Batch] = []
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
            self._stir()
        return ticket

    def call(self, work: Callable[[], T], large: BlackBoxLM | None = None) -> Future[T]:
        """Have other work with the models done between two steps. Raises as `submit` does.

        Args:
            large: the large model that it asks. Where that is on another machine, the work has a thread of its own.
        """
        call = Call(work, large)
        with self._changed:
            self._check_room(1)
            self._calls.append(call)
            self._stir()
        return call.future

    def cancel(self, ticket: Ticket) -> None:
        """Want no more of a request: waiting rows leave at once, running ones before the next step."""
        with self._changed:
            ticket.cancelled = True
            self._rows = deque(place for place in self._rows if place[0] is not ticket)
            self._stir()

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
            self._stir()

    def close(self, timeout_s: float = 10.0) -> None:
        """End everything now; what is open or waits is told so."""
        with self._changed:
            self._stopping = self._closed = True
            self._stir()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _stir(self) -> None:
        """Wake the engine's thread."""
        with self._changed:
            self._stirred = True
            self._changed.notify()

    def _check_room(self, n: int) -> None:
        if self._stopping or not self._thread.is_alive():
            raise Refusal("the server is stopping; ask again when it is back", None, "stopping", 503, FAILED)
        if self.waiting + n > self.max_queue:
            message = f"{self.waiting} answers wait already, and {n} more do not fit into the queue of {self.max_queue}"
            raise Refusal(f"{message}; ask again later", None, "queue_full", 429, OVERLOADED)

    # --- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait():
            self._call_others()
            self._drop_cancelled()
            self._admit()
            for batch in list(self._batches):
                try:
                    self._advance(batch)
                except Exception as error:  # that nobody foresaw: others go on
                    self._fail(batch, error)
        self._end()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False: it is over."""
        with self._changed:
            while not (self._stirred or any(batch.ready for batch in self._batches)):
                looking = bool(self._batches or self._away)
                self._changed.wait(LOOK_S if looking else None)
                if looking:
                    break
            self._stirred = False
            return not self._closed

    def _call_others(self) -> None:
        """Do other work; that with a large model elsewhere goes on beside the engine."""
        for call in list(self._away):
            if call.over(self._patience_s):
                self._away.remove(call)
                if (error := call.unanswered) is not None:
                    self._give_up(call.large, error)
        while (next_call := self._next_call()) is not None:
            if next_call.begin(self._turn, self._stir):
                self._away.append(next_call)

    def _next_call(self) -> Call | None:
        """The one that waits longest, taken out of the queue; of one large model elsewhere, few go on at once."""
        with self._changed:
            for call in self._calls:
                same = sum(own.large is call.large for own in self._away)
                if call.large is None or same < BATCHES or call.future.cancelled():
                    self._calls.remove(call)
                    return call
            return None

    def _drop_cancelled(self) -> None:
        for batch in list(self._batches):
            try:
                batch.drop_cancelled()
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

    def _open(self, chosen: Sequence[tuple[Ticket, int]]) -> None:
        trio, rows = chosen[0][0].trio, [ticket.rows[i] for ticket, i in chosen]
        drafts = self._speculate if trio.steered else 0  # one model alone has nothing to draft for

        def begin() -> Steps:
            return self._decoding(trio, [row.prompt for row in rows], [row.settings for row in rows], drafts)

        self._batches.append(Batch(trio, chosen, begin, self._turn, self._stir))

    def _choose(self) -> list[tuple[Ticket, int]]:
        """Rows of the next batch, taken out of the queue: those that wait longest for models that have a batch free."""
        with self._changed:
            for trio in {id(ticket.trio): ticket.trio for ticket, _ in self._rows}.values():
                if room := self._room(trio):
                    chosen = [place for place in self._rows if place[0].trio is trio][:room]
                    taken = set(map(id, chosen))
                    self._rows = deque(place for place in self._rows if id(place) not in taken)
                    return chosen
            return []

    def _room(self, trio: Trio) -> int:
        """So many rows may form a batch for these models now."""
        same = sum(batch.trio is trio for batch in self._batches)
        free = self.max_batch - sum(len(b.open) for b in self._batches if _home(b.trio) is _home(trio))
        if same >= BATCHES or free < (self.max_batch / 2 if same else 1):
            return 0  # a batch of the few rows that came free would cost a step as a large one does
        return free if trio.large is None else min(free, trio.large.caps.max_batch)

    def _advance(self, batch: Batch) -> None:
        try:
            emitted = batch.step(self._patience_s)
        except Exception as error:
            if batch.steps is None and not isinstance(error, NoAnswer):  # it could not be opened
                self._finish(batch)
                self._refuse(batch.places, error)
            else:
                self._fail(batch, error)
            return
        for owner, own_error in batch.failed():
            self._tell([owner], own_error)
        told: dict[Ticket, list[New]] = {}
        for each in emitted:
            if each.row not in batch.open:
                continue
            ticket, i = batch.places[each.row]
            done = None if each.finish is None or batch.steps is None else batch.steps.completions()[each.row]
            told.setdefault(ticket, []).append(New(i, each, done))
            if each.finish is not None:
                batch.open.discard(each.row)
                ticket.open.discard(i)
        for ticket, new in told.items():
            if not ticket.cancelled:
                _deliver(ticket, new)
        if not batch.open:
            self._finish(batch)

    def _refuse(self, chosen: Sequence[tuple[Ticket, int]], error: Exception) -> None:
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

    def _fail(self, batch: Batch, error: BaseException) -> None:
        """End a batch."""
        tickets = batch.tickets
        batch.open.clear()
        self._finish(batch)
        self._tell(tickets, error)
        if isinstance(error, NoAnswer):
            self._give_up(batch.trio.large, error)

    def _give_up(self, large: BlackBoxLM | None, error: NoAnswer) -> None:
        """A large model did not answer: nobody who waits for it shall wait as long again."""
        with self._changed:
            tickets = list(dict.fromkeys(ticket for ticket, _ in self._rows if ticket.trio.large is large))
            calls = [call for call in self._calls if call.large is large]
            self._calls = deque(call for call in self._calls if call.large is not large)
        self._tell(tickets, error)
        for call in calls:
            call.end(error)

    def _tell(self, tickets: Sequence[Ticket], error: BaseException) -> None:
        """End requests with an error; their other rows go, too."""
        note(error)
        for ticket in tickets:
            if not ticket.cancelled:
                self.cancel(ticket)
                _deliver(ticket, error)

    def _finish(self, batch: Batch) -> None:
        if batch in self._batches:
            self._batches.remove(batch)
            self._stirred = True  # there is room for others
            batch.close()

    def _end(self) -> None:
        error = Refusal("the server stopped before the answer was complete; ask again", None, "stopping", 503, FAILED)
        tickets = [ticket for ticket, _ in self._rows]
        ended = list(self._batches)
        for batch in ended:
            tickets += batch.tickets
            self._finish(batch)
        for ticket in dict.fromkeys(tickets):
            if not ticket.cancelled:
                ticket.cancelled = True
                _deliver(ticket, error)
        away = list(self._away)
        for call in (*away, *self._calls):
            call.end(error)
        self._rows.clear()
        self._calls.clear()
        self._away.clear()
        for batch in ended:
            batch.join(FAREWELL_S)
        for call in away:
            call.join(FAREWELL_S)


def _home(trio: Trio) -> BlackBoxLM | None:
    """Where rows have room: of their own for each large model elsewhere, for none may keep others waiting."""
    return trio.large if elsewhere(trio.large) else None


def _deliver(ticket: Ticket, news: News) -> None:
    """Tell a request; one that cannot hear is nobody else's trouble."""
    try:
        ticket.deliver(news)
    except Exception as error:
        ticket.cancelled = True
        note(error)
