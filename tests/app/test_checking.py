"""What `check` says, against the run that it speaks of and against what a real step keeps in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small
import tiny
from fedpeft import app
from fedpeft.app import rehearsal
from fedpeft.app.checking import rows_per_client
from fedpeft.app.federation import build
from fedpeft.app.room import weight_inputs
from fedpeft.config import load_config
from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, Full, Lora
from fedpeft.core.errors import ConfigError, DataError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import AdamW, Fit
from fedpeft.models.hf import HFModel
from fedpeft.models.load import Base, load_base
from fedpeft.planner.cost import Step, shape_of, weights
from fedpeft.planner.memory import peak_memory
from fedpeft.runs.store import RunFolder


def test_statistics_are_those_of_the_data_and_the_partition(place: Path, finished: app.Run) -> None:
    found = app.check(small.config(place))
    partition = RunFolder.open(finished.folder).partition()
    sizes = [len(entry["train"]) for entry in partition["clients"].values()]
    counts = [entry["label_counts"]["train"] for entry in partition["clients"].values()]
    assert found["partition"] == {
        "clients": 6,
        "rows_smallest": min(sizes),
        "rows_mean": pytest.approx(np.mean(sizes)),
        "rows_largest": max(sizes),
        "top_label_share_mean": pytest.approx(np.mean([max(c) / sum(c) for c in counts])),
        "sha256": partition["sha256"],
    }
    assert found["task"]["rows"] == {"train": sum(sizes), "validation": 120 - sum(sizes), "test": 42}
    assert found["task"]["majority"] == pytest.approx(max(np.sum(counts, axis=0)) / sum(sizes))
    assert found["task"]["labels"] == list(small.LABELS) and found["task"]["tokens_per_row"] == 7.0
    assert found["model"]["trainable_parameters"] == finished.manifest["trainable_parameters"]
    assert found["estimate"]["clients_trained_together"] == 4, "no more than a cohort has"


EQUAL = (
    "fedavg",
    "scaffold",
    "local",
    "centralized",
    "rolora",
    "flora",
    "fedex_lora",
    "deltalora",
    "flexlora",
    "hetlora",
)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *((method, {}) for method in EQUAL),
        ("fedavg", {"run__wire": "int8"}),
        ("fedavg", {"method__steps": 3}),
        ("fedavg", {"method__schedule": "random"}),
        ("flora", {"method__ranks": [1, 4]}),
    ],
)
def test_estimates_are_near_what_a_run_costs(place: Path, tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    """Bytes to 3 % (a mean loss has more or fewer digits), time to 5 %, of rounds that differ too."""
    config = small.config(place, method__name=method, **changes)
    estimate = app.check(config)["estimate"]
    assert "assuming_that" not in estimate
    done = app.run(config, out=tmp_path / "run").manifest
    sent = done["bytes_down"] + done["bytes_up"]
    assert sent == pytest.approx(estimate["bytes"], rel=0.03)
    assert done["simulated_seconds"] == pytest.approx(estimate["simulated_seconds"], rel=0.05)
    lines = RunFolder.open(tmp_path / "run").exchanges()
    examples = np.mean([line["examples"] for line in lines])
    assert estimate["rows_per_client_and_round"] == pytest.approx(examples)


def test_rounds_that_are_not_played_are_like_the_last_ones(place: Path, monkeypatch: Any) -> None:
    """FLoRA's clients get what they have missed, so its rounds grow; FedAvg's are all alike."""
    found = {}
    for name in ("fedavg", "flora"):
        values = small.config(place, method__name=name, run__rounds=6)
        whole = app.check(values)["estimate"]
        with monkeypatch.context() as patch:
            patch.setattr(rehearsal, "MOST_TURNS", 15)
            part = app.check(values)["estimate"]
        assert part["assuming_that"] == "rounds after 4 are like those before"
        found[name] = part["bytes"] / whole["bytes"]
    assert found["fedavg"] == pytest.approx(1, rel=0.01) and 0.7 < found["flora"] < 1.1


def test_clients_that_are_away_or_late_are_lost_in_the_estimate_too(place: Path, tmp_path: Path) -> None:
    devices = tmp_path / "devices.toml"
    devices.write_text("[profile.phone]\navailability = 0.7\n")
    config = small.config(place, run__devices=str(devices), run__quorum=0.25, run__rounds=4)
    estimate, done = app.check(config)["estimate"], app.run(config, out=tmp_path / "run").manifest
    assert any(line["lost"] for line in RunFolder.open(tmp_path / "run").exchanges())
    assert done["bytes_down"] + done["bytes_up"] == pytest.approx(estimate["bytes"], rel=0.03)


@pytest.mark.parametrize("schedule", ["loss", "fisher"])
def test_what_is_computed_besides_training_is_not_known(
    place: Path, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in rehearsal.COMPUTING:  # nor is it computed
        if name != "fit":
            monkeypatch.setattr(HFModel, name, None)
    estimate = app.check(small.config(place, method__schedule=schedule))["estimate"]
    assert "every round sends what the first one does" in estimate["assuming_that"]


def test_estimate_says_what_it_assumes_of_a_method_with_a_set_up(place: Path) -> None:
    found = {}
    for name in ("fedavg", "fedpeptao"):
        values = small.config(place, method__name=name)
        del values["adapter"]  # each its own
        found[name] = app.check(values)["estimate"]
    assert "the set-up is not counted" in found["fedpeptao"]["assuming_that"]
    assert "assuming_that" not in found["fedavg"]


@pytest.mark.parametrize(
    ("method", "changes", "share"),
    [
        ("adalora", {"method__share": 0.5, "method__epochs": 2}, 2.0),  # of the triplets
        ("se", {"method__share": 0.5, "method__epochs": 2}, 2.0),  # of the targets
        ("centralized", {"method__share": 0.5, "method__epochs": 3}, 1.5),  # of the rows
    ],
)
def test_only_a_share_of_the_rows_makes_fewer_rows(
    place: Path, method: str, changes: dict[str, Any], share: float
) -> None:
    values = small.config(place, method__name=method, **changes)
    del values["adapter"]
    fed = build(load_config(values))
    assert rows_per_client(fed) == pytest.approx(share * len(fed.whole("train")) / len(fed.clients))


def test_nothing_is_trained_or_written(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HFModel, "fit_many", None)
    monkeypatch.setattr(HFModel, "logits", None)
    app.check(small.config(place))
    assert list(tmp_path.iterdir()) == []


def test_everything_that_is_wrong_with_the_keys_is_told_at_once(place: Path) -> None:
    config = small.config(place, method__lr=-1, run__rounds=0, task__text="words")
    config["run"]["roundss"] = 3
    with pytest.raises(ConfigError) as caught:
        app.check(config)
    assert len(caught.value.problems) == 3
    with pytest.raises(DataError, match="has no column 'words'"):
        app.check(small.config(place, task__text="words"))


def test_values_that_nobody_has_set_are_told_as_defaults(place: Path, tmp_path: Path) -> None:
    config = small.config(place, task__limit=50)
    del config["partition"]["clients"]
    said = r"partition.clients is 100 \(the default\), but there are only 50 training rows"
    with pytest.raises(DataError, match=said):
        app.check(config)
    with pytest.raises(DataError, match=said):
        app.run(config, out=tmp_path / "run")
    config["partition"]["clients"] = 60
    with pytest.raises(DataError, match=r"partition.clients is 60, but there are only 50 training rows"):
        app.check(config)


# --- memory -----------------------------------------------------------------------------------------------------


def kept_bytes(base: Base, spec: AdapterSpec, rows: int, length: int) -> int:
    """What autograd really keeps of one step: the storages of all saved tensors but the weights."""
    model = HFModel(base, spec, 3, rows * length)
    tokens = tuple(tiny.place(i).integers(5, 50, size=length).astype(np.int32) for i in range(rows))
    data = Examples(tokens, np.zeros(rows, dtype=np.int64))
    weights = {p.untyped_storage().data_ptr() for p in base.module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        (fitted,) = model.fit_many([Fit(model.init(tiny.place()), data, [list(range(rows))], AdamW(1e-3))])
    assert not isinstance(fitted, Exception)
    own = 4 * tree.count(fitted.params) if isinstance(spec, Full) else 0  # one storage, that of the weights that train
    return sum(t.untyped_storage().nbytes() for t in kept.values()) - own


def planned(base: Base, rank: int, rows: int, length: int, blocks: tuple[int, ...] | None = None) -> int:
    """What the planner says that autograd keeps of the same step."""
    shape = shape_of(base.config)
    adapted = weights(shape, ("query", "value"))
    ranks = {w.name: rank for w in adapted if blocks is None or w.block in blocks}
    return peak_memory(shape, Step(rows, length, ranks, classes=3), "plain").activations


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("blocks", [None, (2,)])
def test_memory_of_a_step_is_estimated_within_ten_percent(family: str, blocks: tuple[int, ...] | None) -> None:
    base = tiny.base(family, "float32")
    spec = Lora(rank=8) if blocks is None else Lora(rank=8, blocks=blocks)
    real = kept_bytes(base, spec, 16, 48)
    estimate = planned(base, 8, 16, 48, blocks)
    assert real == pytest.approx(estimate, rel=0.1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_memory_of_a_step_of_all_weights(family: str) -> None:
    base = tiny.base(family, "float32")
    shape = shape_of(base.config)
    plain = peak_memory(shape, Step(16, 48, {}, classes=3, depth=0), "plain").activations
    estimate = plain + 4 * 16 * 48 * weight_inputs(shape, shape.layers)
    assert estimate / 1.5 < kept_bytes(base, Full(), 16, 48) < 1.5 * estimate


@pytest.mark.slow
def test_memory_of_a_step_of_minilm(tmp_path: Path) -> None:
    base = load_base("minilm", device="cpu")
    real = kept_bytes(base, Lora(), 64, 32)
    assert real == pytest.approx(planned(base, 8, 64, 32), rel=0.05)


def test_memory_grows_with_the_clients_that_train_together(place: Path) -> None:
    alone, together = (
        app.check(small.config(place, run__cohort_batching=n))["estimate"]["memory_bytes"] for n in (1, 4)
    )
    base = sum(p.numel() * 4 for p in load_base(str(place / "tiny"), device="cpu").module.parameters())
    assert base < alone < together < 10 * alone


@pytest.mark.parametrize("section", ["run", "check"])
def test_what_a_method_finds_wrong_is_told_before_there_is_a_folder(place: Path, tmp_path: Path, section: str) -> None:
    values = small.config(place, method__name="fedalt", method__personal_from=2)
    with pytest.raises(ConfigError, match=r"method\.personal_from is 2; it must be at most 1"):
        app.run(values, out=tmp_path / "run") if section == "run" else app.check(values)
    assert not (tmp_path / "run").exists()
