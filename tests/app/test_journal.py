"""When a run ends before its last round, and what it then leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small
from fedpeft import app
from fedpeft.app.scoring import Scored
from fedpeft.progress import Progress
from fedpeft.runs.store import RunFolder


def stopped(place: Path, folder: Path, stop: dict[str, Any], **changes: Any) -> tuple[app.Run, list[Progress]]:
    config = small.config(place, **({"run__rounds": 6} | changes))
    config["run"]["stop"] = stop
    told: list[Progress] = []
    return app.run(config, out=folder, progress=told.append), told


def check_end(done: app.Run, rounds: int, reason: str) -> None:
    """The last line of a run that was stopped is like that of any other."""
    lines = RunFolder.open(done.folder).metrics()
    assert done.manifest["rounds_done"] == lines[-1]["round"] == rounds
    assert reason in done.manifest["stopped"] and done.manifest["status"] == "finished"
    assert {"validation", "test"} == lines[-1]["metrics"].keys()
    assert done.metrics["final"]["test"] == lines[-1]["metrics"]["test"]
    assert (done.folder / "adapter" / "adapter_config.json").is_file()


def test_score_that_is_good_enough_ends_the_run(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    values = iter([0.2, 0.3, 0.65, 0.9])
    monkeypatch.setattr(Scored, "selected", lambda self, metric: next(values))
    done, told = stopped(place, tmp_path / "run", {"score": 0.65})
    check_end(done, 2, "validation score 0.65 reached run.stop.score 0.65")
    assert [p.message for p in told if p.message] == [done.manifest["stopped"]]
    assert "reached run.stop.score" in (done.folder / "run.log").read_text()


def test_patience_ends_the_run_and_the_best_parameters_are_kept(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    values = iter([0.2, 0.5, 0.4, 0.5, 0.3])
    monkeypatch.setattr(Scored, "selected", lambda self, metric: next(values))
    done, _ = stopped(place, tmp_path / "run", {"patience": 2})
    check_end(done, 3, "2 evaluations without a better score")
    assert done.metrics["best"]["round"] == 1
    monkeypatch.undo()
    best = small.checkpoint(done.folder).best
    app.run(small.config(place, run__rounds=1), out=tmp_path / "one")
    first = small.params(tmp_path / "one")
    assert best is not None and all(first[name].equal(t) for name, t in best.items())


def test_patience_counts_on_after_a_kill(place: Path, tmp_path: Path) -> None:
    """With lr 0 no score is ever better than the first."""
    config = small.config(place, run__rounds=9, method__lr=1e-9)
    config["run"]["stop"] = {"patience": 4}
    app.run(config, out=tmp_path / "whole")
    assert RunFolder.open(tmp_path / "whole").manifest()["rounds_done"] == 4
    assert small.killed(lambda: app.run(config, out=tmp_path / "run"), 38)
    assert 0 < small.checkpoint(tmp_path / "run").round < 4
    app.resume(tmp_path / "run")
    assert small.story(tmp_path / "run") == small.story(tmp_path / "whole")


def test_traffic_ends_the_run_also_between_evaluations(place: Path, tmp_path: Path, finished: app.Run) -> None:
    round_bytes = sum(RunFolder.open(finished.folder).metrics()[1][key] for key in ("bytes_down", "bytes_up"))
    done, _ = stopped(place, tmp_path / "run", {"bytes": 2 * round_bytes}, run__evaluate_every=5)
    check_end(done, 2, "run.stop.bytes")
    assert [line["round"] for line in RunFolder.open(done.folder).metrics() if "metrics" in line] == [0, 2]
    assert done.metrics["best"]["round"] in (0, 2)


def test_seconds_end_the_run(place: Path, tmp_path: Path) -> None:
    done, _ = stopped(place, tmp_path / "run", {"seconds": 1e-6})
    check_end(done, 0, "run.stop.seconds")


def test_limit_that_is_never_reached_changes_nothing(place: Path, tmp_path: Path, finished: app.Run) -> None:
    done, _ = stopped(place, tmp_path / "run", {"bytes": 10**12, "seconds": 1e6, "score": 1.0}, run__rounds=3)
    assert done.manifest["stopped"] is None and small.sha(done.folder) == small.sha(finished.folder)


def test_run_without_validation_rows_keeps_its_last_parameters(place: Path, tmp_path: Path) -> None:
    """120 clients of one row each have none to spare."""
    config = small.config(place, partition__kind="iid", partition__clients=120, run__rounds=2)
    done = app.run(config, out=tmp_path / "run")
    lines = RunFolder.open(done.folder).metrics()
    assert ["metrics" in line for line in lines] == [False, False, True]
    assert lines[-1]["metrics"].keys() == {"test"}
    assert done.metrics["best"] == {"round": 2, "test": lines[-1]["metrics"]["test"]}
    assert small.checkpoint(done.folder).best is None


def test_run_without_test_rows_has_validation_alone(place: Path, tmp_path: Path) -> None:
    done = app.run(small.config(place, task__test=None, run__rounds=1), out=tmp_path / "run")
    assert done.metrics["final"].keys() == {"validation"}
    assert RunFolder.open(done.folder).metrics()[-1]["metrics"].keys() == {"validation"}


def test_model_card_has_the_facts_of_the_run(place: Path, finished: app.Run) -> None:
    card = (finished.folder / "adapter" / "README.md").read_text()
    score = finished.metrics["best"]["test"]["global"]["accuracy"]
    assert f"| metrics.test.global.accuracy | {score:.4g} |" in card
    assert "| method | fedavg |" in card and "| clients | 6 |" in card and "max_length=16" in card
    assert f"| rounds | {finished.metrics['best']['round']} |" in card
