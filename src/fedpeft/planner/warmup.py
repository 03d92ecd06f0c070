"""The warm-up that a machine measures the importance of weights in: the bits, rows and steps that it has room for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedpeft.planner.cost import update_bytes
from fedpeft.planner.prices import Costs, Setting

FEWEST = 10  # steps: in fewer, lambda has hardly left its zero, and scores mean nothing


@dataclass(frozen=True)
class WarmUp:
    """How a machine measures."""

    bits: str
    batch: int
    groups: int  # into how many groups the candidates are cut, for want of memory; each has all the steps
    steps: int


def warm_up_room(costs: Costs, rank: int, rows: int, steps: int, seconds: float | None = None) -> WarmUp | None:
    """The warm-up that a machine has room and time for.

    All candidates at once with the most bits in which they fit; else with the fewest bits and one row, in as few groups
    as that takes.

    Args:
        costs: with what is applied frozen beside the candidates, which is also what is sent down.
        rank: of every candidate.
        rows: of a step, at most.
        steps: K_w, at most.
        seconds: that the whole of it may take, messages included; None: any.

    Returns:
        None where not even one candidate fits, where the machine has no examples, or where there is no time for
        `FEWEST` steps (or for all of them, if they are fewer).
    """
    found = _fitting(costs, rank, min(rows, costs.examples)) if costs.examples else None
    if found is None:
        return None
    setting, groups = found
    if seconds is not None:
        everything = {w.name: rank for w in costs.job.weights}
        left = (seconds - messages(costs)) / (groups * costs.seconds(setting, everything))
        if left < min(FEWEST, steps):
            return None
        steps = min(steps, math.floor(left))
    return WarmUp(setting.bits, setting.batch, groups, steps)


def messages(costs: Costs) -> float:
    """Seconds that a warm-up's messages take: frozen adapters down; a score of every candidate, and whether it was
    seen, up, with the number of examples.
    """
    job, machine = costs.job, costs.machine
    down = update_bytes(job.weights, costs.frozen or {})
    up = 5 * len(job.weights) + 8
    return machine.latency_s + down / machine.down_bytes_per_s + up / machine.up_bytes_per_s


def _fitting(costs: Costs, rank: int, rows: int) -> tuple[Setting, int] | None:
    """Setting and number of groups; None where a single candidate is too much."""
    names = [w.name for w in costs.job.weights]
    for bits in costs.formats:
        setting = Setting(bits, rows, 0, False)
        if costs.bytes(setting, dict.fromkeys(names, rank)) <= costs.usable:
            return setting, 1
    for bits in costs.formats[-1:]:
        setting = Setting(bits, 1, 0, False)
        for groups in (*(2**i for i in range(len(names).bit_length()) if 2**i < len(names)), len(names)):
            if costs.bytes(setting, dict.fromkeys(names[::groups], rank)) <= costs.usable:
                return setting, groups
    return None
