"""FedPepTAO: golden rounds, invariants of the specification, and the set-up that chooses the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import toy
from fedpeft.core import tree
from fedpeft.core.adapter import Lora, Prefix
from fedpeft.core.errors import ConfigError, DivergedError, RecordError
from fedpeft.core.examples import Examples
from fedpeft.core.exchange import ClientEnv, ServerEnv
from fedpeft.core.federate import Done, federate
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.tree import block_of
from fedpeft.engines.inprocess import InProcess
from fedpeft.maths import drift, spectrum
from fedpeft.methods.fedavg import FedAvg
from fedpeft.methods.fedpeptao import Answer, Ask, FedPepTAO, Memory, Prompts, Ratio, Scores, State, scored, shares
from fedpeft.models.hf import HFModel

FIXED: dict[str, Any] = {"ratio_rule": "fixed", "layers_by": "first"}  # no set-up
P0 = {f"block.{i}.w": torch.full((1,), float(i)) for i in range(4)} | {"head.w": torch.zeros(1)}


def answer(value: float, n: int, k: int) -> Answer:
    return Answer({"w": torch.tensor([value], dtype=torch.float64)}, n, k, 0.0)


def env(model: Any = None, clients: Sequence[str] = ("a", "b", "c", "d"), cohort: Sequence[str] = ()) -> ServerEnv:
    return ServerEnv(model or toy.ToyModel(blocks=4, width=5), clients, 0, 10, cohort=cohort)


# --- the server -----------------------------------------------------------------------------------------------------


def test_two_golden_rounds() -> None:
    """The specification's section 9, through the method's own fold."""
    w = {"w": torch.ones(1, dtype=torch.float64)}
    method, state = FedPepTAO(), State(w, w, (0,), momentum=drift.Momentum(rate=0.05))
    state = method.update(state, {"a": answer(0.6, 3, 2), "b": answer(0.2, 1, 1)}, env())
    assert float(state.prompts["w"]) == pytest.approx(0.4975)
    state = method.update(state, {"a": answer(0.3975, 3, 2), "d": answer(0.2975, 1, 2)}, env())
    assert float(state.prompts["w"]) == pytest.approx(0.2410823, abs=1e-7)
    assert float(state.momentum.control["w"]) == pytest.approx(0.1444444, abs=1e-7)
    assert state.momentum.rate == pytest.approx(0.0495 * 0.99) and state.controls.keys() == {"a", "b", "d"}


def test_every_server_by_its_name() -> None:
    w = {"w": torch.ones(1, dtype=torch.float64)}
    ups = {"a": answer(0.6, 3, 2), "b": answer(0.2, 1, 1)}
    ends = {}
    for server in ("peptao", "fedavg", "fedavgm", "reference"):
        method = FedPepTAO(server=server)  # type: ignore[arg-type]
        state = State(w, w, (0,), momentum=drift.Momentum(rate=1.0 if server == "fedavgm" else 0.05))
        ends[server] = float(method.update(state, ups, env(cohort=("a", "b"))).prompts["w"])
    assert ends == pytest.approx({"peptao": 0.4975, "fedavg": 0.5, "fedavgm": 0.95, "reference": 0.5})


@pytest.mark.parametrize(("server", "rate"), [("peptao", 0.05), ("reference", 0.05), ("fedavgm", 1.0)])
def test_the_first_rate_of_the_server(server: Any, rate: float) -> None:
    state = FedPepTAO(**FIXED, server=server).init(env())
    assert state.momentum.rate == rate
    assert FedPepTAO(**FIXED, server=server, server_lr=0.0).init(env()).momentum.rate == 0.0


def test_without_control_the_server_keeps_nothing_per_device() -> None:
    done = run_toy(FedPepTAO(**FIXED, cohort=2, control="off"), rounds=3)
    assert not done[-1].state.controls
    assert run_toy(FedPepTAO(**FIXED, cohort=2), rounds=3)[-1].state.controls


def run_toy(method: FedPepTAO, rounds: int = 2, seed: int = 0, width: int = 5) -> list[Done]:
    model = toy.ToyModel(blocks=4, width=width)
    engine = InProcess(lambda: method, model, toy.federation(False, width=width), seed)
    return list(federate(method, engine, model, rounds=rounds, seed=seed))


# --- which layers ---------------------------------------------------------------------------------------------------


def test_what_the_set_up_asks_depends_on_the_options() -> None:
    def names(**options: Any) -> list[str]:
        return [e.name for e in FedPepTAO(**options).setup()]

    assert names(warmup_rounds=2) == ["warmup 1", "warmup 2", "score", "ratio"]
    assert names(warmup_rounds=0, layers_by="last") == ["ratio"]
    assert names(ratio_rule="fixed") == ["score"]
    assert names(**FIXED) == []


def test_warm_up_rounds_are_places_of_randomness_of_their_own() -> None:
    done = run_toy(FedPepTAO(cohort=2, warmup_rounds=6), rounds=1)
    cohorts = {tuple(step.cohort) for step in done if step.exchange.startswith("warmup")}
    assert len(cohorts) > 1


def test_without_set_up_init_chooses() -> None:
    """Half of four layers: the first two and the head, at P0, and the momentum at zero."""
    state = FedPepTAO(**FIXED).init(env())
    assert state.layers == (0, 1) and state.prompts.keys() == {"block.0.w", "block.1.w", "head.w"}
    assert state.start.keys() == P0.keys() and not state.controls
    drawn = {FedPepTAO(ratio_rule="fixed", layers_by="random").init(replace(env(), seed=s)).layers for s in range(30)}
    assert len(drawn) == 6
    last = FedPepTAO(ratio_rule="fixed", layers_by="last", candidate_last=False).init(env())
    assert last.layers == (1, 2)


def test_scores_are_means_over_the_clients_with_rows_to_compare() -> None:
    method = FedPepTAO(ratio_rule="fixed")
    state = State(P0, P0, scores=torch.zeros(4), ratio=0.5)
    ups = {
        "a": Scores(torch.tensor([1.0, 2.0, 3.0, 4.0]), 8, 30),
        "b": Scores(torch.tensor([5.0, 2.0, 1.0, 4.0]), 2, 10),
        "c": Scores(torch.zeros(4), 1, 1000),
    }
    state = method.rank_layers(state, ups, env())
    assert state.scores.tolist() == pytest.approx([2.0, 2.0, 2.5, 4.0])
    assert state.layers == (2, 3) and state.client_scores.keys() == {"a", "b", "c"}
    assert "warning" not in method.choices(state)
    nobody = method.rank_layers(State(P0, P0, scores=torch.zeros(4), ratio=0.5), {"c": ups["c"]}, env())
    assert nobody.layers == (0, 1) and "no client has two different rows" in method.choices(nobody)["warning"]


def test_scores_are_of_the_bare_base() -> None:
    """Not of the adapter that training starts from."""

    class Bare(toy.ToyModel):
        def hidden(self, params: Any, data: Any, rows: Any) -> Tensor:
            assert params is None
            return super().hidden(params, data, rows)

    data = toy.points([1.0, 2, 3, 4, 5], [2.0, -1, 0, 3, 1])
    up, _ = FedPepTAO().score_layers(Ask(4), Memory(), ClientEnv("a", Bare(blocks=4), {"train": data}, 0, 1))
    assert up.used == 2 and bool((up.scores >= 1 - 1e-6).all())


def test_the_share_is_of_all_layers_also_where_the_last_is_no_candidate() -> None:
    """ceil(.6 * 4) = 3 of the first three, not ceil(.6 * 3) = 2."""
    method = FedPepTAO(**FIXED, ratio=0.6, candidate_last=False)
    assert method.init(env()).layers == (0, 1, 2)


def test_layers_without_prompts_are_scored_and_never_chosen() -> None:
    model = tiny.model("bert", Prefix(length=2, blocks=(0, 2)), dtype="float32")
    data = {c: {"train": tiny.examples(tiny.place(i), 6)} for i, c in enumerate("abc")}
    method = FedPepTAO(ratio_rule="fixed", ratio=1.0)
    done = next(federate(method, InProcess(lambda: method, model, data, 0), model, rounds=1, seed=0))
    assert done.state.layers == (0, 2) and len(done.state.scores) == tiny.BLOCKS
    assert method.choices(done.state)["of_layers"] == tiny.BLOCKS


def test_warm_up_is_a_mean_weighted_by_examples() -> None:
    ups = {"a": answer(1.0, 3, 2), "b": answer(5.0, 1, 1)}
    state = FedPepTAO().average(State(P0, {"w": torch.zeros(1, dtype=torch.float64)}), ups, env())
    assert float(state.prompts["w"]) == 2.0


def ratio(value: float, usable: bool, n: int) -> Ratio:
    return Ratio(value, usable, 0.1, 0.0, 1.0, n)


def test_the_ratio_is_the_mean_of_usable_ones_or_the_given_one() -> None:
    """Usable on half of the examples is enough, on less it is not."""
    method = FedPepTAO(layers_by="first", ratio=0.75)
    state = State(P0, P0, scores=torch.zeros(4))
    good = method.choose_ratio(
        state, {"a": ratio(0.2, True, 30), "b": ratio(0.6, True, 10), "c": ratio(0, False, 40)}, env()
    )
    assert (good.ratio, good.ratio_from, good.layers) == (pytest.approx(0.3), "eigengap", (0, 1))
    assert "warning" not in method.choices(good)
    bad = method.choose_ratio(state, {"a": ratio(0.2, True, 18), "b": ratio(0, False, 82)}, env())
    assert (bad.ratio, bad.ratio_from, bad.layers) == (0.75, "fallback", (0, 1, 2))
    warning = "layer ratio: eigengap usable on 1 of 2 devices (18% of examples); using 0.75"
    assert method.choices(bad)["warning"] == warning and bad.measured.keys() == {"a", "b"}


def test_training_starts_from_fresh_prompts_unless_the_warm_up_is_kept() -> None:
    for keep in (False, True):
        done = run_toy(FedPepTAO(cohort=2, warmup_rounds=2, keep_warmup=keep, calibration_cohort=2), rounds=1)
        chosen = next(step.state for step in done if step.exchange == "ratio")
        same = all(torch.equal(t, chosen.start[name]) for name, t in chosen.prompts.items())
        assert same is not keep


def test_layers_that_do_not_tell_samples_apart_come_first() -> None:
    """A base whose last block maps all rows to nearly one direction: the whole set-up finds it."""
    module = tiny.module("bert")
    with torch.no_grad():
        norm = module.encoder.layer[2].output.LayerNorm
        norm.weight.mul_(0.01)
        norm.bias.copy_(torch.linspace(-1, 1, tiny.WIDTH))
    model = HFModel(tiny.freeze(module, None, "flat", tiny.CPU), Prefix(length=2), 3)
    method = FedPepTAO(ratio_rule="fixed", ratio=0.3)
    data = {c: {"train": tiny.examples(tiny.place(i), 6)} for i, c in enumerate("abc")}
    done = next(federate(method, InProcess(lambda: method, model, data, 0), model, rounds=1, seed=0))
    assert done.exchange == "score" and done.state.layers == (2,)
    assert float(done.state.scores[2]) > 10 * float(done.state.scores[0])


def test_a_client_with_one_distinct_row_gives_no_score() -> None:
    rows = Examples((np.array([5, 6], np.int32),) * 4, np.zeros(4, dtype=np.int64))
    model = tiny.model("bert", Prefix(length=2))
    up, _ = FedPepTAO().score_layers(Ask(3), Memory(), ClientEnv("a", model, {"train": rows}, 0, 1))
    assert up.used == 1 and not up.scores.any()


def test_answers_that_lie_are_refused() -> None:
    good = Scores(torch.ones(4), 2, 9)
    scored(Ask(4), good)
    for bad in (replace(good, scores=torch.ones(3)), replace(good, used=10), replace(good, used=-1)):
        with pytest.raises(RecordError, match="scores"):
            scored(Ask(4), bad)
    with pytest.raises(RecordError, match="between 0 and 1"):
        shares(Prompts(P0), ratio(1.5, True, 3))
    FedPepTAO().credible(Prompts(P0), ratio(0.05, True, 3))
    FedPepTAO(ratio_rule="plateau").credible(Prompts(P0), ratio(0.99, True, 3))
    with pytest.raises(RecordError, match=r"a usable ratio is 0\.0; the rule eigengap gives 0.05 to"):
        FedPepTAO().credible(Prompts(P0), ratio(0.0, True, 3))
    exchange = FedPepTAO(**FIXED).round()[0]
    with pytest.raises(RecordError, match="0 steps"):
        exchange.accept(Prompts(P0), Answer(P0, 3, 0, 1.0))


@pytest.mark.parametrize("rule", ["eigengap", "plateau"])
def test_the_measured_ratio_is_that_of_the_dense_hessian(rule: Any) -> None:
    """Krylov spaces by numpy, of the Hessian over the prompts alone, at w; its change on the way to an epoch's end."""
    model = tiny.model("bert", Prefix(length=1, dropout=0.0))
    data = tiny.examples(tiny.place(1), 10)
    client = ClientEnv("a", model, {"train": data}, 0, 5, exchange="ratio")
    params = {name: t.double() * 20 for name, t in model.init(tiny.place()).items()}
    method = FedPepTAO(ratio_rule=rule, lanczos_steps=12, power_steps=5)
    work = method.measure_ratio(Prompts(params), Memory(), client)
    there = model.fit(next(work)).params
    with pytest.raises(StopIteration) as stop:
        work.send(model.fit(next(method.measure_ratio(Prompts(params), Memory(), client))))
    up: Ratio = stop.value.value[0]
    rows, names = data.epochs(1, 8, client.rng("batch"))[0], sorted(n for n in params if "prefix" in n)
    here, moved = (dense(model, at, data, rows, names) for at in (params, there))
    rng = client.rng("probe")
    start = 2.0 * rng.integers(0, 2, size=len(here)) - 1
    krylov = [start]
    for _ in range(11):
        krylov.append(here @ krylov[-1] / np.linalg.norm(krylov[-1]))
        for _ in range(3):
            for known in krylov[:-1]:
                krylov[-1] = krylov[-1] - known * (known @ krylov[-1]) / (known @ known)
    basis = np.stack([vector / np.linalg.norm(vector) for vector in krylov], axis=1)
    theta, vectors = np.linalg.eigh(basis.T @ here @ basis)
    change = 2.0 * rng.integers(0, 2, size=len(here)) - 1
    for _ in range(5):
        change = (moved - here) @ (change / np.linalg.norm(change))
    assert up.lipschitz == pytest.approx(np.linalg.norm(change), rel=1e-6)
    theta_t, omega_t = torch.from_numpy(theta), torch.from_numpy(vectors[0] ** 2)
    kept = (
        spectrum.eigengap(theta_t, omega_t, up.lipschitz) if rule == "eigengap" else spectrum.plateau(theta_t, omega_t)
    )
    assert (up.ratio, up.usable) == (pytest.approx(kept.ratio, abs=1e-6), kept.usable)
    assert (up.low, up.high) == (pytest.approx(kept.low, abs=1e-6), pytest.approx(kept.high, abs=1e-6))


def dense(model: HFModel, params: Any, data: Any, rows: Any, names: list[str]) -> Any:
    product, like = model.hessian(params, data, rows, names), {name: params[name] for name in names}
    unit = torch.eye(sum(t.numel() for t in like.values()), dtype=torch.float64)
    return np.stack([tree.flatten(product(tree.unflatten(own, like))).numpy() for own in unit])


def test_a_device_that_diverges_has_no_usable_ratio() -> None:
    client = ClientEnv("a", toy.ToyModel(blocks=4, width=5), {"train": toy.points([1.0] * 5)}, 0, 1)
    down = Prompts(client.initial())
    work = FedPepTAO().measure_ratio(down, Memory(), client)
    next(work)
    with pytest.raises(StopIteration) as stop:
        work.throw(DivergedError("training diverged"))
    assert stop.value.value[0] == Ratio(0.0, False, 0.0, 0.0, 0.0, 1)


@pytest.mark.parametrize("rule", ["eigengap", "plateau"])
def test_a_hessian_that_is_not_finite_does_not_end_the_run(rule: Any) -> None:
    class Broken(toy.ToyModel):
        def hessian(self, params: Any, data: Any, rows: Any, names: Any = None) -> Any:
            product = super().hessian(params, data, rows, names)
            return lambda v: {name: t * float("nan") for name, t in product(v).items()}

    model, method = Broken(blocks=4, width=5), FedPepTAO(warmup_rounds=0, layers_by="first", ratio_rule=rule)
    engine = InProcess(lambda: method, model, toy.federation(False, width=5), 0)
    done = list(federate(method, engine, model, rounds=1, seed=0))
    assert done[0].state.ratio_from == "fallback" and done[0].state.layers == (0, 1)


@pytest.mark.parametrize("options", [
    {"server": "peptao", "beta": 0.5, "drift_weight": 0.3},
    {"server": "peptao", "momentum_input": "difference", "control": "off"},
    {"server": "fedavgm", "beta": 0.3},
    {"server": "reference", "lr": 0.02},
    {"server": "reference", "lr": 0.02, "control": "off"},
])  # fmt: skip
def test_options_of_the_server_reach_its_arithmetic(options: dict[str, Any]) -> None:
    """Three rounds of `update` are three steps of `maths.drift` with these numbers."""
    method, w = FedPepTAO(**options), {"w": torch.ones(1, dtype=torch.float64)}
    state = State(w, w, (0,), momentum=drift.Momentum(rate=0.3))
    momentum, controls = drift.Momentum(rate=0.3), {}
    rounds = [{"a": (0.6, 3, 2), "b": (0.2, 1, 1)}, {"a": (0.3, 3, 2), "d": (0.1, 1, 2)}, {"b": (0.4, 1, 3)}]
    for own in rounds:
        steps = {c: drift.Step({"w": torch.tensor([v], dtype=torch.float64)}, n, k) for c, (v, n, k) in own.items()}
        keep = options.get("control") != "off"
        if options["server"] == "peptao":
            w, momentum, controls = drift.peptao(
                w, steps, momentum, controls, beta=options.get("beta", 0.9),
                drift_weight=options.get("drift_weight", 1.0),
                difference="momentum_input" in options, keep_controls=keep,
            )  # fmt: skip
        elif options["server"] == "fedavgm":
            w, momentum = drift.damped_momentum(w, steps, momentum, options["beta"])
        else:
            w, momentum, controls = drift.reference(
                w, steps, momentum, controls, lr=0.02, share=len(own) / 4, keep_controls=keep
            )
        ups = {c: answer(*values) for c, values in own.items()}
        state = method.update(state, ups, env(cohort=tuple(own)))
    assert float(state.prompts["w"]) == pytest.approx(float(w["w"]), rel=1e-12)


# --- the device -----------------------------------------------------------------------------------------------------


def small(method: FedPepTAO | FedAvg, rounds: int = 2, clients: int = 4) -> tuple[list[Done], InProcess, HFModel]:
    """A run over a tiny BERT in float32 with prefixes."""
    model = tiny.model("bert", Prefix(length=3, dropout=0.0), dtype="float32")
    data = {f"c{i}": {"train": tiny.examples(tiny.place(i), 5 + i)} for i in range(clients)}
    engine = InProcess(lambda: method, model, data, 0)
    return list(federate(method, engine, model, rounds=rounds, seed=0)), engine, model


SAME: dict[str, Any] = {"cohort": 3, "epochs": 2, "batch_size": 4, "lr": 0.04, "head_lr": 3e-3, "weight_decay": 0.1}


def test_all_layers_with_averaging_are_p_tuning_v2_bit_for_bit() -> None:
    ours, *_ = small(FedPepTAO(**SAME, **FIXED, ratio=1.0, server="fedavg"))
    theirs, *_ = small(FedAvg(**SAME, clip=1.0))
    assert ours[-1].state.prompts.keys() == theirs[-1].state.params.keys()
    assert tree.sha256(ours[-1].state.prompts) == tree.sha256(theirs[-1].state.params)


def test_without_rate_and_drift_peptao_is_averaging_bit_for_bit() -> None:
    ends = [
        small(FedPepTAO(**SAME, **FIXED, **options))[0][-1].state.prompts
        for options in ({"server": "fedavg"}, {"server_lr": 0.0, "drift_weight": 0.0})
    ]
    assert tree.sha256(ends[0]) == tree.sha256(ends[1])


def test_with_everybody_drift_control_changes_nothing() -> None:
    """To rounding, while clients take as many steps as before: q is then zero."""
    options = SAME | FIXED | {"cohort": 0}
    plain = run_toy(FedPepTAO(**options, server="fedavg"), rounds=4)[-1].state.prompts
    ours = run_toy(FedPepTAO(**options, server_lr=0.0, drift_weight=1.0), rounds=4)[-1].state.prompts
    assert all(torch.allclose(ours[name], t, atol=1e-6) for name, t in plain.items())
    some = run_toy(FedPepTAO(**options | {"cohort": 2}, server_lr=0.0, drift_weight=1.0), rounds=4)[-1].state.prompts
    assert not all(torch.allclose(some[name], t, atol=1e-3) for name, t in plain.items())


@pytest.mark.parametrize("unselected", ["local", "frozen", "off"])
def test_what_the_other_layers_are(unselected: Any) -> None:
    """local: trained, kept, used; frozen: P0 to the bit; off: nothing there."""
    method = FedPepTAO(**SAME | FIXED | {"cohort": 0}, unselected=unselected)
    done, engine, model = small(method)
    state = done[-1].state
    p0 = model.init(tiny.rng_for(0, "adapter"))
    sent = {name for name in p0 if block_of(name) in (None, *state.layers)}
    assert state.layers == (0, 1) and state.prompts.keys() == sent
    others = p0.keys() - sent
    result = method.result(state)
    assert result.keys() == (sent if unselected == "off" else p0.keys())
    if unselected != "off":
        assert all(torch.equal(result[name], p0[name]) for name in others)
    for client, version in done[-1].versions.items():
        memory = engine.memories.load(client, version, Memory)
        assert memory.local.keys() == (others if unselected == "local" else set())
        own = method.personal(result, memory)
        assert own.keys() == result.keys()
        assert all(torch.equal(own[name], p0[name]) == (unselected == "frozen") for name in own.keys() & others)
    assert method.personalised is (unselected == "local")


@pytest.mark.parametrize("unselected", ["local", "frozen", "off"])
def test_the_fit_of_a_device(unselected: Any) -> None:
    """The layers that are in it, those that train, and where they start."""
    method = FedPepTAO(**FIXED, unselected=unselected)
    model = toy.ToyModel(blocks=4, width=5, dtype="float32")
    client = ClientEnv("a", model, {"train": toy.points([1.0] * 5, [2.0] * 5)}, 3, 1)
    p0 = client.initial()
    down = Prompts({name: p0[name] + 1 for name in ("block.0.w", "block.1.w", "head.w")})
    memory = Memory({"block.2.w": p0["block.2.w"] - 1, "block.3.w": p0["block.3.w"] - 2})
    fit = next(method.train(down, memory, client))
    assert set(fit.trained) == (fit.params.keys() if unselected == "local" else down.prompts.keys())
    expected = {"local": memory.local, "frozen": {n: p0[n] for n in memory.local}, "off": {}}[unselected]
    same(fit.params, {**down.prompts, **expected})
    assert (fit.clip, fit.optimizer.weight_decay, dict(fit.rates)) == (1.0, 0.1, {"head.": 3e-3})


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def test_a_device_starts_anew_or_goes_on() -> None:
    """reset: the same prompts, data and place give the same bits; persist: the moments live on."""
    ends: dict[str, list[tuple[Answer, Memory]]] = {}
    for state in ("reset", "persist"):
        method = FedPepTAO(**SAME, **FIXED, unselected="off", device_state=state)  # type: ignore[arg-type]
        model = tiny.model("bert", Prefix(length=3, dropout=0.0), dtype="float32")
        client = ClientEnv("a", model, {"train": tiny.examples(tiny.place(), 9)}, 0, 5, round=1, exchange="train")
        down = method.send(method.init(ServerEnv(model, ("a",), 0, 5)), "a")
        memory = method.init_client(client)
        ends[state] = []
        for _ in range(2):
            up, memory = finish(method, down, memory, client)
            ends[state].append((up, memory))
    first, second = ends["reset"]
    assert tree.sha256(first[0].prompts) == tree.sha256(second[0].prompts) and second[1] == Memory()
    kept = finish(FedPepTAO(**SAME, **FIXED, device_state="persist"), down, Memory(), client)[1]
    assert kept.moments.first.keys() == client.initial().keys(), "those of its own layers live on too"
    first, second = ends["persist"]
    assert first[1].moments.step == first[0].steps == 6 and second[1].moments.step == 12
    assert tree.sha256(first[0].prompts) != tree.sha256(second[0].prompts)


def finish(method: FedPepTAO, down: Prompts, memory: Memory, client: ClientEnv) -> tuple[Answer, Memory]:
    work = method.train(down, memory, client)
    fit: Fit = next(work)
    fitted: Fitted = client.model.fit(fit)
    with pytest.raises(StopIteration) as stop:
        work.send(fitted)
    result: tuple[Answer, Memory] = stop.value.value
    return result


def test_a_round_sends_the_shared_layers_and_hardly_more() -> None:
    """|SL| D numbers down and up and the head, besides a header; D = 2 P h_kv d."""
    done, *_ = small(FedPepTAO(**SAME, **FIXED), rounds=1)
    numbers = 2 * (2 * 3 * tiny.WIDTH) + 3 * tiny.WIDTH + 3
    for receipt in done[-1].receipts:
        assert 0 < receipt.bytes_down - 4 * numbers < 700 and 0 < receipt.bytes_up - 4 * numbers < 700
        assert receipt.meter.trained.keys() == {0}


def test_the_calibration_is_charged_to_the_devices() -> None:
    """k + 2 * power_steps products of one batch, about two gradients each, besides the epoch."""
    method = FedPepTAO(**SAME, layers_by="last", warmup_rounds=0, lanczos_steps=5, power_steps=3, calibration_cohort=2)
    done, *_ = small(method, rounds=1)
    assert done[0].exchange == "ratio"
    for receipt in done[0].receipts:
        rows = tiny.examples(tiny.place(int(receipt.client[1:])), 5 + int(receipt.client[1:]))
        epoch = int(rows.lengths.sum())
        products = receipt.meter.trained_tokens - epoch
        assert 11 * 2 * 4 <= products <= 11 * 2 * 4 * 12 and products % 22 == 0


# --- options ----------------------------------------------------------------------------------------------------------


def test_only_prefixes_are_accepted() -> None:
    assert FedPepTAO().accepts(Prefix(length=5)) is None
    assert "use prefix" in str(FedPepTAO().accepts(Lora()))
    assert FedPepTAO().adapter() == Prefix(length=20, dropout=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.0}, "method.ratio is 0.0; it must be above 0 and at most 1"),
        ({"ratio": 1.01}, "method.ratio is 1.01; it must be above 0 and at most 1"),
        ({"beta": 1.0}, "method.beta is 1.0"),
        ({"score_batch": 1}, "method.score_batch is 1; it must be at least 2"),
        ({"warmup_rounds": -1}, "method.warmup_rounds is -1"),
        ({"server_lr": -0.1}, "method.server_lr is -0.1"),
        ({"lanczos_steps": 1}, "method.lanczos_steps is 1"),
    ],
)
def test_impossible_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FedPepTAO(**options)
