"""The command line with the composition root replaced: arguments, output, exit codes, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer.testing

import fedpeft
from fedpeft.cli import app as command_line
from fedpeft.config import RunConfig
from fedpeft.core.errors import ClientError, DataError, QuorumError, StoreError
from fedpeft.progress import Progress

DEMO = str(Path(__file__).parents[2] / "examples" / "demo.yaml")
STUDY = str(Path(__file__).parents[2] / "examples" / "compare.yaml")
METRICS = {"best": {"test": {"global": {"accuracy": 0.75, "loss": 0.5}, "majority": {"accuracy": 0.25}}}}
MANIFEST = {"rounds_done": 10, "bytes_down": 2_000_000, "bytes_up": 1_500_000, "seconds": 61.0, "params_sha256": "abc"}
TABLE = [
    {
        "label": "FedAvg",
        "task": "demo",
        "mean": 0.71,
        "std": 0.012,
        "seeds": 3,
        "bytes": 4.2e6,
        "simulated_seconds": 75.0,
    },
    {"label": "Local", "task": "demo", "mean": 0.5, "std": None, "seeds": 1, "bytes": 0, "simulated_seconds": 0.0},
]


@dataclass
class FakeApp:
    """Stands for fedpeft.app: records calls, shows progress, answers or raises."""

    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    error: BaseException | None = None
    leave: Callable[[Path], None] = lambda folder: None  # what the run has written when it fails

    def _do(self, name: str, *arguments: Any, folder: Path | None = None, progress: Any = None) -> None:
        self.calls.append((name, arguments))
        if progress is not None:
            progress(Progress(1, 2, 0.7, 1000, 500, 1.0))
        if self.error is not None:
            if folder is not None:
                self.leave(folder)
            raise self.error

    def run(self, config: Any, overrides: Any = None, *, out: Any = None, progress: Any = None) -> Any:
        self._do("run", config, overrides, out, folder=out, progress=progress)
        return types.SimpleNamespace(folder=out, manifest=MANIFEST, metrics=METRICS)

    def resume(self, folder: Path, overrides: Any = None, *, progress: Any = None) -> Any:
        self._do("resume", folder, overrides, folder=folder, progress=progress)
        return types.SimpleNamespace(folder=folder, manifest=MANIFEST, metrics=METRICS)

    def _comparison(self, out: Path) -> Any:
        return types.SimpleNamespace(folder=out, table=TABLE, report=out / "report.html")

    def compare(self, study: Path, *, out: Any = None, progress: Any = None) -> Any:
        self._do("compare", study, out, folder=out, progress=progress)
        return self._comparison(out)

    def demo(self, *, out: Any = None, progress: Any = None) -> Any:
        self._do("demo", out, folder=out, progress=progress)
        return self._comparison(out)

    def evaluate(self, folder: Path, data: Path | None = None) -> Any:
        self._do("evaluate", folder, data)
        return {"test": {"global": {"accuracy": 0.8125, "loss": 0.4}}}

    def predict(self, folder: Path, data: Path, out: Path | None = None, client: str | None = None) -> Any:
        self._do("predict", folder, data, out, client)
        return [{"label": "NUM", "probabilities": {"NUM": 0.9, "LOC": 0.1}}, {"label": "LOC", "probabilities": {}}]

    def export(self, folder: Path, to: Path, client: str | None = None, merge: bool = False) -> Path:
        self._do("export", folder, to, client, merge)
        return to

    def check(self, config: Any, overrides: Any) -> Any:
        self._do("check", config, overrides)
        return {"partition": {"clients": 24, "rows": [1, 2]}, "estimate": {"bytes_down": 1_230_000, "seconds": 75}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeApp:
    monkeypatch.chdir(tmp_path)
    fake = FakeApp()
    monkeypatch.setitem(sys.modules, "fedpeft.app", fake)
    monkeypatch.setattr(fedpeft, "app", fake, raising=False)
    return fake


def call(*arguments: str) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(command_line, list(arguments))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "config.yaml").write_text("method: {name: fedavg}\n")
    return folder


# --- what each verb does ----------------------------------------------------------------------------------------


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
    result = call("resume", str(run_dir), "--set", "run.rounds=99")
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
    assert whole == {"folder": "here", "report": "here/report.html", "table": TABLE}
    assert fake.calls[0][0] == arguments[0] and fake.calls[0][1][-1] == Path("here")


def test_evaluate_prints_scores(fake: FakeApp, run_dir: Path) -> None:
    result = call("evaluate", str(run_dir), "--data", "rows.csv")
    assert result.stdout.splitlines()[-1].split() == ["test", "global", "accuracy", "0.812"]
    assert fake.calls == [("evaluate", (run_dir, Path("rows.csv")))]
    assert json.loads(call("evaluate", str(run_dir), "--json").stdout)["test"]["global"]["loss"] == 0.4


def test_predict_prints_json_lines_an_array_or_where_they_are(fake: FakeApp, run_dir: Path) -> None:
    lines = call("predict", str(run_dir), "--data", "rows.csv", "--client", "007").stdout.splitlines()
    assert [json.loads(line)["label"] for line in lines] == ["NUM", "LOC"]
    assert fake.calls == [("predict", (run_dir, Path("rows.csv"), None, "007"))]
    assert len(json.loads(call("predict", str(run_dir), "--data", "rows.csv", "--json").stdout)) == 2
    told = call("predict", str(run_dir), "--data", "rows.csv", "--out", "p.jsonl")
    assert told.stdout == "2 predictions: p.jsonl\n"
    assert fake.calls[-1][1][2] == Path("p.jsonl")


def test_export_hands_on_client_and_merge(fake: FakeApp, run_dir: Path) -> None:
    result = call("export", str(run_dir), "--to", "there", "--client", "003", "--merge")
    assert result.stdout == "exported: there\n"
    assert fake.calls == [("export", (run_dir, Path("there"), "003", True))]
    assert json.loads(call("export", str(run_dir), "--to", "there", "--json").stdout) == {"exported": "there"}


def test_check_prints_nested_facts_with_units(fake: FakeApp) -> None:
    result = call("check", DEMO, "--set", "run.seed=4")
    assert result.stdout.splitlines() == [
        "partition:", "  clients: 24", "  rows: 1, 2", "estimate:", "  bytes_down: 1.23 MB", "  seconds: 1 min 15 s",
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


# --- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "nowhere.yaml"), "nowhere.yaml: no such file"),
        (("run", DEMO, "--set", "run.round=3"), "run.round: unknown key; did you mean 'rounds'?"),
        (("run", DEMO, "--set", "rounds"), "--set rounds: not of the form key=value"),
        (("run", DEMO, "--set", "method.cohort=25"), "method.cohort: 25 is above partition.clients = 24"),
        (("run", DEMO, "--set", "method.name=fedavgg"), "did you mean 'fedavg'?"),
        (("check", DEMO, "--set", "run.rounds=0"), "run.rounds: 0 cannot be used; give at least 1."),
        (("compare", DEMO), "model: unknown key"),
        (("resume", "nowhere"), "nowhere is not a folder; give the folder that `fedpeft run` printed first"),
        (("evaluate", "."), ". is a folder without a run (no config.yaml)"),
        (("predict", "nowhere", "--data", "x"), "nowhere is not a folder"),
        (("export", "nowhere", "--to", "x"), "nowhere is not a folder"),
        (("report", "nowhere"), "nowhere is not a folder"),
        (("list", "adapters", "lorra"), "adapters has no 'lorra'; did you mean 'lora'?"),
        (("list", "everything"), "everything"),
        (("run",), "Missing argument"),
        (("runn",), "No such command"),
    ],
)
def test_wrong_request_is_told_with_code_2_and_no_traceback(
    fake: FakeApp, arguments: tuple[str, ...], said: str
) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr and "Traceback" not in result.output
    assert result.stdout == "" and fake.calls == []


def test_all_problems_of_a_configuration_are_told(fake: FakeApp) -> None:
    result = call("run", DEMO, "--set", "run.rounds=0", "--set", "a.b=1")
    assert "2 problems in the configuration:" in result.stderr
    assert "  - a: unknown key" in result.stderr and "  - run.rounds: 0" in result.stderr


def test_folder_that_holds_something_is_not_overwritten(fake: FakeApp, run_dir: Path) -> None:
    result = call("run", DEMO, "--out", str(run_dir))
    assert result.exit_code == 2 and f"fedpeft resume {run_dir}" in result.stderr
    assert fake.calls == []


def test_request_that_only_the_data_show_to_be_wrong_is_code_2(fake: FakeApp) -> None:
    fake.error = DataError("row 3 of x.csv has the label 'q'")
    result = call("run", DEMO, "--out", "here")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, "error: row 3 of x.csv has the label 'q'")


@pytest.mark.parametrize("error", [QuorumError("too few"), ClientError("NaN"), StoreError("disk\nfull")])
def test_failed_run_is_one_line_with_code_1(fake: FakeApp, error: Exception) -> None:
    fake.error = error
    result = call("run", DEMO, "--out", "here")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"error: {' '.join(str(error).split())}"
    assert "Traceback" not in result.output


def test_failed_run_that_left_a_state_says_how_to_go_on(fake: FakeApp) -> None:
    fake.error = QuorumError("too few clients answered.")
    fake.leave = lambda folder: (folder.mkdir(), (folder / "config.yaml").touch())[0]
    result = call("run", DEMO, "--out", "here")
    assert result.stderr.splitlines()[-1] == "error: too few clients answered. Go on with: fedpeft resume here"


def test_interrupt_is_code_130_and_says_how_to_go_on(fake: FakeApp) -> None:
    fake.error = KeyboardInterrupt()
    fake.leave = lambda folder: (folder.mkdir(), (folder / "config.yaml").touch())[0]
    result = call("compare", STUDY, "--out", "here")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == (
        f"interrupted; state saved. Go on with: fedpeft compare {STUDY} --out here"
    )


def test_interrupt_before_anything_was_saved_claims_nothing(fake: FakeApp, run_dir: Path) -> None:
    fake.error = KeyboardInterrupt()
    assert call("evaluate", str(run_dir)).stderr == "interrupted.\n"
    assert call("run", DEMO, "--out", "here").stderr.splitlines()[-1] == "interrupted."


def test_fault_leaves_its_traceback_in_the_log(fake: FakeApp) -> None:
    fake.error = ZeroDivisionError("division by zero")
    fake.leave = lambda folder: (folder.mkdir(), (folder / "run.log").touch())[0]
    result = call("run", DEMO, "--out", "here")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "ZeroDivisionError: division by zero. The traceback is in here/run.log." in result.stderr
    log = Path("here/run.log").read_text()
    assert log.startswith("Traceback") and "ZeroDivisionError" in log


def test_fault_before_there_is_a_log_shows_its_traceback(fake: FakeApp, run_dir: Path) -> None:
    fake.error = ZeroDivisionError("division by zero")
    result = call("evaluate", str(run_dir))
    assert result.exit_code == 1 and "Traceback" in result.stderr and result.stdout == ""


# --- the process itself -----------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy_and_names_every_verb() -> None:
    code = (
        "import sys, fedpeft.cli\n"
        "try: fedpeft.cli.main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'yaml', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("demo", "run", "resume", "compare", "evaluate", "predict", "report", "export", "check", "list"):
        assert f" {verb} " in done.stdout


def test_version() -> None:
    assert call("--version").stdout == f"{fedpeft.__version__}\n"


def test_termination_is_an_orderly_interrupt(tmp_path: Path) -> None:
    code = (
        "import sys, time, types, fedpeft\n"
        "def demo(out, progress):\n"
        "    out.mkdir(); (out / 'config.yaml').touch(); print('ready', flush=True); time.sleep(60)\n"
        "fedpeft.app = sys.modules['fedpeft.app'] = types.SimpleNamespace(demo=demo)\n"
        "from fedpeft.cli import main\n"
        "main(['demo', '--out', 'here'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline() not in ("ready\n", ""):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "interrupted; state saved. Go on with: fedpeft demo --out here\n"
