"""The command line with nothing replaced: real training of a tiny model on a few rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.testing
import yaml

from fedpeft.cli import app as command_line
from fedpeft.runs.store import RunFolder

WORDS = {
    "cooking": ["boil", "the", "soup", "with", "salt", "and", "butter", "in", "a", "large", "pot"],
    "sailing": ["hoist", "the", "main", "sail", "and", "steer", "the", "boat", "into", "the", "wind"],
}
ROUNDS = 3


def call(*arguments: Any, code: int = 0) -> typer.testing.Result:
    result = typer.testing.CliRunner().invoke(command_line, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def write_rows(path: Path, n: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    lines = ["text,label"]
    for i in range(n):
        label = sorted(WORDS)[i % 2]
        lines.append(f"{' '.join(rng.choice(WORDS[label], size=6))},{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_model(folder: Path) -> Path:
    """A random BERT of two small blocks with a vocabulary of the words above."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    words = sorted({word for words in WORDS.values() for word in words})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = BertConfig(
        vocab_size=5 + len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(shape, add_pooling_layer=False).save_pretrained(folder)
    return folder


def write_config(folder: Path, **changes: Any) -> Path:
    config = {
        "model": {"name": "tiny"},
        "task": {"name": "trades", "train": "train.csv", "test": "test.csv", "max_length": 16},
        "partition": {"clients": 4, "size_alpha": 20},
        "method": {"cohort": 2, "steps": 2, "batch_size": 4, "lr": 5e-3},
        "run": {"rounds": ROUNDS, "evaluate_every": 1, "threads": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config.setdefault(section, {})[name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a configuration and a finished run."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "tiny")
    write_rows(folder / "train.csv", 60, 0)
    write_rows(folder / "test.csv", 20, 1)
    shown = call("run", write_config(folder), "--out", folder / "run")
    assert shown.stdout.splitlines()[0] == f"folder: {folder / 'run'}"
    return folder


def manifest(folder: Path) -> dict[str, Any]:
    return RunFolder.open(folder).manifest()


def test_run_leaves_the_folder_that_is_promised(place: Path) -> None:
    run = place / "run"
    files = "config.yaml manifest.json partition.json metrics.jsonl exchanges.jsonl clients.json report.html run.log"
    for name in (*files.split(), "checkpoint", "adapter/adapter_config.json", "adapter/README.md"):
        assert (run / name).exists(), name
    found = manifest(run)
    assert (found["status"], found["rounds_done"]) == ("finished", ROUNDS)
    lines = RunFolder.open(run).metrics()
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1))
    assert {"validation", "test"} <= set(lines[-1]["metrics"])
    exchanges = RunFolder.open(run).exchanges()
    for key in ("bytes_down", "bytes_up"):
        assert found[key] == sum(line[key] for line in lines) == sum(line[key] for line in exchanges) > 0


def test_report_page_tells_the_run(place: Path) -> None:
    page = (place / "run" / "report.html").read_text()
    best = manifest(place / "run")["metrics"]["best"]
    shown = f"<b>{best['test']['global']['accuracy']:.3f}</b><span>test accuracy, global model of round {best['round']}"
    assert f"{shown}</span>" in page
    for heading in ("Who has which labels", "Clients, the worst first", "What it cost", "Configuration", "Manifest"):
        assert f"<h2>{heading}</h2>" in page
    assert "cooking" in page and manifest(place / "run")["params_sha256"] in page


def test_saved_configuration_repeats_the_run_bit_for_bit(place: Path) -> None:
    again = json.loads(call("run", place / "run" / "config.yaml", "--out", place / "again", "--json").stdout)
    assert again["manifest"]["params_sha256"] == manifest(place / "run")["params_sha256"]


def test_run_that_is_prolonged_equals_the_long_run(place: Path) -> None:
    call("run", place / "config.yaml", "--set", "run.rounds=1", "--out", place / "short")
    assert manifest(place / "short")["params_sha256"] != manifest(place / "run")["params_sha256"]
    shown = call("resume", place / "short", "--set", f"run.rounds={ROUNDS}")
    assert manifest(place / "short")["params_sha256"] == manifest(place / "run")["params_sha256"]
    assert manifest(place / "run")["params_sha256"] in shown.stdout


def test_resume_refuses_what_would_make_it_another_run(place: Path) -> None:
    assert "method.lr cannot change" in call("resume", place / "run", "--set", "method.lr=1", code=2).stderr


def test_evaluate_gives_the_scores_of_the_run_and_those_of_a_file(place: Path) -> None:
    scores = json.loads(call("evaluate", place / "run", "--json").stdout)
    assert scores["test"]["global"] == manifest(place / "run")["metrics"]["best"]["test"]["global"]
    of_file = json.loads(call("evaluate", place / "run", "--data", place / "test.csv", "--json").stdout)
    assert of_file["data"]["global"]["accuracy"] == pytest.approx(scores["test"]["global"]["accuracy"])


def test_predictions_are_probabilities_and_agree_with_the_score(place: Path) -> None:
    call("predict", place / "run", "--data", place / "test.csv", "--out", place / "p.jsonl")
    rows = [json.loads(line) for line in (place / "p.jsonl").read_text().splitlines()]
    truth = [line.rpartition(",")[2] for line in (place / "test.csv").read_text().splitlines()[1:]]
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    right = np.mean([row["label"] == label for row, label in zip(rows, truth, strict=True)])
    assert right == pytest.approx(manifest(place / "run")["metrics"]["best"]["test"]["global"]["accuracy"])


def test_predict_for_a_client_that_does_not_exist(place: Path) -> None:
    said = call("predict", place / "run", "--data", place / "test.csv", "--client", "999", code=2).stderr
    assert "client '999' does not exist" in said
    said = call("predict", place / "run", "--data", place / "test.csv", "--client", "0", code=2).stderr
    assert "clients of fedavg have no models of their own" in said


def test_export_writes_an_adapter_and_a_merged_model(place: Path) -> None:
    call("export", place / "run", "--to", place / "adapter")
    assert (place / "adapter" / "adapter_config.json").is_file()
    call("export", place / "run", "--to", place / "merged", "--merge")
    assert (place / "merged" / "config.json").is_file()


def test_check_trains_nothing_and_knows_the_bytes(place: Path) -> None:
    found = json.loads(call("check", place / "config.yaml", "--json").stdout)
    assert found["partition"]["clients"] == 4
    sent = sum(manifest(place / "run")[key] for key in ("bytes_down", "bytes_up"))
    assert found["estimate"]["bytes"] == pytest.approx(sent, rel=0.05)
    assert "rows mean: " in call("check", place / "config.yaml").stdout


def test_compare_makes_one_table_and_keeps_finished_cells(place: Path) -> None:
    study = place / "study.yaml"
    study.write_text(
        "base: config.yaml\nmethods: [{label: Avg, name: fedavg}, {label: Alone, name: local}]\nseeds: [0, 1]\n"
    )
    first = json.loads(call("compare", study, "--out", place / "study", "--json").stdout)
    assert {row["label"] for row in first["table"]} == {"Avg", "Alone"}
    assert all(row["seeds"] == 2 and row["std"] is not None for row in first["table"])
    page = Path(first["report"]).read_text()
    assert "<h2>Results</h2>" in page and "<td>Alone</td>" in page
    stamps = {path: path.stat().st_mtime_ns for path in (place / "study").glob("*/manifest.json")}
    assert len(stamps) == 4
    again = call("compare", study, "--out", place / "study")
    assert "report: " in again.stdout.splitlines()[-1]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task__train": "nothing.csv"}, "task.train: there is no"),
        ({"task__text": "words"}, "has no column 'words' (task.text); it has: text, label"),
        ({"task__labels": ["cooking", "fishing"]}, "is not one of the 2 labels that the task has: cooking, fishing"),
        ({"task__test": "odd.csv"}, "row 1 of data file"),
        ({"task__train": "empty.csv"}, "is empty"),
        ({"partition__clients": 61}, "there are only 60 training rows"),
        ({"method__cohort": 5}, "method.cohort: 5 is above partition.clients = 4"),
        ({"model__name": "bare"}, "has no config.json"),
        ({"partition__kind": "natural", "partition__by": "site"}, "there is no column 'site'"),
        ({"adapter__targets": ["nowhere"]}, "nowhere"),
    ],
)
def test_request_that_cannot_be_met_is_told_and_leaves_no_folder(
    place: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text((place / name).read_text())
    (tmp_path / "odd.csv").write_text("text,label\nboil,baking\n")
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "bare").mkdir()
    (tmp_path / "tiny").symlink_to(place / "tiny")
    result = call("run", write_config(tmp_path, **changes), "--out", tmp_path / "run", code=2)
    assert said in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_run_that_diverges_fails_with_one_line_and_leaves_its_story(place: Path) -> None:
    result = call("run", place / "config.yaml", "--set", "method.lr=1e30", "--out", place / "nan", code=1)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "below the quorum" in line and f"fedpeft resume {place / 'nan'}" in line
    assert "Traceback" not in result.output and "Traceback" in (place / "nan" / "run.log").read_text()
    assert manifest(place / "nan")["status"] == "failed"
    assert "failed after" in (place / "nan" / "report.html").read_text()


def test_interrupted_process_goes_on_to_the_same_bits(place: Path) -> None:
    """The process gets SIGINT as soon as its first round is on disk."""
    many = ["--set", "run.rounds=150"]
    call("run", place / "config.yaml", *many, "--out", place / "whole")
    code = "from fedpeft.cli import main; main()"
    arguments = ["run", place / "config.yaml", *many, "--out", place / "cut"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and not (place / "cut" / "metrics.jsonl").exists():
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == f"interrupted; state saved. Go on with: fedpeft resume {place / 'cut'}"
    assert manifest(place / "cut")["status"] == "interrupted"
    call("resume", place / "cut")
    assert manifest(place / "cut")["params_sha256"] == manifest(place / "whole")["params_sha256"]
