"""Why a plan is as it is, in words: which limit binds, what more would be counted with, what keeps a machine out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from fedpeft.planner.device import FORMATS
from fedpeft.planner.plan import Excluded, Predicted
from fedpeft.planner.prices import Costs, Setting


@dataclass(frozen=True)
class Least:
    """The cheapest way to train one weight."""

    setting: Setting
    bytes: float
    seconds: float  # of a round of one step


def least_of(costs: Costs, settings: Iterable[Setting], ranks: Mapping[str, int]) -> Least | None:
    """The fastest of those that fit, or the one that needs the least memory; None: no format is known."""
    every = [Least(s, costs.bytes(s, ranks), costs.messages(ranks) + costs.seconds(s, ranks)) for s in settings]
    fitting = [least for least in every if least.bytes <= costs.usable]
    return min(fitting, key=lambda p: p.seconds) if fitting else min(every, key=lambda p: p.bytes, default=None)


def excluded(costs: Costs, least: Least | None, deadline: float) -> Excluded:
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


def why(
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
    above = [f for f in costs.formats if FORMATS.index(f) < FORMATS.index(setting.bits)]
    if above:
        yield f"{setting.bits}: {above[-1]} counts {counted(replace(setting, bits=above[-1]), ranks)}"
    if larger := [b for b in costs.batches if b > setting.batch]:
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
