"""What people do with a run that is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import small
from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.config import load_config
from fedpeft.core import tree
from fedpeft.core.errors import DataError, ModelError, RequestError, StoreError
from fedpeft.data import sources
from fedpeft.data.load import HubRows
from fedpeft.models.export import import_adapter


@pytest.fixture(scope="module")
def local(place: Path, tmp_path_factory: pytest.TempPathFactory) -> app.Run:
    """A run with personal models; client 005 never had its turn."""
    folder = tmp_path_factory.mktemp("using") / "local"
    config = small.config(place, method__name="local", method__cohort=5, run__rounds=1, method__epochs=5)
    return app.run(config, out=folder)


def accuracy(found: Sequence[dict[str, Any]], labels: Sequence[str]) -> float:
    return float(np.mean([row["label"] == label for row, label in zip(found, labels, strict=True)]))


# --- evaluate ---------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_scores_that_the_run_told(finished: app.Run, local: app.Run) -> None:
    found = app.evaluate(finished.folder)
    best = finished.metrics["best"]
    assert found == {split: best[split] for split in ("validation", "test")} | {"rounds": {"global": best["round"]}}
    own = app.evaluate(local.folder)
    assert own["test"] == local.metrics["final"]["test"] and own["rounds"] == {"global": 1, "personalized": 1}


def test_evaluate_says_after_which_round_each_model_was_taken(place: Path, tmp_path: Path) -> None:
    """A rate that spoils what two rounds have learnt: the best global model is not of the round of the own ones."""
    done = app.run(small.config(place, method__name="fedalt", method__lr=0.3, run__rounds=2), out=tmp_path / "run")
    best = done.metrics["best"]
    assert best["round"] < 2
    found = app.evaluate(done.folder)
    assert found["rounds"] == {"global": best["round"], "personalized": 2}
    assert found["test"]["global"] == best["test"]["global"]
    assert found["test"]["personalized"] == done.metrics["final"]["test"]["personalized"]
    card = (done.folder / "adapter" / "README.md").read_text()
    assert f"| rounds | {best['round']} |" in card and "validation.global" in card and "on.personalized" not in card
    assert "| selected by | personalized validation accuracy |" in card


def test_evaluate_a_file_with_names_or_indices_as_labels(place: Path, tmp_path: Path, finished: app.Run) -> None:
    expected = finished.metrics["best"]["test"]["global"]
    rows = small.rows(42, "test")
    named = small.write_rows(tmp_path / "named.jsonl", rows)
    found = app.evaluate(finished.folder, named)
    assert found["data"].keys() == {"global"}
    assert found.keys() == {"data", "rounds"} and found["rounds"] == {"global": finished.metrics["best"]["round"]}
    assert found["data"]["global"]["accuracy"] == expected["accuracy"]
    assert found["data"]["global"]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    one = small.write_rows(tmp_path / "one.jsonl", [row for row in rows if row["label"] == "weaving"])
    predicted = app.predict(finished.folder, one)
    assert app.evaluate(finished.folder, one)["data"]["global"]["accuracy"] == accuracy(predicted, ["weaving"] * 14)


def test_evaluate_a_file_that_does_not_fit_the_task(place: Path, tmp_path: Path, finished: app.Run) -> None:
    unknown = small.write_rows(tmp_path / "unknown.jsonl", [{"text": "boil the soup", "label": "fishing"}])
    with pytest.raises(DataError, match="label 'fishing' is not one of the 3 labels that the task has: cooking, sail"):
        app.evaluate(finished.folder, unknown)
    unlabelled = small.write_rows(tmp_path / "unlabelled.jsonl", [{"text": "boil the soup"}])
    with pytest.raises(DataError, match="has no column 'label'"):
        app.evaluate(finished.folder, unlabelled)
    with pytest.raises(DataError, match="there is no data file"):
        app.evaluate(finished.folder, tmp_path / "absent.jsonl")


def test_evaluate_a_file_in_a_run_on_a_hub_data_set(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The file is a file and not a split of the hub's data set."""
    splits = {"train": small.rows(120, "train"), "test": small.rows(42, "test")}
    monkeypatch.setattr(sources, "hub_splits", lambda name: tuple(splits))
    monkeypatch.setattr(sources, "read_hub", lambda name, split: HubRows(list(splits[split])))
    config = small.config(place, task__name="owner/trades", task__train=None, task__test="test", run__rounds=1)
    done = app.run(config, out=tmp_path / "run")
    found = app.evaluate(done.folder, place / "test.jsonl")
    assert found["data"]["global"] == pytest.approx(done.metrics["best"]["test"]["global"])
    unknown = small.write_rows(tmp_path / "unknown.jsonl", [{"text": "boil the soup", "label": "fishing"}])
    with pytest.raises(DataError, match="label 'fishing' is not one of the 3 labels"):
        app.evaluate(done.folder, unknown)


def test_pairs_are_evaluated_and_predicted(place: Path, tmp_path: Path) -> None:
    config = small.config(
        place,
        task__train=str(place / "pairs.jsonl"),
        task__test=str(place / "pairs_test.jsonl"),
        task__max_length=24,
        run__rounds=2,
    )
    done = app.run(config, out=tmp_path / "run")
    found = app.evaluate(done.folder, place / "pairs_test.jsonl")
    assert found["data"]["global"] == pytest.approx(done.metrics["best"]["test"]["global"])
    pairs = small.rows(30, "pairs_test", pairs=True)
    predicted = app.predict(done.folder, place / "pairs_test.jsonl")
    assert accuracy(predicted, [row["label"] for row in pairs]) == found["data"]["global"]["accuracy"]
    turned = [{"sentence1": row["sentence2"], "sentence2": row["sentence1"]} for row in pairs]
    swapped = app.predict(done.folder, small.write_rows(tmp_path / "turned.jsonl", turned))
    assert [row["probabilities"] for row in swapped] != [row["probabilities"] for row in predicted]


def test_file_without_the_columns_of_the_task_is_never_read_as_something_else(
    place: Path, tmp_path: Path, finished: app.Run
) -> None:
    config = small.config(place, task__train=str(place / "pairs.jsonl"), task__test=None, run__rounds=1)
    pairs = app.run(config, out=tmp_path / "run")
    for run, rows, column in (
        (pairs, [{"text": "boil the soup"}], "sentence1"),
        (pairs, [{"sentence1": "boil the soup"}], "sentence2"),
        (finished, small.rows(2, "any", pairs=True), "text"),
    ):
        with pytest.raises(DataError, match=f"has no column '{column}', which the task's texts are in; it has: "):
            app.predict(run.folder, small.write_rows(tmp_path / "rows.jsonl", rows))


# --- predict ----------------------------------------------------------------------------------------------------


def test_predictions_need_no_labels_and_are_written_as_lines(place: Path, tmp_path: Path, finished: app.Run) -> None:
    rows = small.rows(42, "test")
    texts = small.write_rows(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in rows])
    found = app.predict(finished.folder, texts, tmp_path / "new" / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()] == found
    for row in found:
        assert list(row["probabilities"]) == list(small.LABELS)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].__getitem__)
    expected = finished.metrics["best"]["test"]["global"]["accuracy"]
    assert accuracy(found, [row["label"] for row in rows]) == pytest.approx(expected)


def test_a_client_predicts_with_its_own_model(place: Path, local: app.Run) -> None:
    """A client that had its turn differs from the global model, one that never had it is the global model."""
    fed = build(load_config(local.folder / "config.yaml"))
    by = {client: app.predict(local.folder, place / "test.jsonl", client=client) for client in ("000", "005", None)}
    assert by["000"] != by[None] == by["005"]
    memory = small.memory(local.folder, "000", "local")
    data = fed.whole("test")
    share = fed.model.logits(memory.params, data).softmax(dim=1)
    order = [i for c in fed.clients for i in fed.partition.test[c].tolist()]
    expected = {row: dict(zip(small.LABELS, share[k].tolist(), strict=True)) for k, row in enumerate(order)}
    for i, row in enumerate(by["000"]):
        assert row["probabilities"] == pytest.approx(expected[i], abs=1e-6)


def test_client_that_does_not_exist(place: Path, finished: app.Run, tmp_path: Path) -> None:
    message = r"client '999' does not exist in this run; it has 6 clients, 000 to 005"
    with pytest.raises(RequestError, match=message):
        app.predict(finished.folder, place / "test.jsonl", client="999")
    with pytest.raises(RequestError, match=message):
        app.export(finished.folder, tmp_path / "out", client="999")


def test_clients_without_models_of_their_own(place: Path, finished: app.Run, tmp_path: Path) -> None:
    message = "clients of fedavg have no models of their own, but share the global one; leave out --client"
    with pytest.raises(RequestError, match=message):
        app.predict(finished.folder, place / "test.jsonl", client="000")
    with pytest.raises(RequestError, match=message):
        app.export(finished.folder, tmp_path / "out", client="000")
    assert not (tmp_path / "out").exists()


def test_a_clients_number_needs_no_zeros_in_front(place: Path, local: app.Run, tmp_path: Path) -> None:
    by = [app.predict(local.folder, place / "test.jsonl", client=client) for client in ("3", "003")]
    assert by[0] == by[1]
    card = (app.export(local.folder, tmp_path / "out", client="03") / "README.md").read_text()
    assert "| client | 003 |" in card


def test_run_without_a_state_is_told_so(place: Path, tmp_path: Path, finished: app.Run) -> None:
    shutil.copytree(finished.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint"))
    for use in (app.evaluate, lambda folder: app.predict(folder, place / "test.jsonl")):
        with pytest.raises(RequestError, match=r"has no state yet; run it first: fedpeft resume"):
            use(tmp_path / "run")
    with pytest.raises(StoreError, match="holds no run"):
        app.evaluate(place)


def test_run_that_goes_on_can_be_used(place: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    def look(progress: Any) -> None:
        if progress.round == 2 and progress.metrics and not seen:
            seen.append(app.evaluate(tmp_path / "run")["test"]["global"]["accuracy"])
            app.predict(tmp_path / "run", place / "test.jsonl")

    app.run(small.config(place), out=tmp_path / "run", progress=look)
    assert len(seen) == 1


# --- export -----------------------------------------------------------------------------------------------------


def test_export_gives_the_best_adapter_and_a_clients_own(place: Path, tmp_path: Path, local: app.Run) -> None:
    fed = build(load_config(local.folder / "config.yaml"))
    best = small.checkpoint(local.folder, "local").best
    own = small.memory(local.folder, "000", "local").params
    assert best is not None
    clients = json.loads((local.folder / "clients.json").read_text())
    for client, expected in ((None, best), ("000", own), ("005", fed.initial)):
        folder = app.export(local.folder, tmp_path / str(client), client=client)
        assert tree.sha256(import_adapter(folder, fed.model)) == tree.sha256(expected)
        card = (folder / "README.md").read_text()
        assert ("| client | 000 |" in card) == (client == "000")
        assert ("metrics.test.global.accuracy" in card) == (client is None)
        score = None if client is None else clients[client]["personalized"]["accuracy"]
        assert ("metrics.test.personalized.accuracy" in card) == (score is not None)
        assert score is None or f"| metrics.test.personalized.accuracy | {score:.4g} |" in card


def test_merged_export_predicts_what_the_run_predicts(place: Path, tmp_path: Path, finished: app.Run) -> None:
    folder = app.export(finished.folder, tmp_path / "merged", merge=True)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = app.predict(finished.folder, place / "test.jsonl")
    for row, text in list(zip(found, (r["text"] for r in small.rows(42, "test")), strict=True))[:6]:
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0].mean(dim=0)
        assert logits.softmax(dim=0).tolist() == pytest.approx(list(row["probabilities"].values()), abs=1e-5)
        assert model.config.id2label[int(logits.argmax())] == row["label"]


def test_what_was_folded_into_the_base_is_exported_as_a_lora_and_started_from(place: Path, tmp_path: Path) -> None:
    config = small.config(place, run__rounds=2, method__lr=1e-2)
    config["method"] = {"name": "flora", **{k: v for k, v in config["method"].items() if k != "name"}}
    done = app.run(config, out=tmp_path / "run")
    with pytest.raises(RequestError, match="give --merge or --rank, not both"):
        app.export(done.folder, tmp_path / "out", merge=True, rank=4)
    rank, scale = 32, 4.0  # the width: nothing is left out
    folder = app.export(done.folder, tmp_path / "out", rank=rank)
    note = json.loads((folder / "fedpeft.json").read_text())
    assert note["factored"]["rank"] == rank and note["factored"]["left_out"] < 1e-6
    again = small.config(place, run__init_from=str(folder))
    again["adapter"] = {**again.get("adapter", {}), "kind": "lora", "rank": rank, "alpha": scale * rank}
    fed, before = build(load_config(again)), build(load_config(done.folder / "config.yaml"))
    best = small.checkpoint(done.folder, "flora").best
    assert best is not None and any(name.startswith("delta.") for name in best)
    data = fed.data["000"]["train"]
    assert (fed.model.logits(fed.initial, data) - before.model.logits(best, data)).abs().max() < 1e-5
    assert (folder / "adapter_config.json").is_file(), "plain peft loads it"


def test_export_keeps_what_is_not_an_export(place: Path, tmp_path: Path, finished: app.Run) -> None:
    (tmp_path / "own.txt").write_text("mine")
    with pytest.raises(RequestError, match="holds something else than an earlier export"):
        app.export(finished.folder, tmp_path)
    assert (tmp_path / "own.txt").read_text() == "mine"
    app.export(finished.folder, tmp_path / "out")
    app.export(finished.folder, tmp_path / "out")  # the same again harms nobody


def test_export_of_something_else_is_replaced_only_when_that_is_asked_for(
    tmp_path: Path, finished: app.Run, local: app.Run
) -> None:
    out = app.export(local.folder, tmp_path / "out", client="000")
    first = (out / "adapter_model.safetensors").read_bytes()
    for folder, merge in ((local.folder, False), (finished.folder, False), (finished.folder, True)):
        with pytest.raises(RequestError, match=r"out holds an export of other parameters, .* with --replace"):
            app.export(folder, out, merge=merge)
    assert (out / "adapter_model.safetensors").read_bytes() == first
    app.export(local.folder, out, replace=True)
    assert (out / "adapter_model.safetensors").read_bytes() != first


def test_head_alone_needs_a_merged_export(place: Path, tmp_path: Path) -> None:
    config = small.config(place, run__rounds=1)
    config["adapter"] = {"kind": "head"}
    done = app.run(config, out=tmp_path / "run")
    with pytest.raises(ModelError, match="export with --merge"):
        app.export(done.folder, tmp_path / "out")
    app.export(done.folder, tmp_path / "out", merge=True)
    again = small.config(place, run__init_from=str(done.folder))
    again["adapter"] = {"kind": "head"}
    best = small.checkpoint(done.folder).best
    assert best is not None and tree.sha256(build(load_config(again)).initial) == tree.sha256(best)


def test_uses_leave_the_run_as_it_is(place: Path, tmp_path: Path, finished: app.Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    app.evaluate(finished.folder)
    app.predict(finished.folder, place / "test.jsonl")
    app.export(finished.folder, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
