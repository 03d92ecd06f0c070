"""A run from its configuration to its folder: what lies there, and that it can be repeated."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import small
from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.app.scoring import Scored
from fedpeft.config import load_config
from fedpeft.core import records, tree
from fedpeft.core.errors import ModelError, RequestError, StoreError
from fedpeft.core.exchange import Update, Weights
from fedpeft.models.export import import_adapter
from fedpeft.models.load import load_base
from fedpeft.progress import Progress
from fedpeft.runs.store import RunFolder

METHODS = ("fedavg", "fedprox", "scaffold", "fedopt", "local", "centralized")


@pytest.fixture
def folder(finished: app.Run) -> RunFolder:
    return RunFolder.open(finished.folder)


# --- the folder -------------------------------------------------------------------------------------------------


def test_folder_holds_what_is_promised_and_only_its_owner_reads_the_state(folder: RunFolder) -> None:
    names = {path.name for path in folder.path.iterdir()}
    files = "config.yaml manifest.json partition.json metrics.jsonl exchanges.jsonl clients.json report.html run.log"
    assert names == {*files.split(), "checkpoint", "adapter", ".lock"}
    for path in folder.path.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    for path in (folder.path / "checkpoint").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert [path.name for path in (folder.path / "checkpoint").iterdir()] == ["000004"]  # set-up and three rounds


def test_manifest_has_what_it_takes_to_check_a_repetition(folder: RunFolder) -> None:
    found = folder.manifest()
    assert {"fedpeft", "python", "torch", "transformers"} <= found["versions"].keys()
    assert {"system", "processor", "cores", "threads", "gpu"} == found["machine"].keys()
    assert (found["status"], found["rounds_done"], found["seed"], found["error"]) == ("finished", 3, 0, None)
    assert found["params_sha256"] == tree.sha256(small.params(folder.path))
    for key in ("data_sha256", "model_sha256", "partition_sha256", "initial_sha256"):
        assert len(found[key]) == 64
    assert found["partition_sha256"] == folder.partition()["sha256"]
    assert found["started"] <= found["finished"]
    assert found["peak_memory_bytes"] > 1e7
    for which in ("final", "best"):
        for split in ("validation", "test"):
            assert {"global", "majority", "label_prior"} == found["metrics"][which][split].keys()


def test_one_line_per_round_and_their_sums_are_the_totals(folder: RunFolder) -> None:
    lines, exchanges, manifest = folder.metrics(), folder.exchanges(), folder.manifest()
    keys = {
        "round", "train_loss", "seconds", "simulated_seconds", "bytes_down", "bytes_up", "clients", "lost_clients",
        "metrics",
    }  # fmt: skip
    assert all(line.keys() == keys for line in lines)
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert [line["clients"] for line in lines] == [0, 4, 4, 4]
    assert [set(line["metrics"]) for line in lines] == [{"validation"}] * 3 + [{"validation", "test"}]
    assert lines[0]["train_loss"] is None and all(line["train_loss"] > 0 for line in lines[1:])
    for key in ("bytes_down", "bytes_up"):
        assert manifest[key] == sum(line[key] for line in lines) == sum(line[key] for line in exchanges) > 0
    for key in ("seconds", "simulated_seconds"):
        assert manifest[key] == pytest.approx(math.fsum(line[key] for line in lines), rel=1e-12)
    slowest = [max(e["simulated_seconds"] for e in exchanges if e["round"] == r) for r in (1, 2, 3)]
    assert [line["simulated_seconds"] for line in lines[1:]] == pytest.approx(slowest, rel=1e-12)


def test_one_line_per_exchange_and_client_with_the_lengths_of_the_codec(
    place: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    answers: list[int] = []
    encode = records.encode

    def counted(record: Any) -> bytes:
        data = encode(record)
        if isinstance(record, Update):
            answers.append(len(data))
        return data

    monkeypatch.setattr(records, "encode", counted)
    app.run(small.config(place, run__cohort_batching="off", run__rounds=1), out=tmp_path / "run")
    monkeypatch.undo()
    lines = RunFolder.open(tmp_path / "run").exchanges()
    keys = {
        "number", "round", "exchange", "attempt", "client", "bytes_down", "bytes_up", "steps", "examples", "tokens",
        "pairs", "labels", "seconds", "simulated_seconds", "lost",
    }  # fmt: skip
    assert all(line.keys() == keys for line in lines)
    assert [line["bytes_up"] for line in lines] == answers
    sent = Weights(small.params(tmp_path / "run"))  # not the params that were sent, but their layout
    assert {line["bytes_down"] for line in lines} == {len(records.encode(sent))}
    partition = RunFolder.open(tmp_path / "run").partition()["clients"]
    for line in lines:
        n = len(partition[line["client"]]["train"])
        assert (line["examples"], line["steps"]) == (2 * n, 2 * math.ceil(n / 8))
        held = partition[line["client"]]["label_counts"]["train"]
        assert line["labels"] == [2 * count for count in held][: len(line["labels"])] and sum(line["labels"]) == 2 * n


def test_clients_file_has_every_clients_rows_scores_and_losses(folder: RunFolder) -> None:
    clients = json.loads((folder.path / "clients.json").read_text())
    partition = folder.partition()["clients"]
    assert clients.keys() == partition.keys()
    for client, entry in clients.items():
        assert entry["rows"] == len(partition[client]["train"]) == sum(entry["label_counts"])
        assert entry["label_counts"] == partition[client]["label_counts"]["train"]
        assert 0 <= entry["global"]["accuracy"] <= 1 and entry["lost"] == 0


def test_adapter_folder_holds_the_best_validated_parameters(place: Path, finished: app.Run) -> None:
    fed = build(load_config(finished.folder / "config.yaml"))
    best = small.checkpoint(finished.folder).best
    assert best is not None
    assert tree.sha256(import_adapter(finished.folder / "adapter", fed.model)) == tree.sha256(best)
    lines = RunFolder.open(finished.folder).metrics()
    scores = [line["metrics"]["validation"]["global"]["accuracy"] for line in lines]
    found = finished.metrics["best"]
    assert found["round"] == scores.index(max(scores))
    assert found["validation"]["global"]["accuracy"] == max(scores)


def test_folder_that_holds_something_is_refused(place: Path, finished: app.Run) -> None:
    before = small.sha(finished.folder)
    with pytest.raises(StoreError, match="not an empty folder"):
        app.run(small.config(place), out=finished.folder)
    assert small.sha(finished.folder) == before


def test_without_a_folder_the_run_lies_under_runs(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    made = app.run(small.config(place, run__rounds=1))
    assert made.folder.parent == Path("runs") and made.folder.name.startswith("fedavg-trades-")


def test_run_learns_the_task(place: Path, tmp_path: Path) -> None:
    done = app.run(small.config(place, method__epochs=3, run__rounds=6), out=tmp_path / "run")
    test = done.metrics["best"]["test"]
    assert test["global"]["accuracy"] > 0.75 > 0.4 > test["majority"]["accuracy"]
    lines = RunFolder.open(done.folder).metrics()
    assert lines[-1]["train_loss"] < 0.6 * lines[1]["train_loss"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_end_to_end(place: Path, tmp_path: Path, method: str) -> None:
    done = app.run(small.config(place, method__name=method, run__rounds=2), out=tmp_path / "run")
    assert done.manifest["status"] == "finished"
    expected = {"global", "majority", "label_prior"} | ({"personalized"} if method == "local" else set())
    assert done.metrics["final"]["test"].keys() == expected
    clients = {line["client"] for line in RunFolder.open(done.folder).exchanges()}
    if method == "centralized":
        assert clients == {"pooled"}
        assert RunFolder.open(done.folder).exchanges()[0]["examples"] > 0
    else:
        assert clients <= RunFolder.open(done.folder).partition()["clients"].keys()


def test_local_models_beat_the_untrained_global_one(place: Path, tmp_path: Path) -> None:
    done = app.run(small.config(place, method__name="local", method__cohort=0, run__rounds=5), out=tmp_path / "run")
    test = done.metrics["final"]["test"]
    assert test["personalized"]["accuracy"] > test["global"]["accuracy"] + 0.1
    assert done.manifest["evaluation_bytes"] > 0
    assert done.manifest["bytes_down"] < 20_000 < done.manifest["evaluation_bytes"]  # no parameter travels in a round
    entry = json.loads((done.folder / "clients.json").read_text())["000"]
    assert {"global", "personalized"} <= entry.keys()


def test_personal_scores_of_the_best_round_are_not_made_up(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The memories of an earlier round are gone, so its test scores have no personal part."""
    values = iter([0.1, 0.5, 0.4, 0.3])
    monkeypatch.setattr(Scored, "selected", lambda self, metric: next(values))
    done = app.run(small.config(place, method__name="local"), out=tmp_path / "run")
    best = done.metrics["best"]
    assert best["round"] == 1
    assert "personalized" in best["validation"] and best["test"].keys() == {"global", "majority", "label_prior"}
    assert "personalized" in done.metrics["final"]["test"]


def test_head_alone_is_saved_as_a_whole_model(place: Path, tmp_path: Path) -> None:
    config = small.config(place, run__rounds=1)
    config["adapter"] = {"kind": "head"}
    done = app.run(config, out=tmp_path / "run")
    assert done.manifest["trainable_parameters"] == 3 * 32 + 3
    assert transformers.AutoModelForTokenClassification.from_pretrained(done.folder / "adapter").num_labels == 3


def test_adapter_that_cannot_be_exported_does_not_spoil_the_run(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise ModelError("transformers has no classifier for it")

    monkeypatch.setattr("fedpeft.app.journal.export_adapter", refuse)
    told: list[Progress] = []
    done = app.run(small.config(place, run__rounds=1), out=tmp_path / "run", progress=told.append)
    assert done.manifest["status"] == "finished" and not (done.folder / "adapter").exists()
    assert any("transformers has no classifier" in (p.message or "") for p in told)


def test_load_model_gives_the_scores_of_the_run(place: Path, finished: app.Run) -> None:
    """The merged token classifier, pooled over real tokens, predicts what `predict` does."""
    model = finished.load_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "tiny")
    texts = [row["text"] for row in small.rows(42, "test")]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    mask = batch["attention_mask"][:, :, None]
    pooled = (logits * mask).sum(dim=1) / mask.sum(dim=1)
    found = app.predict(finished.folder, place / "test.jsonl")
    expected = torch.tensor([list(row["probabilities"].values()) for row in found])
    assert torch.allclose(pooled.softmax(dim=1), expected, atol=1e-5)
    assert model.config.id2label[0] == "cooking"


# --- the same again ---------------------------------------------------------------------------------------------


def test_same_configuration_gives_the_same_bits_and_another_seed_others(
    place: Path, finished: app.Run, tmp_path: Path
) -> None:
    app.run(small.config(place), out=tmp_path / "again")
    app.run(small.config(place, run__seed=1), out=tmp_path / "other")
    assert small.sha(tmp_path / "again") == small.sha(finished.folder) != small.sha(tmp_path / "other")
    assert small.story(tmp_path / "again") == small.story(finished.folder)


def test_saved_configuration_is_resolved_and_repeats_the_run(finished: app.Run, tmp_path: Path) -> None:
    saved = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert saved["run"]["cohort_batching"] == 6 and saved["run"]["threads"] == 1
    assert saved["method"]["head_lr"] is None and saved["adapter"]["targets"] == ["query", "value"]
    app.run(finished.folder / "config.yaml", out=tmp_path / "again")
    assert small.sha(tmp_path / "again") == small.sha(finished.folder)
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text()) == saved


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "local"])
def test_cohort_training_agrees_with_training_one_by_one(place: Path, tmp_path: Path, method: str) -> None:
    for setting in ("off", 1, 3, "auto"):
        config = small.config(place, method__name=method, run__cohort_batching=setting, run__rounds=2)
        app.run(config, out=tmp_path / str(setting))
    assert small.sha(tmp_path / "off") == small.sha(tmp_path / "1")
    for setting in ("3", "auto"):
        for one, other in zip(small.story(tmp_path / "off")[0], small.story(tmp_path / setting)[0], strict=True):
            assert one["bytes_down"] == other["bytes_down"]
            if one["round"]:
                assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        alone, together = (small.params(tmp_path / name, method) for name in ("off", setting))
        gap = tree.norm(tree.sub(alone, together)) / tree.norm(alone)
        assert gap < 1e-3
    saved = yaml.safe_load((tmp_path / "off" / "config.yaml").read_text())
    assert saved["run"]["cohort_batching"] == 1


def test_base_is_loaded_once_for_all_runs_of_a_process(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    model = small.write_model(tmp_path / "fresh")
    loads: list[str] = []
    load = transformers.AutoModel.from_pretrained.__func__

    def counted(cls: Any, source: str, *arguments: Any, **named: Any) -> Any:
        loads.append(source)
        return load(cls, source, *arguments, **named)

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", classmethod(counted))
    for name in ("fedavg", "local"):
        app.run(small.config(place, model__name=str(model), method__name=name, run__rounds=1), out=tmp_path / name)
    app.evaluate(tmp_path / "local")
    assert loads == [str(model)]


def test_runs_leave_the_base_and_each_other_alone(place: Path, finished: app.Run, tmp_path: Path) -> None:
    """A run between two equal ones changes nothing, and no bit of the base."""
    base = load_base(str(place / "tiny"), device="cpu")
    before = tree.sha256(copy.deepcopy(base.module.state_dict()))
    app.run(small.config(place, method__name="scaffold", run__seed=5), out=tmp_path / "between")
    app.run(small.config(place), out=tmp_path / "after")
    assert small.sha(tmp_path / "after") == small.sha(finished.folder)
    assert tree.sha256(base.module.state_dict()) == before


def test_threads_of_the_process_are_given_back(place: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    app.run(
        small.config(place, run__threads=2, run__rounds=1, method__cohort=1, method__steps=1),
        out=tmp_path / "run",
        progress=lambda _: seen.append(torch.get_num_threads()),
    )
    assert set(seen) == {2} and torch.get_num_threads() == before
    assert RunFolder.open(tmp_path / "run").manifest()["machine"]["threads"] == 2
    config = small.config(place, run__rounds=1)
    del config["run"]["threads"]
    app.run(config, out=tmp_path / "auto")
    assert RunFolder.open(tmp_path / "auto").load_config()["run"]["threads"] == before


# --- what people are told ---------------------------------------------------------------------------------------


def test_listener_hears_rounds_losses_bytes_and_scores(place: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    done = app.run(small.config(place, run__evaluate_every=2), out=tmp_path / "run", progress=told.append)
    rounds = [p.round for p in told]
    assert rounds == sorted(rounds) and rounds[-1] == 3 and {p.rounds for p in told} == {3}
    assert told[-1].bytes_down == done.manifest["bytes_down"] and told[-1].bytes_up == done.manifest["bytes_up"]
    scored = [p for p in told if p.metrics]
    assert [p.round for p in scored] == [0, 2, 3]
    assert "test" in scored[-1].metrics  # type: ignore[operator]
    assert next(p.loss for p in told if p.round == 3) is not None
    lines = RunFolder.open(done.folder).metrics()
    assert ["metrics" in line for line in lines] == [True, False, True, True]


def test_tensorboard_gets_every_round_and_goes_on_after_a_resume(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    app.run(small.config(place, run__trackers=["tensorboard"], run__rounds=2), out=tmp_path / "run")
    app.resume(tmp_path / "run", {"run.rounds": 4})
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train_loss")
    lines = {line["round"]: line["train_loss"] for line in RunFolder.open(tmp_path / "run").metrics()}
    assert {s.step: pytest.approx(s.value, rel=1e-6) for s in scalars} == {r: lines[r] for r in (1, 2, 3, 4)}
    assert "metrics/validation/global/accuracy" in events.Tags()["scalars"]


def test_tracker_that_is_not_installed_is_told_before_anything_is_trained(
    place: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RequestError, match="fedpeft\\[trackers\\]"):
        app.run(small.config(place, run__trackers=["tensorboard"]), out=tmp_path / "run")
