"""Studies: tasks x methods x seeds x grid, each cell a configuration of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError

from fedpeft.config import sections as s
from fedpeft.config.folders import slug
from fedpeft.config.load import is_study, load_raw
from fedpeft.config.problems import sentences
from fedpeft.config.reading import read_yaml
from fedpeft.core.errors import ConfigError

Point: TypeAlias = tuple[tuple[str, Any], ...]


class MethodEntry(s.Section):
    """One method of a study: its label in tables, its name and the fields in which it differs from the base."""

    model_config = ConfigDict(extra="allow")

    label: Annotated[str, Field(min_length=1)]
    """What tables and folders call it."""

    name: str
    """The method."""

    adapter: dict[str, Any] | None = None
    """Its adapter; null takes the base's."""


class Target(s.Section):
    """The common score of the global model to which bytes and simulated time are compared."""

    share_of: str
    """Label of the method whose best validation score of the global model, averaged over seeds, is the measure."""

    share: s.Share = 0.95
    """The part of that score that has to be reached."""


class StudyConfig(s.Section):
    """What `fedpeft compare` runs."""

    base: str | dict[str, Any] = Field(default_factory=dict)
    """The configuration that all cells share: a YAML file or the sections themselves."""

    tasks: tuple[dict[str, Any], ...] | None = None
    """Task sections; null takes the base's task alone."""

    methods: Annotated[tuple[MethodEntry, ...], Field(min_length=1)]
    """The methods to compare."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    """Values of `run.seed`; the first one chooses the grid point."""

    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values by dotted key, the same for every method; the best on validation is kept, per task and method."""

    target: Target | None = None
    """The common score for bytes and time."""

    _folder: Path = PrivateAttr(default=Path("."))

    @property
    def folder(self) -> Path:
        """Where relative paths start; the folder of the study's file."""
        return self._folder


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    task: str
    label: str
    seed: int
    point: Point  # (key, value) of the grid, in the grid's order
    config: s.RunConfig

    @property
    def name(self) -> str:
        """A folder name that stays the same when the study grows."""
        parts = [self.task, self.label, f"seed{self.seed}"]
        parts += [f"{key.rpartition('.')[2]}{value}" for key, value in self.point]
        return "-".join(slug(part) for part in parts)


def load_study(source: str | Path | Mapping[str, Any]) -> StudyConfig:
    """The study, checked as far as it can be without its cells; `cells` checks these. Raises ConfigError."""
    folder = Path(".")
    if isinstance(source, Mapping):
        raw = dict(source)
    else:
        path = Path(source).expanduser()
        raw, folder = read_yaml(path), path.resolve().parent
        if not is_study(raw) and raw.keys() & s.SECTIONS.keys():
            raise ConfigError([f"{path}: is the configuration of one run and no study; use: fedpeft run {path}"])
    try:
        study = StudyConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([p.removeprefix("study.") for p in sentences(error, StudyConfig, "study", {})]) from error
    study._folder = folder
    problems = _repeats("methods", [m.label for m in study.methods])
    problems += _repeats("seeds", [str(seed) for seed in study.seeds])
    labels = [m.label for m in study.methods]
    if study.target is not None and study.target.share_of not in labels:
        problems.append(f"target.share_of: {study.target.share_of!r} is not a label; labels are {', '.join(labels)}.")
    if problems:
        raise ConfigError(problems)
    return study


def cells(study: StudyConfig) -> tuple[Cell, ...]:
    """Every combination of task, method, seed and grid point, with its resolved configuration.

    The base's method fields hold for every method that has them; a method's own entry wins, and the grid over both.

    Raises:
        ConfigError: everything that is wrong in the base or in any cell, at once, each problem with its cell.
    """
    base, folder = _base(study)
    base_config = load_raw(base, folder, {})  # what is wrong here would only be repeated by every cell
    problems: dict[str, str] = {}
    found: list[Cell] = []
    for section, entry, seed, point in _combinations(study):
        raw = dict(base)
        if section is not None:
            raw["task"] = section
        raw["method"] = _method_section(entry, base.get("method") or {})
        if entry.adapter is not None:
            raw["adapter"] = entry.adapter
        start = study.folder if section is not None else folder
        try:
            config = load_raw(_absolute(raw, base_config, section), start, {**dict(point), "run.seed": seed})
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, entry.label)
            continue
        found.append(Cell(config.task.name or "", entry.label, seed, point, config))
    if problems:
        raise ConfigError([f"{label}: {problem}" for problem, label in problems.items()])
    repeated = _repeats("tasks", [task for task, _ in itertools.groupby(cell.task for cell in found)])
    if repeated:
        raise ConfigError(repeated)
    return tuple(found)


def _base(study: StudyConfig) -> tuple[dict[str, Any], Path]:
    folder = study.folder
    if isinstance(study.base, dict):
        return dict(study.base), folder
    path = Path(study.base).expanduser()
    path = path if path.is_absolute() else folder / path
    return read_yaml(path), path.parent


def _combinations(study: StudyConfig) -> Iterator[tuple[dict[str, Any] | None, MethodEntry, int, Point]]:
    points = [tuple(zip(study.grid, values, strict=True)) for values in itertools.product(*study.grid.values())]
    sections: tuple[dict[str, Any] | None, ...] = study.tasks or (None,)
    yield from itertools.product(sections, study.methods, study.seeds, points)


def _method_section(entry: MethodEntry, base: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the base gives as far as this method has them, then the entry's own."""
    from fedpeft import methods
    from fedpeft.core.errors import RequestError

    try:
        known = {field.name for field in methods.describe(methods.load(entry.name))}
    except RequestError:
        known = set()  # loading the cell tells what is wrong
    shared = {key: value for key, value in base.items() if key in known}
    return {"name": entry.name, **shared, **dict(entry.__pydantic_extra__ or {})}


def _absolute(raw: dict[str, Any], base: s.RunConfig, section: dict[str, Any] | None) -> dict[str, Any]:
    """The raw values with the paths of the base already found, so that tasks may start from another folder."""
    changed = dict(raw)
    if section is None:
        changed["task"] = {**(raw.get("task") or {}), **_paths(base.task, ("train", "validation", "test"))}
    changed["run"] = {**(raw.get("run") or {}), **_paths(base.run, ("devices", "init_from"))}
    changed["model"] = {**(raw.get("model") or {}), "name": base.model.name}
    changed["proxy"] = {**(raw.get("proxy") or {}), **_paths(base.proxy, ("large", "public"))}
    return changed


def _paths(section: s.Section, keys: tuple[str, ...]) -> dict[str, str]:
    return {key: value for key in keys if (value := getattr(section, key)) is not None}


def _repeats(key: str, names: list[str]) -> list[str]:
    slugs = [slug(name) for name in names]
    twice = sorted({name for name, short in zip(names, slugs, strict=True) if slugs.count(short) > 1})
    return [f"{key}: {', '.join(twice)} would have the same folder; give each a name of its own."] if twice else []
