"""Offsite-tuning: who has which block, one round by hand, and whole runs whose tuned blocks are plugged in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import small
import tiny
import tiny_lm
import toy
from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.app.scoring import emulated
from fedpeft.config import load_config
from fedpeft.core import tree
from fedpeft.core.adapter import Full, HeadOnly, Lora
from fedpeft.core.errors import ConfigError, ModelError, RequestError
from fedpeft.core.exchange import ServerEnv, Weights
from fedpeft.core.federate import federate
from fedpeft.core.fit import AdamW
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.offsite import METHOD, Offsite
from turns import turn

# --- which blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "every", "layers", "emulated", "base"),
    [
        (1, 2, 5, (0, 1, 3, 4), "blocks:0,1,3,4"),  # of 1 2 3 the second is left out
        (2, 3, 12, (0, 1, 2, 5, 8, 10, 11), "blocks:0,1,2,5,8,10,11"),  # of 2 .. 9: 2 5 8
        (2, 1, 6, (0, 1, 2, 3, 4, 5), ""),
        (1, 100, 6, (0, 1, 5), "blocks:0,1,5"),
        (2, 2, 4, (0, 1, 2, 3), ""),  # nothing between
    ],
)
def test_who_has_which_blocks(blocks: int, every: int, layers: int, emulated: tuple[int, ...], base: str) -> None:
    method = Offsite(blocks=blocks, every=every)
    ends, middle = method.parts(layers)
    assert sorted((*ends, *middle)) == list(range(layers)) and len(ends) == 2 * blocks
    assert ends == (*range(blocks), *range(layers - blocks, layers))
    assert method.emulated(layers) == emulated and method.trains_on(layers) == base


def test_ends_that_overlap_and_other_wrong_requests() -> None:
    with pytest.raises(ModelError, match=r"method\.blocks is 3 at either end, and the model has 5 .* at most 2"):
        Offsite(blocks=3).parts(5)
    with pytest.raises(ConfigError, match=r"method\.blocks is 0; it must be at least 1"):
        Offsite(blocks=0)
    with pytest.raises(ConfigError, match=r"method\.every is 0; it must be at least 1"):
        Offsite(every=0)
    method = Offsite(blocks=2)
    assert method.adapter() == Full((0, 1, -2, -1))
    assert method.accepts(method.adapter()) is None and method.accepts(Lora()) is None
    assert "leave adapter.blocks out" in str(method.accepts(Full()))
    assert "not head" in str(method.accepts(HeadOnly()))


# --- by hand --------------------------------------------------------------------------------------------------------


def test_one_round_by_hand() -> None:
    """Four blocks of one number each and a head, all at 0; the first step of AdamW moves what trains by lr = 1/2.

    Client a (1 row) is at (4, 4, 4, 4, 4), b (3 rows) at (-4, -4, -4, -4, 4). Blocks 0 and 3 train, 1 and 2 have no
    parameters: a answers (1/2, , , 1/2, 1/2), b (-1/2, , , -1/2, 1/2), and the means by examples are (1 - 3)/8 = -1/4
    and 1/2. Of both losses, 1/2 · 5 · 16 = 40 is the mean.
    """
    model = toy.ToyModel((0.0,) * 5, blocks=4)
    rows = {"a": toy.points((4, 4, 4, 4, 4)), "b": toy.points(*[(-4, -4, -4, -4, 4)] * 3)}
    method = Offsite(lr=0.5, every=2, cohort=0)
    engine = InProcess(lambda: method, model, {client: {"train": own} for client, own in rows.items()}, 0)
    (done,) = federate(method, engine, model, rounds=1, seed=0)
    found = {name: t.tolist() for name, t in done.state.params.items()}
    assert found == {
        "block.0.w": pytest.approx([-0.25]),
        "block.3.w": pytest.approx([-0.25]),
        "head.w": pytest.approx([0.5]),
    }
    assert done.state.loss == 40 and method.result(done.state) is done.state.params
    told = method.choices(done.state)
    assert (told["trained_blocks"], told["emulator_blocks"], told["left_out_blocks"]) == ([0, 3], [1], [2])
    assert "warning" not in told


def test_a_turn_trains_on_the_emulator(turns: Any = turn) -> None:
    model = toy.ToyModel((0.0,) * 5, blocks=4)
    env = toy_env(model)
    method = Offsite(every=2, lr=0.25, batch_size=1)
    (fit,), up, _ = turns(method, Weights(method.init(server(model)).params), env)
    assert fit.base == "blocks:0,1,3" and fit.optimizer == AdamW(0.25) and up.examples == 2
    assert up.params.keys() == {"block.0.w", "block.3.w", "head.w"}


def toy_env(model: toy.ToyModel) -> Any:
    from fedpeft.core.exchange import ClientEnv

    return ClientEnv("a", model, {"train": toy.points((1, 2, 3, 4, 5), (5, 4, 3, 2, 1))}, 0, 1, 1, "train")


def server(model: Any) -> ServerEnv:
    return ServerEnv(model, ("a",), 0, 1)


def test_bytes_that_a_client_has_are_those_of_the_tensors() -> None:
    """Against the tensors of the two models: embeddings, norms and four of five blocks."""
    model = tiny.model("gpt2", Full((0, -1)), "float32")
    method = Offsite(every=2)  # blocks 0, 1 and 2: of the one in between nothing is left out
    state = method.init(server(model))
    every = sum(p.numel() * 4 for p in model.base.module.parameters())
    assert state.client_bytes == state.whole_bytes == every
    assert "take a deeper model" in method.choices(state)["warning"]
    config = tiny.config("gpt2")
    config.num_hidden_layers = 5
    deep = tiny.freeze(transformers.AutoModel.from_config(config), None, "deep", tiny.CPU)
    state = method.init(server(tiny.HFModel(deep, Full((0, -1)), 3)))
    parts = {kept: deep.at(kept).module.parameters() for kept in ("blocks:0,1,3,4", "")}
    held, whole = (sum(p.numel() * 4 for p in own) for own in parts.values())
    assert (state.client_bytes, state.whole_bytes) == (held, whole) and held < whole


def test_every_block_kept_is_tuning_of_the_full_model_bit_for_bit() -> None:
    """`every: 1` against FedAvg over `adapter.kind: full` with the same blocks, on the base itself."""
    from fedpeft.methods.fedavg import FedAvg

    model = tiny.model("llama", Full((0, -1)), "float32")
    data = {client: {"train": tiny.examples(tiny.place(n), n)} for client, n in (("a", 3), ("b", 5))}
    ends = []
    for method in (Offsite(every=1, lr=1e-2), FedAvg(lr=1e-2)):
        engine = InProcess(lambda own=method: own, model, data, 0)  # type: ignore[misc]
        (*_, done) = federate(method, engine, model, rounds=2, seed=0)
        ends.append(tree.sha256(done.state.params))
    assert ends[0] == ends[1]


def test_lora_counts_where_it_is_in_the_ends() -> None:
    model = tiny.model("bert", Lora(rank=2))
    state = Offsite().init(server(model))
    assert tree.blocks_of(state.params) == (0, 2) and "head.weight" in state.params
    with pytest.raises(ModelError, match=r"adapter\.blocks has none of the blocks 0, 2 that offsite trains"):
        Offsite().init(server(tiny.model("bert", Lora(rank=2, blocks=(1,)))))


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CACHE", str(folder / "cache"))
        small.make_place(folder)
        small.write_model(folder / "deep", blocks=5)
        yield folder


def config(place: Path, **changes: Any) -> dict[str, Any]:
    values = small.config(place, model__name=str(place / "deep"), run__rounds=2, method__lr=2e-3)
    values["method"]["name"], values["adapter"] = "offsite", {}
    return small.changed(values, changes)


@pytest.fixture(scope="module")
def finished(place: Path) -> app.Run:
    return app.run(config(place), out=place / "offsite")


def test_a_run_plugs_in_and_scores_both_models(place: Path, finished: app.Run, tmp_path: Path) -> None:
    fed = build(load_config(finished.folder / "config.yaml"))
    assert fed.config.adapter.fields["blocks"] == [0, -1]
    size = tree.count(fed.initial)
    block = sum(p.numel() for p in fed.base.module.encoder.layer[0].parameters())
    assert finished.manifest["trainable_parameters"] == size == 2 * block + 3 * 33
    assert 0 <= finished.manifest["bytes_down"] - 2 * 4 * 4 * size < 2 * 4 * 8_000  # rounds, cohort, bytes a number
    scores = finished.metrics["best"]["test"]
    assert scores.keys() >= {"global", "emulator", "majority"}
    best = small.checkpoint(finished.folder, "offsite").best
    assert best is not None and scores["emulator"] == emulated(fed, best, "test")["emulator"]
    assert scores["emulator"]["loss"] != scores["global"]["loss"]
    page = (finished.folder / "report.html").read_text()
    assert "with the blocks that clients have" in page and "left out blocks" in page.replace("_", " ")
    curve = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert all("emulator" in line["metrics"]["validation"] for line in curve)
    first, last = (line["metrics"]["validation"]["emulator"]["loss"] for line in (curve[0], curve[-1]))
    assert last < first

    merged = app.export(finished.folder, tmp_path / "out", merge=True)
    model = transformers.AutoModelForTokenClassification.from_pretrained(merged).eval()
    assert model.config.num_hidden_layers == 5
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    predicted = app.predict(finished.folder, place / "test.jsonl")
    for row, text in list(zip(predicted, (r["text"] for r in small.rows(42, "test")), strict=True))[:4]:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0].mean(dim=0)
        assert logits.softmax(dim=0).tolist() == pytest.approx(list(row["probabilities"].values()), abs=1e-5)
    with pytest.raises(RequestError, match="add --merge"):
        app.export(finished.folder, tmp_path / "plain")


def test_resume_and_simulated_time(place: Path, finished: app.Run, tmp_path: Path) -> None:
    done = app.run(config(place, run__rounds=1), out=tmp_path / "run")
    app.resume(done.folder, {"run.rounds": 2})
    assert small.sha(done.folder) == small.sha(finished.folder)
    whole = app.run(config(place, run__rounds=1, method__every=1), out=tmp_path / "whole")
    assert "emulator" not in whole.metrics["best"]["test"]
    lines = [json.loads(line) for line in (done.folder / "exchanges.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (whole.folder / "exchanges.jsonl").read_text().splitlines()]
    for own, other in zip(lines, others, strict=False):
        assert own["client"] == other["client"] and own["tokens"] == other["tokens"]
        assert own["simulated_seconds"] < other["simulated_seconds"], "what is left out takes no time"


def test_the_estimate_is_that_of_the_emulator(place: Path) -> None:
    part, whole = (app.check(config(place, method__every=every))["estimate"] for every in (2, 1))
    assert 0.7 < part["flops_per_client_and_round"] / whole["flops_per_client_and_round"] < 0.9
    assert part["bytes"] == whole["bytes"]


def test_a_causal_model_answers_by_the_whole_of_it(place: Path, tmp_path: Path) -> None:
    """GPT-2 in the format generate: perplexity of plug-in and emulator, and a merged model of all blocks."""
    tokenizer = tiny_lm.byte_tokenizer()
    tiny_lm.save("gpt2", tokenizer, place / "gpt2", len(tokenizer), positions=48, blocks=4)
    small.write_rows(
        place / "ask.jsonl",
        [{"instruction": "a film ?", "response": " good ." if i % 2 else " odd ."} for i in range(40)],
    )
    values = config(place, run__rounds=1)
    values["model"]["name"] = str(place / "gpt2")
    values["task"] = {
        "name": "ask", "train": str(place / "ask.jsonl"), "test": str(place / "ask.jsonl"), "format": "generate",
        "template": "{instruction}", "max_length": 32, "generate_rows": 2, "generate_tokens": 4,
    }  # fmt: skip
    values["partition"] = {"clients": 4, "kind": "iid"}
    done = app.run(values, out=tmp_path / "run")
    scores = done.metrics["best"]["test"]
    assert scores.keys() == {"global", "emulator", "base"}
    assert scores["global"]["perplexity"] < scores["base"]["perplexity"]
    folder = app.export(done.folder, tmp_path / "out", merge=True)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.n_layer == 4


def test_too_few_blocks_are_named(place: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter\.blocks .* blocks 0 to 4.* lower method\.blocks"):
        build(load_config(config(place, method__blocks=3)))
    assert METHOD is Offsite
