"""Who takes part: sampling over stable client ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from fedpeft.core.rng import Rng

S = TypeVar("S")
Pick = Callable[[S, Sequence[str], Rng], Sequence[str]]


def sample(size: int) -> Callable[[object, Sequence[str], Rng], Sequence[str]]:
    """Pick `size` clients uniformly without replacement (all of them where there are fewer; 0 means all).

    The order is the order of the draw; it is the cohort order in which answers are folded.
    """

    def pick(state: object, clients: Sequence[str], rng: Rng) -> Sequence[str]:
        n = len(clients) if size == 0 else min(size, len(clients))
        return [clients[i] for i in rng.choice(len(clients), size=n, replace=False)]

    return pick


def everyone(state: object, clients: Sequence[str], rng: Rng) -> Sequence[str]:
    """Pick every client, in the order of their ids."""
    return list(clients)
