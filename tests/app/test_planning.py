"""`fedpeft plan` and `fedpeft profile`: from a configuration and a devices file alone, and what goes wrong."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedpeft.app import planning, profiling
from fedpeft.core.errors import ConfigError, DataError, ModelError, RequestError
from fedpeft.data.instructions import read_prompts
from fedpeft.data.load import Source
from fedpeft.models.hf import HFModel
from fedpeft.planner.cost import shape_of, weights
from fedpeft.planner.device import DEFAULT, as_device, load_devices, load_machines
from fedpeft.planner.memory import parameters
from fedpeft.planner.plan import Job
from fedpeft.planner.prices import Costs, Setting

EXAMPLES = Path(__file__).parents[2] / "examples"
LLAMA, MACHINES = str(EXAMPLES / "llama2-7b.json"), EXAMPLES / "machines.toml"


def test_a_plan_for_six_unequal_machines() -> None:
    told = planning.plan(LLAMA, MACHINES, 512)
    assert told["parameters"] == 6_738_415_616
    assert set(told["plans"]) == {"phone", "two cores", "laptop", "consumer GPU", "older GPU", "data centre"}
    phone, gpu, centre = (told["plans"][name] for name in ("phone", "consumer GPU", "data centre"))
    assert phone["bits"] == "nf4" and gpu["bits"] == "full" and told["plans"]["older GPU"]["bits"] == "int8"
    assert phone["predicted"]["under_training"] > 0 == centre["predicted"]["under_training"]
    assert centre["batch"] > gpu["batch"] >= phone["batch"]
    for plan in told["plans"].values():
        assert plan["predicted"]["peak_bytes"] <= plan["usable_bytes"] + 1 and plan["why"]
        assert plan["predicted"]["round_s"] <= told["deadline_s"] * (1 + 1e-9)
    assert json.loads(json.dumps(told)) == told


def test_a_plan_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a plan wants to reach somebody")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert planning.plan(LLAMA, MACHINES, tokens=512)["plans"]


@pytest.mark.parametrize(("bits", "peak"), [("full", 25.1e9), ("int8", 18.6e9), ("nf4dq", 15.5e9)])
def test_golden_peaks_of_one_configuration(bits: str, peak: float) -> None:
    """LLaMA2-7B, b = 4, seq 512, rank 8 on query and value, bfloat16 with float32 adapters."""
    told = planning.plan(LLAMA, MACHINES, 512, fix=f"batch=4,rank=8,kinds=q+v,bits={bits}", loop="plain")
    assert told["fixed"]["memory"]["peak"] == pytest.approx(peak, rel=0.01)
    assert told["fixed"]["flops"] == pytest.approx(55.6e12, rel=0.01)
    assert not told["fixed"]["machines"]["phone"]["fits"] and told["fixed"]["machines"]["data centre"]["fits"]


def test_scores_decide_what_is_trained(tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"block.31.value": 3.0, "block.30.value": 1.0}))
    told = planning.plan(LLAMA, MACHINES, 512, scores=scores)
    assert all(set(plan["ranks"]) <= {"block.31.value", "block.30.value"} for plan in told["plans"].values())
    assert told["plans"]["data centre"]["predicted"]["coverage"] == pytest.approx(1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "manifest.json").write_text(json.dumps({"choices": {"weight_scores": json.loads(scores.read_text())}}))
    assert planning.plan(LLAMA, MACHINES, 512, scores=run)["plans"] == told["plans"]


def test_weights_without_a_score_are_told_and_blocks_that_are_not_there_refused(tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"block.31.value": 3.0, "block.30.down": 1.0}))  # down is no candidate
    told = planning.plan(LLAMA, MACHINES, 512, scores=scores, kinds=("v",))
    assert told["candidates"] == 32 and told["unscored"] == [f"block.{i}.value" for i in range(31)]
    assert planning.plan(LLAMA, MACHINES, 512)["unscored"] == []
    scores.write_text(json.dumps({"block.31.value": 3.0, "block.32.value": 1.0}))
    with pytest.raises(RequestError, match=r"names 'block\.32\.value', and the model has 32 blocks"):
        planning.plan(LLAMA, MACHINES, 512, scores=scores)
    for content in (["block.0.value"], {"block.0.value": float("inf")}):
        scores.write_text(json.dumps(content))
        with pytest.raises(RequestError, match=r"holds no scores|has no score above 0"):
            planning.plan(LLAMA, MACHINES, 512, scores=scores)


def test_memory_and_time_are_calibrated_apart(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(
        '[[device]]\nname = "memory"\npeak_ratio = 1.1\nexamples = 5\n'
        '[[device]]\nname = "time"\nstep_overhead_s = 0.01\nexamples = 5\n'
    )
    told = planning.plan("demo", path, 32, classes=6)
    assert told["uncalibrated"] == {"memory": ["time"], "time": ["memory"]}
    assert told["deadline_from"] == planning.DEFAULT_DEADLINE


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "bert"}, None),
    ],
)
def test_how_many_tokens_a_model_was_made_for(tmp_path: Path, config: dict[str, Any], most: int | None) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 100}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**sizes, **config}))
    assert planning.plan(str(path), MACHINES, 32)["most_tokens"] == most


def test_predictions_say_which_columns_they_need() -> None:
    task = SimpleNamespace(text="instruction", text_pair="context", response="response")
    with pytest.raises(DataError) as caught:
        read_prompts(task, Source("new.jsonl", [{"question": "why?"}]))  # type: ignore[arg-type]
    assert "has no column 'instruction' (task.text)" in str(caught.value)
    assert "a column 'context' is optional; it has: question" in str(caught.value)


def test_the_embedded_models_are_planned_from_their_configurations() -> None:
    told = planning.plan("demo", MACHINES, 32, classes=6, kinds=("all",))
    assert {plan["bits"] for name, plan in told["plans"].items() if name != "phone"} == {"full"}
    assert told["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "./nothing.json"}, ModelError, "does not exist"),
        ({"tokens": 0}, RequestError, "--seq is 0"),
        ({"kinds": ("gate", "w")}, RequestError, "has no weights 'w'"),
        ({"fix": "batch=0,rank=x,bits=nf3,size=9"}, ConfigError, "4 problems"),
        ({"scores": Path(LLAMA)}, RequestError, "has no score above 0"),
        ({"scores": Path("nowhere.json")}, RequestError, "holds no scores"),
        ({"dtype": "int8"}, RequestError, "use float32 or bfloat16"),
        ({"deadline": 0.0}, RequestError, "--deadline is 0; .* above 0"),
        ({"deadline": float("nan")}, RequestError, "--deadline is nan; .* finite"),
        ({"deadline": float("inf")}, RequestError, "--deadline is inf; .* finite"),
        ({"classes": 1}, RequestError, "--classes is 1; give at least 2"),
        ({"cover": 129}, RequestError, "--cover is 129, and there are 128 candidate weights"),
        ({"cover": -1}, RequestError, "--cover is -1; .* at least 0"),
        ({"loop": "plain"}, RequestError, "--loop plain is for --fix"),
        ({"deadline": 0.001}, None, ""),
    ],
)
def test_what_cannot_be_planned_is_told(arguments: dict[str, Any], error: type[Exception] | None, words: str) -> None:
    asked = {"model": LLAMA, "devices": MACHINES, "tokens": 512, **arguments}
    if error is None:
        told = planning.plan(**asked)
        assert not told["plans"] and len(told["excluded"]) == 6 and told["under_training"] is None
        return
    with pytest.raises(error, match=words):
        planning.plan(**asked)


def test_devices_files_in_both_units(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(
        "[profile.phone]\nmemory_bytes = 4_000_000_000\nexamples = 5\n"
        '[[device]]\nname = "box"\nmemory_gb = 2\ntflops = 0.5\nup_mbps = 8\nexamples = 7\nformats = ["nf4"]\n'
    )
    found = load_machines(path)
    assert {name: n for name, (_, n) in found.items()} == {"phone": 5, "box": 7}
    box = found["box"][0]
    assert (box.memory_bytes, box.flops_per_s, box.up_bytes_per_s, box.formats) == (2 * 10**9, 5e11, 1e6, ("nf4",))
    path.write_text(path.read_text() + "[clients]\nassign = {phone = 0.5, box = 0.5}\n")
    assert {p.name for p in load_devices(path, ["a", "b"]).values()} == {"phone", "box"}
    again = tmp_path / "again.toml"
    again.write_text(as_device(box, 7))
    assert load_machines(again) == {"box": (box, 7)}


def test_mistakes_in_devices_files_are_told_together(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(
        '[[device]]\nmemory_gb = 2\n[[device]]\nname = "a"\nmemory_gb = -1\nformats = ["fp4"]\nexamples = 1.5\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_machines(path)
    told = str(caught.value)
    assert (
        "has no name" in told and "device.a.memory_gb is -1" in told and "formats" in told and "examples of a" in told
    )
    path.write_text('[[device]]\nname = "a"\n')
    with pytest.raises(ConfigError, match="says no examples"):
        load_machines(path)


# --- measuring ----------------------------------------------------------------------------------------------------


def test_speed_is_solved_from_two_sizes_and_checked_on_a_third() -> None:
    found = profiling.solve([100, 200, 300], [0.2, 0.3, 0.4])
    assert (found.flops_per_s, found.overhead_s, found.error) == pytest.approx((1000, 0.1, 0))
    noisy = profiling.solve([100, 200, 300], [0.3, 0.2, 0.3])
    assert noisy.flops_per_s == pytest.approx(1000) and noisy.overhead_s == pytest.approx(0.2)


def test_what_is_written_to_disk_is_synchronised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A disk that takes .1 s for 64 KiB writes at most 640 KiB a second, whatever the page cache takes."""
    synchronised = []

    def slow(descriptor: int) -> None:
        synchronised.append(os.fstat(descriptor).st_size)
        time.sleep(0.1)

    monkeypatch.setattr(profiling, "PROBE_BYTES", 2**16)
    monkeypatch.setattr(os, "fsync", slow)
    rate, free = profiling.disk(tmp_path)
    assert synchronised == [2**16] and 0 < rate <= 10 * 2**16 and free > 0


def test_unpacking_is_what_a_step_takes_longer() -> None:
    """Matrices of 2 blocks with d = 8 and f = 16: 2 (4 64 + 2 128) = 1024; 8192 bytes, two passes, in .1 s of mean."""
    config = {**profiling.SMALL, "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16}
    shape = shape_of(config)
    assert profiling.unpacking_speed({"full": 0.3, "int8": 0.35, "nf4": 0.45}, shape) == pytest.approx(81920)
    assert profiling.unpacking_speed({"full": 0.3, "int8": 0.2}, shape) == 0  # noise
    assert profiling.unpacking_speed({"full": 0.3}, shape) == profiling.unpacking_speed({"int8": 0.3}, shape) == 0


def test_a_plan_counts_what_was_measured_of_unpacking() -> None:
    config = {**profiling.SMALL, "num_hidden_layers": 2}
    shape = shape_of(config)
    took = {"full": 0.3, "int8": 0.36, "nf4": 0.4}
    machine = dataclasses.replace(DEFAULT, dequant_bytes_per_s=profiling.unpacking_speed(took, shape))
    every = weights(shape, ("query", "value"))
    job = Job(shape, every, {w.name: 1 / len(every) for w in every}, longest=64, mean=64.0, classes=4)
    costs, ranks = Costs(job, machine, 10), {every[0].name: 8}
    full, int8 = (costs.seconds(Setting(bits, 1, 0, False), ranks) for bits in ("full", "int8"))
    assert int8 - full == pytest.approx(0.08)


class Sink(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"ok")

    def do_GET(self) -> None:
        self._answer(b"x" * (100_000 if self.path == "/" else 9))

    def do_HEAD(self) -> None:
        self.send_error(405)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Sink) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str) -> None:
    monkeypatch.setattr(profiling, "REPEATS", 1)
    monkeypatch.setattr(profiling, "ROWS", 1)
    monkeypatch.setattr(profiling, "PROBE_BYTES", 2**16)
    took = {"full": 0.1, "int8": 0.1, "nf4": 0.1, "nf4dq": 0.1}
    real = profiling.step_seconds

    def steps(model: HFModel) -> dict[str, float]:
        assert real(model).keys() == took.keys() and min(real(model).values()) > 0
        return {**took, "nf4": 0.1 + 3 * 2 * 4 * parameters(shape_of(model.config)).matrices / 2e9}

    monkeypatch.setattr(profiling, "step_seconds", steps)
    told = profiling.profile("demo", "cpu", address, "mine")
    own = told["profile"]
    assert own.flops_per_s > 1e6 and own.memory_bytes > 1e8 and own.formats == ("full", "int8", "nf4", "nf4dq")
    assert own.dequant_bytes_per_s == pytest.approx(2e9)
    assert told["bandwidth_measured"] == {"up": True, "down": True} and own.latency_s > 0
    assert own.up_bytes_per_s > 1e3 and not told["peak_ratio_measured"]
    file = tmp_path / "device.toml"
    file.write_text(as_device(own, 9))
    machines = load_machines(file)
    assert machines["mine"][1] == 9 and machines["mine"][0].flops_per_s == pytest.approx(own.flops_per_s, rel=1e-5)
    assert machines["mine"][0].dequant_bytes_per_s == pytest.approx(2e9)


def test_memory_is_the_lesser_of_what_is_free_and_what_a_container_may_use(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert profiling._cgroup_free(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert profiling._cgroup_free(tmp_path) is None and profiling._cgroup_free(tmp_path / "none") is None
    assert profiling.free_memory(torch.device("cpu"))[0] > 0


def test_a_bandwidth_is_what_is_left_without_the_latency(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer without content takes .5 s, the message 1 s, the content .75 s."""
    seconds = {"HEAD": 0.5, "POST": 1.0, "GET": 0.75}
    real = profiling._exchange
    monkeypatch.setattr(
        profiling, "_exchange", lambda url, method, body=None: (seconds[method], *real(url, method, body)[1:])
    )
    link = profiling.bandwidth(address)
    assert (link.up, link.down, link.latency_s) == (2 * 2**20, 400_000, 0.5)


def test_what_a_server_does_not_tell_stays_unknown(address: str) -> None:
    short = profiling.bandwidth(f"{address}short")
    assert short.up > 0 and short.down == 0 and short.latency_s > 0
    assert "# bandwidth down unknown: 50 Mbit/s are assumed" in as_device(
        dataclasses.replace(DEFAULT, up_bytes_per_s=5e5), 9
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sink, "do_POST", lambda self: self.send_error(405))
        refused = profiling.bandwidth(address)
    assert refused.up == 0 and refused.down > 0


def test_addresses_that_do_not_answer_are_told() -> None:
    with pytest.raises(RequestError, match="begins with http"):
        profiling.bandwidth("example.org")
    with pytest.raises(RequestError, match="does not answer"):
        profiling.bandwidth("http://127.0.0.1:9/")


def test_the_default_profile_is_left_out_of_the_table() -> None:
    assert as_device(DEFAULT).splitlines()[:2] == ["[[device]]", 'name = "edge"'] and "memory_gb" not in as_device(
        DEFAULT
    )
