"""What a run folder tells about a run, ready to be shown: read once, missing pieces allowed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedpeft.runs.store import RunFolder

GLOBAL, PERSONALIZED, MAJORITY, LABEL_PRIOR = "global", "personalized", "majority", "label_prior"
BASE = "base"  # the model without its adapter, where text is predicted
EMULATOR = "emulator"  # the global model without the blocks that clients do not have
PROXY, LARGE = "proxy", "large"  # the large model steered by the small ones, and alone
OWN_PROXIES = "personalized_proxy"  # the large model steered by each client's own small one, mean over clients
ENSEMBLE = "ensemble_proxy"  # the same, steered by the mean of all clients' changes at once
OF_BEST = (GLOBAL, EMULATOR, PROXY, LARGE)  # whose results are those of the best-validated parameters
BARS = {MAJORITY: "always the majority label", BASE: "the untrained base"}  # what a global model must beat
LEVELS = {MAJORITY: "majority", BASE: "untrained", LARGE: "large alone"}  # the same in short


def decisive(scores: Collection[str]) -> str:
    """Whose score selects of those that are there: what the run makes, at last the global model's."""
    return next((who for who in (PERSONALIZED, PROXY) if who in scores), GLOBAL)


@dataclass(frozen=True)
class Client:
    """One client's rows, scores and losses."""

    name: str
    label_counts: tuple[int, ...]
    rows: int
    scores: Mapping[str, float] = field(default_factory=dict)  # by GLOBAL and PERSONALIZED
    lost: int = 0  # exchanges that it was asked for and that were not answered in time or not valid

    @property
    def score(self) -> float | None:
        """What ranks it among the others: its own model's score, or the global one's."""
        return self.scores.get(PERSONALIZED, self.scores.get(GLOBAL))


@dataclass(frozen=True)
class Score:
    """The scores of one evaluated round, with what had been spent by then."""

    round: int
    bytes: float
    simulated_seconds: float
    values: Mapping[str, float]  # by GLOBAL, PERSONALIZED, MAJORITY, ..


@dataclass(frozen=True)
class History:
    """One run."""

    folder: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...]  # lines of metrics.jsonl
    exchanges: tuple[Mapping[str, Any], ...]  # lines of exchanges.jsonl
    partition: Mapping[str, Any]
    clients: tuple[Client, ...]
    labels: tuple[str, ...]
    samples: tuple[Mapping[str, Any], ...] = ()  # texts that were generated at the end

    @property
    def method(self) -> str:
        """The method's name."""
        return str(_at(self.config, "method", "name") or "method")

    @property
    def label(self) -> str:
        """What a table calls the run: the label that a study gave it, else its method."""
        return str(self.manifest.get("label") or self.method)

    @property
    def task(self) -> str:
        """The name of the task."""
        return str(_at(self.config, "task", "name") or "task")

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(_at(self.config, "run", "seed") or 0)

    @property
    def metric(self) -> str:
        """The score that is shown."""
        return str(self.manifest.get("metric") or _at(self.config, "task", "metric") or "accuracy")

    @property
    def scores(self) -> tuple[Score, ...]:
        """The evaluated rounds, by validation."""
        traffic = accumulate(line.get("bytes_down", 0) + line.get("bytes_up", 0) for line in self.rounds)
        times = accumulate(line.get("simulated_seconds", 0.0) for line in self.rounds)
        found = []
        for line, spent, time in zip(self.rounds, traffic, times, strict=True):
            values = self._values(_at(line, "metrics", "validation"))
            if values:
                found.append(Score(int(line.get("round", 0)), spent, time, values))
        return tuple(found)

    @property
    def losses(self) -> tuple[tuple[int, float], ...]:
        """(round, mean training loss)."""
        told = (line for line in self.rounds if line.get("round", 0) > 0 and _finite(line.get("train_loss")))
        return tuple((int(line["round"]), float(line["train_loss"])) for line in told)

    @property
    def final(self) -> tuple[str, Mapping[str, float]]:
        """The result: ("test", or "validation" where there are no test rows, and scores by who predicts).

        The scores of the global model and the proxy are those of the best-validated parameters, those of personal
        models of the final ones: memories of earlier rounds are gone.
        """
        metrics = self.manifest.get("metrics") or {}
        for split in ("test", "validation"):
            best, final = (self._values(_at(metrics, choice, split)) for choice in ("best", "final"))
            if best or final:
                return split, {**final, **best, **{who: final[who] for who in final if who not in OF_BEST}}
        last = self.rounds[-1] if self.rounds else {}
        if values := self._values(_at(last, "metrics", "test")):
            return "test", values
        scores = self.scores
        return "validation", scores[-1].values if scores else {}

    @property
    def taken(self) -> Mapping[str, int]:
        """After which round the models were taken that `final` scores, by who predicts; those that are known."""
        best = _at(self.manifest, "metrics", "best", "round")
        if best is None:
            return {}
        done = self.manifest.get("rounds_done") if self.manifest.get("status") == "finished" else None
        return {GLOBAL: int(best), **({} if done is None else {PERSONALIZED: int(done)})}

    def total(self, key: str) -> float:
        """A total of the manifest, or the sum over rounds where the run did not get so far."""
        if _finite(self.manifest.get(key)):
            return float(self.manifest[key])
        return math.fsum(line[key] for line in self.rounds if _finite(line.get(key)))

    def _values(self, scores: Any) -> dict[str, float]:
        if not isinstance(scores, Mapping):
            return {}
        found = {who: _at(values, self.metric) for who, values in scores.items() if isinstance(values, Mapping)}
        return {str(who): float(value) for who, value in found.items() if _finite(value)}


@dataclass(frozen=True)
class Group:
    """The runs that differ in nothing but their seed."""

    label: str
    runs: tuple[History, ...]

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.runs[0].task

    def final(self, who: str) -> list[float]:
        """The results of all seeds."""
        return [values[who] for run in self.runs if who in (values := run.final[1])]

    def mean_total(self, key: str) -> float:
        """The mean over seeds of a total."""
        return statistics.fmean(run.total(key) for run in self.runs)


def read_history(folder: Path) -> History:
    """What a run folder holds; pieces that are not there yet are empty.

    Raises:
        StoreError: the folder holds no run, or one that is damaged.
    """
    run = RunFolder.open(folder)
    manifest, partition = run.manifest(), run.partition()
    labels = tuple(str(label) for label in partition.get("labels") or manifest.get("labels") or ())
    return History(
        folder=Path(folder),
        config=run.load_config(),
        manifest=manifest,
        rounds=tuple(run.metrics()),
        exchanges=tuple(run.exchanges()),
        partition=partition,
        clients=_clients(run.clients(), partition, str(manifest.get("metric") or _metric(run.load_config()))),
        labels=labels,
        samples=tuple(run.samples()),
    )


def group(histories: Sequence[History]) -> list[Group]:
    """Runs put together over seeds; groups that would have the same label get what sets them apart."""
    groups: dict[str, list[History]] = {}
    for history in histories:
        key = json.dumps([history.label, _without_seed(history.config)], sort_keys=True, default=str)
        groups.setdefault(key, []).append(history)
    runs = [sorted(members, key=lambda h: h.seed) for members in groups.values()]
    heads = [members[0] for members in runs]
    return [Group(_title(members[0], heads), tuple(members)) for members in runs]


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; the latter is None for fewer than two values."""
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _clients(scored: Mapping[str, Any], partition: Mapping[str, Any], metric: str) -> tuple[Client, ...]:
    held = partition.get("clients") or {}
    found = []
    for client in sorted(held or scored):  # a method on pooled rows scores one client that the partition does not know
        entry, own = scored.get(client) or {}, held.get(client) or {}
        counts = entry.get("label_counts") or _at(own, "label_counts", "train") or ()
        scores = {who: _at(entry, who, metric) for who in (GLOBAL, PERSONALIZED)}
        name = own.get("name") or client
        found.append(
            Client(
                name if name == client else f"{client} · {name}",
                tuple(int(n) for n in counts),
                int(entry.get("rows", sum(counts))),
                {who: float(value) for who, value in scores.items() if _finite(value)},
                int(entry.get("lost", 0)),
            )
        )
    return tuple(found)


def _title(history: History, heads: Sequence[History]) -> str:
    rivals = [h for h in heads if h is not history and (h.task, h.label) == (history.task, history.label)]
    if not rivals:
        return history.label
    own = _flat(history.config)
    apart = [key for key in own if any(_flat(rival.config).get(key) != own[key] for rival in rivals)]
    said = ", ".join(f"{key.rpartition('.')[2]} {own[key]}" for key in apart if key != "run.seed")
    return f"{history.label} ({said})" if said else history.label


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    sections = ((name, section) for name, section in config.items() if isinstance(section, Mapping))
    return {f"{name}.{key}": value for name, section in sections for key, value in section.items()}


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _flat(config).items() if key != "run.seed"}


def _metric(config: Mapping[str, Any]) -> str:
    return str(_at(config, "task", "metric") or "accuracy")


def _at(value: Any, *path: str) -> Any:
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
