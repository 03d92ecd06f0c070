"""The planner's problems as mixed-integer linear programs, solved by HiGHS: exact, and slower than the greedy search.

A problem that is not solved within `NODES` gets the best plan found by then, the same however busy the machine is.

`filled` is one setting's knapsack, the referee of `search.filled`. `covered` chooses for all machines at once among the
best settings of each, so that every one of the most important weights is trained by somebody.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.errors import RequestError

Floats = NDArray[np.float64]
GAP = 1e-6  # relative distance to the optimum at which the solver stops
NODES = 2000  # of its search tree, at most: a count, since a limit of time would make plans depend on what else runs
INFEASIBLE = 2  # the solver's status


def filled(gains: Floats, memory: Floats, seconds: Floats, room: float, time: float) -> list[int]:
    """A place per weight: max sum of gains, memory and seconds within their budgets; see `search.filled`."""
    all_of_it = np.where(np.isfinite(memory[:, -1] + seconds[:, -1]), gains.shape[1] - 1, 0)
    every = np.arange(len(gains))
    if memory[every, all_of_it].sum() <= room and seconds[every, all_of_it].sum() <= time:
        return [int(place) for place in all_of_it]  # everything fits: nothing to solve
    offer = Offer(1.0, 0.0, gains, memory, seconds, room, time)
    return covered({"": [offer]}, ())[""][1]


@dataclass(frozen=True)
class Offer:
    """One setting of one machine, as a knapsack.

    Attributes:
        weight: of the setting in the objective: the machine's share of the examples times the share it uses.
        penalty: taken off the objective where the setting is chosen.
        gains, memory, seconds: (weights, places), the first place zero.
        room, time: the budgets.
    """

    weight: float
    penalty: float
    gains: Floats
    memory: Floats
    seconds: Floats
    room: float
    time: float


def covered(offers: Mapping[str, Sequence[Offer]], cover: Sequence[int]) -> dict[str, tuple[int, list[int]]]:
    """Per machine the number of the offer that it takes, and a place per weight.

    Args:
        offers: of every machine, at least one.
        cover: weights that somebody must train.

    Raises:
        RequestError: no choice covers them all, or none was found within `NODES`.
    """
    flat = [(name, i, offer) for name, own in offers.items() for i, offer in enumerate(own)]
    items = [(k, m, r) for k, (_, _, offer) in enumerate(flat) for m, r in _possible(offer)]
    at = {item: len(flat) + j for j, item in enumerate(items)}  # columns: one per offer, then one per item
    goal = np.array([-offer.weight * offer.penalty for _, _, offer in flat] + [0.0] * len(items))
    for k, m, r in items:
        goal[at[k, m, r]] = flat[k][2].weight * flat[k][2].gains[m, r]
    rows = _Rows()
    for name in offers:
        rows.add({k: 1.0 for k, (own, _, _) in enumerate(flat) if own == name}, 1, 1)
    by_weight: dict[tuple[int, int], list[int]] = {}
    by_offer: dict[int, list[tuple[int, int]]] = {}
    for k, m, r in items:
        by_weight.setdefault((k, m), []).append(at[k, m, r])
        by_offer.setdefault(k, []).append((m, r))
    for k, own in by_offer.items():
        offer = flat[k][2]
        for costs, budget in ((offer.memory, offer.room), (offer.seconds, offer.time)):
            rows.add({at[k, m, r]: float(_scaled(costs[m, r], budget)) for m, r in own}, -np.inf, 1)
    for (k, _), columns in by_weight.items():  # one rank per weight, and only in the offer that is taken
        rows.add({**dict.fromkeys(columns, 1.0), k: -1.0}, -np.inf, 0)
    for m in cover:
        rows.add({at[item]: 1.0 for item in items if item[1] == m}, 1, np.inf)
    chosen = rows.solve(goal)
    found = {name: (i, [0] * len(offer.gains)) for k, (name, i, offer) in enumerate(flat) if chosen[k] > 0.5}
    for k, m, r in items:
        if chosen[at[k, m, r]] > 0.5:
            found[flat[k][0]][1][m] = r
    return found


def _possible(offer: Offer) -> list[tuple[int, int]]:
    """(weight, place) of everything but nothing that could be taken by itself."""
    fits = (offer.memory <= offer.room) & (offer.seconds <= offer.time)
    fits[:, 0] = False
    return [(int(m), int(r)) for m, r in np.argwhere(fits)]


class _Rows:
    """Constraints low <= row . x <= high, row by row."""

    def __init__(self) -> None:
        self._values: list[tuple[int, int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add(self, row: Mapping[int, float], low: float, high: float) -> None:
        """One more constraint: coefficients by column."""
        self._values += [(len(self._low), column, value) for column, value in row.items()]
        self._low.append(low)
        self._high.append(high)

    def solve(self, goal: Floats) -> Floats:
        """x in {0, 1} with the largest goal . x."""
        from scipy.sparse import csr_array

        places, columns, values = zip(*self._values, strict=True)
        matrix = csr_array((values, (places, columns)), shape=(len(self._low), len(goal)))
        return _solve(goal, matrix, self._low, self._high)


def _scaled(costs: Any, budget: float) -> Any:
    """Costs as shares of the budget, for the solver's tolerances; anything above a budget of zero is too much."""
    return costs / budget if budget > 0 else np.where(np.asarray(costs) > 0, 2.0, 0.0)


def _solve(goal: Floats, limits: Any, low: Any, high: Any) -> Floats:
    from scipy.optimize import Bounds, LinearConstraint, milp

    with silent():
        found = milp(
            -goal,
            constraints=LinearConstraint(limits, low, high),
            integrality=np.ones(len(goal)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
    if found.x is not None:  # the best one, or the best of those that were found within the limit
        return np.asarray(found.x)
    if found.status == INFEASIBLE:
        raise RequestError("no plan meets all demands; cover fewer weights, or give more memory or time")
    raise RequestError(
        f"no plan was found in {NODES} nodes of the exact search ({found.message.strip()}); "
        "use the greedy search, cover fewer weights, or give more memory or time"
    )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """HiGHS prints to the process's own standard output, which may be a result that others parse."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no standard output at all
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
