"""Who takes part: what all plans stand on, and what changes when somebody comes late, changes or fails."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from fedpeft.core.errors import RequestError
from fedpeft.planner import milp
from fedpeft.planner.cost import shape_of, weights
from fedpeft.planner.device import DEFAULT, Profile
from fedpeft.planner.plan import Choices, Job
from fedpeft.planner.prices import Costs, Setting
from fedpeft.planner.roster import FAILURES, MORE_MEMORY, Demands, Report, Roster

SHAPE = shape_of(
    {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
     "num_key_value_heads": 2, "intermediate_size": 176, "vocab_size": 512}
)  # fmt: skip
EVERY = weights(SHAPE, ("query", "key", "value", "output"))  # eight
MACHINE = dataclasses.replace(DEFAULT, flops_per_s=1e9)
NARROW: dict[str, Any] = {"depths": (0.0,), "checkpointing": (False,), "batches": (1,), "bits": "full"}


def job_of(**choices: Any) -> Job:
    """Scores fall from weight to weight."""
    scores = np.arange(len(EVERY), 0, -1) / math.comb(len(EVERY) + 1, 2)
    named = {w.name: float(s) for w, s in zip(EVERY, scores, strict=True)}
    return Job(SHAPE, EVERY, named, longest=1, mean=1.0, choices=Choices(**choices))


def report(machine: Profile = MACHINE, examples: int = 50) -> Report:
    return Report(machine, examples, 32, 24.0)


def roster_of(job: Job | None = None, **reports: Report) -> Roster:
    return Roster(job or job_of()).met(reports)


def cramped(count: float) -> Profile:
    """A machine with room for so many weights at the least rank, one row at a time."""
    costs = Costs(dataclasses.replace(job_of(**NARROW), longest=32, mean=24.0), MACHINE, 50)
    setting = Setting("full", 1, 0, False)
    need = costs.base(setting)[0] + count * costs.items(setting)[0][:, 1].max()
    return dataclasses.replace(MACHINE, memory_bytes=math.ceil(need / 0.9))


# --- what is planned --------------------------------------------------------------------------------------------------


def test_memory_is_for_the_longest_row_and_time_for_the_mean_row_of_those_who_have_rows() -> None:
    """(30 * 4 + 10 * 12) / 40 = 6."""
    reports = {"a": Report(MACHINE, 30, 7, 4.0), "b": Report(MACHINE, 10, 20, 12.0), "c": Report(MACHINE, 0, 99, 50.0)}
    job = roster_of(None, **reports).whole_job
    assert (job.longest, job.mean) == (20, 6.0)
    assert (roster_of().whole_job.longest, roster_of(c=reports["c"]).whole_job.longest) == (1, 1)


def test_only_the_best_weights_are_candidates_where_that_is_asked_for() -> None:
    roster = roster_of(a=report(), b=report())
    assert set(roster.planned(Demands()).plans["a"].ranks) == {w.name for w in EVERY}
    best = roster.planned(Demands(top_k=3))
    assert all(set(plan.ranks) == {w.name for w in EVERY[:3]} for plan in best.plans.values())
    assert best.told()["untrained"] == sorted(w.name for w in EVERY[3:])
    assert best.planned(Demands(top_k=2), ("b",)).plans["b"].ranks.keys() == {w.name for w in EVERY[:2]}


@pytest.mark.parametrize(("search", "asked"), [("greedy", False), ("milp", True)])
def test_the_search_that_is_asked_for_is_used(search: Any, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, exact = [], milp.filled

    def counted(*sack: Any) -> list[int]:
        calls.append(sack)
        return exact(*sack)

    monkeypatch.setattr(milp, "filled", counted)
    plan = roster_of(job_of(**NARROW), a=report()).planned(Demands(search=search)).plans["a"]
    assert plan.ranks and bool(calls) == asked


def test_the_best_weights_are_covered_by_all_together_and_by_nobody_alone() -> None:
    """Each has room for about three; two of them share the five best out, and a third comes late."""
    roster = roster_of(job_of(**NARROW), a=report(cramped(3.2)), b=report(cramped(3.2)))
    best, demands = {w.name for w in EVERY[:5]}, Demands(round_s=60.0, cover=5)
    alone, together = roster.planned(Demands(round_s=60.0)), roster.planned(demands)
    assert not best <= {name for plan in alone.plans.values() for name in plan.ranks}
    assert best <= {name for plan in together.plans.values() for name in plan.ranks}
    late = together.met({"c": report(cramped(1.2))}).planned(demands, ("c",))
    assert late.plans["c"].ranks and {c: late.plans[c] for c in "ab"} == dict(together.plans)
    with pytest.raises(RequestError):
        roster_of(job_of(**NARROW), c=report(cramped(1.2))).planned(demands)


def test_no_more_weights_are_covered_than_there_are() -> None:
    plans = roster_of(job_of(**NARROW), a=report()).planned(Demands(cover=100)).plans
    assert plans["a"].ranks.keys() == {w.name for w in EVERY}


def test_what_is_told_counts_what_is_trained_and_what_is_left_out() -> None:
    """Of 100 rows, 50 are of who cannot join and 50 of who trains every weight, half of them in time: 1/4 is used."""
    narrow = {**NARROW, "ranks": (2,), "depths": (0.0,)}
    out = report(dataclasses.replace(MACHINE, memory_bytes=1000))
    roster = roster_of(job_of(**narrow), a=report(), b=out).planned(Demands())
    plan = roster.plans["a"]
    half = dataclasses.replace(plan, predicted=dataclasses.replace(plan.predicted, under_training=0.5))
    told = dataclasses.replace(roster, plans={"a": half}).told()
    assert told["under_training"] == pytest.approx(0.5) and told["left_out"] == pytest.approx(0.75)
    assert told["trained_numbers"] == sum(2 * (w.d_in + w.d_out) for w in EVERY)
    assert told["plans"]["a"]["trained_numbers"] == told["trained_numbers"] and list(told["excluded"]) == ["b"]


# --- who comes late -----------------------------------------------------------------------------------------------


def test_a_deadline_is_kept_for_who_comes_late_and_found_again_for_all() -> None:
    slow = dataclasses.replace(MACHINE, flops_per_s=1e8)
    before = roster_of(a=report(), b=report()).planned(Demands())
    late = before.met({"c": report(slow), "d": report(slow), "e": report(slow)})
    after = late.planned(Demands(), ("c", "d", "e"))
    assert after.deadline_s == before.deadline_s > 0
    assert after.plans["a"] is before.plans["a"] and after.plans["c"].predicted.under_training > 0.3
    again = after.planned(Demands())
    assert again.deadline_s > 3 * before.deadline_s
    assert again.deadline_s == pytest.approx(late.planned(Demands()).deadline_s)
    assert after.planned(Demands(round_s=7.0)).deadline_s == after.planned(Demands(round_s=7.0), ("c",)).deadline_s == 7


def test_one_configuration_for_all_is_found_again_when_a_weaker_machine_comes_late() -> None:
    demands = Demands(round_s=1e6, uniform=True)
    before = roster_of(a=report(), b=report()).planned(demands)
    after = before.met({"c": report(examples=3)}).planned(demands, ("c",))
    assert {plan.batch for plan in before.plans.values()} == {32}
    assert {c: plan.batch for c, plan in after.plans.items()} == {"a": 2, "b": 2, "c": 2}


# --- who changes, and who fails ---------------------------------------------------------------------------------------


def test_an_exclusion_goes_away_with_a_new_plan_and_a_plan_with_an_exclusion() -> None:
    small = dataclasses.replace(MACHINE, memory_bytes=1000)
    before = roster_of(a=report(), b=report(small), c=report(small)).planned(Demands())
    assert (set(before.plans), set(before.excluded)) == ({"a"}, {"b", "c"})
    after = before.adjusted({"b": MACHINE, "a": small}, [], Demands())
    assert (set(after.plans), set(after.excluded)) == ({"b"}, {"a", "c"})
    assert after.excluded["c"] is before.excluded["c"] and after.machines["b"].profile == MACHINE
    rows = after.met({"c": report(MACHINE, 0)}).planned(Demands(), ("c",))
    assert rows.excluded["c"].reason == "it has no examples"
    assert set(rows.met({"c": report()}).planned(Demands()).plans) == {"b", "c"}


def test_each_failure_makes_a_machine_smaller_and_the_third_excludes_it() -> None:
    roster = roster_of(job_of(**NARROW), a=report(cramped(4.2)), b=report(cramped(4.2))).planned(Demands(round_s=60.0))
    first = roster.plans["a"]
    assert roster.adjusted({}, [], Demands()) is roster
    for count in range(1, FAILURES):
        roster = roster.adjusted({}, ["a"], Demands(round_s=60.0))
        assert roster.failures == {"a": count}
        assert roster.machine("a").peak_ratio == pytest.approx(MORE_MEMORY**count)
        assert roster.machine("b").peak_ratio == 1 and roster.machines["a"].profile.peak_ratio == 1
        assert "a" in roster.excluded or roster.plans["a"].predicted.coverage < first.predicted.coverage
    roster = roster.adjusted({"a": MACHINE}, ["a"], Demands(round_s=60.0))
    assert roster.failures == {"a": FAILURES} and roster.excluded["a"].reason == "it ran out of memory 3 times"
    assert set(roster.plans) == {"b"} and roster.machines["a"].profile == MACHINE


def test_a_machine_that_changed_and_failed_at_once_is_planned_with_both() -> None:
    roster = roster_of(a=report(), b=report()).planned(Demands())
    larger = dataclasses.replace(MACHINE, memory_bytes=9_000_000_000, flops_per_s=2e9)
    after = roster.adjusted({"a": larger}, ["a", "b"], Demands())
    assert after.failures == {"a": 1, "b": 1} and after.machine("a").flops_per_s == 2e9
    assert after.plans["b"] is not roster.plans["b"]
    ratio = after.plans["b"].predicted.peak_bytes / roster.plans["b"].predicted.peak_bytes
    assert ratio == pytest.approx(MORE_MEMORY, rel=1e-6)
    assert after.deadline_s == roster.deadline_s
