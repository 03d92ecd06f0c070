"""What a running job tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Progress:
    """One sign of life of a run: after every exchange, after every evaluation, and whenever there is a message."""

    round: int  # rounds finished so far; 0 while the set-up runs
    rounds: int  # the horizon
    loss: float | None = None  # mean training loss of the newest round
    bytes_down: int = 0  # server to clients, so far
    bytes_up: int = 0  # clients to server, so far
    seconds: float = 0.0  # since the run began, resumed parts included
    metrics: Mapping[str, Any] | None = None  # scores of the newest evaluation, as in metrics.jsonl
    exchange: str | None = None  # the exchange of the set-up that is done, such as "warmup 3"; None in the rounds
    set_up_seconds: float = 0.0  # of `seconds`, as far as this process knows
    message: str | None = None  # one line for people: the run's folder, a lost client, the cell of a study


Listener: TypeAlias = Callable[[Progress], None]
