"""Configuration: everything that people may write, everything that they may get wrong, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config import (
    adapter_spec,
    build_method,
    cells,
    default_folder,
    load_config,
    load_study,
    parse_overrides,
    resolved,
    slug,
)
from fedpeft.config.sections import SECTIONS, RunConfig, Section, StopSection
from fedpeft.core.adapter import HeadOnly, Lora
from fedpeft.core.errors import ConfigError
from fedpeft.data.partition import PartitionSpec
from fedpeft.data.tasks import METRICS, TaskSpec
from fedpeft.methods.fedavg import FedAvg
from fedpeft.runs.stopping import Limits

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([*(ROOT / "examples").glob("*.yaml"), *(ROOT / "benchmarks" / "studies").glob("*.yaml")])


def problems(source: Any, overrides: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return list(caught.value.problems)


def only(source: Any, overrides: dict[str, Any] | None = None) -> str:
    (problem,) = problems(source, overrides)
    return problem


# --- what is right ----------------------------------------------------------------------------------------------


def test_defaults_are_the_demo_with_fedavg() -> None:
    config = load_config({})
    assert (config.model.name, config.task.name, config.partition.clients) == ("demo", "demo", 24)
    assert build_method(config) == FedAvg()
    assert adapter_spec(config) == Lora()
    run = config.run
    assert (run.rounds, run.evaluate_every, run.cohort_batching, run.quorum) == (40, 10, "auto", 0.5)
    assert (run.token_budget, run.deadline_s, run.threads, run.trackers) == (2048, None, "auto", ())


def test_every_field_has_its_help_text() -> None:
    for section in (*SECTIONS.values(), StopSection):
        for key, field in section.model_fields.items():
            assert field.description and field.description[-1] in ".;)", f"{section.__name__}.{key}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_is_valid_and_its_method_can_be_built(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ROOT.parent / "shared" / "data"
    if "FEDPEFT_DATA" in path.read_text() and not data.is_dir():
        pytest.skip(f"no {data}")
    monkeypatch.delenv("FEDPEFT_DATA", raising=False)
    raw = yaml.safe_load(path.read_text())
    configs = [cell.config for cell in cells(load_study(path))] if "methods" in raw else [load_config(path)]
    assert configs
    for config in configs:
        build_method(config)
        adapter_spec(config)


def test_resolved_configuration_loads_to_an_equal_one_through_yaml() -> None:
    source = {
        "method": {"name": "fedopt", "server_optimizer": "yogi", "lr": 3e-4},
        "adapter": {"targets": ["query", "key"], "blocks": [0, 1]},
        "task": {"labels": ["a", "b"], "classes": ["a", "b"]},
        "run": {"cohort_batching": "off", "trackers": ["tensorboard"], "stop": {"bytes": 10**9, "patience": 2}},
    }
    config = load_config(source)
    assert load_config(yaml.safe_load(yaml.safe_dump(resolved(config)))) == config
    assert adapter_spec(config) == Lora(targets=("query", "key"), blocks=(0, 1))


def test_saved_configuration_is_equal_when_it_is_read_as_a_file(tmp_path: Path) -> None:
    config = load_config({"run": {"cohort_batching": "off"}, "method": {"lr": 1e-5}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(resolved(config)))
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(config, {"run.seed": 3}).run.seed == 3


def test_task_and_partition_sections_are_the_arguments_of_the_data_room() -> None:
    values = resolved(load_config({"task": {"metric": "macro_f1"}, "partition": {"kind": "quantity"}}))
    assert TaskSpec(**values["task"]).problems() == []
    assert PartitionSpec(**values["partition"]).problems() == []
    assert Limits(**values["run"]["stop"]) == Limits()
    for metric in METRICS:
        assert load_config({"task": {"metric": metric}}).task.metric == metric


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("5.", 5.0), ("-.5", -0.5), ("3", 3), ("0x10", 16), ("true", True), ("off", "off"),
     ("yes", "yes"), ("12:30", "12:30"), ("null", None), ("[1, 2e-1]", [1, 0.2]), ("2024-01-02", "2024-01-02"),
     ("", None), ("a=b", "a=b"), (".inf", float("inf"))],
)  # fmt: skip
def test_overrides_are_typed_as_in_yaml_1_2(text: str, value: Any) -> None:
    assert parse_overrides([f"a.b={text}"]) == {"a.b": value}
    assert type(parse_overrides([f"a.b={text}"])["a.b"]) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_every_float_survives_yaml(value: float) -> None:
    (read,) = parse_overrides([f"x={value!r}"]).values()
    assert read == value and type(read) is float


def test_numbers_that_yaml_1_1_reads_as_text_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("method: {lr: 1e-3}\nrun: {cohort_batching: off}\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.method.fields["lr"] == 1e-3
    assert config.run.cohort_batching == "off"


def test_overrides_win_and_make_missing_sections() -> None:
    config = load_config({"run": {"rounds": 3}}, {"run.rounds": 5, "run.stop.score": 0.9, "method.name": "local"})
    assert (config.run.rounds, config.run.stop.score, config.method.name) == (5, 0.9, "local")


def test_source_is_not_changed() -> None:
    source = {"run": {"rounds": 3, "stop": {"patience": 1}, "evaluate_every": 1}}
    load_config(source, {"run.rounds": 5, "run.stop.patience": 2})
    assert source == {"run": {"rounds": 3, "stop": {"patience": 1}, "evaluate_every": 1}}


def test_empty_file_is_the_default_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml") == load_config({})


def test_adapter_of_another_kind_takes_nothing_from_the_default() -> None:
    config = load_config({"adapter": {"kind": "head"}})
    assert adapter_spec(config) == HeadOnly()
    assert resolved(config)["adapter"] == {"kind": "head"}


def test_method_outside_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom fedpeft.methods.fedavg import FedAvg\n"
        "@dataclass(frozen=True)\nclass Mine(FedAvg):\n    knob: float = 2.0  # turns\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config({"method": {"name": "mine:Mine", "knob": 3}})
    assert config.method.fields["knob"] == 3.0


# --- paths ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.jsonl").write_text('{"text": "a", "label": 0}\n')
    return tmp_path


def test_relative_path_starts_at_the_file_then_at_the_current_folder(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows)
    (rows / "test.jsonl").write_text('{"text": "a", "label": 0}\n')
    (rows / "conf" / "c.yaml").write_text("task: {train: train.jsonl, test: test.jsonl}\n")
    task = load_config("conf/c.yaml").task
    assert (task.train, task.test) == (str(rows / "conf" / "train.jsonl"), str(rows / "test.jsonl"))
    assert task.name == "conf"  # a file called train is named after its folder


def test_variables_and_home_are_expanded(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", str(rows / "conf"))
    assert load_config({"task": {"train": "${SOMEWHERE}/train.jsonl"}}).task.train == str(rows / "conf" / "train.jsonl")
    monkeypatch.setenv("HOME", str(rows))
    assert load_config({"task": {"train": "~/conf/train.jsonl"}}).task.train == str(rows / "conf" / "train.jsonl")


def test_data_folder_has_a_default_beside_the_repository(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDPEFT_DATA", raising=False)
    repository = rows / "repository"
    for folder in (repository / "examples", rows / "shared" / "data"):
        folder.mkdir(parents=True)
    (repository / "pyproject.toml").touch()
    (rows / "shared" / "data" / "x.csv").write_text("text,label\na,0\n")
    (repository / "examples" / "c.yaml").write_text("task: {train: '${FEDPEFT_DATA}/x.csv'}\n")
    assert load_config(repository / "examples" / "c.yaml").task.train == str(rows / "shared" / "data" / "x.csv")
    monkeypatch.setenv("FEDPEFT_DATA", str(rows / "conf"))
    assert only(repository / "examples" / "c.yaml").startswith(
        f"task.train: there is no {rows / 'conf' / 'x.csv'} (from ${{FEDPEFT_DATA}}; set it to the folder with"
    )


def test_folder_or_pattern_of_client_files(rows: Path) -> None:
    for source in (rows / "conf", rows / "conf" / "*.jsonl"):
        config = load_config({"task": {"train": str(source)}, "partition": {"kind": "file"}, "method": {"cohort": 999}})
        assert config.task.train == str(source)


def test_split_names_of_a_hub_data_set_are_no_files() -> None:
    task = load_config({"task": {"name": "glue:mrpc", "validation": "validation"}}).task
    assert (task.name, task.validation) == ("glue:mrpc", "validation")


def test_model_folder_becomes_absolute_and_a_hub_id_stays(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(rows)
    assert load_config({"model": {"name": "conf"}}).model.name == str(rows / "conf")
    assert load_config({"model": {"name": "owner/name"}}).model.name == "owner/name"
    assert only({"model": {"name": "./nothing"}}) == f"model.name: there is no {rows / 'nothing'}; check the path."


# --- what is wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"taks": {}}, "taks: unknown key; did you mean 'task'?"),
        ({"run": {"round": 3}}, "run.round: unknown key; did you mean 'rounds'?"),
        ({"run": {"stop": {"scor": 1}}}, "run.stop.scor: unknown key; did you mean 'score'?"),
        ({"adapter": {"ranks": 3}}, "adapter.ranks: unknown key for the kind lora; did you mean 'rank'?"),
        ({"adapter": {"kind": "head", "rank": 3}}, "adapter.rank: unknown key for the kind head; it takes none."),
        ({"method": {"cohorts": 3}}, "method.cohorts is not a field of fedavg; did you mean 'cohort'?"),
        ({"method": {"name": "fedavgg"}}, "method.name: there is no method 'fedavgg'; did you mean 'fedavg'?"),
        ({"method": {"name": "fedpeptoa"}, "adapter": {"length": 3}}, "method.name: there is no method 'fedpeptoa'"),
        ({"method": "fedpeptao", "adapter": {"length": 3}}, "method: 'fedpeptao' cannot be used; give a mapping"),
        ({"method": {"name": 3}}, "method.name: 3 cannot be used; give one of adalora, adapter"),
        ({"method": {"lr": "fast"}}, "method.lr is 'fast'; it must be a number"),
        ({"method": {"lr": -1}}, "method.lr is -1.0; it must be finite and above 0"),
        ({"privacy": {"clip": 1}}, "privacy: not in this version: clipping and noise come with the Flower engine"),
        ({"privacy": None}, "privacy: not in this version: clipping and noise come with the Flower engine"),
        ({"task": {"template": "x"}}, "task.template belongs to the formats cloze, verbalizer and generate, and"),
        (
            {"task": {"loss_over": "labels"}},
            "task.loss_over: labels belongs to the format cloze, and task.format is head.",
        ),
        ({"task": {"format": "clozed"}}, "task.format: 'clozed' is not available; what exists: 'head', 'cloze',"),
        ({"task": {"format": "cloze", "template": "{text} ."}}, "task.template '{text} .' has 0 times <mask>; format"),
        ({"task": {"format": "cloze", "label_words": ["a", "a"]}}, "task.label_words is ['a', 'a']; give a different"),
        ({"task": {"format": "cloze"}, "adapter": {"kind": "head"}}, "adapter.kind: head trains the head, and format"),
        ({"run": {"engine": "flowers"}}, "run.engine: 'flowers' is not available; what exists: 'inprocess'."),
        (
            {"run": {"engine": "flower"}},
            "run.engine: flower will connect real sites over a network and is not in this version; use inprocess",
        ),
        (
            {"model": {"quantize": "nf3"}},
            "model.quantize: 'nf3' is not available; what exists: 'none', 'int8', 'nf4' or",
        ),
        ({"model": {"device": "gpu"}}, "model.device: 'gpu' cannot be used; give auto, cpu, mps, cuda, or cuda with"),
        (
            {"adapter": {"kind": "fully"}},
            "adapter.kind: 'fully' is not available; what exists: lora, adalora, head, prefix, prompt,",
        ),
        ({"run": {"rounds": 0}}, "run.rounds: 0 cannot be used; give at least 1."),
        ({"run": {"rounds": "many"}}, "run.rounds: 'many' cannot be used; give a whole number."),
        ({"run": {"rounds": 2.5}}, "run.rounds: 2.5 cannot be used; give a whole number."),
        ({"run": {"threads": "all"}}, "run.threads: 'all' cannot be used; give 'auto', or a whole number."),
        ({"run": {"quorum": 1.5}}, "run.quorum: 1.5 cannot be used; give at most 1."),
        (
            {"run": {"trackers": ["wand"]}},
            "run.trackers: 'wand' is not available; what exists: 'tensorboard', 'mlflow'",
        ),
        ({"run": {"trackers": "wandb"}}, "run.trackers: 'wandb' cannot be used; give a list."),
        ({"partition": {"alpha": float("inf")}}, "partition.alpha: inf cannot be used; give a finite number."),
        ({"adapter": {"rank": 0}}, "adapter.rank: 0 cannot be used; give at least 1."),
        ({"adapter": {"alpha": 0}}, "adapter.alpha: 0.0 cannot be used; give a number above 0."),
        ({"adapter": {"dropout": 1}}, "adapter.dropout: 1.0 cannot be used; give a number from 0 to below 1."),
        ({"adapter": {"targets": []}}, "adapter.targets: an empty list trains nothing"),
        ({"model": "minilm"}, "model: 'minilm' cannot be used; give a mapping such as `model: {key: value}`."),
        ({"task": {"train": "nothing.jsonl"}}, "task.train: there is no "),
        ({"run": {"init_from": "${NOT_SET_HERE}/x"}}, "run.init_from: '${NOT_SET_HERE}/x' names the variable NOT_SET"),
        ({"method": {"cohort": 25}}, "method.cohort: 25 is above partition.clients = 24 (the default); lower it"),
        ({"task": {"name": "owner/x"}, "partition": {"kind": "natural"}}, "partition.by: kind natural needs it;"),
        ({"partition": {"kind": "file"}}, "task.train: partition.kind file needs it;"),
        (
            {"run": {"stop": {"patience": 5}}},
            "run.stop.patience: 5 evaluations, one every 10 rounds (the default), do not",
        ),
        ({"task": {"labels": ["one"]}}, "task.labels: "),
        (
            {"method": {"name": "fedpipe"}, "model": {"quantize": "nf4"}},
            "model.quantize: nf4 packs one base for everybody, and method.bits plans each machine's own; use none, and",
        ),
    ],
)
def test_problem_names_key_value_and_remedy(source: dict[str, Any], problem: str) -> None:
    assert only(source).startswith(problem)


def test_all_problems_come_at_once() -> None:
    found = problems(
        {
            "model": {"dtype": "float16"},
            "method": {"lrr": 1, "lr": "x"},
            "adapter": {"rank": 0, "foo": 1},
            "run": {"rounds": 0, "quorum": 2},
            "extra": {},
        },
        {"run.rounds.x": 1},
    )
    for key in ("model.dtype", "method.lrr", "method.lr", "adapter.rank", "adapter.foo", "run.rounds:", "run.quorum",
                "extra", "run.rounds.x"):  # fmt: skip
        assert sum(problem.startswith(key) for problem in found) >= 1, key
    assert len(found) == 9


def test_override_of_a_part_of_a_single_value() -> None:
    assert only({"run": {"rounds": 7}}, {"run.rounds.x": 3}) == (
        "run.rounds.x: 'rounds' holds the single value 7; set 'rounds' itself instead."
    )


def test_malformed_overrides_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["rounds", "=3", "a=[1", "b=1"])
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a: [1", "not readable as YAML"), ("- a\n", "holds list"), ("run: {seed: 1}\nrun: {seed: 2}\n", "stands twice"),
     ("run: !!python/object:os.system {}\n", "not readable as YAML")],
)  # fmt: skip
def test_file_that_is_no_configuration(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert problem in only(tmp_path / "c.yaml")


def test_missing_file_is_named() -> None:
    assert only("nowhere/c.yaml") == "nowhere/c.yaml: no such file; check the path."


def test_sections_are_immutable() -> None:
    config = load_config({})
    with pytest.raises(Exception, match="frozen"):
        config.run.rounds = 3  # type: ignore[misc]
    assert issubclass(RunConfig, Section)


# --- names of folders -------------------------------------------------------------------------------------------


def test_default_folder_has_method_task_and_time_and_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda pattern: "20260102-030405")
    config = load_config({"task": {"name": "owner/My task"}})
    first = default_folder(config)
    assert first == Path("runs/fedavg-owner_my_task-20260102-030405")
    first.mkdir(parents=True)
    assert default_folder(config) == Path("runs/fedavg-owner_my_task-20260102-030405-2")


@given(st.text(max_size=30))
@settings(deadline=None)
def test_slug_is_one_safe_part_of_a_path(text: str) -> None:
    part = slug(text)
    assert part and part == slug(part) and "/" not in part and part not in (".", "..") and not part.startswith(".")


def test_sources_of_a_mixture_are_looked_for_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    path = tmp_path / "c.yaml"
    path.write_text("method: {name: attempt, sources: [runs/a]}\n")
    config = load_config(path)
    assert list(config.method.fields["sources"]) == [str(tmp_path / "runs" / "a")]
    assert adapter_spec(config).sources == (str(tmp_path / "runs" / "a"),)  # type: ignore[union-attr]
    path.write_text("method: {name: attempt, sources: [runs/b]}\n")
    assert only(path).startswith("method.sources.0: there is no ")
