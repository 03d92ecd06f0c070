"""Studies with real runs: the grid, what is kept, what fails, the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import small
from fedpeft import app
from fedpeft.app.studies import DEMO
from fedpeft.config import cells, load_study
from fedpeft.core.errors import ConfigError, RequestError, RunError
from fedpeft.progress import Progress
from fedpeft.runs.history import read_history
from fedpeft.runs.store import RunFolder


def study(place: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "base": small.config(place, run__rounds=2),
        "methods": [{"label": "Avg", "name": "fedavg"}, {"label": "Alone", "name": "local"}],
        "seeds": [0, 1],
    }
    return values | changes


def manifest(folder: Path) -> dict[str, Any]:
    return RunFolder.open(folder).manifest()


def test_grid_is_chosen_on_validation_with_the_first_seed(place: Path, tmp_path: Path) -> None:
    """lr 1e-7 learns nothing; the other point wins for both methods, and only it is run with the second seed."""
    grid = {"method.lr": [1e-7, 2e-2]}
    base = small.config(place, run__rounds=3, method__epochs=3)
    told: list[Progress] = []
    done = app.compare(study(place, base=base, grid=grid), out=tmp_path / "study", progress=told.append)
    names = {path.parent.name for path in (tmp_path / "study").glob("*/config.yaml")}
    both = {f"trades-{label}-seed0-lr{lr}" for label in ("avg", "alone") for lr in ("1e_07", "0.02")}
    chosen = {f"trades-{label}-seed1-lr0.02" for label in ("avg", "alone")}
    assert names == both | chosen
    for label in ("avg", "alone"):
        best = [
            manifest(tmp_path / "study" / f"trades-{label}-seed0-lr{lr}")["metrics"]["best"]["validation"]
            for lr in ("1e_07", "0.02")
        ]
        who = "global" if label == "avg" else "personalized"
        assert best[0][who]["accuracy"] < best[1][who]["accuracy"]
    assert [row["chosen"] for row in done.table] == [{"lr": 0.02}] * 2 and done.failures == ()
    said = [p.message for p in told if p.message]
    assert said[0] == "trades Avg  lr=1e-07  seed 0" and len(said) == 6


def test_table_has_mean_and_spread_of_the_runs(place: Path, tmp_path: Path) -> None:
    done = app.compare(study(place, target={"share_of": "Avg", "share": 0.9}), out=tmp_path / "study")
    rows = {row["label"]: row for row in done.table}
    assert [row["mean"] for row in done.table] == sorted((row["mean"] for row in done.table), reverse=True)
    runs = [manifest(tmp_path / "study" / f"trades-avg-seed{seed}") for seed in (0, 1)]
    scores = [run["metrics"]["best"]["test"]["global"]["accuracy"] for run in runs]
    assert rows["Avg"]["mean"] == pytest.approx(sum(scores) / 2)
    assert rows["Avg"]["std"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert rows["Avg"]["bytes"] == sum(run["bytes_down"] + run["bytes_up"] for run in runs) / 2
    assert rows["Avg"]["simulated_seconds"] == pytest.approx(sum(run["simulated_seconds"] for run in runs) / 2)
    assert (rows["Avg"]["of"], rows["Alone"]["of"]) == ("global", "personal")
    alone = [manifest(tmp_path / "study" / f"trades-alone-seed{seed}")["metrics"]["final"]["test"] for seed in (0, 1)]
    assert rows["Alone"]["mean"] == pytest.approx(sum(a["personalized"]["accuracy"] for a in alone) / 2)
    assert rows["Alone"]["majority"] == pytest.approx(sum(a["majority"]["accuracy"] for a in alone) / 2)
    assert rows["Avg"]["global"] == rows["Avg"]["mean"]
    alone = [manifest(tmp_path / "study" / f"trades-alone-seed{seed}")["metrics"]["best"]["test"] for seed in (0, 1)]
    assert rows["Alone"]["global"] == pytest.approx(sum(a["global"]["accuracy"] for a in alone) / 2)
    assert rows["Alone"]["global"] < rows["Alone"]["mean"]
    goal = 0.9 * sum(run["metrics"]["best"]["validation"]["global"]["accuracy"] for run in runs) / 2
    spent = []
    for seed in (0, 1):
        total = 0
        for line in RunFolder.open(tmp_path / "study" / f"trades-avg-seed{seed}").metrics():
            total += line["bytes_down"] + line["bytes_up"]
            if line["metrics"]["validation"]["global"]["accuracy"] >= goal:
                spent.append(total)
                break
    expected = sum(spent) / 2 if len(spent) == 2 else None
    assert rows["Avg"]["bytes_to_target"] == expected
    assert "To a common target" in done.report.read_text()
    whole = json.loads((done.folder / "table.json").read_text())
    runs = [f"trades-{label}-seed{seed}" for label in ("avg", "alone") for seed in (0, 1)]
    assert whole == {"table": done.table, "failures": [], "runs": runs}
    page = done.report.read_text()
    assert done.report == tmp_path / "study" / "report.html" and "<td>Alone</td>" in page


def test_personal_scores_do_not_reach_a_target_of_the_global_model(place: Path, tmp_path: Path) -> None:
    """Alone's own models are above 90 % of Avg's score; its global model, which is the untrained one, is not."""
    base = small.config(place, run__rounds=3)
    rows = {}
    for of, share in (("Avg", 0.9), ("Alone", 1.0)):  # the second study finds the cells of the first
        wanted = study(place, base=base, seeds=[0], target={"share_of": of, "share": share})
        rows[of] = {row["label"]: row for row in app.compare(wanted, out=tmp_path / "study").table}
    lines = [RunFolder.open(tmp_path / "study" / f"trades-{name}-seed0").metrics() for name in ("avg", "alone")]
    avg, alone = ([line["metrics"]["validation"] for line in run] for run in lines)
    goal = 0.9 * max(found["global"]["accuracy"] for found in avg)
    assert max(found["personalized"]["accuracy"] for found in alone) > goal
    assert rows["Avg"]["Avg"]["bytes_to_target"] and rows["Avg"]["Alone"]["bytes_to_target"] is None
    assert rows["Alone"]["Alone"]["bytes_to_target"] == 0  # the untrained model's own score, before any round


def test_finished_cells_are_kept_and_begun_ones_go_on(place: Path, tmp_path: Path) -> None:
    """Killed in the third of four cells; the first two are not touched again, the third is resumed."""
    whole = app.compare(study(place), out=tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.round == 1 and progress.metrics and (tmp_path / "cut" / "trades-alone-seed0").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        app.compare(study(place), out=tmp_path / "cut", progress=stop)
    assert manifest(tmp_path / "cut" / "trades-alone-seed0")["status"] == "interrupted"
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("trades-avg-*/*")}
    again = app.compare(study(place), out=tmp_path / "cut")
    assert stamps and stamps == {path: path.stat().st_mtime_ns for path in stamps}
    for name in ("trades-avg-seed0", "trades-alone-seed0", "trades-alone-seed1"):
        assert small.story(tmp_path / "cut" / name) == small.story(tmp_path / "whole" / name)
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in done.table] for done in (whole, again)]
    assert timeless[0] == timeless[1]
    assert manifest(tmp_path / "cut" / "trades-alone-seed0")["label"] == "Alone"


def test_cell_killed_before_it_was_a_run_is_begun_anew(place: Path, tmp_path: Path) -> None:
    cell = tmp_path / "study" / "trades-avg-seed0"
    wanted = study(place, methods=[{"label": "Avg", "name": "fedavg"}], seeds=[0])
    assert small.killed(lambda: app.compare(wanted, out=tmp_path / "study"), 2)
    assert cell.is_dir() and not (cell / "config.yaml").exists()
    assert app.compare(wanted, out=tmp_path / "study").table[0]["seeds"] == 1


def test_changed_configuration_is_refused_before_anything_runs(place: Path, tmp_path: Path) -> None:
    app.compare(study(place, seeds=[0]), out=tmp_path / "study")
    methods = [
        {"label": "Prox", "name": "fedprox"},
        {"label": "Avg", "name": "fedavg"},
        {"label": "Alone", "name": "local", "lr": 0.5},
    ]
    with pytest.raises(RequestError, match=r"trades-alone-seed0 holds a run with another .*; method.lr differs"):
        app.compare(study(place, seeds=[0], methods=methods), out=tmp_path / "study")
    assert not (tmp_path / "study" / "trades-prox-seed0").exists()
    with pytest.raises(RequestError, match=r"run.rounds differs; choose a new --out"):
        app.compare(study(place, seeds=[0], base=small.config(place, run__rounds=3)), out=tmp_path / "study")


def test_what_keeps_cells_from_starting_is_told_before_any_is_trained(place: Path, tmp_path: Path) -> None:
    """Of all cells at once: ranks that the adapter has not."""
    methods = [
        {"label": "Fine", "name": "fedavg"},
        {"label": "High", "name": "hetlora", "ranks": [2, 64]},
        {"label": "Odd", "name": "flora", "ranks": [128]},
    ]
    with pytest.raises(ConfigError) as refused:
        app.compare(study(place, methods=methods, seeds=[0, 1]), out=tmp_path / "study")
    told = refused.value.problems
    assert len(told) == 2 and told[0].startswith("High on trades: ") and "rank 64" in told[0]
    assert told[1].startswith("Odd on trades: ") and "rank 128" in told[1]
    assert not list((tmp_path / "study").glob("*/config.yaml"))


def test_failing_cell_is_reported_and_the_others_go_on(place: Path, tmp_path: Path) -> None:
    """Avg diverges at a rate of 1e30, in every attempt; a fault that nobody thought of fails a cell, too."""
    methods = [
        {"label": "Broken", "name": "fedavg", "lr": 1e30},
        {"label": "Alone", "name": "local"},
        {"label": "Odd", "name": "fedprox"},
    ]
    told: list[str] = []

    def listen(progress: Progress) -> None:
        told.append(progress.message or "")
        odd = tmp_path / "study" / "trades-odd-seed0"
        if odd.exists() and progress.round == 1 and (RunFolder(odd).manifest().get("status") == "running"):
            raise ZeroDivisionError("odd")

    done = app.compare(study(place, methods=methods, seeds=[0]), out=tmp_path / "study", progress=listen)
    assert [row["label"] for row in done.table] == ["Alone"]
    assert len(done.failures) == 2
    assert done.failures[0].startswith("trades-broken-seed0: ") and "below the quorum" in done.failures[0]
    assert done.failures[1] == "trades-odd-seed0: ZeroDivisionError: odd"
    assert f"failed: {done.failures[0]}" in told
    assert json.loads((done.folder / "table.json").read_text())["failures"] == list(done.failures)
    page = done.report.read_text()
    assert "2 cells failed and are left out" in page and "trades-odd-seed0: ZeroDivisionError: odd" in page
    again = app.compare(study(place, methods=methods, seeds=[0]), out=tmp_path / "study")
    assert {row["label"] for row in again.table} == {"Alone", "Odd"}


def test_study_of_which_nothing_is_left_raises_its_first_error(place: Path, tmp_path: Path) -> None:
    methods = [{"label": "Broken", "name": "fedavg", "lr": 1e30}]
    with pytest.raises(RunError, match="below the quorum"):
        app.compare(study(place, methods=methods, seeds=[0]), out=tmp_path / "a")
    base = small.config(place, task__text="words")
    with pytest.raises(ConfigError, match=r"1 problem .*\n.*Avg on trades, Alone on trades: .* has no column 'words'"):
        app.compare(study(place, base=base, seeds=[0]), out=tmp_path / "b")


def test_everything_that_is_wrong_is_told_before_the_first_cell(place: Path, tmp_path: Path) -> None:
    methods = [{"label": "A", "name": "fedavg", "lrr": 1}, {"label": "B", "name": "nothing"}]
    with pytest.raises(ConfigError) as caught:
        app.compare(study(place, methods=methods), out=tmp_path / "study")
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "study").exists()


def test_several_tasks_make_a_row_each_and_a_file_is_a_study(place: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(small.config(place, run__rounds=1)))
    tasks = [
        {"name": "trades", "train": str(place / "train.jsonl"), "test": str(place / "test.jsonl"), "max_length": 16},
        {
            "name": "pairs",
            "train": str(place / "pairs.jsonl"),
            "test": str(place / "pairs_test.jsonl"),
            "max_length": 24,
        },
    ]
    wanted = {"base": "base.yaml", "tasks": tasks, "methods": [{"label": "Avg", "name": "fedavg"}], "seeds": [3]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(wanted))
    done = app.compare(tmp_path / "study.yaml", out=tmp_path / "study")
    assert [(row["task"], row["label"], row["std"]) for row in done.table] == [
        ("trades", "Avg", None),
        ("pairs", "Avg", None),
    ]
    assert read_history(tmp_path / "study" / "pairs-avg-seed3").labels == ("other", "same")


def test_study_of_the_demo_is_valid() -> None:
    plan = cells(load_study(DEMO))
    labels = ["Centralized", "FedAvg", "FedProx", "FedOpt (Adam)", "SCAFFOLD", "FedPepTAO", "P-tuning v2", "Adapter"]
    assert [cell.label for cell in plan] == [*labels, "Local"]
    assert all(cell.config.run.rounds == 10 for cell in plan)
