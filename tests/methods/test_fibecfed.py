"""FibecFed: the tests of the specification's section 9 that are about the method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import tiny
import tiny_lm
import toy
from fedpeft.core import pairs, records, tree
from fedpeft.core.adapter import Lora, Prefix
from fedpeft.core.errors import ConfigError, RecordError
from fedpeft.core.evaluate import Evaluate, Question, own_model
from fedpeft.core.examples import Examples
from fedpeft.core.exchange import ClientEnv, ServerEnv, Update
from fedpeft.core.federate import Done, Start, federate
from fedpeft.core.fit import SGD, AdamW, Fit, Fitted
from fedpeft.core.tree import Params, block_of
from fedpeft.engines.inprocess import InProcess
from fedpeft.maths import curriculum, spectrum
from fedpeft.methods.fedavg import FedAvg
from fedpeft.methods.fibecfed import FibecFed, Memory, Scores, State, Task
from fedpeft.models.hf import HFModel
from fedpeft.models.readouts.cloze import ClozeReadout
from transports import Recording
from turns import served

SAME: dict[str, Any] = {"cohort": 3, "epochs": 2, "batch_size": 4, "lr": 5e-3}
COLD: dict[str, Any] = {**SAME, "warmup_rounds": 0}


def blocks(*layers: int) -> dict[str, Tensor]:
    """A factor B of each layer, which holds the layer's number."""
    return {f"block.{layer}.query.{side}": torch.full((2, 2), float(layer)) for layer in layers for side in "AB"}


class Bare:
    """Enough of a model for a server."""

    def __init__(self, layers: int) -> None:
        self.blocks = layers

    def init(self, rng: Any) -> dict[str, Tensor]:
        return blocks(*range(self.blocks))


def env(layers: int = 6, **more: Any) -> ServerEnv:
    return ServerEnv(Bare(layers), ("a", "b", "c", "d"), 0, 10, **more)  # type: ignore[arg-type]


def run(
    method: Any, rounds: int = 3, model: Any = None, data: Any = None, seed: int = 0
) -> tuple[list[Done], InProcess, Any]:
    model = model or tiny.model("bert", dtype="float32")
    data = data or {f"c{i}": {"train": tiny.examples(tiny.place(i), 9 + i)} for i in range(6)}
    engine = InProcess(lambda: method, model, data, seed)
    return list(federate(method, engine, model, rounds=rounds, seed=seed)), engine, model


# --- which layers -----------------------------------------------------------------------------------------------------


def test_golden_choices() -> None:
    """Scores (.05 .3 .1 .25 .2 .1): .5 -> {1, 3, 4}; energy .9 -> {1 ... 5}; four of them take 2, not 5."""
    scores = torch.tensor([0.05, 0.3, 0.1, 0.25, 0.2, 0.1])
    every = tuple(range(6))
    assert FibecFed().chosen(scores, None, every, env()) == (1, 3, 4)
    assert FibecFed(gal_count="energy").chosen(scores, None, every, env()) == (1, 2, 3, 4, 5)
    assert FibecFed(gal_ratio=4 / 6).chosen(scores, None, every, env()) == (1, 2, 3, 4)
    assert FibecFed(layers_by="all").chosen(scores, None, every, env()) == every
    assert FibecFed(layers_by="last").chosen(scores, None, every, env()) == (3, 4, 5)
    assert FibecFed().chosen(scores, 0.1, every, env()) == (1,)


def test_a_golden_ratio_of_layers() -> None:
    """r .4 of twelve layers: five."""
    layers = FibecFed(layers_by="first").chosen(torch.zeros(12), 0.4, tuple(range(12)), env(12))
    assert layers == tuple(range(5))


def test_scores_are_a_mean_by_examples() -> None:
    """n (1, 3), values 2 and 6 -> 5; ratios .2 and .6 -> .5."""
    ups = {"a": Scores(torch.tensor([2.0, 1.0]), 0.2, 1), "b": Scores(torch.tensor([6.0, 1.0]), 0.6, 3)}
    state = FibecFed().choose(FibecFed().init(env(2)), ups, env(2))
    assert state.scores.tolist() == [5, 1] and state.layers == (0,) and state.ratio == pytest.approx(0.5)
    assert state.first == ("a", "b") and state.shared.keys() == blocks(0).keys()
    ups["c"] = Scores(torch.tensor([6.0, 1.0]), None, 50)
    assert FibecFed().choose(FibecFed().init(env(2)), ups, env(2)).ratio == pytest.approx(0.5), "c has none"


def test_answers_that_cannot_be_folded_are_refused() -> None:
    """One score per layer, not negative, with an example behind it; and nothing later asks again."""
    method = FibecFed(gal_count="eigengap")
    asked = method.ask(method.init(env(2)), "a")
    assert asked.layers == 2
    method.scored(asked, Scores(torch.tensor([1.0, 0.0]), 1.0, 1))
    for scores, ratio, examples, words in [
        ([1.0], None, 1, r"shape \(1,\); 2 of float32"),
        ([1.0] * 3, None, 1, r"shape \(3,\); 2 of float32"),
        ([[1.0, 1.0]], None, 1, r"shape \(1, 2\); 2 of float32"),
        ([1.0, -1.0], None, 1, "at least 0"),
        ([1.0, 1.0], 1.5, 1, "must lie between 0 and 1"),
        ([1.0, 1.0], None, 0, "come from 0 examples"),
    ]:
        with pytest.raises(RecordError, match=words):
            method.scored(asked, Scores(torch.tensor(scores), ratio, examples))
    with pytest.raises(RecordError, match="2 of float32"):
        method.scored(asked, Scores(torch.ones(2).double(), None, 1))


@pytest.mark.parametrize("options", [{"layers_by": "all"}, {"layers_by": "first"}, {"layers_by": "random"}])
@pytest.mark.parametrize("warmup_rounds", [0, 2])
def test_nobody_is_asked_where_nothing_is_to_be_known(options: Any, warmup_rounds: int) -> None:
    method = FibecFed(**SAME | {"warmup_rounds": warmup_rounds}, **options)
    done, *_ = run(method, rounds=2)
    names = [step.exchange for step in done]
    assert names == [*(f"warmup {i + 1}" for i in range(warmup_rounds)), "train", "train"]
    count = tiny.BLOCKS if method.layers_by == "all" else math.ceil(tiny.BLOCKS / 2)
    state = done[-1].state
    assert len(state.layers) == count and {block_of(name) for name in state.shared} == {None, *state.layers}
    assert "layer_scores" not in method.choices(state) and "warning" not in method.choices(state)
    if warmup_rounds:
        same(state.start, done[1].state.start)
        assert state.since.tolist() == [1] * tiny.BLOCKS
    everybody, *_ = run(replace(method, initialise="all"), rounds=1)
    assert "layers" in [step.exchange for step in everybody], "to order their examples"
    assert replace(method, gal_count="energy").asks is (method.layers_by != "all")
    names = [e.name for e in replace(method, reselect_every=1).round()]
    assert names == (["reselect", "train"] if method.layers_by == "random" else ["train"])


def test_a_choice_without_measure_is_said() -> None:
    method = FibecFed(gal_count="eigengap", gal_ratio=0.5)
    one = {"a": Scores(torch.ones(4), None, 3)}
    told = method.choices(method.choose(method.init(env(4)), one, env(4)))
    assert told["layers"] == [0, 1] and "no client a usable share" in told["warning"] and "0.5" in told["warning"]
    none = {"a": Scores(torch.ones(4), 0.0, 3)}
    told = method.choices(method.choose(method.init(env(4)), none, env(4)))
    assert told["layers"] == [0] and "is none; sharing one" in told["warning"]
    some = {"a": Scores(torch.ones(4), 0.3, 3)}
    assert "warning" not in method.choices(method.choose(method.init(env(4)), some, env(4)))
    assert "warning" not in method.choices(method.init(env(4)))


def test_a_personal_model_has_no_stale_layer() -> None:
    """A layer that joins the shared ones counts for everybody, also for a client that was not asked since."""
    method = FibecFed(warmup_rounds=0)
    memory = Memory({name: t + 100 for name, t in blocks(0, 1).items()})
    state = replace(method.init(env(2)), layers=(0,), shared=blocks(0))
    own = own_model(method, method.result(state), memory, method.shared_names(state))
    same(own, {**blocks(0), **{name: t + 100 for name, t in blocks(1).items()}})

    class Counts(Bare):
        def score(self, params: Any, data: Any) -> dict[str, Tensor]:
            return {"sum": sum((t.sum() for t in params.values()), torch.zeros(()))}

    here = ClientEnv("a", Counts(2), {"test": toy.points((1, 2, 3))}, 0, 3)  # type: ignore[arg-type]
    question = Question(method.result(state), "test", method.shared_names(state))
    up, _ = Evaluate(method).work(question, memory, here)
    assert float(up.personal["sum"]) == float(sum(t.sum() for t in own.values()))


def test_the_first_cohort_may_be_out_of_reach() -> None:
    """Those that scored train first; if they do not answer, others do, and only clients that are there are asked."""
    method = FibecFed(**COLD)
    model = tiny.model("bert", dtype="float32")
    data = {f"c{i}": {"train": tiny.examples(tiny.place(i), 9)} for i in range(16)}
    engine = InProcess(lambda: method, model, data, 0)
    loop = federate(method, engine, model, rounds=1, seed=0)
    scored = next(loop)
    engine.fault = lambda client, call: "away" if client in scored.cohort else None
    trained = next(loop)
    assert trained.exchange == "train" and trained.answered and not set(trained.answered) & set(scored.cohort)
    assert [r.client for r in trained.receipts[:3]] == list(scored.cohort), "they were asked first"
    state = replace(scored.state, first=("c1", "gone"))
    assert method.pick(state, ("c0", "c1"), tiny.place()) == ["c1"]
    assert method.pick(replace(state, first=("gone",)), ("c0", "c1"), tiny.place()) != ["gone"]


def test_a_layer_leaves_and_comes_back() -> None:
    """Reselection moves layer 1 out and in again; whoever missed both gets what the layers were when they left."""
    method = FibecFed(gal_ratio=0.5, warmup_rounds=0)

    def by(*scores: float) -> dict[str, Scores]:
        return {"a": Scores(torch.tensor(scores), None, 1)}

    state = method.choose(method.init(env(2)), by(0, 1), env(2))
    assert state.layers == (1,) and state.since.tolist() == [0, 0] and state.version == 1
    assert method.send(state, "b").rest is None, "everybody can draw P0"
    trained = {name: t + 10 for name, t in state.shared.items()}
    state = method.average(state, {"a": Update(trained, 1, 0.0)}, env(2))
    state = method.choose(state, by(1, 0), env(2))
    assert state.layers == (0,) and state.since.tolist() == [0, 2]
    same(state.shared, blocks(0))
    rest = method.send(state, "a").rest
    same(rest or {}, trained)
    state = method.average(state, {"a": Update({n: t + 5 for n, t in blocks(0).items()}, 1, 0.0)}, env(2))
    assert method.send(state, "a").rest is None and method.send(state, "b").rest is not None
    state = method.choose(state, by(0, 1), env(2))
    assert state.layers == (1,) and state.since.tolist() == [3, 2]
    same(state.shared, trained)
    for client in ("a", "b"):
        same(method.send(state, client).rest or {}, {n: t + 5 for n, t in blocks(0).items()})
    same(method.result(state), {**trained, **{n: t + 5 for n, t in blocks(0).items()}})


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("count", ["plateau", "eigengap"])
def test_a_measured_share_is_that_of_the_dense_hessian(count: Any) -> None:
    """Over the factors B, absolute eigenvalues; the Lipschitz constant by gradients from transformers' own loss."""
    model = tiny.model("bert", Lora(rank=1, alpha=2.0, targets=("query",), blocks=(1,)))
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 8)
    client = ClientEnv("a", model, {"train": data}, 0, 5)
    method = FibecFed(gal_count=count, batch_size=8)
    fits, got = served(method.measure(params, client), model)
    rows, names = data.epochs(1, 8, client.rng("batch"))[0], ["block.1.query.B"]
    product = model.hessian(params, data, rows, names)
    unit = torch.eye(tiny.WIDTH, dtype=torch.float64)
    dense = torch.stack([product({names[0]: own[:, None]})[names[0]][:, 0] for own in unit])
    rng = client.rng("probe")
    theta, omega = spectrum.lanczos(lambda v: dense @ v, tiny.WIDTH, 50, rng, 4)
    if count == "plateau":
        order = torch.argsort(theta.abs(), stable=True)
        kept = spectrum.plateau(theta.abs()[order], omega[order])
        assert (got, kept.usable) == (pytest.approx(kept.ratio) if kept.usable else None, got is not None)
        return
    steps = [fit.params[names[0]] - params[names[0]] for fit in fits]
    length = 1e-2 * params["block.1.query.A"].norm()
    assert len(fits) == 4 and all(float(step.norm()) == pytest.approx(float(length)) for step in steps)
    rest = []
    for fit, step in zip(fits, steps, strict=True):
        gradient = fit.params[names[0]] - model.fit(fit).params[names[0]]
        rest.append((step[:, 0], dense @ step[:, 0] - gradient[:, 0]))
    assert got == spectrum.first_gap(theta.abs().sort().values, spectrum.steepest(rest))


# --- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_everything_shared_and_no_curriculum_is_fedavg_bit_for_bit(rho: float) -> None:
    """Cloze, so that there is no warm-up; everybody scores before."""
    words = ClozeReadout(tiny_lm.lm_head("bert"), (11, 31, 7))
    model = tiny_lm.model("bert", words)
    data = {}
    for i in range(5):
        drawn = tiny.examples(tiny.place(i), 6 + i)
        data[f"c{i}"] = {"train": Examples(drawn.tokens, drawn.labels, None, np.zeros(6 + i, dtype=np.int64))}
    options = {"initialise": "all", "gal_ratio": 1.0, "beta": 1.0, "rho": rho, "pacing": "quad"}
    ours, *_ = run(FibecFed(**SAME, **options), model=model, data=data)
    theirs, *_ = run(FedAvg(**SAME), model=model, data=data)
    assert [step.exchange for step in ours][:2] == ["warmup 1", "layers"] and not ours[0].cohort
    assert tree.sha256(ours[-1].state.shared) == tree.sha256(theirs[-1].state.params)


@pytest.mark.parametrize("together", [1, 8])
@pytest.mark.parametrize("rule", ["fixed", "energy"])
def test_masked_rows_keep_their_bits(together: int, rule: Any) -> None:
    """AdamW with decay: rows without much information stay, the others move; shared layers move in whole."""
    method = FibecFed(**COLD, rho=0.5, rho_rule=rule, eta=0.5, weight_decay=0.01)
    model = tiny.model("bert", dtype="float32")
    data = {f"c{i}": {"train": tiny.examples(tiny.place(i), 9)} for i in range(3)}
    engine = InProcess(lambda: method, model, data, 0, batch=together)
    done = list(federate(method, engine, model, rounds=2, seed=0))
    state, before = done[-1].state, dict(done[-2].versions)
    for client, version in done[-1].versions.items():
        old, new = (engine.memories.load(client, v, Memory) for v in (before[client], version))
        frozen = moved = 0
        for name, t in pairs.factors(new.local).items():
            rows, scores = (t != old.local[name]).any(dim=1), new.fisher[name]
            frozen, moved = frozen + int((~rows).sum()), moved + int(rows.sum())
            if not scores.any():
                continue  # A while B is zero: not masked, and without a gradient of its own
            order = scores.sort(descending=True).values
            count = math.ceil(len(t) / 2)
            if rule == "energy":
                held = order.double().cumsum(0) / order.double().sum()
                count = max(math.ceil(len(t) / 10), int((held < 0.5 - 1e-9).sum()) + 1)
            assert rows.tolist() == (scores >= order[count - 1]).tolist(), name
        assert frozen and moved
    assert state.shared.keys() & new.local.keys() == set()


@pytest.mark.parametrize("optimizer", [SGD(0.1, weight_decay=0.01), AdamW(0.1, weight_decay=0.01)])
def test_a_mask_holds_in_fit_and_fit_many(optimizer: Any) -> None:
    model = tiny.model("bert")
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 8)
    name = "block.1.query.B"
    mask = FibecFed(rho=0.25).mask(params, {name: torch.arange(tiny.WIDTH).double()})
    fit = Fit(params, data, [[0, 1], [2, 3]], optimizer, mask=mask)
    for fitted in (model.fit(fit), *model.fit_many([fit, replace(fit, mask=None)])[:1]):
        assert isinstance(fitted, Fitted)
        changed = (fitted.params[name] != params[name]).any(dim=1)
        assert changed.tolist() == [row >= 24 for row in range(32)]


def test_what_travels_and_what_stays() -> None:
    """Up: the shared layers and the head; rows and difficulties never leave; an unpicked client keeps its bits."""
    method = FibecFed(**COLD)
    model = tiny.model("bert", dtype="float32")
    data = {f"c{i}": {"train": tiny.examples(tiny.place(i), 9 + i)} for i in range(6)}
    engine = InProcess(lambda: method, model, data, 0)
    recording = Recording(engine)
    done = list(federate(method, recording, model, rounds=3, seed=0))
    state, step = done[-1].state, done[-1]
    assert state.layers and len(state.layers) == math.ceil(tiny.BLOCKS / 2)
    numbers = sum(t.numel() for name, t in model.init(tiny.place()).items() if block_of(name) in (None, *state.layers))
    for up in recording.calls[-1][2].ups.values():
        sent = records.encode(up)
        assert len(sent) - 8 - int.from_bytes(sent[:8], "little") == 4 * numbers, "tensors; a header before them"
        assert up.params.keys() == state.shared.keys() and set(vars(up)) == {"params", "examples", "loss"}
    unpicked = set(done[-2].versions) - set(step.cohort)
    for client in unpicked:
        assert done[-2].versions[client] == step.versions[client]
    for client in step.cohort:
        memory = engine.memories.load(client, step.versions[client], Memory)
        n = 9 + int(client[1:])
        assert sorted(memory.rows.tolist()) == list(range(n)) and memory.ends.tolist()[-1] == n
        assert {block_of(name) for name in memory.local} == set(range(tiny.BLOCKS)) - set(state.layers)
        assert memory.fisher.keys() == memory.local.keys() and all(
            t.shape == memory.local[name].shape[:1] for name, t in memory.fisher.items()
        )
        own = method.personal(method.result(state), memory)
        assert (
            all(torch.equal(own[name], t) for name, t in memory.local.items())
            and own.keys() == model.init(tiny.place()).keys()
        )


@pytest.mark.parametrize("initialise", ["all", "cohort", "lazy"])
def test_who_initialises_makes_no_difference_where_everybody_takes_part(initialise: Any) -> None:
    """The same layers; with `lazy` exactly those that scored train first."""
    done, *_ = run(FibecFed(**COLD | {"cohort": 0}, initialise=initialise), rounds=1)
    assert done[0].exchange == "layers" and len(done[0].cohort) == 6
    wanted, *_ = run(FibecFed(**COLD | {"cohort": 0}, initialise="lazy" if initialise == "all" else "all"), rounds=1)
    assert done[-1].state.layers == wanted[-1].state.layers
    few, *_ = run(FibecFed(**COLD, initialise=initialise), rounds=2)
    assert (few[0].cohort == few[1].cohort) is (initialise == "lazy")
    assert len(few[0].cohort) == (6 if initialise == "all" else 3)


def test_a_warm_up_reaches_everybody_once() -> None:
    """The other layers' start travels with a client's first task, and not again."""
    method = FibecFed(**SAME, warmup_rounds=2)
    done, *_ = run(method, rounds=6)
    assert [step.exchange for step in done][:3] == ["warmup 1", "warmup 2", "layers"]
    state = done[2].state
    others = {name for name in state.start if block_of(name) not in (None, *state.layers)}
    task = method.send(state, "new")
    assert task.rest is not None and task.rest.keys() == others
    same(task.rest, {name: state.start[name] for name in others})
    seen: set[str] = set()
    for step in done[3:]:
        big = {r.client for r in step.receipts if r.bytes_down > 1.2 * min(q.bytes_up for q in step.receipts)}
        assert big == set(step.cohort) - seen
        seen |= set(step.cohort)


@pytest.mark.parametrize("head", ["shared", "local"])
def test_where_the_head_is(head: Any) -> None:
    method = FibecFed(**SAME, head=head)
    done, engine, _ = run(method, rounds=2)
    memory = engine.memories.load(done[-1].cohort[0], done[-1].versions[done[-1].cohort[0]], Memory)
    assert ("head.weight" in done[-1].state.shared) is (head == "shared")
    assert ("head.weight" in memory.local) is (head == "local") and "head.weight" not in memory.fisher


# --- the curriculum ---------------------------------------------------------------------------------------------------


def client(rows: int = 10, round: int = 1, rounds: int = 10, model: Any = None) -> ClientEnv:
    data = tiny.examples(tiny.place(1), rows)
    return ClientEnv("a", model or tiny.model("bert"), {"train": data}, 0, rounds, round, "train")


def ordered(method: FibecFed, params: Params, here: ClientEnv) -> Memory:
    """The memory that has its examples in order."""
    memory: Memory = served(method.ordered(params, Memory(), here), here.model)[1]
    return memory


def test_rows_are_ranked_by_the_trace_of_their_fisher_information() -> None:
    here = client()
    params = tiny.params(here.model, tiny.place())
    memory = ordered(FibecFed(batch_size=4), params, here)
    trace = here.model.fisher(params, here.data, range(10)).trace
    assert bool((trace[memory.rows].diff() >= 0).all()) and memory.ends.tolist() == [4, 8, 10]
    turned = ordered(FibecFed(batch_size=4, difficulty="reverse"), params, here)
    assert turned.rows.tolist() == memory.rows.tolist()[::-1]
    length = ordered(FibecFed(difficulty="length"), params, here).rows
    assert bool((torch.from_numpy(here.data.lengths)[length].diff() >= 0).all())
    losses = here.model.losses(params, here.data, range(10))
    assert bool((losses[ordered(FibecFed(difficulty="loss"), params, here).rows].diff() >= 0).all())
    expected = torch.nn.functional.cross_entropy(
        here.model.logits(params, here.data), torch.from_numpy(here.data.labels), reduction="none"
    )
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    chance = ordered(FibecFed(difficulty="random"), params, here).rows.tolist()
    assert sorted(chance) == list(range(10)) and chance != memory.rows.tolist()


def test_batches_of_every_kind() -> None:
    """Three of five batches are in use at first."""
    here = client(rows=18)
    params = tiny.params(here.model, tiny.place())
    trace = here.model.fisher(params, here.data, range(18)).trace.tolist()
    samples = FibecFed(batch_size=4, epochs=2)
    memory = ordered(samples, params, here)
    used = samples.in_use(memory, here)
    easiest = sorted(range(18), key=lambda row: trace[row])[:12]
    assert len(used) == 6 and sorted(r for b in used[:3] for r in b) == sorted(easiest)
    assert used[:3] != used[3:] and sorted(r for b in used[3:] for r in b) == sorted(easiest)
    whole = FibecFed(batch_size=4, epochs=2, batching="sorted_batches")
    parts = whole.in_use(ordered(whole, params, here), here)
    order = sorted(range(18), key=lambda row: trace[row])
    assert sorted(parts[:3]) == sorted([order[:4], order[4:8], order[8:12]])
    fixed = FibecFed(batch_size=4, epochs=2, batching="fixed_random")
    memory = ordered(fixed, params, here)
    begins = [0, *memory.ends.tolist()]
    batches = [memory.rows.tolist()[a:b] for a, b in pairwise(begins)]
    means = [np.mean([trace[row] for row in batch]) for batch in batches]
    assert means == sorted(means) and sorted(map(len, batches)) == [2, 4, 4, 4, 4]
    assert sorted(fixed.in_use(memory, here)[:3]) == sorted(batches[:3])
    late = FibecFed(batch_size=4, epochs=1).in_use(memory, replace(here, round=9))
    assert sorted(r for b in late for r in b) == list(range(18))


def test_labels_in_their_own_proportions() -> None:
    """A head that prefers class 0 calls its rows easy; stratified, every beginning has the client's shares."""
    model = tiny.model("bert", dtype="float32", classes=2)
    rng = tiny.place(3)
    drawn = tiny.examples(rng, 80, classes=2)
    data = Examples(drawn.tokens, np.arange(80) % 2)
    params = model.init(tiny.place())
    params["head.bias"] = torch.tensor([2.0, 0.0])
    here = ClientEnv("a", model, {"train": data}, 0, 10, 1, "train")
    plain, fair = (ordered(FibecFed(stratify_labels=s), params, here).rows for s in (False, True))
    count = 48
    assert (data.labels[plain[:count]] == 0).mean() >= 0.8
    assert abs((data.labels[fair[:count]] == 0).mean() - 0.5) <= 8 / count


def test_an_order_is_made_once_or_again_after_some_visits() -> None:
    for every, expected in ((0, [0, 1, 2, 3]), (2, [0, 1, 0, 1])):
        method = FibecFed(**COLD, rescore_every=every)
        here, memory, visits = client(model=tiny.model("bert")), Memory(), []
        params = tiny.params(here.model, tiny.place())
        task = Task({n: t for n, t in params.items() if block_of(n) in (None, 0)}, None, (0,))
        for _ in range(4):
            _, (_, after) = served(method.train(task, memory, here), here.model)
            before, memory = memory, after
            visits.append(memory.visits - 1)
            if not every and len(before.rows):
                assert torch.equal(before.rows, memory.rows)
        assert visits == expected


def test_momentum_of_the_rows_information() -> None:
    """gamma .9, first 1 then 0 -> 1, .9; and the momentum of row means is the mean of the momentum."""

    class Says(toy.ToyModel):
        value = 1.0

        def fisher(self, params: Any, data: Any, rows: Any, token_norm: Any = "sqrt", also: Any = ()) -> Any:
            found = super().fisher(params, data, rows, token_norm, also)
            return replace(found, rows={name: torch.full_like(t, self.value) for name, t in found.rows.items()})

    model = Says(blocks=1, rank=2, width=5)
    here = ClientEnv("a", model, {"train": toy.points([1.0] * 5, [2.0] * 5)}, 0, 4, 1, "train")
    params, method = model.init(tiny.place()), FibecFed()
    _, first = served(method.information(params, params, Memory(), [[0, 1]], here), model)
    model.value = 0.0
    _, second = served(method.information(params, params, Memory(fisher=first), [[0, 1]], here), model)
    assert all(bool((t == 1).all()) for t in first.values()) and first.keys() == pairs.factors(params).keys()
    assert all(t.tolist() == pytest.approx([0.9] * len(t)) for t in second.values())
    draw = torch.from_numpy(np.random.default_rng(0).random((3, 4, 6)))  # of three visits, numbers of a matrix
    whole, kept = draw[0], {"block.0.w.A": draw[0].mean(dim=1)}
    for visit in draw[1:]:
        whole = 0.9 * whole + 0.1 * visit
        kept = curriculum.blended(kept, {"block.0.w.A": visit.mean(dim=1)}, 0.9)
    torch.testing.assert_close(kept["block.0.w.A"], whole.mean(dim=1), rtol=1e-6, atol=0)
    assert not served(FibecFed(rho=1.0).information(params, params, Memory(), [[0]], here), model)[1]


# --- planted ----------------------------------------------------------------------------------------------------------


def small_roberta(seed: int, layers: int = 2) -> Any:
    config = transformers.RobertaConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModel.from_config(config, add_pooling_layer=False)


def test_planted_neurons_are_the_ones_that_are_masked() -> None:
    """Columns 32 to 63 of a block's attention output are zero: what value rows 32 to 63 say cannot matter."""
    body = small_roberta(0)
    with torch.no_grad():
        body.encoder.layer[1].attention.output.dense.weight[:, 32:] = 0
    model = HFModel(tiny.freeze(body, None, "planted", tiny.CPU), Lora(rank=4), 3)
    params, data = {n: t.float() for n, t in tiny.params(model, tiny.place()).items()}, tiny.examples(tiny.place(1), 20)
    rows = model.fisher(params, data, range(20)).rows["block.1.value.B"]
    assert not rows[32:].any() and bool((rows[:32] > 0).all())
    mask = FibecFed(rho=0.5).mask(params, {"block.1.value.B": rows})["block.1.value.B"]
    assert mask[:32].all() and not mask[32:].any()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_planted_difficulty_shows_after_training_and_not_before(seed: int) -> None:
    """A quarter of the labels are turned: their examples are the hard ones once the model knows the others."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(20, 100, (256, 16)).astype(np.int32)
    truth = draw.integers(0, 3, 256)
    for row, label in zip(tokens, truth, strict=True):
        row[draw.choice(16, 3, replace=False)] = 5 + label
    turned = draw.random(256) < 0.25
    labels = np.where(turned, (truth + draw.integers(1, 3, 256)) % 3, truth)
    data = Examples(tuple(tokens), labels.astype(np.int64))
    model = HFModel(tiny.freeze(small_roberta(seed), None, f"planted-{seed}", tiny.CPU), Lora(rank=8), 3)
    params = model.init(tiny.rng_for(seed, "adapter"))
    before = area(model.fisher(params, data, range(256)).trace.numpy(), turned)
    fit = Fit(params, data, data.epochs(6, 8, tiny.place(seed)), AdamW(2e-3))
    after = area(model.fisher(model.fit(fit).params, data, range(256)).trace.numpy(), turned)
    assert 0.40 <= before <= 0.62 and after >= 0.90


def area(scores: Any, positive: Any) -> float:
    """Under the ROC curve: how often a positive has the larger score."""
    return float((scores[positive][:, None] > scores[~positive][None]).mean())


# --- options ----------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_any_exchange_with_new_layers() -> None:
    method = FibecFed(**SAME, reselect_every=2)
    whole, *_ = run(method, rounds=4)
    names = [(step.round, step.exchange, bool(step.cohort)) for step in whole]
    assert (3, "reselect", True) in names and (2, "reselect", False) in names
    model = tiny.model("bert", dtype="float32")
    data = {f"c{i}": {"train": tiny.examples(tiny.place(i), 9 + i)} for i in range(6)}
    for done in range(1, len(whole), 3):
        engine = InProcess(lambda: method, model, data, 0)
        loop = federate(method, engine, model, rounds=4, seed=0)
        start = [next(loop) for _ in range(done)][-1].start
        loop.close()
        saved = Start(start.number, records.decode(records.encode(start.state), State), start.versions)
        rest = list(federate(method, engine, model, rounds=4, seed=0, start=saved))
        assert records.encode(rest[-1].state) == records.encode(whole[-1].state), whole[done - 1].exchange


def test_only_lora_is_accepted_and_impossible_options_are_not() -> None:
    assert FibecFed().accepts(Lora(rank=2)) is None and "not prefix" in str(FibecFed().accepts(Prefix()))
    for options, words in [
        ({"beta": 0.0}, "method.beta is 0.0"),
        ({"rho": 1.5}, "method.rho is 1.5"),
        ({"gamma": 1.0}, "method.gamma is 1.0"),
        ({"score_samples": 0}, "method.score_samples is 0"),
        ({"stratify_labels": True, "batching": "fixed_random"}, "method.stratify_labels is of rows"),
    ]:
        with pytest.raises(ConfigError, match=words):
            FibecFed(**options)


OTHERS: dict[str, Any] = {
    "gamma": 0.2, "fisher_samples": 2, "rho": 0.2, "rho_rule": "energy", "gal_count": "energy", "gal_ratio": 0.9,
    "eta": 0.3, "layer_score": "amplification", "perturbation": "inf", "gamma_eps": 0.5, "score_samples": 1,
    "reselect_every": 1, "pacing": "step", "alpha_pace": 0.3, "difficulty": "reverse", "stratify_labels": True,
    "rescore_every": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"layers_by": "all"},
        {"layers_by": "first", "gal_ratio": 0.6},
        {"gal_count": "energy", "eta": 0.4},
        {"rho_rule": "energy", "eta": 0.4},
        {"beta": 1.0},
        {"beta": 1.0, "batching": "sorted_batches"},
        {"rho": 1.0},
    ],
)
def test_idle_fields_have_no_effect(options: Any) -> None:
    """Whatever they say, the bits of the run are those without them, and no other exchange is made."""
    method = FibecFed(**SAME | options)
    idle = method.idle().keys()
    assert idle, options
    assert idle <= OTHERS.keys() and idle.isdisjoint(options)
    other = replace(method, **{name: OTHERS[name] for name in idle})
    assert other.idle().keys() >= idle
    (ours, engine, _), (theirs, mirror, _) = run(method, rounds=2), run(other, rounds=2)
    assert [step.exchange for step in ours] == [step.exchange for step in theirs]
    assert tree.sha256(method.result(ours[-1].state)) == tree.sha256(other.result(theirs[-1].state))
    assert ours[-1].state.layers == theirs[-1].state.layers
    assert ours[-1].versions == theirs[-1].versions
    for client, version in ours[-1].versions.items():
        one, two = (made.memories.load(client, version, Memory) for made in (engine, mirror))
        assert tree.sha256(one.local) == tree.sha256(two.local)


def test_what_is_told_about_the_choice() -> None:
    counted = FibecFed(**COLD, layers_by="first", gal_count="energy")
    state = run(counted, rounds=1)[0][-1].state
    assert "method.layers_by first says which" in counted.choices(state)["scores_mean"]
    done, *_ = run(FibecFed(**COLD), rounds=1)
    told = FibecFed().choices(done[-1].state)
    assert told["layers"] == list(done[-1].state.layers) and len(told["layer_scores"]) == told["of_layers"] == 3
