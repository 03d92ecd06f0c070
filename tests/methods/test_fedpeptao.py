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
from fedpeft.core.errors import ConfigError, RecordError
from fedpeft.core.examples import Examples
from fedpeft.core.exchange import ClientEnv, ServerEnv
from fedpeft.core.federate import Done, federate
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.tree import block_of
from fedpeft.engines.inprocess import InProcess
from fedpeft.maths import drift
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
    state = State(P0, P0, ratio=0.5)
    ups = {
        "a": Scores(torch.tensor([1.0, 2.0, 3.0, 4.0]), 8, 30),
        "b": Scores(torch.tensor([5.0, 2.0, 1.0, 4.0]), 2, 10),
        "c": Scores(torch.zeros(4), 1, 1000),
    }
    state = method.rank_layers(state, ups, env())
    assert state.scores.tolist() == pytest.approx([2.0, 2.0, 2.5, 4.0])
    assert state.layers == (2, 3) and state.client_scores.keys() == {"a", "b", "c"}


def ratio(value: float, usable: bool, n: int) -> Ratio:
    return Ratio(value, usable, 0.1, 0.0, 1.0, n)


def test_the_ratio_is_the_mean_of_usable_ones_or_the_given_one() -> None:
    """Usable on half of the examples is enough, on less it is not."""
    method = FedPepTAO(layers_by="first", ratio=0.75)
    state = State(P0, P0)
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
    exchange = FedPepTAO(**FIXED).round()[0]
    with pytest.raises(RecordError, match="0 steps"):
        exchange.accept(Prompts(P0), Answer(P0, 3, 0, 1.0))


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
        assert all(torch.equal(own[name], p0[name]) == (unselected == "frozen") for name in others if name in own)
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
        ({"ratio": 0.0}, "method.ratio is 0.0; it must be finite and above 0"),
        ({"ratio": 1.01}, "method.ratio is 1.01; it must be finite and at most 1"),
        ({"beta": 1.0}, "method.beta is 1.0"),
        ({"score_batch": 1}, "method.score_batch is 1; it must be finite and at least 2"),
        ({"warmup_rounds": -1}, "method.warmup_rounds is -1"),
        ({"server_lr": -0.1}, "method.server_lr is -0.1"),
        ({"lanczos_steps": 1}, "method.lanczos_steps is 1"),
    ],
)
def test_impossible_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FedPepTAO(**options)
