"""FedAdapter: its branches and trials by hand, growth that changes no output, the choice, and whole runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import small
import tiny
import tiny_lm
import toy
from fedpeft import app
from fedpeft.core import tree
from fedpeft.core.adapter import Bottleneck, Lora
from fedpeft.core.errors import ConfigError, RecordError
from fedpeft.core.exchange import ClientEnv, Nothing, ServerEnv, Update
from fedpeft.core.federate import Done, federate
from fedpeft.core.rng import rng_for
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.fedadapter import (
    METHOD,
    Branch,
    Candidates,
    Scores,
    State,
    Trial,
    countable,
    deeper,
    grown,
    most_width,
)
from fedpeft.models.hf import HFModel
from fedpeft.models.readouts.cloze import ClozeReadout

CLIENTS = tuple("abcdef")


def server(blocks: int = 4, size: int = 16, round: int = 0, rounds: int = 100, clients: Sequence[str] = CLIENTS) -> Any:
    model = toy.ToyModel(blocks=blocks, width=1 + 2 * blocks, dtype="float32", size=size)
    return ServerEnv(model, tuple(clients), 0, rounds, round=round)


def sizes(state: State) -> list[tuple[int, int]]:
    return [(branch.depth, branch.width) for branch in state.branches]


def around(depth: int, width: int, env: ServerEnv, method: Any = None) -> State:
    """A trial around a size of which every number matters."""
    fresh = {name: t + 1 for name, t in env.initial().items()}
    return (method or METHOD()).begin(Branch(depth, width, grown({}, fresh, depth, width)), env, ())


# --- branches and trials --------------------------------------------------------------------------------------------


def test_the_first_trial_is_around_the_head_alone() -> None:
    """D = 0, W = 8; one layer alone is skipped."""
    state = METHOD().init(server())
    assert sizes(state) == [(0, 8), (0, 16), (2, 8)]
    assert [sorted({name.split(".w")[0] for name in b.params}) for b in state.branches] == [
        ["head"], ["head"], ["block.2", "block.3", "head"],
    ]  # fmt: skip
    assert METHOD().result(state).keys() == {"head.w"} and METHOD().choices(state)["depth"] == 0
    assert METHOD().adapter() == Bottleneck(size=64, norms=False)


def test_the_branches_around_a_size_and_their_bounds() -> None:
    """(D, W), (D, min(64, W + 8)) and (min(layers, D + 1), W); equal ones are one branch."""
    wide, env = server(size=64), server()
    assert sizes(around(2, 8, env)) == [(2, 8), (2, 16), (3, 8)]
    assert sizes(around(4, 8, env)) == [(4, 8), (4, 16)]
    assert sizes(around(3, 16, env)) == [(3, 16), (4, 16)]
    assert sizes(around(4, 16, env)) == [(4, 16)]
    assert sizes(around(2, 60, wide)) == [(2, 60), (2, 64), (3, 60)]
    assert sizes(around(2, 8, wide, METHOD(width_step=3))) == [(2, 8), (2, 11), (3, 8)]
    assert [deeper(depth, 3) for depth in range(4)] == [2, 2, 3, 3] and deeper(0, 1) == 1
    small_adapter = METHOD().init(server(size=5))
    assert sizes(small_adapter) == [(0, 5), (2, 5)], "the adapter's size is the largest width"


def test_a_trial_lasts_the_longer_the_deeper() -> None:
    """window (4 D + 1) rounds, rounded up."""
    for method, depth, lasts in (
        (METHOD(), 0, 1), (METHOD(), 2, 9), (METHOD(), 3, 13), (METHOD(window=0.5), 2, 5), (METHOD(window=2), 0, 2),
        (METHOD(window=3, expand=0), 3, 3),
    ):  # fmt: skip
        assert around(depth, 8, server(round=10), method).ends == 10 + lasts


def test_every_branch_has_a_group_of_clients_and_a_cohort_of_it() -> None:
    clients = [f"c{i:02}" for i in range(20)]
    state = METHOD().init(server(clients=clients))
    assert sorted(Counter(state.groups.values()).values()) == [6, 7, 7] and state.groups.keys() == set(clients)
    picked = METHOD(cohort=4).pick(state, clients, rng_for(0, "pick"))
    assert [state.groups[client] for client in picked] == [0] * 4 + [1] * 4 + [2] * 4
    everyone = METHOD(cohort=0).pick(state, clients, rng_for(0, "pick"))
    assert sorted(everyone) == clients
    for client in picked:
        assert METHOD().send(state, client).params is state.branches[state.groups[client]].params
    assert METHOD().send(state, "newcomer").params is state.branches[0].params
    later = METHOD().begin(state.branches[0], server(clients=clients, round=5), ())
    assert later.groups != state.groups, "groups are drawn anew in every trial"


def test_too_few_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tries 3 branches on groups of clients, and there are 2 clients; use more"):
        METHOD().init(server(clients=("a", "b")))
    assert METHOD().accepts(Lora()) is not None and METHOD().accepts(Bottleneck(size=8)) is None
    with pytest.raises(ConfigError, match=r"method\.window is 0\.0; it must be finite and above 0"):
        METHOD(window=0.0)


# --- growth ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("norms", [False, True])
def test_growth_leaves_the_outputs_as_they_are(family: str, norms: bool) -> None:
    """Deeper, wider and both: the same logits, and the numbers that were there stay where they were."""
    model = tiny.model(family, Bottleneck(size=12, norms=norms))
    fresh, data = {n: t.double() for n, t in model.init(tiny.place()).items()}, tiny.examples(tiny.place(1), 7)
    rng = tiny.place(2)
    own = {n: t + torch.from_numpy(rng.normal(0, 0.3, t.shape)) for n, t in grown({}, fresh, 1, 4).items()}
    before = model.logits(own, data)
    bare = {name: t for name, t in own.items() if name.startswith("head")}
    assert (before - model.logits(bare, data)).abs().max() > 0.05, "the adapter must matter"
    for depth, width in ((1, 12), (3, 4), (2, 7)):
        larger = grown(own, fresh, depth, width)
        assert {name for name in larger if "down.weight" in name} == {
            f"block.{block}.{half}.down.weight" for block in range(3 - depth, 3) for half in ("attention", "ffn")
        }
        assert all(len(t) == width for name, t in larger.items() if name.endswith("down.weight"))
        assert torch.allclose(model.logits(larger, data), before, atol=1e-6)
        for name, t in own.items():
            assert torch.equal(larger[name][tuple(slice(n) for n in t.shape)], t), name


def test_new_neurons_are_fresh_and_those_of_the_full_adapter() -> None:
    """Rows W .. of the adapter's own start go in, nothing comes out; so both layers can learn."""
    env = server(blocks=2)
    fresh, own = env.initial(), around(2, 8, env).branches[0].params
    larger, stem = grown(own, fresh, 2, 16), "block.1.w"
    assert torch.equal(larger[f"{stem}.down.weight"][8:], fresh[f"{stem}.down.weight"][8:])
    assert torch.equal(larger[f"{stem}.down.weight"][:8], own[f"{stem}.down.weight"])
    assert not larger[f"{stem}.up.weight"][:, 8:].any() and not larger[f"{stem}.down.bias"][8:].any()
    assert torch.equal(larger[f"{stem}.up.bias"], own[f"{stem}.up.bias"])
    assert most_width(fresh) == 16


def test_a_warm_start_grows_without_a_change_too() -> None:
    """Where the adapter starts from another run's, new layers still give nothing."""
    full = {name: torch.ones_like(t) for name, t in server().initial().items()}
    branch = grown({}, full, 2, 8)
    assert not any(t.any() for name, t in branch.items() if ".up." in name)
    assert branch["head.w"].all()


# --- one round ------------------------------------------------------------------------------------------------------


def test_every_branch_is_the_mean_of_its_own_clients() -> None:
    """Heads alone: a 1 of 1 row and b 4 of 2 rows give 3; c gives 7; nobody answers for the third branch."""
    env = replace(server(clients=("a", "b", "c", "d")), round=1)
    state = replace(METHOD().init(env), groups={"a": 0, "b": 0, "c": 1, "d": 2})
    third = state.branches[2]

    def up(value: float, rows: int, loss: float) -> Update:
        return Update({"head.w": torch.tensor([value])}, rows, loss)

    found = METHOD().average(state, {"a": up(1, 1, 3.0), "b": up(4, 2, 6.0), "c": up(7, 1, 1.0)}, env)
    assert [branch.params["head.w"].item() for branch in found.branches[:2]] == [3.0, 7.0]
    assert found.branches[2] is third
    assert [branch.loss for branch in found.branches] == [5.0, 1.0, None]
    assert found.loss == pytest.approx((3 + 2 * 6 + 1) / 4)


def test_judges_are_asked_at_the_end_of_a_trial_and_at_the_horizon() -> None:
    method = METHOD(window=3, judges=2)
    state = method.init(server())
    for round, rounds, due in ((1, 100, False), (2, 100, False), (3, 100, True), (4, 100, True), (2, 2, True)):
        trained = method.average(state, {}, replace(server(rounds=rounds), round=round))
        assert trained.due is due
        assert len(method.pick_judges(trained, CLIENTS, rng_for(0, "pick"))) == (2 if due else 0)
    assert method.ask(state, "a") == Candidates(state.branches)


# --- the choice -----------------------------------------------------------------------------------------------------


def test_a_judge_counts_right_answers_on_its_validation_rows() -> None:
    model = tiny.model("bert", Bottleneck(size=4, norms=False), "float32")
    fresh, rows = model.init(tiny.place()), tiny.examples(tiny.place(1), 9)
    rng = tiny.place(2)
    branches = tuple(
        Branch(d, 4, {n: t + torch.from_numpy(rng.normal(0, 1, t.shape)).float() for n, t in own.items()})
        for d, own in ((d, grown({}, fresh, d, 4)) for d in (0, 2))
    )
    env = ClientEnv("a", model, {"train": rows.take([0]), "validation": rows}, 0, 1)
    scores, memory = METHOD().judge(Candidates(branches), Nothing(), env)
    assert memory == Nothing() and scores.rows == 9
    for branch, correct, loss in zip(branches, scores.correct, scores.losses, strict=True):
        logits, labels = model.logits(branch.params, rows), torch.from_numpy(rows.labels)
        assert correct == int((logits.argmax(dim=1) == labels).sum())
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item())
    countable(Candidates(branches), scores)
    for splits in ({"train": rows}, {"train": rows, "validation": rows.take([])}):
        nothing, _ = METHOD().judge(Candidates(branches), Nothing(), replace(env, splits=splits))
        assert nothing == Scores(0, (0, 0), (0.0, 0.0))
        countable(Candidates(branches), nothing)


def chosen(ups: Mapping[str, Scores], losses: Sequence[float | None] = (None, None, None)) -> State:
    env = replace(server(), round=9)
    before = around(2, 8, server())
    branches = tuple(replace(branch, loss=loss) for branch, loss in zip(before.branches, losses, strict=True))
    return METHOD().choose(replace(before, branches=branches, due=True, loss=0.5), ups, env)


@pytest.mark.parametrize(
    ("ups", "best", "scores"),
    [
        ({"a": Scores(4, (1, 2, 3), (4.0, 4.0, 9.0)), "b": Scores(6, (5, 1, 2), (1.0, 1.0, 1.0))}, 0, (0.6, 0.3, 0.5)),
        ({"a": Scores(10, (6, 7, 5), (1.0, 9.0, 1.0))}, 1, (0.6, 0.7, 0.5)),
        ({"a": Scores(10, (6, 6, 7), (1.0, 1.0, 9.0))}, 2, (0.6, 0.6, 0.7)),
        ({"a": Scores(10, (6, 6, 6), (3.0, 2.0, 3.0))}, 1, (0.6, 0.6, 0.6)),  # the smaller loss
        ({"a": Scores(10, (6, 6, 6), (3.0, 3.0, 3.0))}, 0, (0.6, 0.6, 0.6)),  # the size so far
    ],
)
def test_the_best_accuracy_over_all_rows_wins(ups: Any, best: int, scores: tuple[float, ...]) -> None:
    state, size = chosen(ups), ((2, 8), (2, 16), (3, 8))
    assert state.trials == (Trial(9, size, pytest.approx(scores), True, best),)  # type: ignore[arg-type]
    assert sizes(state)[0] == size[best] and not state.due and state.loss == 0.5
    assert state.ends == 9 + 4 * size[best][0] + 1


def test_without_validation_rows_the_training_loss_decides() -> None:
    """A branch that nobody trained is never chosen."""
    nobody = {"a": Scores(0, (0, 0, 0), (0.0, 0.0, 0.0))}
    state = chosen(nobody, (0.7, 0.4, None))
    assert sizes(state)[0] == (2, 16)
    (trial,) = METHOD().choices(state)["trials"]
    assert trial["tried"][0] == {"depth": 2, "width": 8, "minus_training_loss": -0.7}
    json.dumps(METHOD().choices(state), allow_nan=False)


def test_all_branches_of_the_next_trial_start_from_the_winners_weights() -> None:
    env, before = replace(server(), round=9), around(2, 8, server())
    won = {name: t + 3 for name, t in before.branches[2].params.items()}
    state = replace(before, branches=(*before.branches[:2], replace(before.branches[2], params=won)))
    after = METHOD().choose(state, {"a": Scores(4, (0, 0, 4), (1.0, 1.0, 1.0))}, env)
    assert sizes(after) == [(3, 8), (3, 16), (4, 8)]
    for branch in after.branches:
        for name, t in won.items():
            assert torch.equal(branch.params[name][tuple(slice(n) for n in t.shape)], t), name


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (Scores(3, (1, 1), (1.0, 1.0)), "scores of 3 rows and 2 branches came for 3"),
        (Scores(-1, (0, 0, 0), (0.0, 0.0, 0.0)), "scores of -1 rows"),
        (Scores(3, (1, 4, 1), (1.0, 1.0, 1.0)), "of 3 rows 4 are said to be right"),
        (Scores(3, (1, -1, 1), (1.0, 1.0, 1.0)), "are said to be right"),
        (Scores(0, (0, 0, 0), (0.0, 1.0, 0.0)), r"losses of 0 rows are said to be 1\.0"),
        (Scores(3, (1, 1, 1), (1.0, float("nan"), 1.0)), "losses of 3 rows"),
    ],
)
def test_scores_that_cannot_be_are_refused(scores: Scores, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        countable(Candidates(METHOD().init(server()).branches), scores)


# --- whole runs -----------------------------------------------------------------------------------------------------


def federated(model: HFModel, method: Any, rounds: int, batch: int = 1) -> list[Done]:
    data = {}
    for i in range(9):
        rows = tiny.examples(tiny.place(i), 10)
        data[f"c{i}"] = {"train": rows.take(range(7)), "validation": rows.take(range(7, 10))}
    engine = InProcess(lambda: method, model, data, 0, batch=batch)
    return list(federate(method, engine, model, rounds=rounds, seed=0))


def test_a_run_over_a_bert_grows_and_says_so() -> None:
    """Branches of unequal depth and width train in the same passes, with the same result as one by one."""
    model = tiny.model("bert", Bottleneck(size=12, norms=False), "float32")
    method = METHOD(cohort=2, window=1, expand=0.5, width=4, width_step=4, lr=3e-3)
    done = federated(model, method, 6)
    assert [step.exchange for step in done] == ["train", "judge"] * 6
    asked = [step.round for step in done if step.exchange == "judge" and step.cohort]
    trials = method.choices(done[-1].state)["trials"]
    assert [trial["round"] for trial in trials] == asked and asked[-1] == 6
    assert all(0 <= own["accuracy"] <= 1 for trial in trials for own in trial["tried"])
    last, size = trials[-1], {(trial["depth"], trial["width"]) for trial in trials}
    assert len(size) > 1, "it has grown"
    params = method.result(done[-1].state)
    assert {len(t) for name, t in params.items() if name.endswith("down.weight")} == {last["width"]}
    assert len({name.split(".")[1] for name in params if name.startswith("block")}) == last["depth"]
    together = federated(model, method, 6, batch=6)
    assert method.choices(together[-1].state)["trials"] == trials
    apart = tree.sub(method.result(together[-1].state), params)
    assert tree.norm(apart) < 1e-3 * tree.norm(params)


def test_without_a_head_it_starts_with_two_layers() -> None:
    readout = ClozeReadout(tiny_lm.lm_head("bert"), (9, 10, 11))
    model = HFModel(tiny_lm.base("bert"), Bottleneck(size=12, norms=False), 3, 2048, readout)
    state = METHOD().init(ServerEnv(model, CLIENTS, 0, 9))
    assert sizes(state) == [(2, 8), (2, 12), (3, 8)] and state.branches[0].params


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_a_run_leaves_a_folder_that_comes_back(wire: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the head alone was best, which is a whole model as a folder."""
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    place = small.make_place(tmp_path / "place")
    config = small.config(place, run__rounds=3, run__wire=wire)
    config["method"] = {"name": "fedadapter", "cohort": 2, "lr": 1e-2, "head_lr": 1e-2}
    config["adapter"] = {"size": 16}
    assert app.check(config)["estimate"]["bytes"] > 0
    done = app.run(config, out=tmp_path / "run")
    assert done.manifest["choices"]["depth"] in (0, 2) and done.manifest["choices"]["trials"]
    assert (done.folder / "adapter" / "fedpeft.json").is_file()
    best: Any = small.checkpoint(done.folder, "fedadapter").best
    assert isinstance(best["head.weight"], Tensor)
    folder = app.export(done.folder, tmp_path / "out", merge=best.keys() == {"head.weight", "head.bias"})
    assert (folder / "README.md").is_file()
