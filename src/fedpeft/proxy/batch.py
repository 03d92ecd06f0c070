"""Requests whose rows are decoded together, step by step, in the engine's thread or in one of their own."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from fedpeft.core.errors import FedpeftError
from fedpeft.proxy.answers import Completion, Emitted
from fedpeft.proxy.blackbox import NoAnswer, elsewhere
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.trio import Trio
from fedpeft.proxy.turns import Turn, Worker

log = logging.getLogger("fedpeft.serve")


class Steps(Protocol):
    """Texts that go on side by side; `proxy/decode.py` has the real one."""

    def advance(self) -> Sequence[Emitted]:
        """One more token, or several, for each open row."""
        ...

    @property
    def errors(self) -> Mapping[int, Exception]:
        """What ended rows that had an error of their own, by row."""
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


class Batch:
    """Rows for the same models.

    Where the large model is on another machine, a thread of the batch's own works for it, in turn with others: what
    takes long is waiting for the answer. Else who calls does the work.

    Args:
        places: of its rows: whose each is, and the number of the row there.
        begin: opens the decoding.
        turn: held by whoever works with the models.
        stir: called when a thread of its own has done something.

    Raises:
        what `begin` raises, where it is done here.
    """

    def __init__(
        self,
        trio: Trio,
        places: Sequence[tuple[Ticket, int]],
        begin: Callable[[], Steps],
        turn: Turn,
        stir: Callable[[], None],
    ) -> None:
        self.trio, self.places = trio, places
        self.open = set(range(len(places)))
        self.steps: Steps | None = None  # None: it is being opened
        self._turn, self._asked = turn, False
        self._worker = Worker(turn, stir) if elsewhere(trio.large) else None
        if self._worker is not None:
            self._worker.do(begin)
        else:
            with turn:
                self.steps = begin()

    @property
    def ready(self) -> bool:
        """Whether it can go on now."""
        return self._worker is None or not self._worker.busy

    @property
    def tickets(self) -> list[Ticket]:
        """Whose rows are open."""
        return list(dict.fromkeys(self.places[row][0] for row in sorted(self.open)))

    def step(self, patience_s: float) -> Sequence[Emitted]:
        """What has come: one more token, or several, for each open row; nothing while a thread of its own works.

        Raises:
            Late: another machine has not answered for so long.
            what opening it, or the step, raised.
        """
        worker = self._worker
        if worker is None:
            assert self.steps is not None, "who calls opens it at once"
            with self._turn:
                return self.steps.advance()
        if worker.busy:
            if worker.waited_s > patience_s:
                raise Late(self.trio.name, patience_s)
            return ()
        if self.steps is None:
            self.steps = worker.take()
        elif self._asked:
            self._asked = False
            found: Sequence[Emitted] = worker.take()
            return found
        assert self.steps is not None, "the decoding was opened"
        self._asked = True
        worker.do(self.steps.advance)
        return ()

    def failed(self) -> list[tuple[Ticket, Exception]]:
        """Whose open rows have ended with an error of their own; they are open no more."""
        errors = self.steps.errors if self.steps is not None and self.ready else {}
        rows = [row for row in errors if row in self.open]
        self.open.difference_update(rows)
        return [(self.places[row][0], errors[row]) for row in rows]

    def drop_cancelled(self) -> None:
        """Go on without rows that nobody wants; while a thread of its own works only where that are all."""
        gone = [row for row in self.open if self.places[row][0].cancelled]
        still = self.steps is not None and self.ready
        if not still and len(gone) < len(self.open):
            return
        for row in gone:
            self.open.discard(row)
            if still and self.steps is not None:
                self.steps.drop(row)

    def close(self) -> None:
        """Give everything back; what a thread of its own does is given up where it would ask next."""
        if self._worker is not None:
            self._worker.leave(lambda made: _close(self.steps or made))
        else:
            with self._turn:
                _close(self.steps)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread of its own, at most so long."""
        if self._worker is not None:
            self._worker.join(timeout_s)


class Late(NoAnswer):
    """A large model on another machine that does not answer."""

    def __init__(self, name: str, patience_s: float) -> None:
        super().__init__(f"{name} did not answer within {patience_s:g} s; see whether its server hangs, and ask again")


def _close(steps: Steps | None) -> None:
    try:
        if steps is not None:
            steps.close()
    except Exception as error:
        note(error)


def note(error: BaseException) -> None:
    """Log an error without what it may quote: of one that nobody foresaw the kind and the places alone."""
    if isinstance(error, FedpeftError):
        log.warning("%s: %s", type(error).__name__, error)
    else:
        log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
