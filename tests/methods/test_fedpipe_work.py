"""FedPipe's work at a client, field by field: the Fits that it yields, what it keeps, and what it measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

import toy
from fedpeft.core import pairs, tree
from fedpeft.core.errors import ClientError
from fedpeft.core.exchange import ClientEnv, ServerEnv
from fedpeft.core.fit import SGD, AdamW, Fit, Fitted, Moments
from fedpeft.core.method import stream_batches
from fedpeft.maths.importance import Orthonormal
from fedpeft.methods.fedpipe import FedPipe, Memory, Scores, State, Trained, Warmup
from fedpeft.planner.device import DEFAULT, Profile
from fedpeft.planner.roster import Report
from fedpeft.planner.warmup import WarmUp

MODEL: dict[str, Any] = {"width": 6, "dtype": "float64", "blocks": 2, "rank": 4}
FIRST, SECOND = "block.0.w", "block.1.w"
FAST = dataclasses.replace(DEFAULT, name="fast", flops_per_s=1e12)


def method(**values: Any) -> FedPipe:
    return FedPipe(**{"warmup_steps": 3, "lr": 0.05, "ranks": (1, 2, 4), "batches": (1, 2, 4), **values})


def client(round: int = 1, name: str = "c0", rows: int = 5, resources: Profile | None = None) -> ClientEnv:
    data = toy.points(*np.random.default_rng(2).standard_normal((rows, 6)).tolist())
    return ClientEnv(name, toy.ToyModel(**MODEL), {"train": data}, 3, 4, round, resources=resources)  # type: ignore[arg-type]


def server() -> ServerEnv:
    return ServerEnv(toy.ToyModel(**MODEL), ("c0", "c1"), 3, 4, 1, "train")  # type: ignore[arg-type]


def planned(own: FedPipe, ranks: Mapping[str, int], clients: int = 1, rows: int = 5, **plan: Any) -> State:
    """Everybody trains these ranks; everything has been trained, and something of the first block was folded away."""
    state = own.init(server())
    roster = state.roster.met({f"c{i}": Report(DEFAULT, rows, 3, 3.0) for i in range(clients)})
    job = dataclasses.replace(roster.job, scores=dict.fromkeys((FIRST, SECOND), 0.5))
    roster = dataclasses.replace(roster, job=job).planned(own.demands)
    chosen = {"ranks": dict(ranks), "steps": 3, "batch": 2, "bits": "full", **plan}
    plans = {c: dataclasses.replace(p, **chosen) for c, p in roster.plans.items()}
    rng = np.random.default_rng(5)
    params = {n: torch.from_numpy(rng.standard_normal(t.shape)).to(t) for n, t in state.params.items()}
    stack = {f"{FIRST}.A": params[f"{FIRST}.A"][:1] / 3, f"{FIRST}.B": params[f"{FIRST}.B"][:, :1] / 3}
    roster = dataclasses.replace(roster, plans=plans)
    return dataclasses.replace(state, params=params, union=(FIRST, SECOND), stack=stack, roster=roster)


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return tree.sha256(one) == tree.sha256(other)


def trained(own: FedPipe, state: State, memory: Memory, env: ClientEnv) -> tuple[Fit, Fitted, Trained, Memory]:
    """One turn: what was yielded, what came of it, and what was answered and kept."""
    work = own.train(own.send(state, "c0"), memory, env)
    fit = next(work)
    fitted = env.model.fit(fit)
    with pytest.raises(StopIteration) as stop:
        work.send(fitted)
    return fit, fitted, *stop.value.value


# --- the Fit of a round -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "simulate", "base"),
    [
        ("full", False, ""),
        ("full", True, ""),
        ("int8", False, "int8"),
        ("nf4", True, "nf4:simulated"),
        ("nf4dq", False, "nf4dq"),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_field_of_the_fit_of_a_round(bits: str, simulate: bool, base: str, checkpointing: bool) -> None:
    own = method(clip=0.7, weight_decay=0.3, head_lr=0.02, simulate=simulate)
    state, env = planned(own, {FIRST: 1, SECOND: 4}, bits=bits, checkpointing=checkpointing), client()
    fit = next(own.train(own.send(state, "c0"), Memory(cursor=7), env))
    assert same(fit.params, pairs.cut_each(state.params, {FIRST: 1, SECOND: 4}))
    rest, stack = fit.also
    first = {f"{FIRST}.A": state.params[f"{FIRST}.A"][1:], f"{FIRST}.B": state.params[f"{FIRST}.B"][:, 1:].clone()}
    assert same(rest, first) and same(stack, state.stack)
    assert fit.batches == stream_batches(env, 7, 3, 2) and fit.data is env.data
    plain = Fit(fit.params, fit.data, fit.batches, AdamW(0.05, weight_decay=0.3))
    want = dataclasses.replace(
        plain, also=fit.also, base=base, clip=0.7, rates={"head.": 0.02}, checkpointing=checkpointing
    )
    for field in dataclasses.fields(Fit):
        told, wanted = getattr(fit, field.name), getattr(want, field.name)
        assert told is wanted or told == wanted, field.name


def test_without_a_rate_of_its_own_the_head_has_that_of_all_and_without_a_bound_nothing_is_clipped() -> None:
    own = method(head_lr=None, clip=None)
    fit = next(own.train(own.send(planned(own, {FIRST: 4, SECOND: 4}), "c0"), Memory(), client()))
    assert fit.rates == {} and fit.clip is None and len(fit.also) == 1


@pytest.mark.parametrize("keep", [False, True])
def test_moments_are_kept_only_where_that_is_asked_for(keep: bool) -> None:
    own = method(aggregation="factor_partial", keep_moments=keep)
    state, env = planned(own, {FIRST: 2}), client()
    fit, fitted, _, memory = trained(own, state, Memory(), env)
    assert fit.moments is None and memory.moments is (fitted.moments if keep else None)
    again, _, _, later = trained(own, state, memory, env)
    assert again.moments is memory.moments and again.batches == stream_batches(env, 6, 3, 2) and later.cursor == 12


def test_each_round_draws_another_a_where_the_last_one_was_folded_away() -> None:
    own = method(aggregation="stack_exact")
    down = own.send(dataclasses.replace(planned(own, {FIRST: 2, SECOND: 4}), union=()), "c0")

    def start(env: ClientEnv) -> Mapping[str, torch.Tensor]:
        return next(own.train(down, Memory(), env)).params

    one, two = start(client(1)), start(client(2))
    assert same(one, start(client(1, "c1")))
    for stem in (FIRST, SECOND):
        assert not bool(one[f"{stem}.B"].any() or two[f"{stem}.B"].any())
        assert not torch.equal(one[f"{stem}.A"], two[f"{stem}.A"])
    plain = method()
    down = plain.send(dataclasses.replace(planned(plain, {FIRST: 2}), union=()), "c0")
    assert same(*(next(plain.train(down, Memory(), client(round))).params for round in (1, 2)))


# --- what a client keeps and tells ------------------------------------------------------------------------------------


def test_a_machine_is_told_when_it_has_changed_and_only_then() -> None:
    own = method()
    state = planned(own, {FIRST: 2})
    _, _, up, memory = trained(own, state, Memory(profile=DEFAULT), client(resources=FAST))
    assert up.profile == FAST and memory == Memory(6, FAST)
    _, _, up, memory = trained(own, state, memory, client(resources=FAST))
    assert up.profile is None and memory == Memory(12, FAST)
    _, _, up, memory = trained(own, state, memory, client())
    assert up.profile == DEFAULT and memory == Memory(18, DEFAULT)


def test_memory_that_runs_out_is_told_with_the_machine_and_no_row_counts_as_used() -> None:
    own = method(aggregation="zero_pad", keep_moments=True)
    state, before = planned(own, {FIRST: 2}), Memory(4, DEFAULT, Moments(0))
    lost = ClientError("local training failed")
    lost.__cause__ = torch.OutOfMemoryError("out of memory")
    work = own.train(own.send(state, "c0"), before, client(resources=FAST))
    next(work)
    with pytest.raises(StopIteration) as stop:
        work.throw(lost)
    assert stop.value.value == (Trained({}, 5, 0.0, FAST, "memory"), dataclasses.replace(before, profile=FAST))


def test_other_errors_are_not_told_as_memory() -> None:
    own = method()
    work = own.train(own.send(planned(own, {FIRST: 2}), "c0"), Memory(), client())
    next(work)
    error = ClientError("the loss is not finite")
    with pytest.raises(ClientError) as caught:
        work.throw(error)
    assert caught.value is error


# --- what an answer counts for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "share"), [("examples", 0.25), ("processed", 0.1)])
@pytest.mark.parametrize("aggregation", ["svd_product", "factor_partial", "zero_pad", "stack_exact"])
def test_what_a_plan_had_no_time_for_counts_less_in_every_weight(aggregation: str, by: str, share: float) -> None:
    """10 and 30 examples, of which a third and all are used: 1/4 against 3/4, or (10/3) / (10/3 + 30) = 1/10."""
    own = method(aggregation=aggregation, weight_by=by)
    state = dataclasses.replace(planned(own, {FIRST: 4}, clients=2), stack={})
    plans = {}
    for (c, plan), idle in zip(state.roster.plans.items(), (2 / 3, 0.0), strict=True):
        plans[c] = dataclasses.replace(plan, predicted=dataclasses.replace(plan.predicted, under_training=idle))
    state = dataclasses.replace(state, roster=dataclasses.replace(state.roster, plans=plans))
    rng, ups = np.random.default_rng(1), {}
    for c, examples in (("c0", 10), ("c1", 30)):
        own_params = pairs.of(state.params, {FIRST})
        drawn = {n: torch.from_numpy(rng.standard_normal(t.shape)) for n, t in own_params.items()}
        drawn[f"{FIRST}.A"] = state.params[f"{FIRST}.A"]  # equal: the mean of factors is exact too
        ups[c] = Trained(drawn, examples, 0.5)
    after = own.average(state, ups, server())
    made = after.stack if aggregation == "stack_exact" else after.params

    def change(params: Mapping[str, torch.Tensor]) -> torch.Tensor:
        b, a = pairs.pair(params, FIRST)
        return b @ a

    first, second = (up.params for up in ups.values())
    torch.testing.assert_close(change(made), share * change(first) + (1 - share) * change(second))
    torch.testing.assert_close(after.params[toy.HEAD], share * first[toy.HEAD] + (1 - share) * second[toy.HEAD])


# --- the warm-up ------------------------------------------------------------------------------------------------------


def warmed(
    own: FedPipe, down: Warmup, env: ClientEnv, fit_one: Callable[[Fit], Fitted] | None = None
) -> tuple[list[tuple[Fit, Fitted]], Scores]:
    """Every step of a warm-up, and what it found."""
    work = own.warm_up(down, Memory(), env)
    steps, fit = [], next(work)
    while True:
        fitted = (fit_one or env.model.fit)(fit)
        steps.append((fit, fitted))
        try:
            fit = work.send(fitted)
        except StopIteration as stop:
            return steps, stop.value[0]


@pytest.mark.parametrize(("rows", "batch"), [(3, 3), (20, 8)])
def test_a_warm_up_is_asked_for_with_what_was_learnt_and_no_more_rows_than_there_are(rows: int, batch: int) -> None:
    own = method()
    state = dataclasses.replace(planned(own, {FIRST: 2}, rows=rows), union=(SECOND,))
    down = own.ask_scores(state, "c0")
    assert (down.how, down.candidates) == (WarmUp("full", batch, 1, 3), 2)
    assert same(down.params, {f"{SECOND}.{side}": state.params[f"{SECOND}.{side}"] for side in "AB"})
    assert same(down.stack, state.stack)


@pytest.mark.parametrize(("bits", "groups"), [("full", 1), ("nf4", 2)])
def test_every_field_of_the_fits_of_a_warm_up(bits: str, groups: int) -> None:
    own, env = method(orth=0.4, warmup_lr=0.07, warmup_rank=3), client()
    state = planned(own, {FIRST: 2})
    down = dataclasses.replace(own.ask_scores(state, "c0"), how=WarmUp(bits, 2, groups, 3))
    steps, up = warmed(own, down, env)
    assert len(steps) == 3 * groups and bool(up.seen.all()) and up.examples == 5
    batches = stream_batches(env, 0, 3, 2)
    for i, (fit, _) in enumerate(steps):
        before = steps[i - 1][1] if i % 3 else None
        group = (FIRST, SECOND) if groups == 1 else ((FIRST,), (SECOND,))[i // 3]
        assert fit.params.keys() == {f"{stem}.{side}" for stem in group for side in "PEQ"} | {toy.HEAD}
        assert all(fit.params[f"{stem}.E"].shape == (3,) for stem in group)
        if before is None:
            assert torch.equal(fit.params[toy.HEAD], env.initial()[toy.HEAD])
            assert not any(bool(fit.params[f"{stem}.E"].any()) for stem in group)
        else:
            assert fit.params is before.params
        assert fit.moments is before.moments if before else fit.moments == Moments()
        params, stack = fit.also
        assert params is down.params and stack is down.stack
        want = Fit(fit.params, env.data, [batches[i % 3]], AdamW(0.07), also=fit.also, base=own.base(bits))
        want = dataclasses.replace(want, penalty=Orthonormal(0.4), moments=fit.moments)
        for field in dataclasses.fields(Fit):
            told, wanted = getattr(fit, field.name), getattr(want, field.name)
            assert told is wanted or told == wanted, field.name


def test_a_warm_up_before_anything_was_learnt_holds_no_further_layers() -> None:
    own = method()
    state = dataclasses.replace(planned(own, {FIRST: 2}), union=(), stack={})
    steps, _ = warmed(own, own.ask_scores(state, "c0"), client())
    assert all(fit.also == () for fit, _ in steps)


def test_the_score_is_the_smoothed_sensitivity_times_its_uncertainty() -> None:
    """In numpy, with gradients from steps of SGD of rate 1 at the same points: I = |w g|, then s = mean * spread.

    A weight's score: over its triplets, E's number and the means of P's column and Q's row.
    """
    own, env = method(warmup_steps=5, beta1=0.6, beta2=0.9, orth=0.5, warmup_lr=0.05), client(rows=20)
    down = own.ask_scores(planned(own, {FIRST: 2}, rows=20), "c0")
    steps, up = warmed(own, down, env)
    mean: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    for fit, _ in steps:
        one = env.model.fit(dataclasses.replace(fit, optimizer=SGD(1.0), moments=None))
        for name in fit.params.keys() - {toy.HEAD}:
            number, gradient = fit.params[name].numpy(), (fit.params[name] - one.params[name]).numpy()
            found = np.abs(number * gradient)
            mean[name] = 0.6 * mean.get(name, 0.0) + 0.4 * found
            spread[name] = 0.9 * spread.get(name, 0.0) + 0.1 * np.abs(found - mean[name])
    scores = {name: mean[name] * spread[name] for name in mean}
    whole = np.array(
        [
            (scores[f"{stem}.E"] + scores[f"{stem}.P"].mean(axis=0) + scores[f"{stem}.Q"].mean(axis=1)).sum()
            for stem in (FIRST, SECOND)
        ]
    )
    np.testing.assert_allclose(up.scores.numpy(), whole / whole.sum(), rtol=1e-5)
    assert 0.01 < float(up.scores.min()) < 0.49


def test_the_sum_of_lambda_counts_absolute_numbers() -> None:
    """|-3| + |1| against |2| + |-2|: 1/2 each, where the sums alone were -2 and 0."""
    own, env = method(score="sum_lambda", warmup_steps=2, warmup_rank=2), client()
    down = own.ask_scores(planned(own, {FIRST: 2}), "c0")
    ends = {f"{FIRST}.E": torch.tensor([-3.0, 1.0]).double(), f"{SECOND}.E": torch.tensor([2.0, -2.0]).double()}

    def given(fit: Fit) -> Fitted:
        zeros = tree.zeros_like(fit.params)
        return Fitted({**fit.params, **ends}, (1.0,), 1, 2, Moments(1, zeros, zeros))

    _, up = warmed(own, down, env, given)
    assert up.scores.tolist() == [0.5, 0.5] and up.seen.tolist() == [True, True]
