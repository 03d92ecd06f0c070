"""Runs on a quantised base, from their configuration to what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedpeft
import small
from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.app.running import best_params
from fedpeft.config import load_config
from fedpeft.models.load import load_base
from fedpeft.models.merge import merge
from fedpeft.runs.store import RunFolder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A short run on the embedded task and model, its base in NF4."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CACHE", str(folder / "cache"))
        config = {
            "model": {"name": "demo", "quantize": "nf4", "device": "cpu"},
            "task": {"limit": 240, "max_length": 32},
            "partition": {"clients": 4},
            "method": {"name": "fedavg", "cohort": 2, "lr": 1e-2},
            "run": {"rounds": 2, "evaluate_every": 1, "threads": 1},
        }
        yield fedpeft.run(config, out=folder / "run")


def test_a_run_tells_what_its_base_was(packed: Any) -> None:
    manifest = json.loads((packed.folder / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["model_precision"] == "nf4"
    assert yaml.safe_load((packed.folder / "config.yaml").read_text())["model"]["quantize"] == "nf4"
    assert manifest["model_sha256"] != load_base("demo", device="cpu").sha256
    assert json.loads((packed.folder / "adapter" / "fedpeft.json").read_text())["base_precision"] == "nf4"
    card = (packed.folder / "adapter" / "README.md").read_text()
    assert "| base in training | its blocks' weights rounded to nf4; a merged model has the full ones |" in card


def test_it_trained_and_is_scored_on_the_packed_base(packed: Any) -> None:
    lines = [json.loads(line) for line in (packed.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[2]["train_loss"] < lines[1]["train_loss"]
    again = app.evaluate(packed.folder)["validation"]["global"]
    best = packed.manifest["metrics"]["best"]["validation"]["global"]
    assert again["loss"] == pytest.approx(best["loss"]) and again["accuracy"] == best["accuracy"]


def test_it_is_merged_into_the_full_weights(packed: Any, tmp_path: Path) -> None:
    opened = RunFolder.open(packed.folder)
    config = load_config(packed.folder / "config.yaml")
    fed = build(config, opened.partition())
    plain = build(load_config(packed.folder / "config.yaml", {"model.quantize": "none"}), opened.partition())
    params = best_params(fed, opened)
    expected = merge(plain.model, params, plain.task.labels).state_dict()
    merged = packed.load_model().state_dict()
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], t) for name, t in expected.items())
    app.export(packed.folder, tmp_path / "merged", merge=True)
    assert "rounded to nf4" in (tmp_path / "merged" / "README.md").read_text()
    app.export(packed.folder, tmp_path / "adapter")
    rows = fed.whole("validation")
    ours, theirs = fed.model.logits(params, rows), plain.model.logits(params, rows)
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.5


@pytest.mark.parametrize("name", ["int8", "nf4dq"])
def test_check_tells_the_precision_and_its_bytes(place: Path, name: str) -> None:
    full = app.check(small.config(place))
    found = app.check(small.config(place, model__quantize=name))
    assert (full["model"]["precision"], found["model"]["precision"]) == ("float32", name)
    assert found["model"]["parameters"] == full["model"]["parameters"]
    saved = full["model"]["base_bytes"] - found["model"]["base_bytes"]
    assert saved > 0 and full["estimate"]["memory_bytes"] - found["estimate"]["memory_bytes"] == saved


def test_a_run_starts_from_the_adapter_of_another_precision(place: Path, tmp_path: Path, finished: app.Run) -> None:
    config = small.config(place, model__quantize="int8", run__init_from=str(finished.folder), run__rounds=1)
    manifest = app.run(config, out=tmp_path / "run").manifest
    assert manifest["status"] == "finished" and manifest["model_precision"] == "int8"
