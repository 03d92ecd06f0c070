"""Whole runs of the format generate: perplexity selects, texts are said at the end, and every command knows them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import small
import tiny_lm
from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.config import load_config, resolved
from fedpeft.core.errors import ConfigError, DataError, ModelError
from fedpeft.core.rng import rng_for
from fedpeft.runs.store import RunFolder
from fedpeft.runs.texts import rouge_available

SHARED = Path(os.environ.get("FEDPEFT_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).parent
STORIES = SHARED / "models" / "stories260k"
EVIL = "<script>alert(1)</script>"


def rows(n: int, place: str) -> list[dict[str, Any]]:
    """Instructions that are answered by a word that the category decides; one holds what a page must escape."""
    rng = rng_for(0, "generate", place)
    found = []
    for i in range(n):
        word = str(rng.choice(["film", "time", "once"]))
        found.append(
            {
                "instruction": f"a {word} ?",
                "context": EVIL if i == 1 else "",
                "response": " good ." if word == "film" else " bad .",
                "references": [" odd ."],
                "category": word,
                "who": f"p{i % 4}",
            }
        )
    return found


@pytest.fixture(scope="module")
def models(place: Path) -> Path:
    """Tiny random causal models beside the encoder of the place, and rows."""
    tokenizer = tiny_lm.byte_tokenizer()
    for family in ("llama", "gpt2"):
        tiny_lm.save(family, tokenizer, place / family, len(tokenizer), positions=96)
    small.write_rows(place / "ask.jsonl", rows(72, "train"))
    small.write_rows(place / "ask_test.jsonl", rows(24, "test"))
    return place


def config(place: Path, **changes: Any) -> dict[str, Any]:
    values = small.config(place, model__name=str(place / "llama"), partition__kind="iid")
    values["task"] = {
        "name": "ask", "train": str(place / "ask.jsonl"), "test": str(place / "ask_test.jsonl"), "format": "generate",
        "template": "{instruction} {context}", "max_length": 64, "generate_rows": 5, "generate_tokens": 6,
    }  # fmt: skip
    return small.changed(values, changes)


@pytest.fixture(scope="module")
def ran(models: Path) -> app.Run:
    return app.run(config(models), out=models / "run-generate")


def test_the_lowest_perplexity_is_the_best(ran: app.Run) -> None:
    lines = RunFolder.open(ran.folder).metrics()
    curve = {line["round"]: line["metrics"]["validation"]["global"]["perplexity"] for line in lines}
    assert ran.metrics["best"]["round"] == min(curve, key=lambda r: curve[r]) and curve[3] < curve[0] / 2
    for split in ("validation", "test"):
        scores = ran.metrics["best"][split]
        assert scores.keys() == {"global", "base"} and scores["global"]["perplexity"] < scores["base"]["perplexity"]
        assert scores["global"]["perplexity"] == pytest.approx(np.exp(scores["global"]["loss"]))
    first = lines[0]["metrics"]["validation"]  # LoRA starts at zero
    assert first["global"]["perplexity"] == pytest.approx(first["base"]["perplexity"], rel=1e-6)
    clients = json.loads((ran.folder / "clients.json").read_text())
    assert all("perplexity" in own["global"] for own in clients.values())


def test_texts_are_said_at_the_end_and_shown_escaped(ran: app.Run) -> None:
    samples = RunFolder.open(ran.folder).samples()
    assert len(samples) == 5 and samples[0].keys() == {"instruction", "context", "references", "global", "base"}
    assert all(one["references"][-1] == " odd ." for one in samples)
    scores = ran.metrics["best"]["test"]
    assert 0 <= scores["global"]["exact_match"] <= 1 and ("rouge_l" in scores["global"]) == rouge_available()
    assert "exact_match" in scores["base"]
    page = (ran.folder / "report.html").read_text()
    assert "What it says" in page and "the untrained base" in page and "majority" not in page
    assert "lower is better" in page and "<script" not in page


def test_evaluation_predictions_and_exports(ran: app.Run, models: Path, tmp_path: Path) -> None:
    found = app.evaluate(ran.folder)
    best = ran.metrics["best"]["test"]
    assert found["test"]["global"]["perplexity"] == pytest.approx(best["global"]["perplexity"], rel=1e-6)
    alone = app.evaluate(ran.folder, models / "ask_test.jsonl")["data"]["global"]
    assert alone["perplexity"] == pytest.approx(best["global"]["perplexity"], rel=1e-5)
    file = small.write_rows(tmp_path / "new.jsonl", [{"instruction": "a film ?"}, {"instruction": "a time ?"}])
    said = app.predict(ran.folder, file, tmp_path / "said.jsonl")
    assert [row.keys() for row in said] == [{"text"}] * 2
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 2
    adapter = json.loads((ran.folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "CAUSAL_LM"
    assert "AutoModelForCausalLM" in (ran.folder / "adapter" / "README.md").read_text()
    merged = app.export(ran.folder, tmp_path / "merged", merge=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    ids = tokenizer("a film ? ", return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    assert tokenizer.decode(out, skip_special_tokens=True).strip() == said[0]["text"]
    assert type(ran.load_model()).__name__ == "LlamaForCausalLM"
    again = build(load_config(config(models, run__init_from=str(ran.folder))))
    assert any(t.abs().max() > 0 for name, t in again.initial.items() if name.endswith(".B"))


def test_a_resumed_run_is_the_uninterrupted_one(ran: app.Run, models: Path, tmp_path: Path) -> None:
    done = app.run(config(models, run__rounds=1), out=tmp_path / "run")
    assert load_config(resolved(load_config(config(models)))) == load_config(config(models))
    app.resume(done.folder, {"run.rounds": 3})
    assert small.sha(done.folder) == small.sha(ran.folder)
    assert RunFolder.open(done.folder).samples() == RunFolder.open(ran.folder).samples()


def test_personal_models_say_their_own(models: Path, tmp_path: Path) -> None:
    values = config(models, method__name="local", run__rounds=1, partition__kind="natural", partition__by="who")
    done = app.run(values, out=tmp_path / "run")
    assert done.metrics["final"]["test"].keys() == {"global", "personalized", "base"}
    file = small.write_rows(tmp_path / "new.jsonl", [{"instruction": "a film ?", "context": "it was"}])
    assert app.predict(done.folder, file, client="001")[0].keys() == {"text"}
    assert "p1" in (done.folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("method", "adapter"),
    [("fibecfed", "lora"), ("centralized", "lora"), ("fedavg", "prompt"), ("fedpeptao", "prefix")],
)
def test_methods_that_ask_more_of_a_model(method: str, adapter: str, models: Path, tmp_path: Path) -> None:
    values = config(models, run__rounds=1, task__generate_rows=2)
    values["model"]["name"] = str(models / "gpt2")
    values["adapter"] = {"kind": adapter} | ({} if adapter == "lora" else {"length": 3})
    values["method"] = {"name": method, "lr": 1e-2} | ({} if method == "centralized" else {"cohort": 2})
    values["method"] |= {"schedule": "length"} if method == "fedavg" else {}
    values["method"] |= (
        {"warmup_rounds": 1, "calibration_cohort": 1, "score_cohort": 2, "lanczos_steps": 2, "power_steps": 1}
        if method == "fedpeptao"
        else {}
    )
    done = app.run(values, out=tmp_path / "run")
    assert done.manifest["status"] == "finished" and np.isfinite(done.metrics["best"]["test"]["global"]["perplexity"])
    assert RunFolder.open(done.folder).samples()[0]["global"] is not None


def test_a_study_takes_the_lowest_perplexity(models: Path, tmp_path: Path) -> None:
    study = {
        "base": config(models, run__rounds=1, task__generate_rows=0),
        "methods": [
            {"label": "Still", "name": "fedavg", "lr": 1e-6},
            {"label": "Moving", "name": "fedavg"},
            {"label": "Alone", "name": "local"},
        ],
        "seeds": [0],
        "grid": {"method.epochs": [1, 3]},
        "target": {"share_of": "Moving", "share": 0.9},
    }
    found = app.compare(study, out=tmp_path / "study")
    assert not found.failures and [row["label"] for row in found.table][-1] == "Still"
    rows = {row["label"]: row for row in found.table}
    best, worst = rows["Moving"], rows["Still"]
    assert [row["mean"] for row in found.table] == sorted(row["mean"] for row in found.table)
    assert rows["Alone"]["of"] == "personal" and "label_prior" not in rows["Alone"]
    assert best["mean"] < worst["mean"] <= best["base"] * 1.01 and best["chosen"] == {"epochs": 3}
    assert best["bytes_to_target"] and worst["bytes_to_target"] is None
    page = found.report.read_text()
    assert page.index(">Moving<") < page.index(">Still<") and "the untrained base" in page


def test_the_likeliest_choice_can_select(models: Path, tmp_path: Path) -> None:
    """The instruction tells the answer; after a few rounds the choice of least mean loss is the right one."""
    for name, n in (("train", 72), ("test", 24)):
        asked = [{**row, "choices": [" bad .", " good ."]} for row in rows(n, name)]
        small.write_rows(tmp_path / f"{name}.jsonl", asked)
    values = config(models, task__metric="choice_accuracy", task__generate_rows=0)
    values["task"] |= {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    done = app.run(values, out=tmp_path / "run")
    scores = done.metrics["best"]["test"]
    assert scores["global"]["choice_accuracy"] > max(0.8, scores["base"]["choice_accuracy"])
    assert "perplexity" in scores["global"] and not RunFolder.open(done.folder).samples()


def test_check_tells_of_answers(models: Path) -> None:
    found = app.check(config(models, task__max_length=7))
    assert found["task"]["metric"] == "perplexity" and found["task"]["rows_with_cut_answer"] > 0
    assert 0 < found["task"]["tokens_per_answer"] < found["task"]["tokens_per_row"] <= 7
    assert found["estimate"]["memory_bytes"] > 0


def test_plain_text_by_speaker(models: Path, tmp_path: Path) -> None:
    texts = [{"speaker": f"s{i % 3}", "text": f"it was a good time {i} ."} for i in range(30)]
    file = small.write_rows(tmp_path / "plain.jsonl", texts)
    values = config(models, run__rounds=1, partition__kind="natural", partition__by="speaker")
    values["method"]["cohort"] = 0
    values["task"] = {"train": str(file), "test": str(file), "format": "generate", "generate_rows": 3, "max_length": 32}
    done = app.run(values, out=tmp_path / "run")
    scores = done.metrics["best"]["test"]["global"]
    assert scores.keys() == {"perplexity", "loss", "bits_per_byte"}
    fed = build(load_config(done.folder / "config.yaml"))
    data, tokenizer = fed.whole("test"), fed.base.tokenizer
    pairs = zip(data.tokens, data.starts, strict=True)
    written = [tokenizer.decode(own[start:], skip_special_tokens=True).encode() for own, start in pairs]
    bits = scores["loss"] * (data.lengths - data.starts).sum() / np.log(2)
    assert scores["bits_per_byte"] == pytest.approx(bits / sum(map(len, written)))
    samples = RunFolder.open(done.folder).samples()
    assert samples[0]["instruction"].startswith("it was a") and len(samples) == 3
    assert app.predict(done.folder, file)[0].keys() == {"text"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model__name": "tiny"}, ModelError, "generate needs a causal language model .* family bert"),
        ({"partition__kind": "dirichlet", "task__label": "none", "task__train": "who"}, DataError, "skews categories"),
        ({"task__format": "head", "task__template": None}, DataError, "no column 'text'.*task.format generate"),
        ({"task__end": "no token"}, DataError, "task.end 'no token' is not one token"),
        ({"task__template": "chat"}, DataError, "no chat template"),
        ({"task__metric": "accuracy"}, ConfigError, "task.metric: accuracy is not for format generate; use one of p"),
        ({"task__format": "head", "task__metric": "perplexity"}, ConfigError, "perplexity is not for format head"),
        ({"adapter__kind": "head"}, ConfigError, "format generate has none"),
        ({"task__metric": "choice_accuracy", "run__stop": {"score": 3}}, ConfigError, "is a share; give a number"),
        ({"task__max_length": 3, "task__template": "{instruction} good bad"}, DataError, "template alone takes"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], error: type[Exception], message: str, models: Path) -> None:
    values = config(models)
    if changes.get("model__name") == "tiny":
        changes = {"model__name": str(models / "tiny")}
    if changes.get("task__train") == "who":
        plain = [{key: row[key] for key in ("instruction", "response")} for row in rows(40, "plain")]
        changes = {**changes, "task__train": str(small.write_rows(models / "plain.jsonl", plain)), "task__test": None}
    small.changed(values, changes)
    if "adapter__kind" in changes:
        del values["adapter"]["rank"]
    with pytest.raises(error, match=message):
        build(load_config(values))


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model in {STORIES}; set FEDPEFT_DATA to the shared data folder")
def test_a_real_model_is_better_than_chance_and_learns(tmp_path: Path) -> None:
    """stories260k knows English stories; a few steps on the example's rows bring it to a third of its perplexity."""
    root = Path(__file__).parents[2] / "examples"
    values = {
        "model": {"name": str(STORIES), "device": "cpu"},
        "task": {
            "train": str(root / "stories.jsonl"), "test": str(root / "stories_test.jsonl"), "format": "generate",
            "template": "{instruction}\n{context}\n", "max_length": 160, "generate_rows": 2, "end": "<s>",
        },
        "partition": {"kind": "natural", "by": "animal"},
        "method": {"name": "fedavg", "cohort": 3, "steps": 6, "batch_size": 8, "lr": 1e-2},
        "run": {"rounds": 2, "evaluate_every": 2},
    }  # fmt: skip
    done = app.run(values, out=tmp_path / "run")
    scores = done.metrics["best"]["test"]
    assert scores["base"]["perplexity"] < 10  # chance: 512
    assert scores["global"]["perplexity"] < scores["base"]["perplexity"] / 3
    assert "One day" in RunFolder.open(done.folder).samples()[0]["global"]
