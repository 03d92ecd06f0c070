"""Every error that fedpeft raises on purpose.

    FedpeftError
    ├── RequestError          the request is wrong or cannot be met: exit code 2
    │   ├── ConfigError       one or more problems of a configuration, all at once
    │   ├── DataError         a data set, a column, a label, a partition
    │   ├── ModelError        a model that does not exist or cannot do what is asked
    │   └── FitError          a Fit that names what the model does not have
    └── RunError              a run that was right to start and failed: exit code 1
        ├── QuorumError       too few answers, three times
        ├── StoreError        a run folder that cannot be read or written
        ├── RecordError       bytes or values that are not the record that was expected
        └── ClientError       the work of one client failed; that client is lost, the round goes on
            └── DivergedError its loss or its parameters are not finite

A message says what is wrong, the value, and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedpeft.core.federate import Done


class FedpeftError(Exception):
    """Base of all errors that fedpeft raises on purpose."""


class RequestError(FedpeftError):
    """The request is wrong or cannot be met; the message says what to change."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if "can't allocate memory" in str(error):  # torch on the CPU
            return True
        error = error.__cause__
    return False


class ConfigError(RequestError):
    """One or more problems of a configuration, reported together.

    Args:
        problems: one sentence each: key, value, remedy.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        n = len(self.problems)
        head = "1 problem" if n == 1 else f"{n} problems"
        super().__init__(f"{head} in the configuration:\n" + "\n".join(f"  - {p}" for p in self.problems))


class DataError(RequestError):
    """A data set, a column, a label or a partition is not usable."""


class ModelError(RequestError):
    """A model does not exist, or cannot do what is asked of it."""


class FitError(RequestError):
    """A Fit names parameters, rows or settings that the model does not have."""


class RunError(FedpeftError):
    """A run that was right to start has failed."""


class QuorumError(RunError):
    """Too few clients answered an exchange, in the first attempt and in each repetition.

    Attributes:
        done: the exchange as far as it came: nothing is folded, the receipts are those of every attempt.
    """

    def __init__(self, message: str, done: Done | None = None) -> None:
        super().__init__(message)
        self.done = done


class StoreError(RunError):
    """A run folder cannot be read or written."""


class RecordError(RunError):
    """Bytes or values are not the record that was expected."""


class ClientError(RunError):
    """The work of one client failed; the client is lost, the round goes on."""


class DivergedError(ClientError):
    """A client's loss or parameters are no longer finite."""
