"""Clients that fail, lie, answer too late or not at all; too few answers; narrow wires."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import said
import small
from fedpeft import app
from fedpeft.app.federation import Federation
from fedpeft.app.proxying import FILE
from fedpeft.core import records, tree
from fedpeft.core.errors import QuorumError
from fedpeft.core.exchange import Call, Exchange
from fedpeft.core.wire import Wired
from fedpeft.engines.inprocess import InProcess
from fedpeft.runs.store import RunFolder

FAULTS = ("not a number", "wrong shape", "exception", "silence")
REASONS = (
    r"refused: params/block.0.query.A of (Update|Correction) holds 1 numbers that are not finite, of 128",
    r"refused: 'block.0.query.A' has shape \(5, 32\) where \(4, 32\) was expected",
    r"RuntimeError: the disk of the client is broken",
    r"no answer",
)


def with_engine(patch: pytest.MonkeyPatch, change: Callable[[InProcess], None]) -> None:
    """Let every run from now on change its engine before it uses it."""
    whole = Federation.transport

    def transport(self: Federation, memories: Any = None) -> Any:
        made = whole(self, memories)
        change(made.transport if isinstance(made, Wired) else made)  # type: ignore[arg-type]
        return made

    patch.setattr(Federation, "transport", transport)


def victim(call: Call) -> str:
    """Another client in every round."""
    return f"00{(call.round - 1) % 4}"


def spoiled(call: Call, data: bytes) -> bytes | None:
    """What the wire makes of the answer of the round's victim."""
    fault = FAULTS[(call.round - 1) % 4]
    if fault == "silence":
        return None
    up = records.decode(data, call.exchange.up)
    first = up.params["block.0.query.A"].clone()
    if fault == "not a number":
        first[0, 0] = torch.nan
    elif fault == "wrong shape":
        first = torch.zeros(5, 32)
    return records.encode(replace(up, params={**up.params, "block.0.query.A": first}))


def break_one(engine: InProcess) -> None:
    """In every round one client is faulty, each time in another way."""
    now: list[Call] = []
    exchange = engine.exchange

    def wired(inner: Exchange) -> Exchange:
        def work(down: Any, memory: Any, env: Any) -> Any:
            if env.client == victim(now[-1]) and FAULTS[(env.round - 1) % 4] == "exception":
                raise RuntimeError("the disk of the client is broken")
            return inner.work(down, memory, env)

        return replace(inner, work=work)

    def remember(call: Call, downs: Mapping[str, Any]) -> Any:
        now.append(call)
        return exchange(call, downs)

    engine.exchange = remember  # type: ignore[method-assign]
    engine.wire = wired
    engine.carry = lambda client, call, data: spoiled(call, data) if client == victim(call) else data


def leave_one_out(engine: InProcess) -> None:
    """In every round the same client is simply not there."""
    engine.fault = lambda client, call: "absent" if client == victim(call) else None


class Other:
    """The model of a site that has another base than the server."""

    sha256 = "f" * 64

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def change_base(engine: InProcess) -> None:
    """One client has another base than the server."""
    site = engine.site

    def own(client: str) -> Any:
        found = site(client)
        return replace(found, model=Other(found.model)) if client == "002" else found

    engine.site = own  # type: ignore[method-assign]


def leave_it_out(engine: InProcess) -> None:
    """That client is not there in training."""
    engine.fault = lambda client, call: "absent" if client == "002" and call.exchange.name == "train" else None


def test_a_client_with_another_base_is_lost_and_the_round_goes_on(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedPT: the adapter fits one base alone. The mean is that of the others, and the report names the reason."""
    config = said.config(models, method__cohort=0, proxy__large=None, run__rounds=1)
    for name, change in (("other", change_base), ("absent", leave_it_out)):
        with monkeypatch.context() as patch:
            with_engine(patch, change)
            app.run(config, out=tmp_path / name)
    run = RunFolder.open(tmp_path / "other")
    (line,) = [line for line in run.exchanges() if line["lost"] is not None]
    own = json.loads((run.path / "adapter" / FILE).read_text())["small"]["sha256"][:12]
    why = f"the adapter is for a base with sha256 {own}, and this client has ffffffffffff; give it the server's model"
    assert (line["client"], line["exchange"]) == ("002", "train") and why in line["lost"]
    assert [line["lost_clients"] for line in run.metrics()] == [0, 1]
    assert html.escape(why) in run.report.read_text()
    assert small.sha(tmp_path / "other") == small.sha(tmp_path / "absent")


@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
@pytest.mark.parametrize("batching", ["off", 4])
def test_one_faulty_client_of_four_is_reported_and_harms_nobody(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, batching: Any
) -> None:
    """The run ends like one in which the faulty client was absent: bit for bit one by one, else to rounding."""
    config = small.config(
        place, method__name=method, method__cohort=0, partition__clients=4, run__rounds=4, run__cohort_batching=batching
    )
    for name, change in (("faulty", break_one), ("absent", leave_one_out)):
        with monkeypatch.context() as patch:
            with_engine(patch, change)
            app.run(config, out=tmp_path / name)
    lines = [line for line in RunFolder.open(tmp_path / "faulty").exchanges() if line["lost"] is not None]
    assert [(line["round"], line["client"]) for line in lines] == [(i + 1, f"00{i}") for i in range(4)]
    for line, reason in zip(lines, REASONS, strict=True):
        assert re.fullmatch(reason, line["lost"]), line
    assert [line["lost_clients"] for line in RunFolder.open(tmp_path / "faulty").metrics()] == [0, 1, 1, 1, 1]
    assert "lost client 003: no answer" in (tmp_path / "faulty" / "run.log").read_text()
    faulty, absent = (small.params(tmp_path / name, method) for name in ("faulty", "absent"))
    if batching == "off":
        assert small.sha(tmp_path / "faulty") == small.sha(tmp_path / "absent")
    assert tree.norm(tree.sub(faulty, absent)) < 1e-3 * tree.norm(absent)
    if method == "scaffold":
        for client in ("000", "001", "002", "003"):
            own, other = (small.memory(tmp_path / name, client, method) for name in ("faulty", "absent"))
            assert tree.norm(tree.sub(own.control, other.control)) < 1e-3 * tree.norm(other.control)


def test_bytes_that_are_no_record_are_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def garble(engine: InProcess) -> None:
        made = {1: lambda data: data[:100], 2: lambda data: b"", 3: lambda data: data[:-1] + b"\0\0"}
        engine.carry = lambda client, call, data: made[call.round](data) if client == "000" else data

    with_engine(monkeypatch, garble)
    config = small.config(place, method__cohort=0, run__wire="int8")
    app.run(config, out=tmp_path / "run")
    lost = [line for line in RunFolder.open(tmp_path / "run").exchanges() if line["lost"]]
    assert [line["client"] for line in lost] == ["000"] * 3
    assert all(line["lost"].startswith("refused: ") for line in lost)
    assert [line["bytes_up"] for line in lost][:2] == [100, 0]  # what came is counted, used or not


def test_too_few_answers_fail_the_run_which_goes_on_when_they_are_back(
    place: Path, tmp_path: Path, finished: app.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 2 is tried four times with cohorts of their own; resumed, it is the round that it would have been."""
    asked: list[tuple[int, str]] = []

    def cut(engine: InProcess) -> None:
        def fault(client: str, call: Call) -> str | None:
            if call.round == 2:
                asked.append((call.attempt, client))
            return "the line is cut" if call.round == 2 else None

        engine.fault = fault

    with monkeypatch.context() as patch:
        with_engine(patch, cut)
        with pytest.raises(QuorumError, match=r"below the quorum .* the line is cut"):
            app.run(small.config(place), out=tmp_path / "run")
    cohorts = [tuple(client for attempt, client in asked if attempt == i) for i in range(4)]
    assert len(asked) == 16 and len(set(cohorts)) > 1
    found = RunFolder.open(tmp_path / "run").manifest()
    assert found["status"] == "failed" and "the line is cut" in found["error"] and found["rounds_done"] == 1
    lines = RunFolder.open(tmp_path / "run").exchanges()
    given_up = [line for line in lines if line["round"] == 2]
    assert [(line["attempt"], line["client"]) for line in given_up] == asked
    assert {line["lost"] for line in given_up} == {"the line is cut"}
    assert sum(line["bytes_down"] for line in lines) == found["bytes_down"]
    assert "round 2, " in (log := (tmp_path / "run" / "run.log").read_text()) and log.count("the line is cut") >= 16
    app.resume(tmp_path / "run")
    assert small.sha(tmp_path / "run") == small.sha(finished.folder)
    assert small.story(tmp_path / "run") == small.story(finished.folder)


def test_quorum_can_be_lowered_when_a_run_is_resumed(place: Path, tmp_path: Path) -> None:
    """A fault schedule is a part of the run's seed: without the change it would fail for ever."""
    devices = tmp_path / "devices.toml"
    devices.write_text("[profile.phone]\navailability = 0.5\n")
    config = small.config(place, run__devices=str(devices), run__quorum=1.0, method__cohort=0)
    for attempt in (lambda: app.run(config, out=tmp_path / "run"), lambda: app.resume(tmp_path / "run")):
        with pytest.raises(QuorumError, match="not available"):
            attempt()
    done = app.resume(tmp_path / "run", {"run.quorum": 0.1})
    assert done.manifest["status"] == "finished"


def test_unavailable_devices_are_drawn_by_the_seed_and_survive_a_kill(place: Path, tmp_path: Path) -> None:
    devices = tmp_path / "devices.toml"
    devices.write_text(
        "[profile.phone]\navailability = 0.6\nflops_per_s = 1e6\n[profile.laptop]\n"
        "[clients]\nassign = {phone = 0.5, laptop = 0.5}\n"
    )
    config = small.config(place, method__cohort=0, run__devices=str(devices), run__rounds=5)
    app.run(config, out=tmp_path / "whole")
    lost = [line for line in RunFolder.open(tmp_path / "whole").exchanges() if line["lost"]]
    reason = "not available (its device 'phone' answers with probability 0.6)"
    assert lost and {line["lost"] for line in lost} == {reason}
    assert all(line["bytes_down"] == line["steps"] == line["simulated_seconds"] == 0 for line in lost)
    clients = yaml.safe_load((tmp_path / "whole" / "clients.json").read_text())
    assert sum(entry["lost"] for entry in clients.values()) == len(lost)
    phones = {client for client, entry in clients.items() if entry["lost"]}
    lines = RunFolder.open(tmp_path / "whole").exchanges()
    slow = [line["simulated_seconds"] for line in lines if line["client"] in phones and not line["lost"]]
    fast = [line["simulated_seconds"] for line in lines if line["client"] not in phones]
    assert min(slow) > 100 * max(fast)
    assert small.killed(lambda: app.run(config, out=tmp_path / "run"), 40)
    app.resume(tmp_path / "run")
    assert small.story(tmp_path / "run") == small.story(tmp_path / "whole")
    assert small.sha(tmp_path / "run") == small.sha(tmp_path / "whole")
    other = small.config(place, method__cohort=0, run__devices=str(devices), run__rounds=5, run__seed=1)
    app.run(other, out=tmp_path / "other")
    schedule = [[(e["round"], e["client"]) for e in RunFolder.open(tmp_path / name).exchanges() if e["lost"]]
                for name in ("whole", "other")]  # fmt: skip
    assert schedule[0] != schedule[1]


def test_answers_after_the_deadline_are_lost(place: Path, tmp_path: Path) -> None:
    devices = tmp_path / "devices.toml"
    devices.write_text(
        "[profile.slow]\nflops_per_s = 1e6\n[profile.fast]\n[clients]\n"
        + "".join(f'00{i} = "{"slow" if i == 2 else "fast"}"\n' for i in range(6))
    )
    config = small.config(place, method__cohort=0, run__devices=str(devices), run__deadline_s=2.0)
    done = app.run(config, out=tmp_path / "run")
    lines = RunFolder.open(done.folder).exchanges()
    assert {line["client"] for line in lines if line["lost"]} == {"002"}
    late = [line for line in lines if line["lost"]]
    assert len(late) == 3 and all(line["lost"].startswith("late: ") and "deadline 2 s" in line["lost"] for line in late)
    assert all(line["simulated_seconds"] == 2 and line["bytes_up"] > 0 for line in late)
    assert done.manifest["simulated_seconds"] == pytest.approx(3 * 2)  # every round waits for the late one


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_narrow_wires_send_less_and_still_learn(place: Path, tmp_path: Path, wire: str) -> None:
    config = small.config(place, method__epochs=3, run__rounds=6, run__wire=wire, adapter__rank=8)
    done = app.run(config, out=tmp_path / "run")
    wide = app.run({**config, "run": {**config["run"], "wire": "float32"}}, out=tmp_path / "wide")
    share = {"bfloat16": 0.8, "int8": 0.65}[wire]  # headers are a large part of so small an adapter
    for key in ("bytes_down", "bytes_up"):
        assert done.manifest[key] < share * wide.manifest[key]
    assert done.metrics["best"]["test"]["global"]["accuracy"] > 0.6
    again = app.run(config, out=tmp_path / "again")
    assert again.manifest["params_sha256"] == done.manifest["params_sha256"] != wide.manifest["params_sha256"]


def test_repeated_attempts_are_told_apart_and_follow_one_another(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In round 2 half of the cohort is missing at first: its other half has worked in vain, and the time is spent."""

    def cut(engine: InProcess) -> None:
        engine.fault = lambda client, call: "cut" if call.round == 2 and not call.attempt and client != "000" else None

    with_engine(monkeypatch, cut)
    config = small.config(place, method__cohort=0, run__rounds=2, run__quorum=1.0)
    done = app.run(config, out=tmp_path / "run")
    lines = [line for line in RunFolder.open(done.folder).exchanges() if line["round"] == 2]
    assert [(line["attempt"], line["lost"]) for line in lines] == [(0, None)] + [(0, "cut")] * 5 + [(1, None)] * 6
    first, second = (
        [line["simulated_seconds"] for line in lines if line["attempt"] == i and not line["lost"]] for i in (0, 1)
    )
    last = RunFolder.open(done.folder).metrics()[2]
    assert last["simulated_seconds"] == pytest.approx(max(first) + max(second))
    assert (last["clients"], last["lost_clients"]) == (6, 5)
    assert last["bytes_up"] == sum(line["bytes_up"] for line in lines)
