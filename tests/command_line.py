"""The command line with the composition root replaced: what its tests share."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer.testing

from fedpeft.cli import app as command_line
from fedpeft.progress import Progress

DEMO = str(Path(__file__).parents[1] / "examples" / "demo.yaml")
STUDY = str(Path(__file__).parents[1] / "examples" / "compare.yaml")
METRICS = {"best": {"test": {"global": {"accuracy": 0.75, "loss": 0.5}, "majority": {"accuracy": 0.25}}}}
MANIFEST = {"rounds_done": 10, "bytes_down": 2_000_000, "bytes_up": 1_500_000, "seconds": 61.0, "params_sha256": "abc"}
TABLE = [
    {
        "label": "FedAvg",
        "task": "demo",
        "mean": 0.71,
        "std": 0.012,
        "seeds": 3,
        "bytes": 4.2e6,
        "simulated_seconds": 75.0,
    },
    {"label": "Local", "task": "demo", "mean": 0.5, "std": None, "seeds": 1, "bytes": 0, "simulated_seconds": 0.0},
]


@dataclass
class FakeApp:
    """Stands for fedpeft.app: records calls, shows progress, answers or raises."""

    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    error: BaseException | None = None
    refusal: BaseException | None = None  # an error before there is a folder
    leave: Callable[[Path], None] = lambda folder: None  # what the run has written when it fails
    failures: tuple[str, ...] = ()  # of a study's cells

    def _do(self, name: str, *arguments: Any, folder: Path | None = None, progress: Any = None) -> None:
        self.calls.append((name, arguments))
        if self.refusal is not None:
            raise self.refusal
        if progress is not None:
            progress(Progress(1, 2, 0.7, 1000, 500, 1.0))
        if self.error is not None:
            if folder is not None:
                self.leave(folder)
            raise self.error

    def run(
        self, config: Any, overrides: Any = None, *, out: Any = None, progress: Any = None, begun: Any = None
    ) -> Any:
        if begun is not None and self.refusal is None:
            begun(out)
        self._do("run", config, overrides, out, folder=out, progress=progress)
        return types.SimpleNamespace(folder=out, manifest=MANIFEST, metrics=METRICS)

    def resume(self, folder: Path, overrides: Any = None, *, progress: Any = None) -> Any:
        self._do("resume", folder, overrides, folder=folder, progress=progress)
        return types.SimpleNamespace(folder=folder, manifest=MANIFEST, metrics=METRICS)

    def _comparison(self, out: Path) -> Any:
        return types.SimpleNamespace(folder=out, table=TABLE, report=out / "report.html", failures=self.failures)

    def compare(self, study: Path, *, out: Any = None, progress: Any = None) -> Any:
        self._do("compare", study, out, folder=out, progress=progress)
        return self._comparison(out)

    def demo(self, *, out: Any = None, progress: Any = None) -> Any:
        self._do("demo", out, folder=out, progress=progress)
        return self._comparison(out)

    def evaluate(self, folder: Path, data: Path | None = None, *, large: bool, own_proxies: bool) -> Any:
        self._do("evaluate", folder, data, large, own_proxies)
        return {"test": {"global": {"accuracy": 0.8125, "loss": 0.4}}}

    def predict(self, folder: Path, data: Path, out: Path | None = None, client: str | None = None) -> Any:
        self._do("predict", folder, data, out, client)
        return [{"label": "NUM", "probabilities": {"NUM": 0.9, "LOC": 0.1}}, {"label": "LOC", "probabilities": {}}]

    def export(
        self,
        folder: Path,
        to: Path,
        client: str | None = None,
        merge: bool = False,
        replace: bool = False,
        rank: int | None = None,
    ) -> Path:
        self._do("export", folder, to, client, merge, replace, rank)
        return to

    def check(self, config: Any, overrides: Any) -> Any:
        self._do("check", config, overrides)
        figures = {"bytes_down": 1_230_000, "memory_bytes": 3e7, "seconds": 75, "flops_per_client_and_round": 4.7e9}
        return {"partition": {"clients": 1200, "rows_mean": 153.87, "top_label_share_mean": 0.381}, "estimate": figures}


def call(*arguments: str) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(command_line, list(arguments))
