"""Other work with the models than decoding: scores of given texts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fedpeft.proxy.batch import Late, note
from fedpeft.proxy.blackbox import BlackBoxLM, NoAnswer, elsewhere
from fedpeft.proxy.turns import Turn, Worker


class Call:
    """Work that somebody waits for.

    Args:
        work: it.
        large: the large model that it asks.

    Attributes:
        future: what comes of it; told by whoever calls the methods.
        large: that model where it is on another machine: the work has a thread of its own then; None: it needs none.
    """

    def __init__(self, work: Callable[[], Any], large: BlackBoxLM | None) -> None:
        self.future: Future[Any] = Future()
        self.large = large if elsewhere(large) else None
        self._work = work
        self._worker: Worker | None = None

    def begin(self, turn: Turn, stir: Callable[[], None]) -> bool:
        """Do the work, or begin it in a thread of its own; whether it goes on there."""
        if not self.future.set_running_or_notify_cancel():
            return False
        if self.large is None:
            with turn:
                self._settle(self._work)
            return False
        try:
            self._worker = Worker(turn, stir)
        except Exception as error:  # no thread to be had
            self._fail(error)
            return False
        self._worker.do(self._work)
        return True

    def over(self, patience_s: float) -> bool:
        """Whether its thread is done with it, or has waited too long for another machine; then that is told."""
        worker = self._worker
        assert worker is not None and self.large is not None, "it has begun in a thread of its own"
        if not worker.busy:
            self._settle(worker.take)
        elif worker.waited_s > patience_s:
            self._fail(Late(self.large.caps.identity, patience_s))
        else:
            return False
        worker.leave(lambda _: None)
        return True

    @property
    def unanswered(self) -> NoAnswer | None:
        """The error, when it is over and the large model gave no answer in time."""
        error = self.future.exception()
        return error if isinstance(error, NoAnswer) else None

    def end(self, error: Exception) -> None:
        """Tell that it will not be done; what its thread does is given up."""
        if self._worker is not None:
            self._worker.leave(lambda _: None)
            self.future.set_exception(error)
        elif self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread of its own, at most so long."""
        if self._worker is not None:
            self._worker.join(timeout_s)

    def _settle(self, work: Callable[[], Any]) -> None:
        try:
            self.future.set_result(work())
        except BaseException as error:  # whatever it is, others go on
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        note(error)
        self.future.set_exception(error)
