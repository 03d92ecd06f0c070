"""Studies: many runs, one table, one page."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedpeft.app.federation import build, computing
from fedpeft.app.running import Run, resume, run
from fedpeft.config import Cell, StudyConfig, cells, free_folder, load_study, resolved, slug
from fedpeft.core.client import reason
from fedpeft.core.errors import ConfigError, RequestError
from fedpeft.core.metrics import better, lower, rank
from fedpeft.progress import Listener, Progress
from fedpeft.runs.files import plain, write_file
from fedpeft.runs.history import (
    BARS,
    GLOBAL,
    LABEL_PRIOR,
    LARGE,
    OF_BEST,
    PERSONALIZED,
    PROXY,
    History,
    decisive,
    read_history,
    spread,
)
from fedpeft.runs.report import write_report
from fedpeft.runs.store import RunFolder

RESOLVED = {"run": ("cohort_batching", "threads"), "model": ("device",)}  # keys that a run folder holds resolved

DEMO: dict[str, Any] = {
    "base": {
        "model": {"name": "demo"},
        "task": {"name": "demo", "max_length": 32},
        "partition": {"kind": "dirichlet", "clients": 24, "alpha": 1.0},
        "method": {"name": "fedavg", "cohort": 8, "steps": 8, "batch_size": 16, "lr": 5e-3},
        "run": {"rounds": 10, "evaluate_every": 2},
    },
    "methods": [
        {"label": "Centralized", "name": "centralized", "steps": 64},
        {"label": "FedAvg", "name": "fedavg"},
        {"label": "FedProx", "name": "fedprox"},
        {"label": "FedOpt (Adam)", "name": "fedopt"},
        {"label": "SCAFFOLD", "name": "scaffold", "lr": 0.1},
        {"label": "FedPepTAO", "name": "fedpeptao", "lr": 4e-2, "ratio_rule": "fixed"},
        {"label": "P-tuning v2", "name": "ptuning_v2", "lr": 4e-2},
        {"label": "Adapter", "name": "adapter", "lr": 3e-3},
        {"label": "Local", "name": "local"},
    ],
    "seeds": [0],
    "target": {"share_of": "FedAvg", "share": 0.95},
}
"""The study of `fedpeft demo`: 24 clients of the embedded task, 8 per round, 8 steps of 16 rows, 10 rounds."""


@dataclass(frozen=True)
class Comparison:
    """A finished study.

    Attributes:
        table: one row per task and method; see `tabulate`.
        failures: for each cell that failed, its name and why.
    """

    folder: Path
    table: list[dict[str, Any]]
    report: Path
    failures: tuple[str, ...] = ()


def compare(
    study: Path | str | Mapping[str, Any], *, out: Path | str | None = None, progress: Listener | None = None
) -> Comparison:
    """Run every cell of a study that is not finished yet; one table (mean and spread), one report page.

    The grid is tried with the first seed; the point with the best validation score is kept for the other seeds, for
    each task and method. A cell that fails is told and left out; the others go on.

    Args:
        out: folder of the study; finished cells in it are kept, begun ones are resumed.

    Raises:
        ConfigError: everything that is wrong in any cell, or keeps it from starting, before the first one starts.
        RequestError: the folder holds a cell with another configuration.
        FedpeftError: no cell came to its end; the error of the first one.
    """
    wanted = load_study(study)
    plan = cells(wanted)
    name = "study" if isinstance(study, Mapping) else slug(Path(study).stem)
    folder = Path(out) if out is not None else free_folder(name)
    for cell in plan:
        _check_cell(cell, folder / cell.name)
    _check_startable([cell for cell in plan if not (folder / cell.name / "config.yaml").is_file()])
    work = _Work(folder, progress or (lambda _: None))
    rows: list[tuple[Cell, Run]] = []
    for _, group in itertools.groupby(plan, key=lambda cell: (cell.task, cell.label)):
        members = list(group)
        done = work.run([cell for cell in members if cell.seed == wanted.seeds[0]])
        if not done:
            continue
        chosen, _ = min(done, key=lambda pair: _place(pair[1]))
        rows += [pair for pair in done if pair[0].point == chosen.point]
        rows += work.run([c for c in members if c.point == chosen.point and c.seed != wanted.seeds[0]])
    if not rows:
        raise work.errors[0]
    table = tabulate(wanted, rows)
    figures = {"table": table, "failures": work.failures, "runs": [found.folder.name for _, found in rows]}
    write_file(folder / "table.json", json.dumps(plain(figures), indent=2, ensure_ascii=False).encode() + b"\n")
    report = write_report([found.folder for _, found in rows], folder / "report.html", None, work.failures, table)
    return Comparison(folder, table, report, tuple(work.failures))


def demo(*, out: Path | str | None = None, progress: Listener | None = None) -> Comparison:
    """The methods side by side on the embedded task and model; needs no network."""
    return compare(DEMO, out=out if out is not None else free_folder("demo"), progress=progress)


@dataclass
class _Work:
    """The cells of one study being run; those that fail are told and left out."""

    folder: Path
    tell: Listener
    failures: list[str] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def run(self, plan: Iterable[Cell]) -> list[tuple[Cell, Run]]:
        """The cells that came to their end."""
        done = []
        for cell in plan:
            self._say(cell, f"{cell.task} {cell.label}  {_point(cell)}seed {cell.seed}")
            try:
                done.append((cell, _run_cell(cell, self.folder / cell.name, self.tell)))
            except Exception as error:  # also one that nobody thought of: the other cells may have run for hours
                self.errors.append(error)
                self.failures.append(f"{cell.name}: {reason(error)}")
                self._say(cell, f"failed: {self.failures[-1]}")
        return done

    def _say(self, cell: Cell, message: str) -> None:
        self.tell(Progress(0, cell.config.run.rounds, message=message))


def _point(cell: Cell) -> str:
    return "".join(f"{key.rpartition('.')[2]}={value}  " for key, value in cell.point)


def _check_cell(cell: Cell, folder: Path) -> None:
    """Raise RequestError where the cell's folder holds a run with another configuration."""
    if not (folder / "config.yaml").is_file():
        return
    here, wanted = (_comparable(config) for config in (RunFolder.open(folder).load_config(), resolved(cell.config)))
    if here == wanted:
        return
    apart = [
        f"{section}.{key}"
        for section, values in wanted.items()
        for key in values
        if (here.get(section) or {}).get(key) != values[key]
    ]
    what = f"; {apart[0]} differs" if apart else ""
    raise RequestError(
        f"{folder} holds a run with another configuration{what}; choose a new --out, or remove the folder"
    )


def _check_startable(plan: Sequence[Cell]) -> None:
    """Raise ConfigError with whatever keeps cells from starting: data, model, adapter, what a method asks of them.

    Seeds change nothing of it: of each task, method and point of the grid the first cell is looked at.
    """
    problems: dict[str, list[str]] = {}
    firsts = {(cell.task, cell.label, cell.point): cell for cell in reversed(plan)}
    for cell in reversed(firsts.values()):
        try:
            with computing(cell.config):
                build(cell.config).start()
        except RequestError as error:
            told = error.problems if isinstance(error, ConfigError) else (str(error),)
            for problem in told:
                problems.setdefault(problem, []).append(f"{cell.label} on {cell.task}")
    if problems:
        raise ConfigError([f"{', '.join(dict.fromkeys(who))}: {problem}" for problem, who in problems.items()])


def _run_cell(cell: Cell, folder: Path, tell: Listener) -> Run:
    """The finished cell: as it lies there, resumed, or run from its start."""
    if (folder / "config.yaml").is_file():
        return resume(folder, progress=tell)
    return run(cell.config, out=folder, progress=tell, label=cell.label)


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: value for key, value in section.items() if key not in RESOLVED.get(name, ())}
        for name, section in config.items()
    }


# --- the table --------------------------------------------------------------------------------------------------


def _validated(found: Run) -> float | None:
    """The best validation score; None where there is none."""
    best = found.metrics.get("best", {}).get("validation", {})
    score = best.get(decisive(best), {}).get(found.manifest["metric"])
    return None if score is None else float(score)


def _place(found: Run) -> float:
    """A key that puts the best run first, and those without a score last."""
    score = _validated(found)
    return math.inf if score is None or math.isnan(score) else rank(found.manifest["metric"], score)


def tested(found: Run) -> dict[str, float]:
    """What a run scored on test rows (validation rows where it has none), by who predicts.

    The global score is that of the best-validated parameters; the personal one that of the final ones, since memories
    of earlier rounds are gone.
    """
    metric, metrics = found.manifest["metric"], found.metrics
    split = "test" if "test" in metrics.get("best", {}) else "validation"
    final = metrics.get("final", {}).get(split, {})
    scores = metrics.get("best", {}).get(split, {}) | {
        who: values for who, values in final.items() if who not in OF_BEST
    }
    return {who: float(values[metric]) for who, values in scores.items() if metric in values}


def tabulate(study: StudyConfig, rows: Sequence[tuple[Cell, Run]]) -> list[dict[str, Any]]:
    """One row per task and method, the best score first within a task."""
    table = []
    for _, group in itertools.groupby(rows, key=lambda pair: pair[0].task):
        members = list(group)
        goal = _goal(study, members)
        of_task = [_row(list(pairs), goal) for _, pairs in itertools.groupby(members, key=lambda pair: pair[0].label)]
        table += sorted(of_task, key=lambda row: rank(members[0][1].manifest["metric"], row["mean"]))
    return table


def _row(pairs: Sequence[tuple[Cell, Run]], goal: float | None) -> dict[str, Any]:
    cell = pairs[0][0]
    scores = [tested(found) for _, found in pairs]
    mean, std = spread([score[decisive(score)] for score in scores])
    personal = any(PERSONALIZED in score for score in scores)
    row: dict[str, Any] = {
        "label": cell.label,
        "task": cell.task,
        "mean": mean,
        "std": std,
        "seeds": len(pairs),
        "bytes": _mean(found.manifest["bytes_down"] + found.manifest["bytes_up"] for _, found in pairs),
        "simulated_seconds": _mean(found.manifest["simulated_seconds"] for _, found in pairs),
        "of": "personal" if personal else decisive(scores[0]),
        "global": _mean(score[GLOBAL] for score in scores),
        **{who: _mean(s[who] for s in scores) for who in (PROXY, LARGE, *BARS) if all(who in s for s in scores)},
    }
    if personal and all(LABEL_PRIOR in score for score in scores):  # the bar for models that know whose
        row["label_prior"] = _mean(score[LABEL_PRIOR] for score in scores)
    if goal is not None:
        reached = [at for _, found in pairs if (at := _reach(read_history(found.folder), goal)) is not None]
        complete = len(reached) == len(pairs)
        row["target"] = goal
        row["bytes_to_target"] = _mean(r[0] for r in reached) if complete else None
        row["seconds_to_target"] = _mean(r[1] for r in reached) if complete else None
    row |= _planned([found for _, found in pairs])
    if cell.point:
        row["chosen"] = {key.rpartition(".")[2]: value for key, value in cell.point}
    return row


def _planned(runs: Sequence[Run]) -> dict[str, float]:
    """Of planned federations, means over the seeds: what is left undone, who is out, how much is trained."""
    told = [choices for found in runs if "plans" in (choices := found.manifest.get("choices", {}))]
    if len(told) < len(runs):
        return {}
    return {
        "under_training": _mean(own["under_training"] for own in told),
        "left_out": _mean(own["left_out"] for own in told),
        "machines_excluded": _mean(len(own["excluded"]) for own in told),
        "trained_numbers": round(_mean(own["trained_numbers"] for own in told)),
        "set_up_seconds": _mean(read_history(found.folder).rounds[0]["simulated_seconds"] for found in runs),
    }


def _goal(study: StudyConfig, rows: Sequence[tuple[Cell, Run]]) -> float | None:
    """The common score: a share of the best validation score, averaged over seeds, of the method that is named.

    It is of the global model, for every method: scores of personal models on their own rows are another measure. Of a
    metric whose lower scores are better it is that score divided by the share.
    """
    if study.target is None:
        return None
    histories = [read_history(found.folder) for cell, found in rows if cell.label == study.target.share_of]
    bests = [min(scores, key=partial(rank, h.metric)) for h in histories if (scores := list(_global_scores(h)))]
    if not bests:
        return None
    share = study.target.share
    return _mean(bests) / share if lower(histories[0].metric) else share * _mean(bests)


def _global_scores(history: History) -> Iterator[float]:
    return (score.values[GLOBAL] for score in history.scores if GLOBAL in score.values)


def _reach(history: History, goal: float) -> tuple[float, float] | None:
    """(bytes, simulated seconds) of the first evaluation at which the global model is as good as the goal."""
    for score in history.scores:
        value = score.values.get(GLOBAL)
        if value is not None and (value == goal or better(history.metric, value, goal)):
            return score.bytes, score.simulated_seconds
    return None


def _mean(values: Iterable[float]) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)
