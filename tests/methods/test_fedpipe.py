"""FedPipe: what every machine gets to do, and what happens when machines come late, change, or run out of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

import toy
from fedpeft.core import pairs, tree
from fedpeft.core.adapter import Lora, Prefix
from fedpeft.core.errors import ClientError, ConfigError, RecordError, RequestError, out_of_memory
from fedpeft.core.exchange import ClientEnv, ServerEnv
from fedpeft.core.federate import Done, federate
from fedpeft.core.fit import Fit, Fitted, Moments
from fedpeft.core.method import stream_batches
from fedpeft.engines.inprocess import InProcess
from fedpeft.maths import lowrank
from fedpeft.methods import fedpipe
from fedpeft.methods.fedpipe import Ask, FedPipe, Memory, Report, Scores, State, Trained, fits, scored, sound
from fedpeft.planner.device import DEFAULT, Profile
from fedpeft.planner.prices import Costs
from fedpeft.planner.warmup import WarmUp, messages

QUICK = {"warmup_steps": 3, "lr": 0.05, "ranks": (1, 2, 4), "batches": (1, 2, 4)}
MODEL = {"width": 6, "dtype": "float32", "blocks": 2, "rank": 4}
SLOW = dataclasses.replace(DEFAULT, name="slow", flops_per_s=1.2e6, latency_s=0.001)
FAST = dataclasses.replace(DEFAULT, name="fast", flops_per_s=1e9, latency_s=0.001)
TINY = dataclasses.replace(DEFAULT, name="tiny", memory_bytes=600)


def method(**values: Any) -> FedPipe:
    return FedPipe(**{**QUICK, **values})


def engine(own: FedPipe, machines: Mapping[str, Profile], clients: int = 4) -> InProcess:
    data = toy.federation(False, clients=clients, width=MODEL["width"])
    return InProcess(lambda: own, toy.ToyModel(**MODEL), data, 3, resources=dict(machines))  # type: ignore[arg-type]


def run(own: FedPipe, transport: Any, rounds: int = 2, resources: Mapping[str, Profile] | None = None) -> list[Done]:
    model = toy.ToyModel(**MODEL)  # type: ignore[arg-type]
    return list(federate(own, transport, model, rounds=rounds, seed=3, resources=resources))


def server(round: int = 1) -> ServerEnv:
    return ServerEnv(toy.ToyModel(**MODEL), ("c0", "c1"), 3, 4, round, "train")  # type: ignore[arg-type]


class Learnt(toy.ToyModel):
    """A model whose run begins with an adapter that has learnt something."""

    def init(self, rng: Any) -> dict[str, torch.Tensor]:
        draw = np.random.default_rng(5)
        fresh = super().init(draw)
        return {
            name: torch.from_numpy(draw.normal(size=tuple(t.shape))).to(t.dtype) if pairs.is_factor(name, "B") else t
            for name, t in fresh.items()
        }


@pytest.mark.parametrize("aggregation", ["svd_product", "factor_partial", "zero_pad", "stack_exact"])
def test_what_was_learnt_before_the_run_acts_from_its_first_round_on(aggregation: Any) -> None:
    """With a rate of nearly zero, few weights and low ranks: the change of every weight is that of the start."""
    own = method(aggregation=aggregation, lr=1e-9, head_lr=1e-9, ranks=(1, 2), top_k=2)
    model = Learnt(**MODEL)  # type: ignore[arg-type]
    data = toy.federation(False, clients=4, width=MODEL["width"])
    transport = InProcess(lambda: own, model, data, 3)
    seen: list[Fit] = []
    fit_many = model.fit_many

    def watched(fits: Any, *more: Any) -> Any:
        seen.extend(fits)
        return fit_many(fits, *more)

    model.fit_many = watched  # type: ignore[method-assign]
    done = list(federate(own, transport, model, rounds=2, seed=3))
    start, end = model.init(np.random.default_rng(0)), own.result(done[-1].state)
    scale = done[-1].state.scale
    assert pairs.stems(start)
    for stem in pairs.stems(start):
        b, a = pairs.pair(start, stem)
        whole = torch.zeros(len(b), a.shape[1])
        if f"{stem}.A" in end:
            whole += scale * end[f"{stem}.B"] @ end[f"{stem}.A"]
        if f"delta.{stem}.left" in end:
            whole += end[f"delta.{stem}.left"] @ end[f"delta.{stem}.right"]
        torch.testing.assert_close(whole, scale * b @ a, atol=1e-4, rtol=1e-4)
        for fit in (f for f in seen if any(pairs.stems(layer) for layer in (f.params, *f.also)) and f.penalty is None):
            acting = sum(
                (layer[f"{stem}.B"] @ layer[f"{stem}.A"] for layer in (fit.params, *fit.also) if f"{stem}.A" in layer),
                torch.zeros(len(b), a.shape[1]),
            )
            torch.testing.assert_close(acting, b @ a, atol=1e-4, rtol=1e-4)
    assert any(fit.penalty is None for fit in seen)


# --- plans --------------------------------------------------------------------------------------------------------


def test_unequal_machines_get_unequal_plans_within_the_deadline() -> None:
    machines = {"c0": FAST, "c1": SLOW, "c2": FAST, "c3": SLOW}
    done = run(method(round_seconds=0.02), engine(method(round_seconds=0.02), machines))
    roster = done[-1].state.roster
    assert set(roster.plans) == set(machines) and not roster.excluded
    fast, slow = roster.plans["c0"].predicted, roster.plans["c1"].predicted
    assert fast.value > slow.value and slow.round_s <= 0.02
    told = method().choices(done[-1].state)
    assert told["plans"]["c1"]["why"] and 0 <= told["under_training"] < 1
    assert sum(told["weight_scores"].values()) == pytest.approx(1)


def test_a_machine_without_room_is_left_out_and_the_run_goes_on() -> None:
    done = run(method(), engine(method(), {"c1": TINY}))
    roster = done[-1].state.roster
    assert set(roster.excluded) == {"c1"} and "usable" in roster.excluded["c1"].reason
    assert all("c1" not in step.cohort for step in done if step.exchange == "train")
    assert method().choices(done[-1].state)["excluded"]["c1"].startswith("needs ")


def test_nobody_having_room_is_a_clear_error() -> None:
    with pytest.raises(RequestError, match="no machine can train a single weight"):
        run(method(), engine(method(), dict.fromkeys(("c0", "c1", "c2", "c3"), TINY)))
    with pytest.raises(RequestError, match="no client can take part: c0 one step with its messages takes"):
        run(method(round_seconds=1e-6), engine(method(round_seconds=1e-6), {}))


def test_who_comes_late_is_planned_for_with_the_deadline_and_the_scores_as_they_are() -> None:
    own = method()
    transport = engine(own, {"c3": SLOW})
    transport.fault = lambda client, call: "away" if client == "c3" and call.round == 0 else None
    done = run(own, transport)
    before = next(step.state for step in done if step.exchange == "importance")
    assert "c3" not in before.roster.plans
    after = next(step.state for step in done if step.exchange == "join")
    assert set(after.roster.plans) == {"c0", "c1", "c2", "c3"}
    assert after.roster.deadline_s == before.roster.deadline_s and after.roster.job.scores == before.roster.job.scores
    assert {c: after.roster.plans[c] for c in before.roster.plans} == dict(before.roster.plans)


def test_who_never_answers_is_asked_again_in_every_round_and_stops_nobody() -> None:
    own = method()
    transport = engine(own, {})
    transport.fault = lambda client, call: "away" if client == "c3" else None
    done = run(own, transport)
    joins = [step for step in done if step.exchange == "join"]
    assert [(step.cohort, step.answered, len(step.receipts)) for step in joins] == [(("c3",), (), 1)] * 2
    assert set(done[-1].state.roster.plans) == {"c0", "c1", "c2"} and done[-1].round == 2
    assert all("c3" not in step.cohort for step in done if step.exchange == "train")


def test_a_machine_that_changes_gets_another_plan() -> None:
    own = method(round_seconds=0.02)
    transport = engine(own, dict.fromkeys(("c0", "c1", "c2", "c3"), FAST))
    loop = federate(own, transport, toy.ToyModel(**MODEL), rounds=2, seed=3)  # type: ignore[arg-type]
    for step in loop:
        if step.exchange == "importance":
            before = step.state.roster.plans
            transport.resources = {**transport.resources, "c0": SLOW}
        elif step.exchange == "train" and step.round == 1:
            assert step.state.roster.machines["c0"].profile == SLOW
            assert step.state.roster.plans["c0"].predicted.value < before["c0"].predicted.value
            assert step.state.roster.plans["c1"] == before["c1"]


def test_a_machine_that_was_left_out_is_asked_again_and_comes_back_when_it_has_room() -> None:
    own = method()
    transport = engine(own, {"c1": TINY})
    loop = federate(own, transport, toy.ToyModel(**MODEL), rounds=3, seed=3)  # type: ignore[arg-type]
    plans = {}
    for step in loop:
        if step.exchange == "join" and step.round == 1:
            assert step.cohort == ("c1",) and set(step.state.roster.excluded) == {"c1"}
            plans = dict(step.state.roster.plans)
        elif step.exchange == "train" and step.round == 1:
            transport.resources = {"c1": FAST}
        elif step.exchange == "train":
            assert "c1" in step.cohort and not step.state.roster.excluded
            assert {c: step.state.roster.plans[c] for c in plans} == plans, "the others' plans stand"
    assert step.round == 3


def test_a_machine_that_ran_out_of_memory_too_often_comes_back_as_another_one() -> None:
    own = method()
    roster = [step.state.roster for step in run(own, engine(own, {}), rounds=1)][-1]
    for _ in range(3):
        roster = roster.adjusted({}, ["c0"], own.demands)
    assert "c0" in roster.excluded
    same = roster.machines["c0"]
    assert not roster.news({"c0": same}) and roster.met({"c0": same}).failures == {"c0": 3}
    other = roster.met({"c0": dataclasses.replace(same, profile=FAST)})
    assert not other.failures and "c0" in other.planned(own.demands, ("c0",)).plans


def test_memory_that_runs_out_shrinks_the_plan_and_the_third_time_leaves_the_machine_out() -> None:
    own = method(batches=(2,), checkpointing="off", depths=(0.0,), bits="full")
    transport = engine(own, {})
    model = transport.model
    whole = model.fit_many

    def short_of_memory(fits: list[Fit]) -> list[Fitted | Exception]:
        """Whoever trains c0's rows runs out of memory, as torch on a GPU says it."""
        lost = ClientError("local training failed: OutOfMemoryError")
        lost.__cause__ = torch.OutOfMemoryError("out of memory")
        mine = transport.data["c0"]["train"]
        return [
            lost if f.data is mine and len(f.batches) > 1 else got for f, got in zip(fits, whole(fits), strict=True)
        ]

    model.fit_many = short_of_memory  # type: ignore[method-assign, assignment]
    done = run(own, transport, rounds=5)
    trains = [step.state.roster for step in done if step.exchange == "train"]
    assert [roster.failures.get("c0", 0) for roster in trains] == [1, 2, 3, 3, 3]
    assert trains[1].machine("c0").peak_ratio == pytest.approx(1.15**2)
    assert "c0" in trains[1].plans and "c0" not in trains[2].plans
    assert trains[2].excluded["c0"].reason == "it ran out of memory 3 times"
    assert all(roster.machines.keys() == {"c0", "c1", "c2", "c3"} for roster in trains)


def test_other_failures_are_the_clients_own() -> None:
    assert out_of_memory(MemoryError()) and out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    wrapped = ClientError("x")
    wrapped.__cause__ = torch.OutOfMemoryError("y")
    assert out_of_memory(wrapped) and not out_of_memory(ClientError("diverged")) and not out_of_memory(None)


# --- importance ---------------------------------------------------------------------------------------------------


def test_importance_is_the_mean_by_examples_and_a_client_without_rows_has_no_say() -> None:
    own, state = method(), method().init(server())
    roster = state.roster.met({c: Report(DEFAULT, n, 3, 3.0) for c, n in (("c0", 30), ("c1", 10), ("c2", 0))})
    state = dataclasses.replace(state, roster=roster)
    ups = {
        "c0": Scores(torch.tensor([0.8, 0.2]), torch.tensor([True, True]), 30),
        "c1": Scores(torch.tensor([0.4, 0.6]), torch.tensor([True, True]), 10),
        "c2": Scores(torch.tensor([0.0, 0.0]), torch.tensor([False, False]), 0),
    }
    found = own.weigh(state, ups, server()).roster
    assert list(found.job.scores.values()) == pytest.approx([0.7, 0.3])
    assert found.excluded["c2"].reason == "it has no examples"
    nothing = own.weigh(state, {"c2": ups["c2"]}, server())
    assert set(nothing.roster.job.scores.values()) == {0.5} and "all count the same" in nothing.warning


@pytest.mark.parametrize("score", ["sensitivity", "sum_lambda"])
def test_the_warm_up_finds_the_block_in_which_something_is_to_be_learnt(score: str) -> None:
    """The first block's numbers are 5 away from the data, the second's are where they should be."""
    own = method(score=score, warmup_steps=40, warmup_lr=0.05)
    rows = np.zeros((8, 6))
    rows[:, :3] = 5.0
    rows += 0.01 * np.random.default_rng(0).standard_normal(rows.shape)
    env = ClientEnv("c0", toy.ToyModel(**MODEL), {"train": toy.Points(rows)}, 3, 4)  # type: ignore[arg-type]
    state = own.init(server())
    state = dataclasses.replace(state, roster=state.roster.met({"c0": Report(DEFAULT, 8, 3, 3.0)}))
    ask = own.ask_scores(state, "c0")
    work = own.warm_up(ask, Memory(), env)
    fit = next(work)
    assert fit.base == "" and len(fit.batches) == 1 and len(fit.batches[0]) == ask.how.batch
    try:
        while True:
            fit = work.send(env.model.fit(fit))
    except StopIteration as stop:
        up, memory = stop.value
    assert float(up.scores[0]) > 0.8 and float(up.scores.sum()) == pytest.approx(1) and memory == Memory()
    scored(ask, up)


def test_who_has_no_time_for_a_warm_up_is_planned_for_with_the_others_scores() -> None:
    """A step of eight rows takes 1.2e-5 s on a fast machine and 1 ms on a slow one."""
    machines = {"c0": FAST, "c1": SLOW, "c2": FAST, "c3": SLOW}
    own = method(warmup_seconds=0.004, warmup_steps=10)
    done = run(own, engine(own, machines), rounds=1)
    measured = next(step for step in done if step.exchange == "importance")
    assert set(measured.cohort) == {"c0", "c2"}
    assert set(measured.state.roster.plans) == set(machines) and not measured.state.warning


@pytest.mark.parametrize("short", [("c0",), ("c0", "c1", "c2", "c3")])
def test_a_warm_up_that_runs_out_of_memory_leaves_the_scores_to_others(short: tuple[str, ...]) -> None:
    own = method()
    transport = engine(own, {})
    model = transport.model
    whole = model.fit_many
    hurt = [transport.data[c]["train"] for c in short]
    lost = ClientError("local training failed: MemoryError")
    lost.__cause__ = MemoryError("no room")

    def short_of_memory(wanted: list[Fit]) -> list[Fitted | Exception]:
        """The warm-up, whose triplets have an E, does not fit."""
        heavy = [any(f.data is own for own in hurt) and any(n.endswith(".E") for n in f.params) for f in wanted]
        return [lost if bad else got for bad, got in zip(heavy, whole(wanted), strict=True)]

    model.fit_many = short_of_memory  # type: ignore[method-assign, assignment]
    done = run(own, transport, rounds=1)
    measured = next(step for step in done if step.exchange == "importance")
    assert set(measured.answered) == {"c0", "c1", "c2", "c3"}
    assert ("all count the same" in measured.state.warning) == (len(short) == 4)
    assert set(done[-1].state.roster.plans) == {"c0", "c1", "c2", "c3"}


def test_one_answer_is_enough_for_the_importance() -> None:
    own = method()
    transport = engine(own, {})
    transport.fault = lambda client, call: "away" if call.exchange.name == "importance" and client != "c2" else None
    measured = next(step for step in run(own, transport, rounds=1) if step.exchange == "importance")
    assert measured.answered == ("c2",) and not measured.state.warning and len(measured.receipts) == 4


def test_where_nobody_can_measure_importance_all_weights_count_the_same_and_that_is_said() -> None:
    own = method(warmup_seconds=1e-6)
    done = run(own, engine(own, {}), rounds=1)
    assert [len(step.cohort) for step in done if step.exchange == "importance"] == [0]
    state = done[-1].state
    assert set(state.roster.job.scores.values()) == {0.5} and "all count the same" in own.choices(state)["warning"]
    assert set(state.roster.plans) == {"c0", "c1", "c2", "c3"}


def test_a_warm_up_is_priced_with_what_it_sends_and_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing at first; later what is trained at its whole rank, and what was folded away."""
    asked: list[Costs] = []

    def asking(costs: Costs, *rest: Any) -> WarmUp:
        asked.append(costs)
        return WarmUp("full", 2, 1, 3)

    monkeypatch.setattr(fedpipe, "warm_up_room", asking)
    own = method()
    after = planned_state(own, {"block.0.w": 2})
    stack = {"block.1.w.A": torch.ones(7, 2), "block.1.w.B": torch.ones(1, 7)}
    for state in (dataclasses.replace(after, union=()), after, dataclasses.replace(after, union=(), stack=stack)):
        down = own.ask_scores(state, "c0")
        up = Scores(torch.zeros(2), torch.zeros(2, dtype=torch.bool), 4)
        sent, told = 4 * tree.count({**down.params, **down.stack}), up.scores.nbytes + up.seen.nbytes + 8
        expected = DEFAULT.latency_s + sent / DEFAULT.down_bytes_per_s + told / DEFAULT.up_bytes_per_s
        assert messages(asked[-1]) == pytest.approx(expected, rel=1e-12)
    assert [costs.frozen for costs in asked] == [{}, dict.fromkeys(pairs.stems(after.params), 4), {"block.1.w": 7}]


def test_a_refreshed_importance_stands_on_what_was_learnt() -> None:
    own = method(refresh_every=2)
    transport = engine(own, {})
    asked: list[tuple[int, int]] = []
    keep = own.ask_scores

    done = run(own, transport, rounds=4)
    assert [(s.round, len(s.cohort)) for s in done if s.exchange == "refresh"] == [(1, 0), (2, 0), (3, 4), (4, 0)]
    state = next(s.state for s in done if s.exchange == "join" and s.round == 3)
    sent = keep(state, "c0")
    assert set(pairs.stems(sent.params)) == set(state.union) and not asked


# --- training -----------------------------------------------------------------------------------------------------


def planned_state(own: FedPipe, ranks: Mapping[str, int]) -> State:
    """A state in which c0 trains these ranks, everything has been trained, and B is not zero."""
    state = own.init(server())
    roster = state.roster.met({"c0": Report(DEFAULT, 4, 3, 3.0)})
    roster = dataclasses.replace(
        roster, job=dataclasses.replace(roster.job, scores={n: 0.5 for n in pairs.stems(state.params)})
    )
    roster = roster.planned(own.demands)
    plan = dataclasses.replace(roster.plans["c0"], ranks=dict(ranks), steps=2, batch=2, bits="full")
    rng = np.random.default_rng(5)
    params = {n: torch.from_numpy(rng.standard_normal(t.shape)).to(t) for n, t in state.params.items()}
    roster = dataclasses.replace(roster, plans={"c0": plan})
    return dataclasses.replace(state, params=params, union=pairs.stems(params), roster=roster)


def test_what_a_client_does_not_train_acts_frozen() -> None:
    own, stem = method(), "block.0.w"
    state = planned_state(own, {stem: 2})
    env = ClientEnv("c0", toy.ToyModel(**MODEL), {"train": toy.points(*[[1.0] * 6] * 4)}, 3, 4)  # type: ignore[arg-type]
    down = own.send(state, "c0")
    work = own.train(down, Memory(profile=DEFAULT), env)
    fit = next(work)
    assert pairs.ranks(fit.params) == {stem: 2}
    (rest,) = fit.also
    assert pairs.ranks(rest) == {stem: 2, "block.1.w": 4}
    both = {
        stem: pairs.pair(fit.params, stem)[0] @ pairs.pair(fit.params, stem)[1] + rest[f"{stem}.B"] @ rest[f"{stem}.A"]
    }
    torch.testing.assert_close(both[stem], state.params[f"{stem}.B"] @ state.params[f"{stem}.A"])
    try:
        work.send(env.model.fit(fit))
    except StopIteration as stop:
        up, memory = stop.value
    assert up.params.keys() == fit.params.keys() and memory.cursor == 4 and up.profile is None
    fits(down, up)


def test_at_the_start_of_a_round_all_clients_on_one_base_have_the_same_model() -> None:
    """Whatever they train, what they train and what acts frozen make the global model."""
    own = method()
    data, outputs = toy.points(*[[1.0] * 6] * 4), []
    model = toy.ToyModel(**MODEL)  # type: ignore[arg-type]
    for ranks in ({"block.0.w": 1}, {"block.0.w": 4, "block.1.w": 2}, {"block.1.w": 4}):
        state = planned_state(own, ranks)
        env = ClientEnv("c0", model, {"train": data}, 3, 4)
        fit = next(own.train(own.send(state, "c0"), Memory(), env))
        outputs.append(model.point(fit.params, 6) + sum(model.point(layer, 6) for layer in fit.also))
    for other in outputs:
        torch.testing.assert_close(
            other, model.point(own.result(planned_state(own, {"block.0.w": 1})), 6), rtol=1e-5, atol=1e-5
        )


def test_with_the_tail_dropped_only_the_own_components_travel() -> None:
    own = method(tail="drop")
    down = own.send(planned_state(own, {"block.0.w": 2}), "c0")
    assert pairs.ranks(down.params) == {"block.0.w": 2}


def test_before_anything_was_trained_only_the_head_travels() -> None:
    own = method()
    state = dataclasses.replace(planned_state(own, {"block.0.w": 2}), union=())
    assert set(own.send(state, "c0").params) == {toy.HEAD}


def test_a_client_that_stops_early_sees_all_of_its_rows_over_the_rounds() -> None:
    env = ClientEnv("c0", toy.ToyModel(), {"train": toy.points(*[[float(i)] * 3 for i in range(7)])}, 3, 9)
    seen: list[int] = []
    for cursor in range(0, 14, 2):
        (batch,) = stream_batches(env, cursor, 1, 2)
        seen += batch
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7)) and seen[:7] != seen[7:]


def test_moments_are_kept_while_the_plan_is_the_same() -> None:
    own = method(aggregation="factor_partial", keep_moments=True)
    state = planned_state(own, {"block.0.w": 2})
    env = ClientEnv("c0", toy.ToyModel(**MODEL), {"train": toy.points(*[[1.0] * 6] * 4)}, 3, 4)  # type: ignore[arg-type]

    def turn(state: State, memory: Memory) -> tuple[Fit, Memory]:
        work = own.train(own.send(state, "c0"), memory, env)
        fit = next(work)
        try:
            work.send(env.model.fit(fit))
        except StopIteration as stop:
            return fit, stop.value[1]
        raise AssertionError

    _, memory = turn(state, Memory())
    again, _ = turn(state, memory)
    assert isinstance(again.moments, Moments) and again.moments.step == 2
    other, _ = turn(planned_state(own, {"block.0.w": 1}), memory)
    assert other.moments is None
    with pytest.raises(ConfigError, match=r"does not go with method\.aggregation svd_product"):
        method(keep_moments=True)


# --- aggregation --------------------------------------------------------------------------------------------------


def answers(state: State, own: Mapping[str, tuple[Mapping[str, int], int]], seed: int = 9) -> dict[str, Trained]:
    """Per client the ranks that it trained and its examples; random factors."""
    rng, found = np.random.default_rng(seed), {}
    for client, (ranks, examples) in own.items():
        params = pairs.cut_each(pairs.of(state.params, ranks), ranks)
        params = {n: torch.from_numpy(rng.standard_normal(t.shape)).to(t) for n, t in params.items()}
        found[client] = Trained(params, examples, 0.5)
    return found


def product(params: Mapping[str, torch.Tensor], stem: str, first: int = 0, last: int | None = None) -> np.ndarray:
    b, a = (t.double().numpy() for t in pairs.pair(params, stem))
    return np.asarray(b[:, first:last] @ a[first:last])


def test_svd_product_is_the_exact_mean_in_which_frozen_components_count_as_applied() -> None:
    own, stem = method(), "block.0.w"
    state = planned_state(own, {stem: 2})
    ups = answers(state, {"c0": ({stem: 1}, 10), "c1": ({stem: 4}, 30)})
    after = own.average(state, ups, server())
    exact = 0.25 * (product(ups["c0"].params, stem) + product(state.params, stem, 1)) + 0.75 * product(
        ups["c1"].params, stem
    )
    np.testing.assert_allclose(product(after.params, stem), exact, rtol=1e-4, atol=1e-5)
    untouched = "block.1.w"
    assert torch.equal(after.params[f"{untouched}.B"], state.params[f"{untouched}.B"])
    assert torch.equal(after.params[f"{untouched}.A"], state.params[f"{untouched}.A"])


def test_components_of_two_zeros_get_a_fresh_a() -> None:
    """One row of numbers has one singular value: of four components three are drawn anew, the same at every server."""
    own, stem = method(), "block.0.w"
    state = planned_state(own, {stem: 2})
    ups = answers(state, {"c0": ({stem: 2}, 10)})
    one, two = (own.average(state, ups, server()).params for _ in range(2))
    assert not bool(one[f"{stem}.B"][:, 1:].any()) and bool(one[f"{stem}.A"].any(dim=1).all())
    assert torch.equal(one[f"{stem}.A"], two[f"{stem}.A"])
    other = own.average(state, ups, server(2)).params
    assert not torch.equal(one[f"{stem}.A"][1:], other[f"{stem}.A"][1:])


@pytest.mark.parametrize("tail", ["frozen", "drop"])
def test_factor_means_and_zero_padding(tail: str) -> None:
    stem = "block.0.w"
    for aggregation in ("factor_partial", "zero_pad"):
        own = method(aggregation=aggregation, tail=tail)
        state = planned_state(own, {stem: 2})
        ups = answers(state, {"c0": ({stem: 1}, 10), "c1": ({stem: 2}, 30)})
        a = own.average(state, ups, server()).params[f"{stem}.A"].double().numpy()
        first, second = (up.params[f"{stem}.A"].double().numpy() for up in ups.values())
        before = state.params[f"{stem}.A"].double().numpy()
        np.testing.assert_allclose(a[0], 0.25 * first[0] + 0.75 * second[0], rtol=1e-5)
        if aggregation == "factor_partial":
            np.testing.assert_allclose(a[1], second[1], rtol=1e-5)
            np.testing.assert_allclose(a[2:], before[2:])
        else:
            old = before if tail == "frozen" else 0 * before
            np.testing.assert_allclose(a[1], 0.25 * old[1] + 0.75 * second[1], rtol=1e-5)
            if tail == "frozen":
                np.testing.assert_allclose(a[2:], old[2:])
            else:
                assert a[2:].any(axis=1).all(), "components of two zeros are drawn anew"


def test_what_is_folded_away_is_exact_and_acts_on_everybody() -> None:
    own, stem = method(aggregation="stack_exact"), "block.0.w"
    state = dataclasses.replace(planned_state(own, {stem: 2}), union=())
    ups = answers(state, {"c0": ({stem: 1}, 10), "c1": ({stem: 4}, 30)})
    one = own.average(state, ups, server())
    two = own.average(one, ups, server(2))
    exact = 0.25 * product(ups["c0"].params, stem) + 0.75 * product(ups["c1"].params, stem)
    np.testing.assert_allclose(product(one.stack, stem), exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(product(two.stack, stem), 2 * exact, rtol=1e-4, atol=1e-5)
    result = own.result(two)
    folded = (result[f"delta.{stem}.left"] @ result[f"delta.{stem}.right"]).double().numpy()
    np.testing.assert_allclose(folded, 2 * toy.SCALE * exact, rtol=1e-4, atol=1e-5)
    env = ClientEnv("c0", toy.ToyModel(**MODEL), {"train": toy.points(*[[1.0] * 6] * 4)}, 3, 4, 3)  # type: ignore[arg-type]
    fit = next(own.train(own.send(two, "c0"), Memory(), env))
    assert len(fit.also) == 1 and torch.equal(fit.also[0][f"{stem}.A"], two.stack[f"{stem}.A"])
    assert not bool(fit.params[f"{stem}.B"].any()) and not torch.equal(
        fit.params[f"{stem}.A"], env.initial()[f"{stem}.A"][:2]
    )


def test_what_a_plan_had_no_time_for_may_count_less() -> None:
    stem = "block.0.w"
    for by, want in (("examples", 0.25), ("processed", 0.25 * 0.5 / (0.25 * 0.5 + 0.75))):
        own = method(weight_by=by)
        state = planned_state(own, {stem: 4})
        plan = state.roster.plans["c0"]
        half = dataclasses.replace(plan, predicted=dataclasses.replace(plan.predicted, under_training=0.5))
        idle = dataclasses.replace(plan, predicted=dataclasses.replace(plan.predicted, under_training=0.0))
        state = dataclasses.replace(state, roster=dataclasses.replace(state.roster, plans={"c0": half, "c1": idle}))
        ups = answers(state, {"c0": ({stem: 4}, 10), "c1": ({stem: 4}, 30)})
        head = own.average(state, ups, server()).params[toy.HEAD]
        torch.testing.assert_close(head, want * ups["c0"].params[toy.HEAD] + (1 - want) * ups["c1"].params[toy.HEAD])


def test_nobody_trained_changes_nothing() -> None:
    own = method()
    state = planned_state(own, {"block.0.w": 2})
    after = own.average(state, {"c0": Trained({}, 4, 0.0, failure="memory")}, server())
    assert tree.sha256(after.params) == tree.sha256(state.params) and after.roster.failures == {"c0": 1}


# --- what does not fit --------------------------------------------------------------------------------------------


def test_answers_that_do_not_fit_are_refused() -> None:
    own, stem = method(), "block.0.w"
    state = planned_state(own, {stem: 2})
    down = own.send(state, "c0")
    good = answers(state, {"c0": ({stem: 2}, 10)})["c0"]
    fits(down, good)
    for bad in (
        dataclasses.replace(good, params={**good.params, f"{stem}.A": good.params[f"{stem}.A"][:1]}),
        dataclasses.replace(good, params={toy.HEAD: good.params[toy.HEAD]}),
        dataclasses.replace(good, failure="memory"),
        dataclasses.replace(good, params={}, failure="tired"),
        dataclasses.replace(good, profile=dataclasses.replace(DEFAULT, flops_per_s=-1.0)),
        dataclasses.replace(good, examples=0),
    ):
        with pytest.raises(RecordError):
            fits(down, bad)
    with pytest.raises(RecordError):
        sound(Ask(), Report(dataclasses.replace(DEFAULT, memory_bytes=0), 5, 3, 3.0))
    with pytest.raises(RecordError, match="are not possible"):
        sound(Ask(), Report(DEFAULT, 5, 3, 4.0))
    ask = own.ask_scores(state, "c0")
    for scores, seen in ((torch.ones(3) / 3, torch.ones(3).bool()), (torch.tensor([2.0, 0.0]), torch.ones(2).bool())):
        with pytest.raises(RecordError):
            scored(ask, Scores(scores, seen, 5))


def test_adapters_that_do_not_fit_are_refused() -> None:
    assert "not prefix" in str(method().accepts(Prefix()))
    assert "raise adapter.rank" in str(FedPipe(ranks=(8,)).accepts(Lora(4)))
    assert "set it to 0" in str(method().accepts(Lora(16, dropout=0.1)))
    assert method().accepts(Lora(16)) is None


def test_planted_changes_are_found_again() -> None:
    """Nothing but the golden aggregate: equal factors A make the factor mean exact."""
    stem = "block.0.w"
    own = method(aggregation="factor_partial")
    state = planned_state(own, {stem: 4})
    ups = answers(state, {"c0": ({stem: 4}, 10), "c1": ({stem: 4}, 30)})
    same = {
        c: dataclasses.replace(up, params={**up.params, f"{stem}.A": ups["c0"].params[f"{stem}.A"]})
        for c, up in ups.items()
    }
    after = own.average(state, same, server()).params
    own_pairs = [pairs.pair(up.params, stem) for up in same.values()]
    exact = lowrank.product(lowrank.stack(own_pairs, (0.25, 0.75)))
    np.testing.assert_allclose(product(after, stem), exact, rtol=1e-5, atol=1e-6)
