"""Every benchmark runs from end to end with tiny arguments, and measures two ways of doing the same thing."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.app import profiling

ROOT = Path(__file__).parents[1]
TINY = "--model tiny --data random --length 8 --clients 3 --batch 2 --steps 2"
RUNS = {
    "imports": "--repeats 1",
    "null_client": "--clients 3 --rounds 2 --starts 1",
    "memory": "--model tiny --clients 2 3 --rows 2 --cohort-batching 2",
    "peak": "--width 64 --layers 2 --vocabulary 100 --shrink 16 --settings bert llama",
    "steptime": "--width 32 --layers 1 --vocabulary 100 --shrink 16 --repeats 1 --profile-repeats 1 --families llama",
    "overhead": f"{TINY} --repeats 2",
    "cohort": f"{TINY} --repeats 2 --matrix 32 --profile 3",
    "prefix": f"{TINY} --repeats 2",
    "rounds": f"{TINY} --repeats 2",
    "difficulty": f"{TINY} --repeats 2",
    "quantize": f"{TINY} --repeats 2",
    "decoding": "--tokens 6 --prompt 4 --repeats 2 --speculate 2",
    "serving": "--width 16 --blocks 1 --tokens 6 --requests 5 --rows 2 --repeats 2",
    "merged": "--model tiny --length 8 --batch 2 --repeats 2",
    "gap": "--tasks code --seeds 0 --rows 3 --rounds 1 --steps 1",
    "shares": f"{TINY} --rounds 2 --methods fedavg fibecfed fedalt",
}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def measured(name: str, folder: Path) -> dict[str, Any]:
    """The result of one benchmark, after its record was found complete on disk."""
    options = [*RUNS[name].split(), "--threads", "1", "--results", str(folder), "--note", "a test"]
    kept = importlib.import_module(f"benchmarks.{name}").main(options)
    (on_disk,) = json.loads((folder / f"{name}.json").read_text())
    assert on_disk == kept
    assert on_disk["benchmark"] == name and on_disk["note"] == "a test" and on_disk["machine"]["threads"] == 1
    result: dict[str, Any] = on_disk["result"]
    return result


def test_cohort_gives_the_same_parameters_as_sequential_training(tmp_path, capsys):
    result = measured("cohort", tmp_path)
    assert result["largest_relative_difference"] < 1e-4
    assert result["tokens"] == 3 * 2 * 2 * 8  # clients, steps, rows, tokens
    seconds = result["seconds"]
    assert result["tokens_per_s"]["cohort"] == pytest.approx(result["tokens"] / seconds["cohort"])
    assert result["ratio"]["min"] <= result["ratio"]["median"] <= result["ratio"]["max"]
    assert "aten::" in capsys.readouterr().out  # the profile


def test_overhead_compares_equal_work(tmp_path):
    result = measured("overhead", tmp_path)
    assert result["relative_difference"] < 1e-4
    assert result["seconds"]["engine"] > 0 and result["seconds"]["plain"] > 0


def test_null_client_moves_one_megabyte_each_way(tmp_path):
    result = measured("null_client", tmp_path)
    for direction in ("down", "up"):
        assert 1_000_000 < result["bytes"][direction] < 1_010_000
    assert result["ms_per_client"]["median"] > 0 and result["start_s"]["median"] > 0


def test_memory_compares_processes_of_their_own(tmp_path):
    result = measured("memory", tmp_path)
    assert result["2"]["over_first"] == 0
    for each in result.values():
        assert 50e6 < each["before"] <= each["peak"] < 2e9


def test_predicted_peaks_are_compared_in_processes_of_their_own(tmp_path):
    result = measured("peak", tmp_path)
    assert result.keys() == {"bert", "llama"}
    for each in result.values():
        assert 0 < each["predicted"] < 10e6 and each["base"] > 0 and each["measured"] < 500e6


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["bert", "bert, int8", "bert, checkpointing", "llama, language model"])
def test_predicted_peaks_are_near_what_a_process_takes(setting, tmp_path):
    peak = importlib.import_module("benchmarks.peak")
    kept = peak.main(["--threads", "1", "--settings", setting, "--results", str(tmp_path)])
    assert abs(kept["result"][setting]["error"]) <= 0.1


def test_predicted_step_times_stand_beside_measured_ones(tmp_path):
    """Of one turn, median, least and greatest are its one ratio."""
    result = measured("steptime", tmp_path)
    assert result["predicted_s"].keys() == result["seconds"].keys() == result["ratio"].keys()
    assert result["flops_per_s"]["llama"] > 0 and min(result["seconds"].values()) > 0
    for name in result["ratio"]:
        ratio = result["predicted_s"][name] / result["seconds"][name]
        assert result["ratio"][name] == {key: pytest.approx(ratio) for key in ("median", "min", "max")}


def test_a_profiles_speed_of_unpacking_is_predicted_with(monkeypatch):
    """Matrices of one block with d 32 and f 128: 4 * 32 * 32 + 2 * 32 * 128 = 12,288, two passes of 49,152 bytes;
    packed steps take .1 s longer in the mean.
    """
    steptime = importlib.import_module("benchmarks.steptime")
    monkeypatch.setattr(steptime, "step_seconds", lambda *args: {"full": 0.3, "int8": 0.35, "nf4": 0.45})
    config = {**profiling.SMALL, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 128}
    model, _ = profiling.random_model(config, torch.device("cpu"))
    assert steptime.profiled(model, 1, time.perf_counter).dequant_bytes_per_s == pytest.approx(983_040)


def test_imports_are_slower_than_an_empty_interpreter(tmp_path):
    result = measured("imports", tmp_path)
    assert result["python"]["median"] < result["fedpeft --help"]["median"]


def test_prefixes_in_the_upper_half_end_the_backward_pass_there(tmp_path):
    result = measured("prefix", tmp_path)
    assert result["lowest_block"] == {"all": 0, "upper half": 1, "random half": 1, "lora": 0}
    assert result["ratio"].keys() == {"upper half", "random half", "lora"} and result["seconds"]["all"] > 0


def test_a_round_of_half_the_layers_sends_half_the_bytes(tmp_path):
    result = measured("rounds", tmp_path)
    assert result["layers"]["ptuning_v2"] == [] and result["layers"]["fedpeptao, off, last"] == [1]
    shares = result["share_of_bytes"]
    assert shares["ptuning_v2"] == 1.0 and all(0.4 < share < 0.65 for label, share in shares.items() if "fedp" in label)


@pytest.mark.slow
def test_alpha_nothing_is_the_large_model_and_the_gap_is_counted_from_it(tmp_path, capsys):
    (cell,) = measured("gap", tmp_path)["cells"]
    test = cell["test"]
    assert test["proxy"][0] == test["base_large"] < test["base_small"] - 0.1 and cell["gap_closed"][0] == 0
    gap = test["base_large"] - test["tuned_large"]
    assert cell["gap_closed"][4] == pytest.approx((test["base_large"] - test["proxy"][4]) / gap)
    assert test["tokens"] == 3 * 127 and cell["rows"] == {"clients": 12, "test": 3}
    assert "gap closed" in capsys.readouterr().out


def test_records_are_appended_not_replaced(tmp_path):
    module = importlib.import_module("benchmarks.imports")
    for _ in range(2):
        module.main(["--repeats", "1", "--results", str(tmp_path)])
    assert len(json.loads((tmp_path / "imports.json").read_text())) == 2


def test_every_benchmark_is_tested_and_part_of_make_bench():
    shared = {"__init__", "record", "timing", "workload"}
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - shared
    assert modules == RUNS.keys()
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"-m benchmarks.{name}" in makefile for name in modules)


def test_finished_cells_of_a_study_are_collected(tmp_path):
    """Two methods at two rates: the better one on validation is in the table; unfinished cells are left out."""
    collect = importlib.import_module("benchmarks.studies.collect")
    for label, lr, value in (("A", 0.1, 0.6), ("A", 0.2, 0.7), ("B", 0.1, 0.5)):
        folder = tmp_path / "study" / f"{label}-{lr}"
        folder.mkdir(parents=True)
        scores = {"global": {"accuracy": value, "loss": 1.0}}
        best = {"round": 2, "validation": scores, "test": {"global": {"accuracy": value - 0.1, "loss": 1.0}}}
        manifest = {
            "status": "finished",
            "metric": "accuracy",
            "label": label,
            "metrics": {"best": best, "final": best},
        }
        manifest |= {"bytes_down": 10, "bytes_up": 20, "simulated_seconds": 1.5, "seconds": 9.0, "rounds_done": 2}
        plan = {"examples": 9, "bits": "nf4", "batch": 2, "steps": 3, "weights": "query 0 r2", "trained_numbers": 8}
        plan["predicted"] = {"round_s": 0.5, "under_training": 0.25, "peak_bytes": 100}
        told = {"under_training": 0.25, "left_out": 0.5, "trained_numbers": 8, "excluded": {"b": "small"}}
        manifest |= {"choices": {**told, "weight_scores": {}, "plans": {"a": plan}}} if label == "A" else {}
        manifest |= {"params_sha256": f"{label}{lr}", "status": "finished" if label == "A" else "running"}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        config = {"task": {"name": "t"}, "method": {"name": "fedavg", "lr": lr}, "run": {"seed": 0}}
        (folder / "config.yaml").write_text(json.dumps(config))
        lines = [
            {"round": 0, "bytes_down": 1, "bytes_up": 2, "simulated_seconds": 0.5, "metrics": {"validation": scores}},
            {"round": 2, "bytes_down": 9, "bytes_up": 18, "simulated_seconds": 1.0},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        asked = [{"round": 0, "client": "b"}, {"round": 1, "client": "a"}, {"round": 2, "client": "a"}]
        (folder / "exchanges.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    out = tmp_path / "cells.json"
    cells = collect.main([str(tmp_path / "study"), "--out", str(out)])
    assert [(cell["label"], cell["lr"], cell["set_up_bytes"]) for cell in cells] == [("A", 0.1, 3), ("A", 0.2, 3)]
    assert cells[1]["round_bytes"] == [27] and cells[1]["clients_asked"] == 1
    assert cells[1]["curve"] == [[0, {"global": 0.7}]] and cells == json.loads(out.read_text())
    assert collect.table(cells)[2] == "| t | A | 0.2 | 1 | 0.600 |  | 0 | 0 | 1.5 |"
    assert collect.planned([cells[1]])[2] == "| t | A | 1 | 0.600 | 0.25 | 0.50 | 1.0 | 8 | 0.00 | 1.00 | 1.5 |"
    assert cells[1]["plans"]["a"]["round_s"] == 0.5 and "weight_scores" not in cells[1]["choices"]
    assert collect.table([{**cell, "metric": "perplexity"} for cell in cells])[2].startswith("| t | A | 0.1 | 1 |")
    assert collect.main(["--out", str(out)]) == cells, "what was kept stays"


def test_collected_cells_tell_what_it_takes_to_a_common_goal():
    """By hand: the goal is .9 x .8, the mean of the named method's best scores; costs are those up to that round."""
    collect = importlib.import_module("benchmarks.studies.collect")

    def cell(label, seed, curve, each=None):
        own = {"task": "t", "label": label, "seed": seed, "lr": 0.1, "rounds": 4, "validation": {"global": curve[-1]}}
        own |= {"bytes": 90e6, "set_up_bytes": 10e6, "simulated_seconds": 9.0, "set_up_simulated_seconds": 1.0}
        own["curve"] = [[2 * i, {"global": value}] for i, value in enumerate(curve)]
        return own | ({"round_simulated_seconds": each, "round_bytes": [40e6, 20e6, 10e6, 10e6]} if each else {})

    cells = [
        cell("LoRA", 0, [0.1, 0.75, 0.9]),
        cell("LoRA", 1, [0.1, 0.7, 0.7]),
        cell("Other", 0, [0.1, 0.73, 0.5], [1.0, 2.0, 2.5, 2.5]),
        cell("Never", 0, [0.1, 0.2, 0.71]),
    ]
    assert collect.reaching(cells, "LoRA", 0.9)[2:] == [
        "| t | LoRA | 0.720 | 1 of 2 | 2 | 50 | 5.0 |",  # half of the rounds: in proportion
        "| t | Never | 0.720 | 0 of 1 | | | |",
        "| t | Other | 0.720 | 1 of 1 | 2 | 70 | 4.0 |",
    ]
    assert collect.reaching(cells, "FedAvg", 0.9)[2:] == []
    read = [
        cell("LoRA", 0, [9.0, 5.0, 4.5]) | {"metric": "perplexity"},  # the goal is 4.5 / .9
        cell("Other", 0, [9.0, 5.1, 4.9]) | {"metric": "perplexity"},
    ]
    assert collect.reaching(read, "LoRA", 0.9)[2:] == [
        "| t | LoRA | 5.000 | 1 of 1 | 2 | 50 | 5.0 |",
        "| t | Other | 5.000 | 1 of 1 | 4 | 90 | 9.0 |",
    ]


def test_difficulty_is_the_same_by_hooks_and_one_by_one(tmp_path):
    result = measured("difficulty", tmp_path)
    assert result["largest_relative_difference"] < 1e-4
    assert result["ratio"]["difficulty"]["median"] > 0 and -1 <= result["rank_correlation"]["median"] <= 1


def test_the_endpoint_says_what_the_plain_loop_says(tmp_path):
    result = measured("serving", tmp_path)
    for name in ("ratio", "ratio_of_processor_time"):
        assert result[name].keys() == {"whole", "stream"} and result[name]["stream"]["min"] > 0
    assert result["at_once"]["tokens_per_s"]["requests"] > 0 and result["at_once"]["grown_bytes"] < 100e6


def test_quantised_bases_are_smaller_and_checkpointing_changes_nothing(tmp_path):
    result = measured("quantize", tmp_path)
    held = result["bytes"]
    assert held["nf4dq"] < held["nf4"] < held["int8"] < held[""]
    assert result["ratio"].keys() == {"int8", "nf4", "nf4dq", "full, checkpointing"}
    assert result["change"]["full, checkpointing"] == 0 < result["change"]["int8"] < result["change"]["nf4"]
    assert result["kept_bytes"]["full, checkpointing"] < result["kept_bytes"]["full"]


def test_shares_of_a_round_add_up(tmp_path):
    result = measured("shares", tmp_path)
    assert result.keys() == {"fedavg", "fibecfed", "fedalt"}
    for each in result.values():
        parts = [each[f"{part}_share"] for part in ("forward", "backward", "optimizer", "overhead")]
        assert sum(parts) == pytest.approx(1) and min(parts) > 0
        assert each["samples_per_s"] * each["seconds"] == pytest.approx(round(each["samples_per_s"] * each["seconds"]))


def test_a_merged_model_is_the_base_in_size_and_the_adapter_in_what_it_says(tmp_path):
    result = measured("merged", tmp_path)
    assert result["parameters"]["merged"] == result["parameters"]["base"]
    assert result["largest_difference"] < 1e-4 * result["largest_logit"] and result["ratio"].keys() == {
        "merged",
        "adapter",
    }


def test_decoding_is_timed_beside_its_models_and_drafts_say_the_same(tmp_path):
    result = measured("decoding", tmp_path)
    assert result["ms_per_token"].keys() >= {"large", "tuned small", "base small", "proxy", "with drafts"}
    assert result["share_of_rate"].keys() == {"proxy", "proxy, small models apart"}
    assert result["drafts"]["same_tokens"] and 1 <= result["drafts"]["tokens_per_call"] <= 3
