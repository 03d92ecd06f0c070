"""From what went wrong to a message and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from fedpeft.core.errors import FedpeftError, RequestError

WRONG, FAILED, INTERRUPTED = 2, 1, 130

_place: dict[str, str] = {}


def working_in(folder: Path, resume: str) -> None:
    """Remember the folder of the work that begins, for the message if it ends early.

    Args:
        resume: the command that goes on.
    """
    _place.update(folder=str(folder), resume=resume)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Print one clear message instead of a traceback, and end with the code that INTERFACE promises.

    2: the request is wrong or cannot be met; 1: the run failed; 130: interrupted. A closed pipe ends quietly.
    """
    _place.clear()
    try:
        yield
    except RequestError as error:
        _say(str(error))
        raise typer.Exit(WRONG) from error
    except FedpeftError as error:
        text, go_on = " ".join(str(error).split()), _go_on()
        _say(f"{text.rstrip('.')}.{go_on}" if go_on else text)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt as error:
        saved = _go_on()
        typer.echo(f"interrupted; state saved.{saved}" if saved else "interrupted.", err=True)
        raise typer.Exit(INTERRUPTED) from error
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from error
    except Exception as error:
        if isinstance(error, typer.Exit) or type(error).__module__.startswith(("click", "typer")):
            raise
        _say(f"{type(error).__name__}: {' '.join(str(error).split())}. {_keep_traceback(error)}{_go_on()}")
        raise typer.Exit(FAILED) from error


def _say(text: str) -> None:
    typer.echo(f"error: {text}", err=True)


def _go_on() -> str:
    folder = _place.get("folder")
    return f" Go on with: {_place['resume']}" if folder and any(Path(folder).glob("*")) else ""


def _keep_traceback(error: Exception) -> str:
    """See that the traceback is in the run's log, once, and say where; print it where there is no run yet."""
    text = "".join(traceback.format_exception(error))
    log = Path(_place.get("folder", "")) / "run.log"
    if not _place or not log.is_file():
        typer.echo(text, err=True)
        return "This is a fault in fedpeft or below it; the traceback is above."
    tail = "".join([*traceback.format_tb(error.__traceback__)[-1:], *traceback.format_exception_only(error)])
    if tail not in log.read_text(encoding="utf-8", errors="replace"):  # a run that could still write has logged it
        with log.open("a", encoding="utf-8") as file:
            file.write(text)
    return f"The traceback is in {log}."
