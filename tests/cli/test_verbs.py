"""The command line with the composition root replaced: what each verb is given and what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from command_line import DEMO, MANIFEST, METRICS, STUDY, TABLE, FakeApp, call
from fedpeft.cli.render import print_scores
from fedpeft.config import RunConfig


def test_run_prints_its_folder_first_and_its_result_last(fake: FakeApp) -> None:
    result = call("run", DEMO, "--set", "run.rounds=3", "--set", "method.lr=1e-3", "--out", "here")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0] == "folder: here"
    assert lines[-1] == "report: here/report.html"
    assert any(line.split() == ["best", "test", "global", "accuracy", "0.750"] for line in lines)
    assert "10 rounds, 3.50 MB of traffic, 1 min 01 s here" in result.stdout
    assert "params_sha256: abc" in result.stdout
    ((name, (config, _, out)),) = fake.calls
    assert (name, out) == ("run", Path("here"))
    assert isinstance(config, RunConfig)
    assert (config.run.rounds, config.method.fields["lr"]) == (3, 1e-3)


def test_progress_goes_to_stderr_as_plain_lines(fake: FakeApp) -> None:
    result = call("run", DEMO, "--out", "here")
    assert result.stderr.splitlines() == ["round 1/2  loss 0.700  1.50 kB  1.00 s gone  1.00 s left"]


def test_run_without_out_is_named_after_method_task_and_time(fake: FakeApp) -> None:
    result = call("run", DEMO)
    assert result.stdout.splitlines()[0].startswith("folder: runs/fedavg-demo-20")


def test_run_as_json_is_one_object(fake: FakeApp) -> None:
    result = call("run", DEMO, "--out", "here", "--json")
    assert json.loads(result.stdout) == {"folder": "here", "manifest": MANIFEST, "metrics": METRICS}


def test_resume_hands_on_folder_and_overrides(fake: FakeApp, run_dir: Path) -> None:
    (run_dir / "manifest.json").write_text('{"status": "finished", "rounds_done": 7}')
    again = call("resume", str(run_dir))
    assert "finished already, after 7 rounds; to go on, raise run.rounds" in again.stderr
    fake.calls.clear()
    result = call("resume", str(run_dir), "--set", "run.rounds=99")
    assert "finished already" not in result.stderr
    assert fake.calls == [("resume", (run_dir, {"run.rounds": 99}))]
    assert result.stdout.splitlines()[0] == f"folder: {run_dir}"
    assert json.loads(call("resume", str(run_dir), "--json").stdout)["metrics"] == METRICS


@pytest.mark.parametrize("arguments", [("demo",), ("compare", STUDY)])
def test_comparison_ends_with_a_table_and_the_report(fake: FakeApp, arguments: tuple[str, ...]) -> None:
    result = call(*arguments, "--out", "here")
    lines = result.stdout.splitlines()
    assert (result.exit_code, lines[0], lines[-1]) == (0, "folder: here", "report: here/report.html")
    assert lines[1].split() == ["method", "task", "score", "seeds", "traffic", "simulated"]
    assert lines[3].split() == ["FedAvg", "demo", "0.710", "±", "0.012", "3", "4.20", "MB", "1", "min", "15", "s"]
    assert lines[4].split() == ["Local", "demo", "0.500", "1", "0", "B", "0", "s"]
    whole = json.loads(call(*arguments, "--out", "here", "--json").stdout)
    assert whole == {"folder": "here", "report": "here/report.html", "table": TABLE, "failures": []}
    assert fake.calls[0][0] == arguments[0] and fake.calls[0][1][-1] == Path("here")


@pytest.mark.parametrize("failures", [("demo-a-seed0: too few",), ("demo-a-seed0: too few", "demo-b-seed0: NaN")])
def test_cells_that_failed_are_told_after_the_table(fake: FakeApp, failures: tuple[str, ...]) -> None:
    fake.failures = failures
    result = call("compare", STUDY, "--out", "here")
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    said = {1: "1 cell failed and is left out:", 2: "2 cells failed and are left out:"}[len(failures)]
    assert lines[5:-1] == [said, *(f"  - {failure}" for failure in failures)]
    assert json.loads(call("demo", "--out", "here", "--json").stdout)["failures"] == list(failures)


def test_one_of_a_thing_is_told_as_one(fake: FakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MANIFEST, "rounds_done", 1)
    assert "\n1 round, 3.50 MB of traffic" in call("run", DEMO, "--out", "here").stdout


def test_evaluate_prints_scores(fake: FakeApp, run_dir: Path) -> None:
    result = call("evaluate", str(run_dir), "--data", "rows.csv")
    assert result.stdout.splitlines()[-1].split() == ["test", "global", "accuracy", "0.812"]
    assert fake.calls == [("evaluate", (run_dir, Path("rows.csv"), True, False))]
    call("evaluate", str(run_dir), "--without-large", "--own-proxies")
    assert fake.calls[-1][1][2:] == (False, True)
    assert json.loads(call("evaluate", str(run_dir), "--json").stdout)["test"]["global"]["loss"] == 0.4


def test_scores_name_the_round_of_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    by = {"global": {"accuracy": 0.6}, "personalized": {"accuracy": 0.7}, "majority": {"accuracy": 0.2}}
    told = {"rounds": {"global": 8, "personalized": 10}, "not_scored": {"proxy": "it tells a few candidates"}}
    print_scores({"test": by, **told}, False)
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines.pop() == ["proxy has no score: it tells a few candidates"]
    assert lines == [
        ["test global accuracy (round 8)", "0.600"],
        ["test personalized accuracy (round 10)", "0.700"],
        ["test majority accuracy", "0.200"],
    ]


def test_predict_prints_json_lines_an_array_or_where_they_are(fake: FakeApp, run_dir: Path) -> None:
    lines = call("predict", str(run_dir), "--data", "rows.csv", "--client", "007").stdout.splitlines()
    assert [json.loads(line)["label"] for line in lines] == ["NUM", "LOC"]
    assert fake.calls == [("predict", (run_dir, Path("rows.csv"), None, "007"))]
    assert len(json.loads(call("predict", str(run_dir), "--data", "rows.csv", "--json").stdout)) == 2
    told = call("predict", str(run_dir), "--data", "rows.csv", "--out", "p.jsonl")
    assert told.stdout == "2 predictions: p.jsonl\n"
    assert fake.calls[-1][1][2] == Path("p.jsonl")


def test_export_hands_on_client_and_merge_and_says_what_it_wrote(fake: FakeApp, run_dir: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "fedpeft.json").write_text('{"form": "own"}')
    result = call("export", str(run_dir), "--to", str(there), "--client", "003", "--merge")
    assert result.stdout.startswith(f"exported: {there} (an adapter in fedpeft's own form, which peft does not know")
    assert fake.calls == [("export", (run_dir, there, "003", True, False, None))]
    call("export", str(run_dir), "--to", str(there), "--replace")
    assert fake.calls[-1][1][2:] == (None, False, True, None)
    told = json.loads(call("export", str(run_dir), "--to", str(there), "--json").stdout)
    assert told == {"exported": str(there), "form": "own"}
    facts = {"form": "adapter", "factored": {"rank": 16, "left_out": 0.0312}, "adapter": {"rank": 16, "alpha": 32.0}}
    (there / "fedpeft.json").write_text(json.dumps(facts))
    ranked = call("export", str(run_dir), "--to", str(there), "--rank", "16")
    assert fake.calls[-1][1][2:] == (None, False, False, 16)
    assert ranked.stdout.endswith(
        "rank 16 leaves out 3.12% of the norm of what was trained; a run goes on from it with adapter.rank=16 and "
        "adapter.alpha=32\n"
    )
    told = json.loads(call("export", str(run_dir), "--to", str(there), "--rank", "16", "--json").stdout)
    assert told == {"exported": str(there), "form": "adapter", "rank": 16, "left_out": 0.0312}
    (there / "fedpeft.json").write_text('{"form": "own", "changes_base": true}')
    assert (
        "to go on with it, export the run with --rank N or --merge"
        in call("export", str(run_dir), "--to", str(there)).stdout
    )
    (there / "fedpeft.json").write_text('{"form": "adapter", "learnt": false}')
    assert "its adapter changes nothing" in call("export", str(run_dir), "--to", str(there)).stdout


def test_check_prints_nested_facts_with_units(fake: FakeApp) -> None:
    result = call("check", DEMO, "--set", "run.seed=4")
    assert result.stdout.splitlines() == [
        "partition:", "  clients: 1,200", "  rows mean: 153.9", "  top label share mean: 38.1 %", "estimate:",
        "  bytes down: 1.23 MB", "  memory: 30.0 MB", "  seconds: 1 min 15 s",
        "  flops per client and round: 4.70 GFLOPs",
    ]  # fmt: skip
    assert fake.calls == [("check", (Path(DEMO), {"run.seed": 4}))]
    assert json.loads(call("check", DEMO, "--json").stdout)["estimate"]["bytes_down"] == 1_230_000


def test_report_of_one_and_of_several_runs(tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("report", str(run_dir)).stdout == f"report: {run_dir / 'report.html'}\n"
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")
    assert call("report", str(run_dir), str(run_dir)).stdout == "report: report.html\n"
    shown = call("report", str(run_dir), "--out", "mine.html", "--title", "Mine", "--json")
    assert json.loads(shown.stdout) == {"report": "mine.html"}
    assert "<h1>Mine</h1>" in Path("mine.html").read_text()


def test_report_of_a_study_is_the_page_of_the_runs_that_it_has_chosen(tmp_path: Path) -> None:
    study = tmp_path / "study"
    for name in ("demo-a-seed0-lr1", "demo-a-seed0-lr2", "demo-b-seed0-lr1"):
        (study / name).mkdir(parents=True)
        (study / name / "config.yaml").write_text(f"method: {{name: fedavg, lr: {name[-1]}}}\n")
        (study / name / "manifest.json").write_text(json.dumps({"label": f"Method {name[5]}"}))
    assert call("report", str(study)).stdout == f"report: {study / 'report.html'}\n"
    page = (study / "report.html").read_text()
    assert "Method a (lr 1)" in page and "Method a (lr 2)" in page and "Method b" in page, "not at its end yet"
    row = {"label": "Method a", "task": "t", "target": 0.625, "bytes_to_target": 3000, "seconds_to_target": 1.5}
    runs = ["demo-a-seed0-lr2", "demo-b-seed0-lr1", "gone"]
    chosen = {"table": [row], "failures": ["demo-c-seed0: odd"], "runs": runs}
    (study / "table.json").write_text(json.dumps(chosen))
    call("report", str(study))
    page = (study / "report.html").read_text()
    assert "Method a" in page and "Method b" in page and "lr: 1\n" in page and "(lr" not in page
    assert "demo-c-seed0: odd" in page and "To a common target" in page and "3.00 kB" in page
    wrong = call("evaluate", str(study))
    assert (
        wrong.exit_code == 2
        and f"is the folder of a study; give the folder of one of its runs, such as {study}" in (wrong.stderr)
    )


@pytest.mark.parametrize("what", ["methods", "tasks", "models", "adapters", "options"])
def test_list_names_everything_and_each_with_its_options(what: str) -> None:
    found = json.loads(call("list", what, "--json").stdout)
    assert len(found) >= 2 and all(entry["meaning"] for entry in found)
    for entry in found:
        shown = json.loads(call("list", what, entry["name"], "--json").stdout)
        assert shown["name"] == entry["name"]
        assert all(set(option) == {"name", "type", "default", "meaning"} for option in shown["options"])
        assert all(option["meaning"] for option in shown["options"]), entry["name"]
        text = call("list", what, entry["name"]).stdout
        assert all(option["name"] in text for option in shown["options"])
        assert entry["name"] in call("list", what).stdout


def test_list_tells_defaults_of_a_method_and_of_nested_keys() -> None:
    options = {o["name"]: o for o in json.loads(call("list", "methods", "fedavg", "--json").stdout)["options"]}
    assert options["cohort"]["default"] == 10
    options = {o["name"]: o for o in json.loads(call("list", "options", "run", "--json").stdout)["options"]}
    assert options["stop.patience"]["type"] == "whole number | null"


def test_list_tells_the_fields_of_a_curriculum_where_there_can_be_one() -> None:
    for what, name, there in (("methods", "fedavg", True), ("methods", "voc", False), ("options", "method", True)):
        options = {o["name"]: o for o in json.loads(call("list", what, name, "--json").stdout)["options"]}
        assert ("schedule_beta" in options) == there, name
    assert options["schedule"]["default"] is None and options["schedule_beta"]["default"] == 0.6


def test_list_tells_the_adapter_that_a_method_brings() -> None:
    """Two methods with the same fields differ in it."""
    told = [json.loads(call("list", "methods", name, "--json").stdout) for name in ("fedprompt", "prompt_tuning")]
    assert told[0]["options"] == told[1]["options"]
    assert [t["adapter"]["start"] for t in told] == ["normal", "vocabulary"]
    assert "adapter: prompt, length 20, start normal\n" in call("list", "methods", "fedprompt").stdout
    assert "adapter" not in json.loads(call("list", "adapters", "lora", "--json").stdout)


def test_list_of_a_section_with_fields_of_its_own_says_where_these_are() -> None:
    assert call("list", "options", "method").stdout.endswith("besides: fedpeft list methods NAME\n")
    assert call("list", "options", "adapter").stdout.endswith("besides: fedpeft list adapters KIND\n")
    assert "of its own" not in call("list", "options", "run").stdout
