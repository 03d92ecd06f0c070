"""Studies: which cells they have, what each is configured to, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import StudyConfig, cells, load_study
from fedpeft.core.errors import ConfigError

METHODS = [{"label": "LoRA", "name": "fedavg"}, {"label": "Prox <1>", "name": "fedprox", "mu": 1.0}]


def study(**changes: Any) -> StudyConfig:
    return load_study({"methods": METHODS, **changes})


def problems(source: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        cells(load_study(source))
    return list(caught.value.problems)


def test_cells_are_all_combinations_in_order_with_stable_names() -> None:
    found = cells(study(seeds=[0, 1], grid={"method.lr": [1e-3, 3e-3]}))
    assert [cell.name for cell in found] == [
        f"demo-{label}-seed{seed}-lr{lr}" for label in ("lora", "prox_1") for seed in (0, 1) for lr in (0.001, 0.003)
    ]
    assert [(c.config.run.seed, c.config.method.fields["lr"]) for c in found[:4]] == [
        (0, 1e-3), (0, 3e-3), (1, 1e-3), (1, 3e-3),
    ]  # fmt: skip
    assert {c.config.partition.seed for c in found} == {0}
    grown = {cell.name for cell in cells(study(seeds=[0, 1, 2], grid={"method.lr": [1e-3, 3e-3, 1e-2]}))}
    assert {cell.name for cell in found} < grown


def test_base_fields_hold_where_a_method_has_them_and_its_own_entry_and_the_grid_win() -> None:
    base = {"method": {"name": "scaffold", "cohort": 4, "server_lr": 0.5, "lr": 0.2}, "run": {"rounds": 7}}
    plain, prox = cells(study(base=base, seeds=[5], grid={"method.cohort": [6]}))
    assert plain.config.method.fields["cohort"] == 6
    assert plain.config.method.fields["lr"] == 0.2
    assert "server_lr" not in plain.config.method.fields
    assert prox.config.method.fields["mu"] == 1.0
    assert plain.config.run.rounds == 7


def test_defaults_of_the_bases_method_are_not_forced_on_others() -> None:
    (scaffold,) = cells(load_study({"methods": [{"label": "S", "name": "scaffold"}], "seeds": [0]}))
    assert scaffold.config.method.fields["lr"] == 0.1  # its own default, not that of fedavg


def test_adapter_of_a_method_replaces_the_bases() -> None:
    methods = [{"label": "a", "name": "fedavg"}, {"label": "b", "name": "fedavg", "adapter": {"kind": "head"}}]
    one, two = cells(load_study({"base": {"adapter": {"rank": 2}}, "methods": methods, "seeds": [0]}))
    assert one.config.adapter.fields["rank"] == 2
    assert two.config.adapter.kind == "head"


def test_tasks_and_paths_start_at_their_own_files(tmp_path: Path) -> None:
    for folder in ("study", "base"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "base" / "b.yaml").write_text("task: {train: train.csv}\n")
    (tmp_path / "study" / "plain.yaml").write_text("base: ../base/b.yaml\nmethods: [{label: A, name: fedavg}]\n")
    (cell,) = cells(load_study(tmp_path / "study" / "plain.yaml"))[:1]
    assert cell.config.task.train == str(tmp_path / "base" / "train.csv")
    (tmp_path / "study" / "tasks.yaml").write_text(
        "base: ../base/b.yaml\nmethods: [{label: A, name: fedavg}]\n"
        "tasks: [{name: one, train: train.csv}, {name: demo}]\n"
    )
    found = cells(load_study(tmp_path / "study" / "tasks.yaml"))
    assert [cell.task for cell in found] == ["one"] * 3 + ["demo"] * 3
    assert found[0].config.task.train == str(tmp_path / "study" / "train.csv")
    assert found[3].config.task.train is None


def test_target_is_checked_against_the_labels() -> None:
    assert study(target={"share_of": "LoRA"}).target is not None
    found = problems({"methods": METHODS, "target": {"share_of": "lora"}})
    assert found == ["target.share_of: 'lora' is not a label; labels are LoRA, Prox <1>."]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"methods": []}, "methods: "),
        ({}, "methods: "),
        ({"methods": [{"name": "fedavg"}]}, "methods"),
        ({"methods": METHODS, "seedz": [1]}, "seedz: unknown key; did you mean 'seeds'?"),
        ({"methods": METHODS, "seeds": [1, 1]}, "seeds: 1 would have the same folder"),
        (
            {"methods": [METHODS[0], {**METHODS[0], "label": "lora!"}]},
            "methods: LoRA, lora! would have the same folder",
        ),
        ({"methods": METHODS, "grid": {"method.lr": []}}, "grid"),
        ({"methods": METHODS, "grid": {"method.mu": [1]}}, "LoRA: method.mu is not a field of fedavg"),
        ({"methods": [{"label": "x", "name": "fedavgg"}]}, "x: method.name: there is no method 'fedavgg'"),
        ({"methods": METHODS, "base": {"run": {"rounds": 0}}}, "run.rounds: 0 cannot be used"),
        ({"methods": METHODS, "base": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({"methods": METHODS, "tasks": [{"name": "a"}, {"name": "A"}]}, "tasks: A, a would have the same folder"),
    ],
)
def test_study_that_is_refused(source: dict[str, Any], problem: str) -> None:
    (found,) = problems(source)
    assert found.startswith(problem)
