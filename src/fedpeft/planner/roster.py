"""Who takes part in a planned federation: each client's machine, its plan or why it has none, and what went wrong."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fedpeft.core.errors import RecordError
from fedpeft.core.exchange import ClientId
from fedpeft.planner.device import Profile, check_profile
from fedpeft.planner.fleet import Search, plan_fleet
from fedpeft.planner.plan import Excluded, Job, Plan, as_plain, under_training

MORE_MEMORY = 1.15  # by which a machine is thought to need more than predicted after it ran out of memory
FAILURES = 3  # after which it takes no part any more


@dataclass(frozen=True)
class Report:
    """What a machine is, and what it holds."""

    profile: Profile
    examples: int
    longest: int  # tokens of its longest row
    mean: float  # tokens of a mean row


@dataclass(frozen=True)
class Demands:
    """What all plans together have to meet; see `fleet.plan_fleet`."""

    round_s: float | None = None  # T; None: `fleet.default_deadline`
    search: Search = "greedy"
    cover: int = 0
    uniform: bool = False
    top_k: int | None = None  # only the best weights are candidates; None: all


@dataclass(frozen=True)
class Roster:
    """The machines and their plans; every change gives a new roster."""

    job: Job  # for a row of one token; `whole_job` knows everybody's rows
    machines: Mapping[ClientId, Report] = field(default_factory=dict)
    plans: Mapping[ClientId, Plan] = field(default_factory=dict)
    excluded: Mapping[ClientId, Excluded] = field(default_factory=dict)
    failures: Mapping[ClientId, int] = field(default_factory=dict)  # how often a machine ran out of memory
    deadline_s: float = 0.0  # T of the plans; 0 before there are any

    @property
    def decided(self) -> bool:
        """Whether anybody was planned for."""
        return bool(self.plans or self.excluded)

    @cached_property
    def whole_job(self) -> Job:
        """What is planned: for the longest row that anybody has, and for the mean row of all."""
        told = [r for r in self.machines.values() if r.examples]
        rows = sum(r.examples for r in told)
        mean = sum(r.examples * r.mean for r in told) / rows if rows else 1.0
        return replace(self.job, longest=max((r.longest for r in told), default=1), mean=mean)

    def machine(self, client: ClientId) -> Profile:
        """A client's profile; each time that it ran out of memory it is thought to need more than predicted."""
        own = self.machines[client].profile
        return replace(own, peak_ratio=own.peak_ratio * MORE_MEMORY ** self.failures.get(client, 0))

    def news(self, reports: Mapping[ClientId, Report]) -> dict[ClientId, Report]:
        """Those of machines that are new or not what they were."""
        return {client: report for client, report in reports.items() if self.machines.get(client) != report}

    def met(self, reports: Mapping[ClientId, Report]) -> Roster:
        """With these machines; one that is not what it was has not failed yet."""
        known = self.news(reports)
        failures = {client: n for client, n in self.failures.items() if client not in known}
        return replace(self, machines={**self.machines, **reports}, failures=failures)

    def adjusted(self, profiles: Mapping[ClientId, Profile], failed: Sequence[ClientId], demands: Demands) -> Roster:
        """Plans again for those whose machine is another one now, or ran out of memory."""
        if not profiles and not failed:
            return self
        machines = {c: replace(r, profile=profiles.get(c, r.profile)) for c, r in self.machines.items()}
        failures = {**self.failures, **{c: self.failures.get(c, 0) + 1 for c in failed}}
        return replace(self, machines=machines, failures=failures).planned(demands, (*profiles, *failed))

    def planned(self, demands: Demands, who: Sequence[ClientId] = ()) -> Roster:
        """Plans for everybody, or for some by themselves, with the deadline as it is.

        Raises:
            RequestError: nobody can take part, or the demands cannot be met.
        """
        job, alone = self.whole_job, bool(who) and not demands.uniform
        if demands.top_k is not None:
            best = {job.weights[m].name for m in job.by_score[: demands.top_k]}
            job = replace(job, weights=tuple(w for w in job.weights if w.name in best))
        asked = tuple(dict.fromkeys(who)) if alone else tuple(self.machines)
        out = {c: no for c in asked if (no := self._refusal(c)) is not None}
        able = {c: (self.machine(c), self.machines[c].examples) for c in asked if c not in out}
        plans = {c: p for c, p in self.plans.items() if c not in asked}
        excluded = {c: p for c, p in self.excluded.items() if c not in asked} | out
        seconds = demands.round_s or (self.deadline_s if who else None) or None
        if able:
            cover = 0 if alone else min(demands.cover, len(job.weights))
            fleet = plan_fleet(job, able, seconds, demands.search, cover, demands.uniform)
            plans, excluded, seconds = {**plans, **fleet.plans}, {**excluded, **fleet.excluded}, fleet.deadline_s
        return replace(self, plans=plans, excluded=excluded, deadline_s=seconds or self.deadline_s)

    def told(self) -> dict[str, Any]:
        """Deadline, scores, every plan and why, who has none, as JSON can carry it.

        `under_training` is of the examples of those with a plan, `left_out` of everybody's; `trained_numbers` are those
        of a mean machine's adapter.
        """
        counts = {c: self.machines[c].examples for c in self.plans}
        plans = {c: as_plain(plan, counts[c], self.job.weights) for c, plan in sorted(self.plans.items())}
        under = under_training(self.plans, counts)
        every = sum(r.examples for r in self.machines.values())
        trained = {name for plan in self.plans.values() for name in plan.ranks}
        few = "; ".join(f"{client} {no.reason}" for client, no in list(sorted(self.excluded.items()))[:3])
        out = f"{len(self.excluded)} of {len(self.machines)} machines cannot join: {few}" if self.excluded else ""
        return {
            **({"warning": out} if out else {}),
            "deadline_s": self.deadline_s,
            "under_training": under,
            "left_out": 1 - (1 - under) * sum(counts.values()) / every if every else 0.0,
            "trained_numbers": round(statistics.fmean(p["trained_numbers"] for p in plans.values())) if plans else 0,
            "weight_scores": dict(self.job.scores),
            "plans": plans,
            "excluded": {c: no.reason for c, no in sorted(self.excluded.items())},
            "untrained": sorted(self.job.scores.keys() - trained),
        }

    def _refusal(self, client: ClientId) -> Excluded | None:
        """Why a client cannot train whatever its plan."""
        if not self.machines[client].examples:
            return Excluded("it has no examples", 0, 0.0)
        if self.failures.get(client, 0) >= FAILURES:
            return Excluded(f"it ran out of memory {FAILURES} times", 0, 0.0)
        return None


def check_report(report: Report) -> None:
    """Raise RecordError unless a report that came from afar could be a machine's."""
    check_profile(report.profile)
    if not (0 <= report.examples <= 2**53 and 1 <= report.longest <= 2**31 and 0 < report.mean <= report.longest):
        raise RecordError(
            f"{report.examples} rows of {report.mean} tokens in the mean and {report.longest} at most are not possible"
        )
