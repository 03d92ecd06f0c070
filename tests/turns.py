"""A client's turn driven by hand, so that a test sees every Fit that was asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

from fedpeft.core.exchange import ClientEnv, Method, Record
from fedpeft.core.fit import Fit
from fedpeft.core.model import FisherProbe


class Turn(NamedTuple):
    """What a turn asked for, and what it left."""

    fits: list[Fit]
    up: Any
    memory: Any


def turn(method: Method, down: Record, env: ClientEnv, memory: Record | None = None) -> Turn:
    """The client's work on the method's only exchange of a round, from its first memory unless one is given."""
    (exchange,) = method.round()
    fits, result = served(exchange.work(down, method.init_client(env) if memory is None else memory, env), env.model)
    return Turn(fits, *result)


def served(work: Any, model: Any) -> tuple[list[Fit], Any]:
    """The Fits that a work, or a part of one, asks for, and what it ends with; a model gives it all that it asks."""
    fits: list[Fit] = []
    given = None
    try:
        while True:
            wanted = work.send(given)
            if isinstance(wanted, FisherProbe):
                (given,) = model.fisher_many([wanted])
                continue
            fits.append(wanted)
            given = model.fit(wanted)
    except StopIteration as stop:
        return fits, stop.value
