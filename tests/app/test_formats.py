"""Runs in the formats cloze and verbalizer, from the configuration to predictions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import small
import tiny_lm
from fedpeft import app
from fedpeft.app.federation import Federation, build
from fedpeft.config import load_config, resolved
from fedpeft.core.errors import ConfigError, DataError, ModelError
from fedpeft.core.fit import SGD, Fit
from fedpeft.models.load import load_base
from fedpeft.planner.cost import shape_of, train_flops
from fedpeft.runs.store import RunFolder

SHARED = Path(os.environ.get("FEDPEFT_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).parent
STORIES = SHARED / "models" / "stories260k"
CLOZE = {"format": "cloze", "label_words": ["soup", "boat", "yarn"], "template": "{text} , it was <mask>"}
VERBALIZER = {"format": "verbalizer", "label_words": ["good", "bad", "odd film"], "max_length": 96}


@pytest.fixture(scope="module")
def models(place: Path) -> Path:
    """A masked and a causal tiny model beside the others of the place."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "tiny")
    tiny_lm.save("bert", tokenizer, place / "masked", len(tokenizer))
    tokenizer = tiny_lm.byte_tokenizer()
    tiny_lm.save("gpt2", tokenizer, place / "causal", len(tokenizer), positions=96)
    return place


def config(place: Path, format: dict[str, Any], **changes: Any) -> dict[str, Any]:
    model = "masked" if format["format"] == "cloze" else "causal"
    values = small.config(place, **({"model__name": str(place / model)} | changes))
    values["task"] = values["task"] | format
    return values


def made(place: Path, format: dict[str, Any], **changes: Any) -> Federation:
    return build(load_config(config(place, format, **changes)))


@pytest.fixture(scope="module", params=["cloze", "verbalizer"])
def ran(models: Path, request: pytest.FixtureRequest) -> app.Run:
    """A finished run of FedAvg with LoRA in each format."""
    format = CLOZE if request.param == "cloze" else VERBALIZER
    changes: dict[str, Any] = {} if request.param == "cloze" else {"run__rounds": 1}
    return app.run(config(models, format, **changes), out=models / f"run-{request.param}")


def test_a_run_learns_without_a_head(ran: app.Run) -> None:
    lines = RunFolder.open(ran.folder).metrics()
    first, last = (lines[i]["train_loss"] for i in (1 if len(lines) > 2 else 0, -1))
    assert last < first if len(lines) > 2 else np.isfinite(last)
    assert ran.manifest["status"] == "finished"
    params = small.params(ran.folder)
    assert params and not any(name.startswith("head") for name in params)
    assert any(t.abs().max() > 0 for name, t in params.items() if name.endswith(".B"))


def test_predictions_and_evaluation_of_a_finished_run(ran: app.Run, models: Path, tmp_path: Path) -> None:
    rows = small.write_rows(tmp_path / "rows.jsonl", small.rows(12, "new"))
    found = app.predict(ran.folder, rows)
    assert len(found) == 12 and set(found[0]["probabilities"]) == set(small.LABELS)
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1, rel=1e-5)
    hits = np.mean([row["label"] == want["label"] for row, want in zip(found, small.rows(12, "new"), strict=True)])
    assert app.evaluate(ran.folder, rows)["data"]["global"]["accuracy"] == pytest.approx(hits)
    assert app.evaluate(ran.folder)["test"] == ran.metrics["best"]["test"]


def test_the_configuration_says_the_template_and_the_words_in_use(ran: app.Run) -> None:
    task = yaml.safe_load((ran.folder / "config.yaml").read_text())["task"]
    assert task["template"] in ("{text} , it was <mask>", "{text} It was %s .") and len(task["label_words"]) == 3
    again = build(load_config(ran.folder / "config.yaml"))
    assert resolved(again.config)["task"] == task


def test_a_resumed_run_has_the_same_bits(models: Path, tmp_path: Path) -> None:
    whole = app.run(config(models, CLOZE), out=tmp_path / "whole")
    part = app.run(config(models, CLOZE, run__rounds=2), out=tmp_path / "part")
    app.resume(part.folder, {"run.rounds": 3})
    assert small.sha(part.folder) == small.sha(whole.folder)


def test_the_loss_may_be_over_the_label_words_alone(models: Path, tmp_path: Path) -> None:
    """A model that knows nothing starts near ln of what its loss is over: the vocabulary or the three words."""
    for over, words in (("vocabulary", len(made(models, CLOZE).base.tokenizer)), ("labels", 3)):
        done = app.run(config(models, {**CLOZE, "loss_over": over}, run__rounds=1), out=tmp_path / over)
        loss = RunFolder.open(done.folder).metrics()[-1]["train_loss"]
        assert np.log(words) * 0.5 < loss < np.log(words) * 1.3


@pytest.mark.parametrize("method", ["local", "centralized"])
def test_personal_and_pooled_methods(models: Path, tmp_path: Path, method: str) -> None:
    done = app.run(config(models, CLOZE, method__name=method, run__rounds=1), out=tmp_path / "run")
    assert done.manifest["status"] == "finished"
    whole = made(models, CLOZE, method__name=method).whole("train")
    assert whole.marks is not None and whole.marks.shape == (len(whole),)


def test_rows_are_the_template_filled_in(models: Path) -> None:
    fed = made(models, CLOZE)
    tokenizer = fed.base.tokenizer
    whole = fed.whole("test")
    wanted = sorted(tokenizer(f"{row['text']} , it was [MASK]")["input_ids"] for row in small.rows(42, "test"))
    assert sorted(t.tolist() for t in whole.tokens) == wanted
    assert whole.marks is not None
    assert all(t[m] == tokenizer.mask_token_id for t, m in zip(whole.tokens, whole.marks, strict=True))
    assert fed.initial.keys() == {n for n in fed.initial if n.startswith("block.")}


def test_pairs_in_both_formats(models: Path) -> None:
    files = {"train": str(models / "pairs.jsonl"), "test": str(models / "pairs_test.jsonl")}
    cloze = made(models, {"format": "cloze", "label_words": ["soup", "salt"], **files, "max_length": 24})
    assert cloze.config.task.template == "{a} ? <mask> , {b}" and cloze.whole("train").segments is None
    verbalizer = made(models, {**VERBALIZER, "label_words": ["good", "bad"], **files})
    assert verbalizer.config.task.template == "{a} {b} They are %s ."
    text = verbalizer.base.tokenizer.decode(verbalizer.whole("train").tokens[0])
    assert text.endswith(" They are")


def test_an_answer_fits_behind_the_longest_text(models: Path) -> None:
    fed = made(models, {**VERBALIZER, "max_length": 20})
    readout, train = fed.model.readout, fed.whole("train")
    longest = max(readout.length(item) for row in range(len(train)) for item in readout.predicting(0, train, row))
    assert longest == 20 and fed.format.reserve == 20 - int(train.lengths.max())


def test_labels_names_are_the_words_for_want_of_others(models: Path) -> None:
    with pytest.raises(
        DataError, match=r"label 'cooking' is not in the model's vocabulary.* give task.label_words, one"
    ):
        made(models, {"format": "cloze"})
    fed = made(models, {"format": "verbalizer", "max_length": 64})
    assert fed.config.task.label_words == ("cooking", "sailing", "weaving")


@pytest.mark.parametrize(
    ("format", "model", "message"),
    [
        (CLOZE, "causal", r"task.format cloze needs a masked language model, and .*causal \(family gpt2\) has no mask"),
        (VERBALIZER, "masked", r"task.format verbalizer needs a causal language model .* is of the family bert; use"),
        (CLOZE, "tiny", r"model .*tiny has no language-model head; use task.format head, or a model with one such as"),
        ({**CLOZE, "label_words": ["soup", "boat", "soups"]}, "masked", r"label word ' soups' is not in the model's"),
    ],
)
def test_what_cannot_be_met_is_said_before_any_training(
    models: Path, format: dict[str, Any], model: str, message: str
) -> None:
    with pytest.raises((ModelError, DataError), match=message):
        made(models, format | {"max_length": 16}, **{"model__name": str(models / model)})


def test_all_problems_of_the_section_come_at_once(models: Path) -> None:
    wrong = {"format": "cloze", "template": "{text} {c}", "label_words": ["a", "a"]}
    with pytest.raises(ConfigError) as caught:
        made(models, wrong, adapter__kind="head", adapter__rank=None)
    said = "\n".join(caught.value.problems)
    for part in ("names {c}", "has 0 times <mask>", "task.label_words is", "adapter.kind: head trains the head"):
        assert part in said, part


def test_positions_of_a_prompt_and_a_text_must_fit(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpeft.models.virtual.positions", lambda spec: 20)
    message = r"adapter.length 20 and task.max_length 16 need 36 positions; the model has 32: lower one of them"
    with pytest.raises(ModelError, match=message):
        made(models, CLOZE)
    assert made(models, {**CLOZE, "max_length": 12}).model.adapter is not None


@pytest.mark.parametrize("format", [CLOZE, VERBALIZER])
def test_check_counts_answers_and_the_head(models: Path, format: dict[str, Any]) -> None:
    fed, found = made(models, format), app.check(config(models, format, method__cohort=0))  # everybody in every round
    readout, train = fed.model.readout, fed.whole("train")
    items = [readout.training(0, train, row) for row in range(len(train))]
    sizes = np.array([len(readout.sequence(item)[0]) for item in items])
    projected = sum(1 if format is CLOZE else len(readout.sequence(i)[0]) - len(i.data.tokens[i.row]) for i in items)
    assert found["task"]["tokens_per_row"] == pytest.approx(sizes.mean())
    shape = shape_of(fed.base.config)
    head = 2 * 2 * shape.hidden * shape.vocab * projected  # forward and backward
    body = train_flops(shape, int(sizes.sum()), int((sizes**2).sum()))
    work = fed.model.cost(Fit(fed.initial, train, [range(len(train))], SGD(0.0)))
    assert train_flops(fed.shape, *work[:2]) == pytest.approx(body + head, rel=1e-3)
    factors = 6 * sum(t.numel() for name, t in fed.initial.items() if name.startswith("block.")) * int(sizes.sum())
    each = (body + head + factors) * 2 / 6
    assert found["estimate"]["flops_per_client_and_round"] == pytest.approx(each, rel=3e-3)
    bare = app.check(config(models, {"format": "head", "max_length": format.get("max_length", 16)}))
    assert found["model"]["trainable_parameters"] < bare["model"]["trainable_parameters"]


# --- real models ------------------------------------------------------------------------------------------------


def test_the_demo_task_has_words_of_the_demo_model(tmp_path: Path) -> None:
    """The package's own task and model: words of one token, and a score above chance before any training."""
    source = {"model": {"device": "cpu"}, "task": {"format": "cloze", "max_length": 32}, "run": {"threads": 1}}
    fed = build(load_config(source))
    assert fed.config.task.template == "<mask> : {text}"
    assert fed.config.task.label_words == ("server", "text", "process", "files", "objects", "numbers", "debug")
    rows = fed.whole("train").take(range(0, len(fed.whole("train")), 4))
    hits = (fed.model.logits(None, rows).argmax(dim=1) == torch.from_numpy(rows.labels)).double().mean().item()
    majority = np.bincount(rows.labels).max() / len(rows)
    assert hits > majority + 0.15
    changes = {"run.rounds": 1, "method.cohort": 2, "method.steps": 4, "run.evaluate_every": 1}
    done = app.run(source, changes, out=tmp_path / "run")
    scores = done.metrics["final"]["test"]
    assert scores["global"]["accuracy"] > scores["majority"]["accuracy"] + 0.1


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model in {STORIES}; set FEDPEFT_DATA to the shared data folder")
def test_a_real_causal_model_with_a_verbalizer(place: Path, tmp_path: Path) -> None:
    """Context and answer are the tokens of the whole sentence also where a tokenizer puts a blank before a text."""
    format = {"format": "verbalizer", "label_words": ["happy", "sad", "very big"], "max_length": 64}
    values = small.config(place, model__name=str(STORIES), run__rounds=1, method__lr=5e-3)
    values["task"] |= format
    fed = build(load_config(values))
    tokenizer = load_base(str(STORIES), device="cpu").tokenizer
    train, readout = fed.whole("train"), fed.model.readout
    texts = {tuple(tokenizer(f"{row['text']} It was")["input_ids"]): row for row in small.rows(120, "train")}
    for row in range(12):
        text = texts[tuple(train.tokens[row].tolist())]["text"]
        for item, word in zip(readout.predicting(0, train, row), format["label_words"], strict=True):
            whole = [*tokenizer(f"{text} It was {word} .")["input_ids"], tokenizer.eos_token_id]
            assert readout.sequence(item)[0].tolist() == whole
    done = app.run(values, out=tmp_path / "run")
    assert done.manifest["status"] == "finished"
    assert json.loads((done.folder / "manifest.json").read_text())["rounds_done"] == 1
