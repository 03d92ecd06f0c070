"""Plans for all machines of a federation: each by itself, with demands that they share, or all the same.

told = plan_fleet(job, machines)        # machines: profile and number of examples by name
told.plans, told.excluded, told.deadline_s
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from fedpeft.core.errors import RequestError
from fedpeft.planner import milp
from fedpeft.planner.device import FORMATS, Profile
from fedpeft.planner.plan import Excluded, Job, Plan, under_training
from fedpeft.planner.prices import Costs, Setting
from fedpeft.planner.reasons import gigabytes
from fedpeft.planner.search import default_deadline, filled, knapsack, priced, search, settings, whole_turns

Machines: TypeAlias = Mapping[str, tuple[Profile, int]]  # profile, and how many examples it holds
Search: TypeAlias = Literal["greedy", "milp"]
OFFERS = 9  # settings per machine that are weighed together where machines share a demand


@dataclass(frozen=True)
class Fleet:
    """What everybody does, and who cannot take part."""

    plans: Mapping[str, Plan]
    excluded: Mapping[str, Excluded]
    deadline_s: float
    examples: Mapping[str, int]

    @property
    def under_training(self) -> float:
        """U over those who take part."""
        return under_training(self.plans, self.examples)


def plan_fleet(
    job: Job,
    machines: Machines,
    deadline: float | None = None,
    by: Search = "greedy",
    cover: int = 0,
    uniform: bool = False,
) -> Fleet:
    """The plan of every machine that can take part.

    Args:
        deadline: seconds of a round; None: `default_deadline`.
        by: how ranks are chosen within a setting.
        cover: the most important weights of which each must be trained by somebody; 0: none.
        uniform: one configuration for all, every candidate at the largest rank: the common practice, to compare with.

    Raises:
        RequestError: nobody can take part, or the demand cannot be met.
    """
    if not machines:
        raise RequestError("there is no machine to plan for; give at least one")
    whole = {w.name: job.ranks[-1] for w in job.weights} if uniform else None
    seconds = default_deadline(job, machines, whole) if deadline is None else deadline
    if uniform:
        found = _uniform(job, machines, seconds)
    else:
        fill = milp.filled if by == "milp" else None
        known: dict[tuple[Profile, int], Plan | Excluded] = {}  # equal machines are planned once
        for machine, examples in machines.values():
            if (machine, examples) not in known:
                known[machine, examples] = search(job, machine, examples, seconds, fill)
        found = {name: known[own] for name, own in machines.items()}
    plans = {name: p for name, p in found.items() if isinstance(p, Plan)}
    excluded = {name: p for name, p in found.items() if isinstance(p, Excluded)}
    if cover and plans and not uniform:
        plans |= _covered(job, {name: machines[name] for name in plans}, seconds, cover)
    return Fleet(plans, excluded, seconds, {name: examples for name, (_, examples) in machines.items()})


def _covered(job: Job, machines: Machines, deadline: float, cover: int) -> dict[str, Plan]:
    """One MILP over the best settings of every machine."""
    total = sum(examples for _, examples in machines.values())
    chosen: dict[str, list[tuple[Costs, Setting]]] = {}
    offers: dict[str, list[milp.Offer]] = {}
    for name, (machine, examples) in machines.items():
        costs = Costs(job, machine, examples)
        best: list[tuple[float, int, Setting, milp.Offer]] = []
        for i, setting in enumerate(settings(costs)):
            if (sack := knapsack(costs, setting, deadline)) is None:
                continue
            gain = sum(float(job.gains[m, p]) for m, p in enumerate(filled(*sack)))
            if not gain:  # not even one weight fits
                continue
            weight = setting.used * examples / total
            offer = milp.Offer(weight, costs.penalty(setting.bits) / setting.used, *sack)
            best.append((setting.used * gain - costs.penalty(setting.bits), -i, setting, offer))
        best = sorted(best, key=lambda entry: entry[:2], reverse=True)[:OFFERS]
        if best:  # else only exact costs fit, and the machine keeps the plan that it has
            chosen[name] = [(costs, setting) for _, _, setting, _ in best]
            offers[name] = [offer for *_, offer in best]
    if not offers:
        return {}
    told = milp.covered(offers, job.by_score[:cover])
    plans = {}
    for name, (i, places) in told.items():
        costs, setting = chosen[name][i]
        plans[name] = priced(costs, setting, job.named(places), deadline)
    return plans


def _uniform(job: Job, machines: Machines, deadline: float) -> dict[str, Plan | Excluded]:
    """Every candidate at the largest rank for all, with the bits and the batch that the weakest who takes part fits."""
    ranks = {w.name: job.ranks[-1] for w in job.weights}
    costs = {name: Costs(job, machine, examples) for name, (machine, examples) in machines.items()}
    found: dict[str, Plan | Excluded] = {}
    fitting: dict[str, list[Setting]] = {}
    for name, own in costs.items():
        able = [s for s in whole_turns(own) if own.bytes(s, ranks) <= own.usable]
        able = [s for s in able if own.messages(ranks) + own.seconds(s, ranks) <= deadline]
        if able:
            fitting[name] = able
        else:
            least = min((own.bytes(s, ranks) for s in whole_turns(own)), default=0)
            reason = f"one configuration for all needs at least {gigabytes(least)} and a step within {deadline:.3g} s"
            found[name] = Excluded(reason, least, 0.0)
    common = [s for s in _shared(list(fitting.values()))]
    if not common:
        return found | {name: Excluded("no configuration suits all machines", 0, 0.0) for name in fitting}
    best = max(common, key=lambda s: (-FORMATS.index(s.bits), not s.checkpointing, s.batch))
    return found | {name: priced(costs[name], best, ranks, deadline) for name in fitting}


def _shared(lists: Sequence[Sequence[Setting]]) -> list[Setting]:
    """The settings that all have."""
    return [s for s in lists[0] if all(s in other for other in lists[1:])] if lists else []


def scores_of(parts: Sequence[tuple[float, np.ndarray, np.ndarray]], names: Sequence[str]) -> dict[str, float]:
    """S_m = sum_i p_i seen_im S_im / sum_i p_i seen_im, divided by its sum; uniform where nobody has seen anything.

    Args:
        parts: per client its share p_i, (weights,) scores, (weights,) whether it has seen the weight.
        names: of the weights.
    """
    total, seen = np.zeros(len(names)), np.zeros(len(names))
    for share, scores, own in parts:
        total += share * np.where(own, scores, 0.0)
        seen += share * own
    means = np.divide(total, seen, out=np.zeros(len(names)), where=seen > 0)
    if not means.sum() > 0:
        means = np.ones(len(names))
    return dict(zip(names, (means / means.sum()).tolist(), strict=True))
