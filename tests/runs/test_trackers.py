from __future__ import annotations

import logging
import os
import sys
import types

import pytest

from fedpeft.core.errors import RequestError
from fedpeft.runs.trackers import open_trackers, scalars

CONFIG = {"method": {"name": "fedavg", "lr": 1e-3}, "run": {"rounds": 3}}
LINE = {
    "round": 1,
    "train_loss": 0.5,
    "note": "text",
    "best": True,
    "metrics": {"validation": {"global": {"accuracy": 0.75}}, "test": None},
}


def test_scalars_are_the_numbers_with_their_paths():
    assert dict(scalars(LINE)) == {"train_loss": 0.5, "metrics/validation/global/accuracy": 0.75}


def test_unknown_names_and_missing_packages(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="'tensorbord' is unknown; choose from tensorboard, mlflow, wandb"):
        open_trackers(["tensorbord"], tmp_path, CONFIG)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(RequestError, match=rf"{name} cannot be imported .*pip install 'fedpeft\[trackers\]'"):
            open_trackers([name], tmp_path, CONFIG)
    assert open_trackers([], tmp_path, CONFIG) == []


def test_tensorboard_shows_each_round_once_also_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(["tensorboard", "tensorboard"], tmp_path, CONFIG)
    for round in (1, 2):
        tracker.log(round, LINE | {"train_loss": 0.5 / round})
    tracker.close()
    (tracker,) = open_trackers(["tensorboard"], tmp_path, CONFIG, first_round=2)
    tracker.log(2, LINE | {"train_loss": 0.125})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "trackers" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(1, 0.5), (2, 0.125)]
    assert events.Scalars("metrics/validation/global/accuracy")[0].value == 0.75
    (text,) = events.Tensors("config/text_summary")
    assert b"| method.lr | 0.001 |" in text.tensor_proto.string_val[0]


class FakeMlflow(types.ModuleType):
    """The part of mlflow's client that is used, as a list of calls."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple] = []
        self.telemetry: str | None = None
        self.experiment: str | None = None

    def MlflowClient(self, tracking_uri):
        self.telemetry = os.environ.get("MLFLOW_DISABLE_TELEMETRY")
        self.calls.append(("uri", tracking_uri))
        return self

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id=self.experiment) if self.experiment else None

    def create_experiment(self, name, artifact_location):
        self.calls.append(("experiment", name, artifact_location))
        self.experiment = "7"
        return "7"

    def create_run(self, experiment, run_name):
        self.calls.append(("run", experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))


def test_mlflow_writes_into_the_run_folder_and_goes_on_after_a_resume(tmp_path, monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "x")  # so that it is restored afterwards
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tracker,) = open_trackers(["mlflow"], tmp_path, CONFIG)
    tracker.log(1, LINE)
    tracker.close()
    folder = tmp_path / "trackers" / "mlflow"
    assert fake.telemetry == "true"
    assert fake.calls == [
        ("uri", f"sqlite:///{folder}/mlflow.db"),
        ("experiment", "fedpeft", (folder / "artifacts").as_uri()),
        ("run", "7", tmp_path.name),
        ("log_param", "r1", "method.name", "fedavg"),
        ("log_param", "r1", "method.lr", "0.001"),
        ("log_param", "r1", "run.rounds", "3"),
        ("log_metric", "r1", "train_loss", 0.5, 1),
        ("log_metric", "r1", "metrics/validation/global/accuracy", 0.75, 1),
        ("set_terminated", "r1"),
    ]
    fake.calls.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere.db")
    open_trackers(["mlflow"], tmp_path, CONFIG, first_round=2)[0].close()
    assert fake.calls == [
        ("uri", "sqlite:////elsewhere.db"),
        ("update_run", "r1", "RUNNING"),
        ("set_terminated", "r1"),
    ]


class FakeWandb(types.ModuleType):
    """The part of wandb that is used; its log fails when told to."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict] = []
        self.logs: list[tuple] = []
        self.finished = 0
        self.fails = False

    def init(self, **kwargs):
        self.inits.append(kwargs)
        return self

    def log(self, values, step):
        if self.fails:
            raise ConnectionError("gone")
        self.logs.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_is_offline_unless_told_and_keeps_its_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tracker,) = open_trackers(["wandb"], tmp_path, CONFIG)
    tracker.log(1, LINE)
    tracker.close()
    monkeypatch.setenv("WANDB_MODE", "online")
    open_trackers(["wandb"], tmp_path, CONFIG, first_round=2)[0].close()
    first, second = fake.inits
    assert (first["mode"], second["mode"]) == ("offline", "online")
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["dir"] == str(tmp_path / "trackers" / "wandb")
    assert first["config"] == {"method.name": "fedavg", "method.lr": "0.001", "run.rounds": "3"}
    assert fake.logs == [(1, {"train_loss": 0.5, "metrics/validation/global/accuracy": 0.75})]
    assert fake.finished == 2


def test_a_failing_tracker_is_switched_off_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tracker,) = open_trackers(["wandb"], tmp_path, CONFIG)
    fake.fails = True
    with caplog.at_level(logging.WARNING):
        tracker.log(1, LINE)
        tracker.log(2, LINE)
    tracker.close()
    assert [r.getMessage() for r in caplog.records] == ["the tracker wandb failed in round 1 and is switched off"]
    assert fake.finished == 1


def test_what_was_opened_is_closed_when_a_later_one_is_missing(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RequestError, match="mlflow cannot be imported"):
        open_trackers(["wandb", "mlflow"], tmp_path, CONFIG)
    assert fake.finished == 1
