"""The search for a plan: for one machine, which weights, at which rank, with what batch, depth and bits.

A *setting* fixes everything but the ranks: bits, batch, depth, checkpointing, and the share of the examples that is to
be used. In a setting memory and time are linear in the ranks, bounded from above: all blocks from the depth on work
backward, all candidates are applied, no inputs are shared. What is left is a knapsack with two budgets, filled greedily
(`filled`) or by the MILP of `planner/milp.py`. The best setting is then priced exactly.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

from fedpeft.core.errors import RequestError
from fedpeft.planner.device import FORMATS, Profile
from fedpeft.planner.plan import Excluded, Job, Plan, Predicted
from fedpeft.planner.prices import Costs, Floats, Setting
from fedpeft.planner.reasons import excluded, least_of, why

USED = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1)  # nu: shares of the examples that a setting may aim at
FIRST = 4  # weights that must fit at the least rank for a format to be taken
TIE = 0.01  # of the best value: what is less better does not count against a larger batch or more bits
SLACK = 1e-12  # of a budget, for what rounding takes from it

Sack: TypeAlias = tuple[Floats, Floats, Floats, float, float]  # gains, memory, seconds, room, time
Fill: TypeAlias = Callable[[Floats, Floats, Floats, float, float], list[int]]


def search(job: Job, machine: Profile, examples: int, deadline: float, fill: Fill | None = None) -> Plan | Excluded:
    """The best plan of one machine within its memory and the deadline, or why there is none.

    Args:
        examples: rows that the machine holds, at least 1.
        deadline: seconds of one round, messages included.
        fill: solves one setting's knapsack; None: greedily.
    """
    costs = Costs(job, machine, examples)
    least = least_of(costs, whole_turns(costs), _first(job, 1))
    if least is None or least.bytes > costs.usable or least.seconds > deadline:
        return excluded(costs, least, deadline)
    best: tuple[float, Setting, dict[str, int]] | None = None
    for setting in settings(costs):
        penalty = costs.penalty(setting.bits)
        if best is not None and best[0] >= setting.used * _reach(job, setting.depth) - penalty:
            continue
        ranks = _ranks(costs, setting, deadline, fill or filled)
        if not ranks:
            continue
        value = setting.used * job.coverage(ranks) - penalty
        if best is None or value > best[0] + TIE * abs(best[0]):
            best = value, setting, ranks
    if best is None:  # only at exact costs does anything fit
        return priced(costs, least.setting, _first(job, 1), deadline)
    return priced(costs, best[1], best[2], deadline)


def priced(costs: Costs, setting: Setting, ranks: Mapping[str, int], deadline: float) -> Plan:
    """The plan of a setting and its ranks at exact costs, with as many steps as the deadline allows."""
    step_s, messages = costs.seconds(setting, ranks), costs.messages(ranks)
    there_is_time_for = math.floor((deadline * (1 + SLACK) - messages) / step_s)
    steps = max(1, min(costs.steps(setting.batch), there_is_time_for))
    used = min(1.0, steps * setting.batch / costs.wanted)
    predicted = Predicted(
        peak_bytes=round(costs.bytes(setting, ranks) * costs.machine.peak_ratio) + costs.machine.context_bytes,
        step_s=step_s,
        round_s=messages + steps * step_s,
        up_bytes=costs.up_bytes(ranks),
        down_bytes=costs.down_bytes(),
        under_training=1 - used,
        coverage=costs.job.coverage(ranks),
    )
    plan = Plan(setting.bits, setting.batch, steps, setting.depth, setting.checkpointing, dict(ranks), predicted)
    return replace(plan, why=tuple(why(costs, setting, ranks, deadline, predicted)))


def default_deadline(
    job: Job, machines: Mapping[str, tuple[Profile, int]], ranks: Mapping[str, int] | None = None
) -> float:
    """T: the median over machines of the time of a full turn with the largest batch that fits.

    Args:
        machines: profile and number of examples by name.
        ranks: what is trained; None: the most important weight at the least rank.

    Raises:
        RequestError: nothing fits on any machine.
    """
    times = []
    for machine, examples in machines.values():
        costs = Costs(job, machine, examples)
        ranks = _first(job, 1) if ranks is None else ranks
        fitting = [s for s in whole_turns(costs) if costs.bytes(s, ranks) <= costs.usable]
        if fitting:
            largest = max(fitting, key=lambda s: (s.batch, not s.checkpointing))
            times.append(costs.messages(ranks) + costs.steps(largest.batch) * costs.seconds(largest, ranks))
    if not times:
        raise RequestError(
            "no machine can train a single weight: give larger machines, a smaller model, a shorter task.max_length, "
            "or formats with fewer bits"
        )
    return statistics.median(times)


# --- settings ----------------------------------------------------------------------------------------------------


def _depths(job: Job) -> list[int]:
    return sorted({int(share * job.shape.layers) for share in job.choices.depths})


def _formats(costs: Costs) -> list[str]:
    """Formats to search among: one, the first in which the smallest batch and a few weights fit, or several."""
    job, choices = costs.job, costs.job.choices
    if choices.bits == "search":
        return costs.formats
    batch, depth, few = min(costs.batches), min(_depths(job)), _first(job, FIRST)
    for bits in costs.formats:
        for recompute in sorted(choices.checkpointing):
            if costs.bound(Setting(bits, batch, depth, recompute), few)[0] <= costs.usable:
                return [bits]
    return costs.formats[::-1]


def _first(job: Job, count: int) -> dict[str, int]:
    """The most important weights at the least rank."""
    return {job.weights[m].name: job.ranks[0] for m in job.by_score[:count]}


def settings(costs: Costs) -> Iterator[Setting]:
    """All settings, those first that would use more examples; of equals those with more bits, no recomputing and
    larger batches."""
    formats = sorted(_formats(costs), key=FORMATS.index)
    for used in USED:
        for bits in formats:
            for recompute in sorted(costs.job.choices.checkpointing):
                for batch in costs.batches:
                    for depth in _depths(costs.job):
                        yield Setting(bits, batch, depth, recompute, used)


def whole_turns(costs: Costs) -> list[Setting]:
    """Every format, batch and way, with the weights trained from the lowest depth on."""
    return [
        Setting(bits, batch, max(_depths(costs.job)), recompute)
        for bits in costs.formats
        for batch in costs.batches
        for recompute in sorted(costs.job.choices.checkpointing)
    ]


def _reach(job: Job, depth: int) -> float:
    """The coverage of all weights from a depth on."""
    return math.fsum(float(job.gains[m, -1]) for m, w in enumerate(job.weights) if w.block >= depth)


# --- ranks -------------------------------------------------------------------------------------------------------


def knapsack(costs: Costs, setting: Setting, deadline: float) -> Sack | None:
    """Gains, memory and seconds by weight and place, and the two budgets; None where nothing at all fits."""
    own_bytes, own_s = costs.base(setting)
    room = costs.usable - own_bytes
    time = deadline - costs.messages({}) - costs.steps(setting.batch, setting.used) * own_s
    return None if room < 0 or time < 0 else (costs.job.gains, *costs.items(setting), room, time)


def _ranks(costs: Costs, setting: Setting, deadline: float, fill: Fill) -> dict[str, int]:
    """The best ranks of a setting; empty where not even one weight fits."""
    sack = knapsack(costs, setting, deadline)
    if sack is None:
        return {}
    job, (gains, memory, seconds, room, time) = costs.job, sack
    if job.choices.per_weight:
        return job.named(fill(gains, memory, seconds, room, time))
    found: list[dict[str, int]] = []
    for place in range(1, len(job.ranks) + 1):  # one rank for the machine
        only = [0, place]
        places = fill(gains[:, only], memory[:, only], seconds[:, only], room, time)
        found.append(job.named([place * p for p in places]))
    return max(found, key=job.coverage)


def filled(gains: Floats, memory: Floats, seconds: Floats, room: float, time: float) -> list[int]:
    """A rank's place for every weight, the most valuable upgrade per share of the scarcest budget first.

    From the place that a weight has, *any* higher one is an upgrade. One that does not fit any more is tried again with
    the next lower place.

    Args:
        gains, memory, seconds: (weights, places), the first place zero.
        room, time: the budgets, not negative.

    Returns:
        a place per weight, 0 for none.
    """
    places = [0] * len(gains)
    heap: list[tuple[float, int, int, int]] = []
    free, left = room, time

    def push(m: int, top: int) -> None:
        """The best upgrade of a weight to a place of at most `top`."""
        here, best = places[m], (0.0, 0)
        for to in range(here + 1, top + 1):
            gain = float(gains[m, to] - gains[m, here])
            if gain <= 0:
                continue
            share = max(_share(memory[m], here, to, room), _share(seconds[m], here, to, time))
            if share < math.inf:
                best = max(best, (gain / max(share, 1e-300), to))
        if best[1]:
            heapq.heappush(heap, (-best[0], m, here, best[1]))

    for m in range(len(gains)):
        push(m, gains.shape[1] - 1)
    while heap:
        _, m, here, to = heapq.heappop(heap)
        more = float(memory[m, to] - memory[m, here])
        longer = float(seconds[m, to] - seconds[m, here])
        if more <= free + SLACK * room and longer <= left + SLACK * time:
            free, left = free - more, left - longer
            places[m] = to
            push(m, gains.shape[1] - 1)
        else:
            push(m, to - 1)
    return places


def _share(costs: Floats, here: int, to: int, budget: float) -> float:
    """What an upgrade takes of a budget, as a share."""
    cost = float(costs[to] - costs[here])
    return cost / budget if budget > 0 else (math.inf if cost > 0 else 0.0)
