"""FedPipe on a transformer: a run on unequal machines, what it leaves, and a merged model as small as the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import small
from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.config import load_config
from fedpeft.core.errors import ModelError

MACHINES = """
[profile.small]
flops_per_s = 2.0e8
memory_bytes = 400_000
formats = ["int8", "nf4"]
[profile.large]
flops_per_s = 2.0e9
[profile.none]
memory_bytes = 1000
[clients]
000 = "small"
001 = "small"
002 = "large"
003 = "large"
004 = "large"
005 = "none"
"""


def run(place: Path, out: Path, machines: str = MACHINES, **method: Any) -> app.Run:
    devices = place / "machines.toml"
    devices.write_text(machines)
    values = small.config(place, run__devices=str(devices), run__rounds=2)
    values["method"] = {"name": "fedpipe", "lr": 2e-2, "warmup_steps": 4, "ranks": [1, 2, 4], **method}
    values["adapter"] = {"rank": 4, "alpha": 8, "targets": ["query", "value", "output"]}
    return app.run(values, out=out)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_the_clock_says_what_was_planned(place: Path, tmp_path: Path, checkpointing: str) -> None:
    """Operations are most of a turn here; rows of a round are not quite the mean row, and a plan is a bound."""
    machines = MACHINES.replace("memory_bytes = 400_000", "memory_bytes = 4_000_000")
    for name in ("small", "large"):
        machines = machines.replace(f"[profile.{name}]", f"[profile.{name}]\nlatency_s = 0.0\nup_bytes_per_s = 1e8")
    done = run(place, tmp_path / "run", machines, checkpointing=checkpointing, round_seconds=0.5)
    told = json.loads((done.folder / "manifest.json").read_text())["choices"]
    lines = [json.loads(line) for line in (done.folder / "exchanges.jsonl").read_text().splitlines()]
    took = {(e["client"], e["round"]): e["simulated_seconds"] for e in lines if e["exchange"] == "train"}
    assert len(took) == 10
    for client, plan in told["plans"].items():
        rounds = [took[client, round] for round in (1, 2)]
        assert sum(rounds) / 2 == pytest.approx(plan["predicted"]["round_s"], rel=0.15), client


@pytest.mark.parametrize("aggregation", ["svd_product", "stack_exact"])
def test_unequal_machines_train_a_model_that_merges_without_a_trace(
    place: Path, tmp_path: Path, aggregation: str
) -> None:
    done = run(place, tmp_path / "run", aggregation=aggregation)
    told = json.loads((done.folder / "manifest.json").read_text())["choices"]
    assert set(told["plans"]) == {"000", "001", "002", "003", "004"} and set(told["excluded"]) == {"005"}
    assert told["plans"]["000"]["bits"] == "int8" and told["plans"]["002"]["bits"] == "full"
    assert "could not join" in (done.folder / "report.html").read_text().lower()
    exchanges = [json.loads(line) for line in (done.folder / "exchanges.jsonl").read_text().splitlines()]
    assert {e["exchange"] for e in exchanges if e["client"] == "005"} == {"profile", "join"}
    folder = app.export(done.folder, tmp_path / "merged", merge=True)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    plain = transformers.AutoModel.from_pretrained(place / "tiny", add_pooling_layer=False)
    head = sum(p.numel() for p in model.classifier.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + head
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = app.predict(done.folder, place / "test.jsonl")
    for row, text in list(zip(found, (r["text"] for r in small.rows(42, "test")), strict=True))[:4]:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0].mean(dim=0)
        assert logits.softmax(dim=0).tolist() == pytest.approx(list(row["probabilities"].values()), abs=1e-5)


def test_what_was_folded_away_is_started_from_as_a_merged_model(place: Path, tmp_path: Path) -> None:
    """There is no adapter to start from, which is said with the way that there is; that way keeps what was learnt."""
    done = run(
        place, tmp_path / "run", aggregation="stack_exact", epochs=10, lr=1e-2, score="uniform", round_seconds=100.0
    )
    assert done.metrics["best"]["round"] > 0  # what came before anything was folded away is an adapter
    values = small.config(place, run__init_from=str(done.folder), run__rounds=1)
    with pytest.raises(ModelError, match=r"is no adapter to go on with.* --merge --to DIR, and model.name: DIR"):
        app.run(values, out=tmp_path / "refused")
    folder = app.export(done.folder, tmp_path / "merged", merge=True)
    learnt = done.load_model().base_model.state_dict()
    base = build(load_config(small.config(place, model__name=str(folder)))).base.module.state_dict()
    assert base.keys() <= learnt.keys() and all(torch.equal(base[name], learnt[name]) for name in base)
    plain = transformers.AutoModel.from_pretrained(place / "tiny", add_pooling_layer=False).state_dict()
    assert any(not torch.equal(base[name], plain[name]) for name in base)


def test_a_comparison_says_what_a_deadline_leaves_undone(place: Path, tmp_path: Path) -> None:
    """Means over the seeds of what the runs' records say; a method without plans leaves the columns empty."""
    devices = tmp_path / "machines.toml"
    devices.write_text(MACHINES)
    base = small.config(place, run__devices=str(devices), run__rounds=1)
    planned = {"name": "fedpipe", "score": "uniform", "ranks": [1, 2], "round_seconds": 0.08}
    methods = [{"label": "Plans", **planned}, {"label": "Avg", "name": "fedavg"}]
    done = app.compare({"base": base, "methods": methods, "seeds": [0, 1]}, out=tmp_path / "study")
    rows = {row["label"]: row for row in done.table}
    found = [json.loads(path.read_text()) for path in (tmp_path / "study").glob("trades-plans-*/manifest.json")]
    told = [manifest["choices"] for manifest in found]
    for key in ("under_training", "left_out", "trained_numbers"):
        assert rows["Plans"][key] == pytest.approx(sum(own[key] for own in told) / 2) and key not in rows["Avg"]
    assert rows["Plans"]["machines_excluded"] == 1 and rows["Plans"]["left_out"] > rows["Plans"]["under_training"] > 0
    files = (tmp_path / "study").glob("trades-plans-*/metrics.jsonl")
    set_up = [json.loads(file.read_text().splitlines()[0])["simulated_seconds"] for file in files]
    assert rows["Plans"]["set_up_seconds"] == pytest.approx(sum(set_up) / 2) and set_up[0] > 0


def test_a_killed_run_ends_with_the_same_bits(place: Path, tmp_path: Path) -> None:
    """Plans, machines and cursors are state and memory like everything else."""
    whole = run(place, tmp_path / "whole", bits="full")

    def stop(progress: Any) -> None:
        if progress.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        app.run(whole.folder / "config.yaml", out=tmp_path / "cut", progress=stop)
    resumed = app.resume(tmp_path / "cut")
    assert resumed.manifest["params_sha256"] == whole.manifest["params_sha256"]
