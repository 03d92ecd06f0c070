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
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.errors import RequestError
from fedpeft.planner.activations import DTYPE_BYTES
from fedpeft.planner.cost import Step, step_flops
from fedpeft.planner.device import FORMATS, Profile
from fedpeft.planner.memory import WEIGHT_ERROR, base_bytes, peak_memory
from fedpeft.planner.plan import Excluded, Job, Plan, Predicted

USED = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1)  # nu: shares of the examples that a setting may aim at
FIRST = 4  # weights that must fit at the least rank for a format to be taken
TIE = 0.01  # of the best value: what is less better does not count against a larger batch or more bits
SLACK = 1e-12  # of a budget, for what rounding takes from it
BYTES_PER_NUMBER = 4  # float32 on the wire

Floats: TypeAlias = NDArray[np.float64]
Sack: TypeAlias = tuple[Floats, Floats, Floats, float, float]  # gains, memory, seconds, room, time
Fill: TypeAlias = Callable[[Floats, Floats, Floats, float, float], list[int]]


@dataclass(frozen=True)
class Setting:
    """Everything of a plan but the ranks."""

    bits: str
    batch: int
    depth: int
    checkpointing: bool
    used: float = 1.0  # nu


class Costs:
    """Prices of one job on one machine."""

    def __init__(self, job: Job, machine: Profile, examples: int) -> None:
        self.job, self.machine, self.examples = job, machine, examples
        self.usable = ((1 - job.choices.headroom) * machine.memory_bytes - machine.context_bytes) / machine.peak_ratio
        self.room = (1 - job.choices.headroom) * machine.memory_bytes  # with context and the machine's ratio
        self._most = {w.name: job.ranks[-1] for w in job.weights} if job.choices.applied else {}
        self._bases: dict[tuple[str, int, int, bool], tuple[float, float]] = {}
        self.ranks = np.array([0, *job.ranks], dtype=np.float64)

    @property
    def wanted(self) -> int:
        """E n: examples of a full turn."""
        return self.job.choices.epochs * self.examples

    def steps(self, batch: int, used: float = 1.0) -> int:
        """Steps that use this share of the examples."""
        return max(1, math.ceil(used * self.wanted / batch - 1e-9))

    def step(self, setting: Setting, ranks: Mapping[str, int], tokens: float) -> Step:
        """What one step does when these ranks train and everything else is applied."""
        frozen = {name: top - ranks.get(name, 0) for name, top in self._most.items() if top > ranks.get(name, 0)}
        lowest = min((w.block for w in self.job.weights if w.name in ranks), default=self.job.shape.layers)
        return Step(
            rows=setting.batch,
            tokens=max(1, math.ceil(tokens)),
            trained=dict(ranks),
            frozen=frozen,
            base=self.job.loaded(setting.bits),
            compute=self.job.dtype,
            classes=self.job.classes,
            depth=lowest if ranks else setting.depth,
            checkpointing=setting.checkpointing,
        )

    def bytes(self, setting: Setting, ranks: Mapping[str, int]) -> int:
        """Peak memory, before the machine's own ratio and context."""

        def price() -> int:
            return peak_memory(self.job.shape, self.step(setting, ranks, self.job.longest)).peak

        return self._priced("bytes", setting, ranks, price)

    def seconds(self, setting: Setting, ranks: Mapping[str, int]) -> float:
        """Of one step."""

        def price() -> int:
            return step_flops(self.job.shape, self.step(setting, ranks, self.job.mean)).total

        flops = self._priced("flops", setting, ranks, price)
        return self.machine.step_overhead_s + flops / self.machine.flops_per_s + self._unpacking(setting.bits)

    def _priced(self, what: str, setting: Setting, ranks: Mapping[str, int], price: Callable[[], int]) -> int:
        """A price that does not depend on the machine, computed once per job."""
        key = what, replace(setting, used=1.0), frozenset(ranks.items())
        if key not in self.job.prices:
            self.job.prices[key] = price()
        return int(self.job.prices[key])

    def _unpacking(self, bits: str) -> float:
        """Seconds to unpack a quantised base, forward and backward; a guess."""
        if bits == "full" or not self.machine.dequant_bytes_per_s:
            return 0.0
        packed = base_bytes(self.job.shape, self.job.loaded(bits), self.job.dtype)
        return 2 * packed / self.machine.dequant_bytes_per_s

    def base(self, setting: Setting) -> tuple[float, float]:
        """(bytes, seconds of a step) of a setting in which no weight trains, bounds from above."""
        key = setting.bits, setting.batch, setting.depth, setting.checkpointing
        if key not in self._bases:
            own = float(self.bytes(setting, {})) + (self._one_block(setting) if setting.checkpointing else 0.0)
            self._bases[key] = own, self.seconds(setting, {})
        return self._bases[key]

    def _one_block(self, setting: Setting) -> float:
        """Bytes of the adapters' inputs in one block: with checkpointing no more are kept at a time."""
        width: dict[int, int] = {}
        for w in self.job.weights:
            width[w.block] = width.get(w.block, 0) + w.d_in + self.job.ranks[-1]
        return float(DTYPE_BYTES[self.job.dtype] * setting.batch * self.job.longest * max(width.values(), default=0))

    def items(self, setting: Setting) -> tuple[Floats, Floats]:
        """(weights, 1 + ranks) bytes, and seconds of a whole turn, that a rank adds; infinite below the depth."""
        job, tokens = self.job, setting.batch * self.job.longest
        numbers = job.sizes[:, None] * self.ranks[None, :]
        memory = (32.0 + 2.0 * (job.dtype != "float32")) * numbers  # as received, in flat buffers, as a result; copies
        if not setting.checkpointing:
            inputs = np.array([w.d_in for w in job.weights])[:, None] + self.ranks[None, :]
            memory = memory + DTYPE_BYTES[job.dtype] * tokens * inputs * (self.ranks > 0)
        passes = 2.0 if job.choices.applied else 6.0 + 2.0 * setting.checkpointing  # a frozen adapter has the rest
        flops = passes * setting.batch * math.ceil(job.mean) * numbers
        seconds = self.steps(setting.batch, setting.used) * flops / self.machine.flops_per_s
        seconds = seconds + BYTES_PER_NUMBER * numbers / self.machine.up_bytes_per_s
        below = np.array([w.block < setting.depth for w in job.weights])
        memory[below, 1:] = seconds[below, 1:] = np.inf
        return memory, seconds

    def bound(self, setting: Setting, ranks: Mapping[str, int]) -> tuple[float, float]:
        """(bytes, seconds of a round) that these ranks are counted with in a setting: bounds from above."""
        places = [self.job.ranks.index(ranks[w.name]) + 1 if w.name in ranks else 0 for w in self.job.weights]
        (own_bytes, own_s), (memory, seconds) = self.base(setting), self.items(setting)
        turn = self.messages({}) + self.steps(setting.batch, setting.used) * own_s
        every = range(len(places))
        more = sum(float(memory[m, places[m]]) for m in every)
        return own_bytes + more, turn + sum(float(seconds[m, places[m]]) for m in every)

    def penalty(self, bits: str) -> float:
        """What a quantised base costs in the objective, where bits are searched for."""
        counts = self.job.choices.bits == "search" and bits != "full"
        return self.job.choices.penalty * WEIGHT_ERROR[bits] if counts else 0.0

    def down_bytes(self) -> int:
        """Everything that may be sent to the machine: all candidates at the largest rank, and the head."""
        top = self.job.ranks[-1]
        return int(BYTES_PER_NUMBER * top * self.job.sizes.sum()) + self.job.head_bytes

    def up_bytes(self, ranks: Mapping[str, int]) -> int:
        """What it sends: the components that it trains, and the head."""
        sizes = {w.name: w.d_in + w.d_out for w in self.job.weights}
        return BYTES_PER_NUMBER * sum(r * sizes[name] for name, r in ranks.items()) + self.job.head_bytes

    def messages(self, ranks: Mapping[str, int]) -> float:
        """Seconds that the messages of a round take."""
        up = self.up_bytes(ranks) / self.machine.up_bytes_per_s
        return self.machine.latency_s + self.down_bytes() / self.machine.down_bytes_per_s + up


def search(job: Job, machine: Profile, examples: int, deadline: float, fill: Fill | None = None) -> Plan | Excluded:
    """The best plan of one machine within its memory and the deadline, or why there is none.

    Args:
        examples: rows that the machine holds, at least 1.
        deadline: seconds of one round, messages included.
        fill: solves one setting's knapsack; None: greedily.
    """
    costs = Costs(job, machine, examples)
    least = _least(costs)
    if least is None or least.bytes > costs.usable or least.seconds > deadline:
        return _excluded(costs, least, deadline)
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
    steps = max(1, min(costs.steps(setting.batch), math.floor((deadline - messages) / step_s)))
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
    return replace(plan, why=tuple(_why(costs, setting, ranks, deadline, predicted)))


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


def _batches(costs: Costs) -> list[int]:
    """Those that the machine has the examples for, largest first; the smallest where it has them for none."""
    every = sorted(set(costs.job.choices.batches), reverse=True)
    return [b for b in every if b <= max(1, costs.examples)] or every[-1:]


def _depths(job: Job) -> list[int]:
    return sorted({int(share * job.shape.layers) for share in job.choices.depths})


def _formats(costs: Costs) -> list[str]:
    """Formats to search among: one, the first in which the smallest batch and a few weights fit, or several."""
    job, choices = costs.job, costs.job.choices
    known = [f for f in FORMATS if f in costs.machine.formats and (choices.bits != "full" or f == "full")]
    if choices.bits == "search":
        return known
    batch, depth, few = min(_batches(costs)), min(_depths(job)), _first(job, FIRST)
    for bits in known:
        for recompute in sorted(choices.checkpointing):
            if costs.bound(Setting(bits, batch, depth, recompute), few)[0] <= costs.usable:
                return [bits]
    return known[::-1]


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
                for batch in _batches(costs):
                    for depth in _depths(costs.job):
                        yield Setting(bits, batch, depth, recompute, used)


def whole_turns(costs: Costs) -> list[Setting]:
    """Every format, batch and way, with the weights trained from the lowest depth on."""
    known = [f for f in FORMATS if f in costs.machine.formats and (costs.job.choices.bits != "full" or f == "full")]
    return [
        Setting(bits, batch, max(_depths(costs.job)), recompute)
        for bits in known
        for batch in _batches(costs)
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


def warm_up_room(costs: Costs, rank: int, rows: int) -> tuple[str, int, int]:
    """Bits, rows per step and number of groups with which all candidates can be trained at one rank for a while.

    The most bits in which all of them fit at once; else the fewest bits, one row, and as few groups as that takes.
    """
    job = costs.job
    known = [f for f in FORMATS if f in costs.machine.formats and (job.choices.bits != "full" or f == "full")]
    everything = {w.name: rank for w in job.weights}
    for bits in known:
        if costs.bytes(Setting(bits, rows, 0, False), everything) <= costs.usable:
            return bits, rows, 1
    bits, groups = (known or ["full"])[-1], 1
    while groups < len(everything):
        part = dict(list(everything.items())[::groups])
        if costs.bytes(Setting(bits, 1, 0, False), part) <= costs.usable:
            break
        groups = min(2 * groups, len(everything))
    return bits, 1, groups


# --- words -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Least:
    """The cheapest way to train one weight."""

    setting: Setting
    bytes: float
    seconds: float  # of a round of one step


def _least(costs: Costs) -> _Least | None:
    """The fastest of those that fit, or the one that needs the least memory; None: no format is known."""
    ranks = _first(costs.job, 1)
    every = [
        _Least(s, costs.bytes(s, ranks), costs.messages(ranks) + costs.seconds(s, ranks)) for s in whole_turns(costs)
    ]
    fitting = [least for least in every if least.bytes <= costs.usable]
    return min(fitting, key=lambda p: p.seconds) if fitting else min(every, key=lambda p: p.bytes, default=None)


def _excluded(costs: Costs, least: _Least | None, deadline: float) -> Excluded:
    """What keeps the machine out."""
    if least is None:
        return Excluded(f"it can keep the base in none of the formats wanted ({costs.job.choices.bits})", 0, 0.0)
    needed = round(least.bytes)
    if needed > costs.usable:
        machine = costs.machine
        told = gigabytes(needed * machine.peak_ratio + machine.context_bytes)
        cheapest = f"{told} at {least.setting.bits}, batch {least.setting.batch}"
        return Excluded(f"needs {cheapest}; {gigabytes(costs.room)} usable", needed, least.seconds)
    words = f"one step with its messages takes {least.seconds:.3g} s; the round has {deadline:.3g} s"
    return Excluded(words, needed, least.seconds)


def _why(
    costs: Costs, setting: Setting, ranks: Mapping[str, int], deadline: float, predicted: Predicted
) -> Iterator[str]:
    """Which limit binds, and what the next larger batch, rank and bits would be counted with."""

    def counted(other: Setting, more: Mapping[str, int]) -> str:
        """Memory and time of an alternative, and which of the two it exceeds."""
        needed, seconds = costs.bound(other, more)
        over = [name for name, much in (("memory", needed > costs.usable), ("time", seconds > deadline)) if much]
        told = gigabytes(needed * costs.machine.peak_ratio + costs.machine.context_bytes)
        verdict = f"{' and '.join(over)} bind{'s' if len(over) == 1 else ''}" if over else "no gain"
        return f"up to {told} of {gigabytes(costs.room)}, {seconds:.3g} s of {deadline:.3g} ({verdict})"

    if predicted.under_training > 1e-9:
        full = costs.steps(setting.batch)
        longer = costs.messages(ranks) + full * predicted.step_s
        yield f"time binds: all {full} steps would take {longer:.3g} s of {deadline:.3g}"
    above = [f for f in FORMATS if f in costs.machine.formats and FORMATS.index(f) < FORMATS.index(setting.bits)]
    if above and costs.job.choices.bits != "full":
        yield f"{setting.bits}: {above[-1]} counts {counted(replace(setting, bits=above[-1]), ranks)}"
    if larger := [b for b in _batches(costs) if b > setting.batch]:
        yield f"batch {larger[-1]} counts {counted(replace(setting, batch=larger[-1]), ranks)}"
    if upgrade := _next_rank(costs, ranks):
        name, rank = next(iter(upgrade.items()))
        block = next(w.block for w in costs.job.weights if w.name == name)
        deeper = replace(setting, depth=min(setting.depth, block))
        yield f"next rank: {name} at {rank} counts {counted(deeper, {**ranks, **upgrade})}"
    else:
        yield "every candidate has the largest rank"


def _next_rank(costs: Costs, ranks: Mapping[str, int]) -> dict[str, int]:
    """The most important weight that has not the largest rank, with its next one."""
    for m in costs.job.by_score:
        name = costs.job.weights[m].name
        higher = [r for r in costs.job.ranks if r > ranks.get(name, 0)]
        if higher:
            return {name: higher[0]}
    return {}


def gigabytes(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
