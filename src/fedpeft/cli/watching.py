"""What people see while something runs: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fedpeft.cli.render import progress_line, time_left
from fedpeft.runs.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from fedpeft.progress import Progress

QUIET_S = 2.0  # least time between two plain lines, so that quick runs do not flood a log


class Watch:
    """A listener for `progress=`: shows rounds, loss, bytes and time left.

    Args:
        stream: where it writes; stderr by default.
    """

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._shown: tuple[int, str | None] | None = None  # round, and the exchange in the set-up
        self._shown_at = float("-inf")

    def __enter__(self) -> Watch:
        return self

    def begin(self) -> None:
        """Start the bar, where there is to be one; else the first sign of life does, so that lines may come before."""
        if self._bar is None and self._stream.isatty():
            self._bar, self._task = _bar(self._stream)
            self._bar.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show one sign of life."""
        self.begin()
        if self._bar is not None:
            self._advance(progress)
        else:
            self._print(progress)

    def _advance(self, progress: Progress) -> None:
        if progress.message:
            self._bar.console.print(progress.message, markup=False, highlight=False)
        left = time_left(progress)
        self._bar.update(
            self._task,
            what=f"set-up: {progress.exchange}" if progress.exchange else "round",
            completed=progress.round,
            total=progress.rounds,
            loss="" if progress.loss is None else f"loss {progress.loss:.3f}",
            traffic=bytes_text(progress.bytes_down + progress.bytes_up),
            left="" if left is None else f"{seconds_text(left)} left",
        )

    def _print(self, progress: Progress) -> None:
        if progress.message:
            print(progress.message, file=self._stream, flush=True)
            return
        now = time.monotonic()
        here = (progress.round, progress.exchange)
        if here == self._shown and progress.metrics is None:
            return
        if now - self._shown_at < QUIET_S and progress.metrics is None:  # the last round has metrics
            return
        self._shown, self._shown_at = here, now
        print(progress_line(progress), file=self._stream, flush=True)


def _bar(stream: Any) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.fields[what]}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[traffic]}"),
        TextColumn("{task.fields[left]}"),
        console=Console(file=stream),
    )
    return bar, bar.add_task("run", total=None, what="round", loss="", traffic="", left="")
