"""`fedpeft plan` and `fedpeft profile` as people type them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import call

EXAMPLES = Path(__file__).parents[2] / "examples"
LLAMA, MACHINES = str(EXAMPLES / "llama2-7b.json"), EXAMPLES / "machines.toml"


def test_plan_on_the_command_line(tmp_path: Path) -> None:
    kept = tmp_path / "plan.json"
    done = call("plan", "--model", LLAMA, "--devices", str(MACHINES), "--seq", "512", "--out", str(kept))
    assert set(json.loads(kept.read_text())["plans"]) >= {"phone", "data centre"}
    assert done.exit_code == 0, done.output
    assert "consumer GPU" in done.stdout and "time binds" in done.stdout and "under-training" in done.stdout
    told = call("plan", "--model", LLAMA, "--devices", str(MACHINES), "--seq", "512", "--search", "milp", "--json")
    assert json.loads(told.stdout)["plans"]["phone"]["bits"] == "nf4"
    fixed = call("plan", "--model", LLAMA, "--devices", str(MACHINES), "--seq", "512", "--fix", "batch=4,bits=nf4dq")
    assert "one step:" in fixed.stdout and fixed.exit_code == 0


def plan(*more: str, seq: str = "512") -> str:
    done = call("plan", "--model", LLAMA, "--devices", str(MACHINES), "--seq", seq, *more)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def test_a_plan_says_what_it_rests_on(tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"block.31.value": 3.0}))
    text = plan("--scores", str(scores), "--kinds", "q, v", seq="5000")
    assert "of the examples of the machines that take part are not used in a round" in text
    assert "63 of 64 weights have no score and count 0" in text
    assert "--seq 5000 exceeds the model's 4096 positions" in text
    assert "with one weight at the least rank in the largest batch that fits)" in text
    assert "memory not calibrated, a formula alone: phone, " in text and "(no peak_ratio; see fedpeft profile)" in text
    assert "time not calibrated, a formula alone: phone, " in text and "(no step_overhead_s; " in text
    assert "exceeds the model's 4096 positions" in plan("--fix", "batch=1", seq="5000")
    assert "exceeds" not in plan("--fix", "batch=1,checkpointing=yes", "--loop", "plain")


def test_defaults_of_fix_are_those_that_help_and_pages_name() -> None:
    fixed = json.loads(plan("--fix", "checkpointing=no", "--kinds", "q,v", "--json"))["fixed"]
    assert (fixed["batch"], fixed["rank"], fixed["bits"], fixed["kinds"]) == (8, 8, "full", ["query", "value"])
    told = json.loads(plan("--fix", "batch=8,rank=8,kinds=q+v,bits=full", "--json"))["fixed"]
    assert told == fixed


def test_plan_ends_with_2_where_nobody_can_join() -> None:
    done = call("plan", "--model", LLAMA, "--devices", str(MACHINES), "--seq", "512", "--deadline", "0.01")
    assert done.exit_code == 2 and "phone cannot join: one step with its messages takes" in done.stdout
    wrong = call("plan", "--model", LLAMA, "--devices", str(MACHINES), "--seq", "512", "--bits", "nf4")
    assert wrong.exit_code == 2 and "use largest or search or full" in wrong.output


def test_profile_on_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fedpeft.app import profiling

    monkeypatch.setattr(profiling, "REPEATS", 1)
    monkeypatch.setattr(profiling, "ROWS", 1)
    monkeypatch.setattr(profiling, "PROBE_BYTES", 2**16)
    file = tmp_path / "device.toml"
    done = call("profile", "--device", "cpu", "--name", "mine", "--examples", "9", "--out", str(file))
    assert done.exit_code == 0, done.output
    assert "formats: full, int8, nf4, nf4dq" in done.output and "bandwidth: unknown" in done.output
    assert "# bandwidth unknown: 10 Mbit/s up, 50 down are assumed" in file.read_text()
    assert "which is indicative" in file.read_text()
    planned = call("plan", "--model", "demo", "--devices", str(file), "--seq", "32", "--classes", "6", "--json")
    assert json.loads(planned.stdout)["plans"]["mine"]["examples"] == 9
    assert json.loads(call("profile", "--device", "cpu", "--json").stdout)["profile"]["name"] == "here"
