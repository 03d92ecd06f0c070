"""A client's turn driven by hand, so that a test sees every Fit that was asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

from fedpeft.core.exchange import ClientEnv, Method, Record
from fedpeft.core.fit import Fit


class Turn(NamedTuple):
    """What a turn asked for, and what it left."""

    fits: list[Fit]
    up: Any
    memory: Any


def turn(method: Method, down: Record, env: ClientEnv, memory: Record | None = None) -> Turn:
    """The client's work on the method's only exchange of a round, from its first memory unless one is given."""
    (exchange,) = method.round()
    work: Any = exchange.work(down, method.init_client(env) if memory is None else memory, env)
    fits: list[Fit] = []
    try:
        fits.append(next(work))
        while True:
            fits.append(work.send(env.model.fit(fits[-1])))
    except StopIteration as stop:
        return Turn(fits, *stop.value)
