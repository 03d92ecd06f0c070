"""Experiment trackers as optional hooks: TensorBoard, MLflow and Weights & Biases.

All of them write into the run folder and send nothing anywhere, unless their own environment variables say otherwise
(`MLFLOW_TRACKING_URI`, `WANDB_MODE`). They hold copies; the run folder's own files are what fedpeft reads.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from fedpeft.core.errors import RequestError
from fedpeft.runs.files import make_folder, write_file

_log = logging.getLogger(__name__)

PROJECT = "fedpeft"


class Tracker(Protocol):
    """One place that shows the figures of a run."""

    def log(self, round: int, values: Mapping[str, Any]) -> None:
        """Show the figures of a finished round (an object of `metrics.jsonl`)."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


def open_trackers(
    names: Sequence[str], run_folder: Path, config: Mapping[str, Any], first_round: int = 0
) -> list[Tracker]:
    """The named trackers, ready to log; a resumed run goes on where its trackers stopped.

    Args:
        names: any of tensorboard, mlflow, wandb.
        run_folder: gets a folder `trackers`.
        config: the resolved configuration, shown beside the figures.
        first_round: the first round that will be logged; what an earlier part of the run logged from there on is void.

    Raises:
        RequestError: an unknown name, or a package that is not installed.
    """
    openers: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
        "tensorboard": TensorBoard,
        "mlflow": MLflow,
        "wandb": WandB,
    }
    for name in names:
        if name not in openers:
            raise RequestError(f"run.trackers: {name!r} is unknown; choose from {', '.join(openers)}")
    found: list[Tracker] = []
    try:
        for name in dict.fromkeys(names):
            folder = run_folder / "trackers" / name
            make_folder(folder.parent)
            make_folder(folder)
            found.append(Watched(name, openers[name](folder, run_folder.resolve().name, config, first_round)))
    except BaseException:
        for tracker in found:
            tracker.close()
        raise
    return found


def scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested mapping with their paths, `metrics/validation/global/accuracy`; the rest is left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "round":
            yield f"{prefix}{key}", float(value)


def settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a configuration with their dotted keys."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


class Watched:
    """A tracker whose failure is logged once and ends the tracker, never the run."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name = name
        self._tracker: Tracker | None = tracker

    def log(self, round: int, values: Mapping[str, Any]) -> None:
        """See `Tracker.log`."""
        if self._tracker is None:
            return
        try:
            self._tracker.log(round, values)
        except Exception:
            _log.warning("the tracker %s failed in round %d and is switched off", self._name, round, exc_info=True)
            self.close()

    def close(self) -> None:
        """See `Tracker.close`."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close()
            except Exception:
                _log.warning("the tracker %s could not be closed", self._name, exc_info=True)


class TensorBoard:
    """Event files for `tensorboard --logdir RUN_DIR/trackers`."""

    def __init__(self, folder: Path, run: str, config: Mapping[str, Any], first_round: int) -> None:
        writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(folder), purge_step=first_round or None)
        if not first_round:
            lines = [f"| {key} | {value.replace('|', '/')} |" for key, value in settings(config)]
            self._writer.add_text("config", "\n".join(["| key | value |", "|---|---|", *lines]))

    def log(self, round: int, values: Mapping[str, Any]) -> None:
        """See `Tracker.log`."""
        for name, value in scalars(values):
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()


class MLflow:
    """A run in an SQLite store: `mlflow ui --backend-store-uri sqlite:///RUN_DIR/trackers/mlflow/mlflow.db`."""

    def __init__(self, folder: Path, run: str, config: Mapping[str, Any], first_round: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        local = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        client = _package("mlflow", "mlflow").MlflowClient
        self._client = client(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", local))
        self._run, fresh = _remembered(folder / "run_id", lambda: self._create(run, folder))
        if fresh:
            for key, value in settings(config):
                self._client.log_param(self._run, key, value[:500])
        else:
            self._client.update_run(self._run, status="RUNNING")

    def _create(self, run: str, folder: Path) -> str:
        known = self._client.get_experiment_by_name(PROJECT)
        artifacts = (folder.resolve() / "artifacts").as_uri()
        experiment = known.experiment_id if known else self._client.create_experiment(PROJECT, artifacts)
        return str(self._client.create_run(experiment, run_name=run).info.run_id)

    def log(self, round: int, values: Mapping[str, Any]) -> None:
        """See `Tracker.log`."""
        for name, value in scalars(values):
            self._client.log_metric(self._run, name, value, step=round)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self._run)


class WandB:
    """A run of Weights & Biases, offline unless `WANDB_MODE` says otherwise; `wandb sync` sends it later."""

    def __init__(self, folder: Path, run: str, config: Mapping[str, Any], first_round: int) -> None:
        wandb = _package("wandb", "wandb")
        run_id, _ = _remembered(folder / "run_id", lambda: os.urandom(8).hex())
        self._run = wandb.init(
            project=PROJECT,
            name=run,
            id=run_id,
            resume="allow",
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(settings(config)),
            settings={"silent": True, "console": "off"},
        )

    def log(self, round: int, values: Mapping[str, Any]) -> None:
        """See `Tracker.log`."""
        self._run.log(dict(scalars(values)), step=round)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError(
            f"run.trackers: {package} cannot be imported ({error}); install it with pip install 'fedpeft[trackers]', "
            f"or take it out of run.trackers"
        ) from error


def _remembered(path: Path, make: Callable[[], str]) -> tuple[str, bool]:
    """What the file says, and whether it was made just now."""
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8"), False
    value = make()
    write_file(path, value.encode())
    return value, True
