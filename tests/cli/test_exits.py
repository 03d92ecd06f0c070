"""The command line with the composition root replaced: errors, exit codes, and the process itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

import fedpeft
from command_line import DEMO, STUDY, FakeApp, call
from fedpeft.core.errors import ClientError, DataError, QuorumError, StoreError

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
        (("compare", DEMO), f"{DEMO}: is the configuration of one run and no study; use: fedpeft run {DEMO}"),
        (("run", STUDY), f"{STUDY}: is a study and not the configuration of a run; use: fedpeft compare {STUDY}"),
        (("check", STUDY), f"use: fedpeft compare {STUDY}"),
        (("list", "options", "fedavg"), "options has no 'fedavg'; use: fedpeft list methods fedavg"),
        (("list", "adapters", "scaffold"), "use: fedpeft list methods scaffold"),
        (("list", "methods", "run"), "methods has no 'run'; use: fedpeft list options run"),
        (("list", "options", "method.lr"), "and those of its own with: fedpeft list methods NAME"),
        (("list", "options", "run.rounds"), "list all keys of run with: fedpeft list options run"),
        (("resume", "nowhere"), "nowhere is not a folder; give the folder that `fedpeft run` printed first"),
        (("evaluate", "."), ". is a folder without a run (no config.yaml)"),
        (("predict", "nowhere", "--data", "x"), "nowhere is not a folder"),
        (("export", "nowhere", "--to", "x"), "nowhere is not a folder"),
        (("report", "nowhere"), "nowhere is not a folder"),
        (("list", "adapters", "lorra"), "adapters has no 'lorra'; did you mean 'lora'?"),
        (("list", "everything"), "everything"),
        (("run",), "Missing argument"),
        (("runn",), "No such command"),
        (("run", DEMO, "--set", "run.engine=flower"), "run.engine: flower will connect real sites over a network and"),
        (("server", "x.yaml"), "fedpeft server will run the server of a federation of real sites and is not in this"),
        (("client", "--help"), "fedpeft client will run one site of a federation and is not in this version; use"),
        (("keys", "new"), "fedpeft keys will make and list the keys"),
        (("status",), "fedpeft status will tell the live state of a federation of real sites and is not in this"),
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


def test_a_folder_is_told_only_where_there_is_one(fake: FakeApp) -> None:
    fake.refusal = DataError("row 3 of x.csv has the label 'q'")
    result = call("run", DEMO, "--out", "here")
    assert (result.exit_code, result.stdout) == (2, "")


def test_near_verbs_are_told_once(fake: FakeApp) -> None:
    said = call("import", "x").stderr
    assert said.count("Did you mean") == 1 and "'export'" in said


@pytest.mark.parametrize("error", [QuorumError("too few"), ClientError("NaN"), StoreError("disk\nfull")])
def test_failed_run_is_one_line_with_code_1(fake: FakeApp, error: Exception) -> None:
    fake.error = error
    result = call("run", DEMO, "--out", "here")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"error: {' '.join(str(error).split())}"
    assert "Traceback" not in result.output


@pytest.mark.parametrize("end", [".", ""])
def test_failed_run_that_left_a_state_says_how_to_go_on(fake: FakeApp, end: str) -> None:
    fake.error = QuorumError(f"too few clients answered{end}")
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


def test_traceback_that_the_run_has_logged_is_not_logged_again(fake: FakeApp) -> None:
    """The run's own log has it with a time before it and without the frames of the command line."""
    fake.error = ZeroDivisionError("division by zero")

    def leave(folder: Path) -> None:
        try:
            raise fake.error or AssertionError
        except ZeroDivisionError:
            folder.mkdir()
            (folder / "run.log").write_text(f"12:00:00 ERROR the run failed\n{traceback.format_exc()}")
        raise fake.error

    fake.leave = leave
    result = call("run", DEMO, "--out", "here")
    assert "The traceback is in here/run.log." in result.stderr
    assert Path("here/run.log").read_text().count("Traceback") == 1


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
