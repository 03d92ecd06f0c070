"""Whose turn it is with the models: one thread at a time works with them, but not while it waits for another machine.

Adapters are put in place for one pass, so two threads must not pass at once. A thread that waits for a server's answer
gives its turn away meanwhile, so that a server that hangs holds up nobody else.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

_here = threading.local()


class Left(BaseException):
    """Nobody wants any more what this thread does; not an `Exception`, so that only the thread's end takes it."""


class Turn:
    """A lock that goes to who has waited longest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of what follows
        self._held = False
        self._queue: deque[threading.Event] = deque()

    def acquire(self) -> None:
        """Wait for it."""
        with self._lock:
            if not self._held:
                self._held = True
                return
            mine = threading.Event()
            self._queue.append(mine)
        mine.wait()

    def release(self) -> None:
        """Hand it on."""
        with self._lock:
            if self._queue:
                self._queue.popleft().set()
            else:
                self._held = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Worker:
    """A thread that does one work after another, in turn with other threads.

    Args:
        turn: held by whoever works with the models.
        done: called, from the thread, behind each work.
    """

    def __init__(self, turn: Turn, done: Callable[[], None]) -> None:
        self.busy = False  # there is work that is not done
        self.turn = turn
        self._done = done
        self._since: float | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._unwanted = False
        self._works: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fedpeft-worker", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], Any]) -> None:
        """Have this done next; `take` has what it gave when `busy` is over."""
        self.busy = True
        self._works.put(work)

    def take(self) -> Any:
        """What the last work gave. Raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result

    @property
    def waited_s(self) -> float:
        """How long it has been waiting for another machine by now; 0: it does not."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def leave(self, last: Callable[[Any], None]) -> None:
        """Want nothing more: what the thread does is given up where it would ask another machine next, and it ends.

        Args:
            last: done at the end, with what the last work gave, None where it gave nothing.
        """

        def end() -> None:
            self._unwanted = False
            last(self._result)

        self._unwanted = self.busy
        self._works.put(end)
        self._works.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for its end, at most so long."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            with self.turn:
                _here.worker = self
                try:
                    self._result, self._error = work(), None
                except BaseException as error:
                    self._result, self._error = None, error
                finally:
                    _here.worker = None
            self.busy = False
            self._done()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Its turn is others' meanwhile. Raises Left, once, where nobody wants an answer any more.

        What was asked is heard to its end: it may have opened what must be closed again.
        """
        if self._unwanted:
            self._unwanted = False  # what was opened is closed behind this
            raise Left
        self._since = time.monotonic()
        self.turn.release()
        try:
            yield
        finally:
            self._since = None  # the answer is here: waiting for the turn is not waiting for the server
            self.turn.acquire()


@contextmanager
def waiting() -> Iterator[None]:
    """Around a wait for another machine: a `Worker`'s turn is others' meanwhile; of other threads nothing changes."""
    worker: Worker | None = getattr(_here, "worker", None)
    if worker is None:
        yield
    else:
        with worker.waiting():
            yield
