"""A run that was stopped, killed or failed goes on to the same end."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import small
from fedpeft import app
from fedpeft.core import tree
from fedpeft.core.errors import RequestError, StoreError
from fedpeft.core.rng import rng_for
from fedpeft.progress import Progress
from fedpeft.runs import files
from fedpeft.runs.store import RunFolder


def stop_at(round: int, error: BaseException) -> Any:
    """A listener that raises as soon as a round is done."""

    def listen(progress: Progress) -> None:
        if progress.round == round and progress.metrics is not None:
            raise error

    return listen


def go_on(config: dict[str, Any], folder: Path) -> app.Run:
    """What a person does after a kill: resume, or begin again where the run was none yet."""
    if (folder / "config.yaml").exists():
        return app.resume(folder)
    return app.run(config, out=folder)


# --- kill -9 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "local"])
@pytest.mark.usefixtures("finished")  # its tokens are in the cache: all runs here write the same files
def test_run_killed_at_any_write_goes_on_to_the_same_bits(place: Path, tmp_path: Path, method: str) -> None:
    """SIGKILL in the middle of a write, or just before a rename or a removal: at some, and while the run begins."""
    config = small.config(place, method__name=method)
    with small.on_write(lambda number: False, lambda: None) as writes:
        app.run(config, out=tmp_path / "whole")
    clients = RunFolder.open(tmp_path / "whole").partition()["clients"]
    moments = rng_for(0, "kills", method).choice(writes.number - 14, size=3, replace=False) + 12
    for moment in [3, 10, *moments.tolist(), writes.number - 2]:
        folder = tmp_path / str(moment)
        assert small.killed(lambda folder=folder: app.run(config, out=folder), moment)  # type: ignore[misc]
        go_on(config, folder)
        assert small.sha(folder) == small.sha(tmp_path / "whole"), moment
        assert small.sha(folder) in (folder / "report.html").read_text()
        assert small.story(folder) == small.story(tmp_path / "whole"), moment
        if method != "fedavg":
            for client in clients:
                if client in small.checkpoint(folder, method).versions:
                    own, other = (small.memory(f, client, method) for f in (folder, tmp_path / "whole"))
                    assert own.__class__ is other.__class__ and str(own) == str(other)


def test_run_killed_again_and_again_ends_like_one_that_was_not(place: Path, tmp_path: Path, finished: app.Run) -> None:
    """Every resume is killed a few writes later, wherever that is."""
    config, folder, kills = small.config(place), tmp_path / "run", 0
    while small.killed(lambda: go_on(config, folder), 19):
        kills += 1
        assert kills < 30
    assert kills >= 2
    assert small.sha(folder) == small.sha(finished.folder)
    assert small.story(folder) == small.story(finished.folder)


def test_process_of_the_command_line_is_killed_and_resumed(place: Path, tmp_path: Path) -> None:
    """The same bits as in this process: a fresh process differs in nothing."""
    config = small.config(place, run__rounds=12)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    app.run(config, out=tmp_path / "whole")
    process = small.command("run", tmp_path / "config.yaml", "--out", tmp_path / "run")
    while process.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.001)
    time.sleep(float(rng_for(0, "kill").random()) * 0.2)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said
    app.resume(tmp_path / "run")
    assert small.sha(tmp_path / "run") == small.sha(tmp_path / "whole")
    assert small.story(tmp_path / "run") == small.story(tmp_path / "whole")


def test_a_method_of_another_package_may_plan_by_the_number_of_rounds(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere.py").write_text(
        "from dataclasses import dataclass\nfrom fedpeft.methods.fedavg import FedAvg\n"
        "@dataclass(frozen=True)\nclass Planner(FedAvg):\n    plans_by_rounds = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    app.run(small.config(place, run__rounds=1, method__name="elsewhere:Planner"), out=tmp_path / "run")
    told: list[str] = []
    app.resume(tmp_path / "run", {"run.rounds": 2}, progress=lambda sign: told.append(sign.message or ""))
    assert any("elsewhere:Planner plans by it; from here on it plans by 2" in said for said in told)


@pytest.mark.parametrize(
    ("changes", "by"),
    [({}, None), ({"method__name": "voc"}, "voc"), ({"method__schedule": "random"}, "method.schedule")],
)
def test_another_number_of_rounds_is_another_plan(place: Path, tmp_path: Path, changes: Any, by: str | None) -> None:
    """Two rounds and two more end like four only where nothing is planned by the number; else a warning says so."""
    app.run(small.config(place, run__rounds=4, **changes), out=tmp_path / "whole")
    app.run(small.config(place, run__rounds=2, **changes), out=tmp_path / "run")
    told: list[str] = []
    app.resume(tmp_path / "run", {"run.rounds": 4}, progress=lambda sign: told.append(sign.message or ""))
    assert (small.sha(tmp_path / "run") == small.sha(tmp_path / "whole")) == (by is None)
    warning = (
        f"warning: run.rounds was 2, and {by} plans by it; from here on it plans by 4, and a run that has 4 rounds"
    )
    assert any(said.startswith(warning) for said in told) == (by is not None)
    assert ("plans by it" in (tmp_path / "run" / "run.log").read_text()) == (by is not None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "scaffold", "local"])
def test_processes_of_the_command_line_are_killed_three_times(place: Path, tmp_path: Path, method: str) -> None:
    config = small.config(place, method__name=method, run__rounds=60)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    app.run(config, out=tmp_path / "whole")
    rng = rng_for(0, "kills", method)
    folder = tmp_path / "run"
    for _ in range(3):
        begun = (folder / "config.yaml").exists()
        arguments = ("resume", folder) if begun else ("run", tmp_path / "config.yaml", "--out", folder)
        before = len(RunFolder.open(folder).metrics()) if begun else 0
        process = small.command(*arguments)
        while process.poll() is None and (
            not (folder / "config.yaml").exists() or len(RunFolder.open(folder).metrics()) <= before
        ):
            time.sleep(0.001)
        time.sleep(float(rng.random()) * 0.8)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    process = small.command("resume", folder)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert small.sha(folder) == small.sha(tmp_path / "whole")
    assert small.story(folder) == small.story(tmp_path / "whole")


# --- other ends -------------------------------------------------------------------------------------------------


def test_interrupted_run_says_so_and_goes_on(place: Path, tmp_path: Path, finished: app.Run) -> None:
    with pytest.raises(KeyboardInterrupt):
        app.run(small.config(place), out=tmp_path / "run", progress=stop_at(2, KeyboardInterrupt()))
    found = RunFolder.open(tmp_path / "run").manifest()
    assert (found["status"], found["error"], found["params_sha256"]) == ("interrupted", None, None)
    assert (tmp_path / "run" / "report.html").exists()
    app.resume(tmp_path / "run")
    assert small.sha(tmp_path / "run") == small.sha(finished.folder)
    assert small.story(tmp_path / "run") == small.story(finished.folder)


def test_failed_run_leaves_its_story_and_goes_on(place: Path, tmp_path: Path, finished: app.Run) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="boom"):
        app.run(small.config(place), out=folder, progress=stop_at(2, RuntimeError("boom\nand more")))
    found = RunFolder.open(folder).manifest()
    assert (found["status"], found["error"]) == ("failed", "boom and more")
    log = (folder / "run.log").read_text()
    assert "the run failed: boom and more" in log and "Traceback" in log and "RuntimeError: boom" in log
    assert "boom and more" in (folder / "report.html").read_text()
    done = app.resume(folder)
    assert (done.manifest["status"], done.manifest["error"]) == ("finished", None)
    assert done.manifest["started"] == found["started"] <= done.manifest["resumed"]
    assert small.sha(folder) == small.sha(finished.folder)


def test_error_of_the_report_hides_no_other_and_spoils_no_run(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise OSError("no page")

    monkeypatch.setattr("fedpeft.app.running.write_report", refuse)
    with pytest.raises(RuntimeError, match="boom"):
        app.run(small.config(place), out=tmp_path / "run", progress=stop_at(1, RuntimeError("boom")))
    assert app.resume(tmp_path / "run").manifest["status"] == "finished"
    assert "the report was not written" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize("moment", [8, 20])
def test_full_disk_ends_the_run_with_its_own_error_and_the_run_goes_on_later(
    place: Path, tmp_path: Path, finished: app.Run, monkeypatch: Any, moment: int
) -> None:
    """From one write on nothing can be written any more, the manifest and the report included."""
    folder, numbers, write_all = tmp_path / "run", itertools.count(), files.write_all

    def full(fd: int, data: bytes) -> None:
        if next(numbers) >= moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(fd, data)

    monkeypatch.setattr(files, "write_all", full)
    with pytest.raises(StoreError, match=r"No space left on device .* MB free.*Free space .*resume the run"):
        app.run(small.config(place), out=folder)
    assert "the manifest cannot say so" in (folder / "run.log").read_text()
    monkeypatch.undo()
    app.resume(folder)
    assert small.sha(folder) == small.sha(finished.folder)
    assert small.story(folder) == small.story(finished.folder)


def test_run_in_use_is_not_resumed_by_another(place: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def intrude(progress: Progress) -> None:
        if progress.round == 1 and not said:
            with pytest.raises(StoreError, match="is being written by process") as caught:
                app.resume(tmp_path / "run")
            said.append(str(caught.value))

    app.run(small.config(place), out=tmp_path / "run", progress=intrude)
    assert said


# --- finished runs, and more rounds ------------------------------------------------------------------------------


def test_resume_of_a_finished_run_changes_nothing(place: Path, tmp_path: Path) -> None:
    app.run(small.config(place, run__rounds=1), out=tmp_path / "run")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "run").rglob("*")}
    again = app.resume(tmp_path / "run")
    assert again.manifest["params_sha256"] == small.sha(tmp_path / "run")
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "local"])
def test_prolonged_run_equals_the_long_one(place: Path, tmp_path: Path, method: str) -> None:
    app.run(small.config(place, method__name=method, run__rounds=4), out=tmp_path / "long")
    app.run(small.config(place, method__name=method, run__rounds=2), out=tmp_path / "run")
    short = RunFolder.open(tmp_path / "run").metrics()
    done = app.resume(tmp_path / "run", {"run.rounds": 4})
    assert small.sha(tmp_path / "run") == small.sha(tmp_path / "long")
    assert done.manifest["rounds_done"] == 4
    lines, exchanges = small.story(tmp_path / "run")
    assert exchanges == small.story(tmp_path / "long")[1]
    assert lines[3:] == small.story(tmp_path / "long")[0][3:] and len(lines) == 5
    assert RunFolder.open(tmp_path / "run").metrics()[:3] == short
    assert done.metrics == RunFolder.open(tmp_path / "long").manifest()["metrics"]


def test_fewer_rounds_than_are_done_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        app.run(small.config(place), out=tmp_path / "run", progress=stop_at(2, KeyboardInterrupt()))
    done = small.checkpoint(tmp_path / "run").round
    with pytest.raises(RequestError, match=rf"run.rounds is {done}, and {done} rounds? (is|are) done; give a larger"):
        app.resume(tmp_path / "run", {"run.rounds": done})
    assert RunFolder.open(tmp_path / "run").load_config()["run"]["rounds"] == 3
    assert app.resume(tmp_path / "run", {"run.rounds": 2}).manifest["rounds_done"] == 2


def test_only_some_keys_may_change(finished: app.Run) -> None:
    for key in ("method.lr", "run.seed", "run.roundsy", "run.cohort_batching", "task.max_length"):
        with pytest.raises(RequestError, match=rf"{key} cannot change .*run.rounds.*run.quorum.*run.init_from="):
            app.resume(finished.folder, {key: 1})


def test_stopped_run_goes_on_only_under_other_limits(place: Path, tmp_path: Path, finished: app.Run) -> None:
    config = small.config(place)
    config["run"]["stop"] = {"bytes": 1}
    first = app.run(config, out=tmp_path / "run")
    assert first.manifest["rounds_done"] == 1 and "run.stop.bytes" in first.manifest["stopped"]
    assert app.resume(tmp_path / "run", {"run.rounds": 4}).manifest["rounds_done"] == 1
    with pytest.raises(KeyboardInterrupt):  # other limits hold, also when the next part is interrupted at once
        app.resume(
            tmp_path / "run",
            {"run.rounds": 3, "run.stop.bytes": None},
            progress=stop_at_once,
        )
    done = app.resume(tmp_path / "run")
    assert (done.manifest["rounds_done"], done.manifest["stopped"]) == (3, None)
    assert small.sha(tmp_path / "run") == small.sha(finished.folder)


def stop_at_once(progress: Progress) -> None:
    raise KeyboardInterrupt


def test_changed_data_model_or_start_is_refused(place: Path, tmp_path: Path, finished: app.Run) -> None:
    own = small.make_place(tmp_path / "own")
    config = small.config(own, run__init_from=str(tmp_path / "other"))
    app.run(small.config(place, run__rounds=1), out=tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        app.run(config, out=tmp_path / "run", progress=stop_at(1, KeyboardInterrupt()))
    app.resume(tmp_path / "other", {"run.rounds": 3})
    with pytest.raises(RequestError, match=r"the adapter that it started from of .*run has changed"):
        app.resume(tmp_path / "run")
    small.write_rows(own / "train.jsonl", small.rows(121, "other"))
    with pytest.raises(RequestError, match="the partition was made for other data"):
        app.resume(tmp_path / "run")


def test_other_versions_and_machines_are_noted(place: Path, tmp_path: Path) -> None:
    """The same bits are promised on the same machine type, threads and versions; elsewhere the log says so."""
    with pytest.raises(KeyboardInterrupt):
        app.run(small.config(place), out=tmp_path / "run", progress=stop_at(1, KeyboardInterrupt()))
    with RunFolder.open(tmp_path / "run") as opened:
        versions = opened.manifest()["versions"]
        opened.update_manifest(versions={**versions, "torch": "1.0"})
    app.resume(tmp_path / "run")
    log = (tmp_path / "run" / "run.log").read_text()
    assert "the versions changed since the run began" in log and "'torch': '1.0'" in log
    assert "the machine changed" not in log
    assert RunFolder.open(tmp_path / "run").manifest()["versions"] == versions


def test_partition_is_the_saved_one(place: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        app.run(small.config(place), out=tmp_path / "run", progress=stop_at(1, KeyboardInterrupt()))
    path = tmp_path / "run" / "partition.json"
    path.write_text(path.read_text().replace('"carved": true', '"carved": false'))
    with pytest.raises(RequestError, match="the saved partition was changed"):
        app.resume(tmp_path / "run")


def test_warm_started_run_is_resumed_to_the_same_bits(place: Path, tmp_path: Path, finished: app.Run) -> None:
    config = small.config(place, method__name="local", run__init_from=str(finished.folder))
    app.run(config, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        app.run(config, out=tmp_path / "run", progress=stop_at(1, KeyboardInterrupt()))
    app.resume(tmp_path / "run")
    assert small.story(tmp_path / "run") == small.story(tmp_path / "whole")
    clients = small.checkpoint(tmp_path / "run", "local").versions
    for client in clients:
        own, other = (small.memory(tmp_path / name, client, "local") for name in ("run", "whole"))
        assert tree.sha256(own.params) == tree.sha256(other.params)
