"""Every shipped configuration and study is really run, one round of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft import app

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
RUNS = sorted(path.name for path in (ROOT / "examples").glob("*.yaml") if "methods" not in path.read_text())
STUDIES = [*(ROOT / "examples").glob("*.yaml"), *(ROOT / "benchmarks" / "studies").glob("*.yaml")]
STUDIES = sorted(path for path in STUDIES if "\nmethods:" in path.read_text())
ONE = {"run.rounds": 1, "run.evaluate_every": 1}
SHORT = {"warmup_rounds": 1, "calibration_cohort": 1, "score_cohort": 2, "lanczos_steps": 2, "power_steps": 1}


def needs_data(path: Path) -> None:
    if "FEDPEFT_DATA" in path.read_text() and not DATA.is_dir():
        pytest.skip(f"no {DATA}")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * ("trec" in n)) for n in RUNS])
def test_every_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "examples" / name
    needs_data(path)
    monkeypatch.delenv("FEDPEFT_DATA", raising=False)
    fields = yaml.safe_load(path.read_text())["method"]
    short = {f"method.{key}": value for key, value in SHORT.items() if key in fields}
    run = app.run(path, {**ONE, **short}, out=tmp_path / "run")
    assert run.metrics["best"]["validation"]["global"][run.manifest["metric"]] > 0
    assert (run.folder / "report.html").is_file() and (run.folder / "adapter" / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_study_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its methods, one seed, one point of the grid, one round with two clients."""
    needs_data(path)
    monkeypatch.setenv("FEDPEFT_DATA", str(DATA))
    study: dict[str, Any] = yaml.safe_load(path.read_text())
    base = study.get("base", {})
    if isinstance(base, str):
        base = yaml.safe_load((path.parent / base).read_text())
    if all(task.get("format") != "generate" for task in (base.get("task", {}), *study.get("tasks", ()))):
        base["model"] = {"name": "demo"}  # a minute for all studies; what they compare is the same
    base["run"] = {**base.get("run", {}), "rounds": 1, "evaluate_every": 1}
    for key, file in base.get("task", {}).items():
        if key in ("train", "validation", "test") and (path.parent / file).is_file():
            base["task"][key] = str(path.parent / file)
    if "devices" in base["run"]:
        base["run"]["devices"] = str(path.parent / base["run"]["devices"])
    base["method"] = {**base.get("method", {}), "cohort": 2}
    study |= {"base": base, "seeds": [0], "grid": {key: values[:1] for key, values in study.get("grid", {}).items()}}
    if study.get("tasks"):
        study["tasks"] = [{**task, "limit": 300} for task in study["tasks"][:1]]
        if study["tasks"][0].get("format") == "generate":
            study["tasks"][0] |= {"limit": 60, "generate_rows": 2, "generate_tokens": 8}
    for method in study["methods"]:
        if method["name"] == "fedpeptao":
            method |= SHORT
        if method["name"] == "fedpipe":
            method |= {"warmup_steps": 2, "batches": [8]}
    found = app.compare(study, out=tmp_path / "study")
    assert not found.failures and len(found.table) == len(study["methods"])
