"""From a file, a mapping or a configuration to a `RunConfig` in which every key has its value."""

from __future__ import annotations

import copy
import dataclasses
import glob
import math
import re
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from fedpeft.config import sections as s
from fedpeft.config.problems import nearest, sentences, unknown, value_sentence
from fedpeft.config.reading import apply_overrides, find_path, read_yaml
from fedpeft.core.adapter import ADAPTERS, AdapterSpec, spec_of
from fedpeft.core.errors import ConfigError, DataError, ModelError, RequestError
from fedpeft.core.metrics import lower
from fedpeft.core.metrics import names as metric_names
from fedpeft.data.templates import template_problems
from fedpeft.runs.units import count_text

if TYPE_CHECKING:
    from fedpeft.core.exchange import Method

Source: TypeAlias = "str | Path | Mapping[str, Any] | s.RunConfig"

PACKAGED = ("demo", "demo-small", "demo-large", "minilm")
FILES = {"task": ("train", "validation", "test"), "run": ("devices", "init_from"), "proxy": ("public",)}
MODELS = (("model", "name"), ("proxy", "large"))


def load_config(source: Source, overrides: Mapping[str, Any] | None = None) -> s.RunConfig:
    """The configuration with every default, path and field of its method filled in.

    Args:
        source: a YAML file, a nested mapping, or a configuration to be changed.
        overrides: values by dotted key, such as `{"method.lr": 1e-3}`; they win over the source.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    raw, folder = _read(source)
    return load_raw(raw, folder, overrides or {}, defaults_of(source) if isinstance(source, s.RunConfig) else ())


def load_raw(
    raw: Mapping[str, Any], folder: Path, overrides: Mapping[str, Any], defaults: Collection[str] = ()
) -> s.RunConfig:
    """As `load_config`, from nested plain values whose relative paths start at `folder`.

    Args:
        defaults: dotted keys whose values in `raw` nobody has set.
    """
    problems: list[str] = []
    values = copy.deepcopy(dict(raw))
    apply_overrides(values, overrides, problems)
    values, before = _known_sections(values, problems), values
    changed = {".".join(dotted.split(".")[:2]) for dotted in overrides}
    given = {
        name: {key for key in section if f"{name}.{key}" in changed or f"{name}.{key}" not in defaults}
        for name, section in values.items()
    }
    _find_paths(values, folder, problems)
    misshapen = "method" in before and "method" not in values  # said already: which method was meant nobody knows
    method = None if misshapen else _method(values, problems)
    _adapter(values, method, problems)
    parts: dict[str, Any] = {}
    for name, section in s.SECTIONS.items():
        try:
            parts[name] = section.model_validate(values.get(name, {}))
        except ValidationError as error:
            problems += sentences(error, section, name, s.LATER)
    _settle_clients(parts)
    for name, part in parts.items():  # the default values that stand in a section now are not given by anybody
        part.model_fields_set.intersection_update(given.get(name, ()))
    problems += _conflicts(parts)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return s.RunConfig(**parts)


def resolved(config: s.RunConfig) -> dict[str, Any]:
    """The configuration as plain data with nothing left out; loading it gives an equal configuration."""
    return config.model_dump(mode="json")


def build_method(config: s.RunConfig) -> Method:
    """The method that the configuration describes."""
    from fedpeft import methods

    return methods.build(config.method.name, config.method.fields)


def adapter_spec(config: s.RunConfig) -> AdapterSpec:
    """The adapter that the configuration describes."""
    return spec_of({**config.adapter.fields, "kind": config.adapter.kind})


def _read(source: Source) -> tuple[dict[str, Any], Path]:
    if isinstance(source, s.RunConfig):
        return resolved(source), Path.cwd()
    if isinstance(source, Mapping):
        return dict(source), Path.cwd()
    path = Path(source).expanduser()
    raw = read_yaml(path)
    if is_study(raw):
        raise ConfigError([f"{path}: is a study and not the configuration of a run; use: fedpeft compare {path}"])
    return raw, path.resolve().parent


def is_study(raw: Mapping[str, Any]) -> bool:
    """Whether what a file holds is a study: `methods` is what every study has and no configuration."""
    return "methods" in raw


def defaults_of(config: s.RunConfig) -> frozenset[str]:
    """The dotted keys whose values nobody has set."""
    sections = {name: getattr(config, name) for name in s.SECTIONS}
    return frozenset(
        f"{name}.{key}"
        for name, section in sections.items()
        for key in section.model_dump()
        if key not in section.model_fields_set
    )


@contextmanager
def naming_defaults(config: s.RunConfig) -> Iterator[None]:
    """Let the message of an error say which of its values nobody has set: "partition.clients is 100 (the default)"."""
    try:
        yield
    except (DataError, ModelError) as error:
        text = str(error)
        for dotted in defaults_of(config):
            name, _, key = dotted.partition(".")
            said = f"{re.escape(dotted)}(?: is |: | = ){re.escape(str(getattr(getattr(config, name), key)))}"
            text = re.sub(rf"\b({said})(?![\w.])", r"\1 (the default)", text)
        error.args = (text,)
        raise


def not_given(section: s.Section, key: str) -> str:
    """Words to put behind a value that nobody has set: " (the default)", else nothing."""
    return "" if key in section.model_fields_set else " (the default)"


def _known_sections(values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name not in s.SECTIONS:
            problems.append(unknown(str(name), s.SECTIONS, s.LATER))
        elif value is not None and not isinstance(value, Mapping):
            problems.append(f"{name}: {value!r} cannot be used; give a mapping such as `{name}: {{key: value}}`.")
        else:
            kept[name] = dict(value or {})
    return kept


def _find_paths(values: dict[str, Any], folder: Path, problems: list[str]) -> None:
    wanted = [(section, key) for section, keys in FILES.items() for key in keys]
    task = values.get("task", {})
    if task.get("train") is None and task.get("name") not in (None, "demo"):
        wanted = [(section, key) for section, key in wanted if section != "task"]  # names of splits on the hub
    for section, key in [*wanted, *MODELS]:
        text, named = values.get(section, {}).get(key), (section, key) in MODELS
        if isinstance(text, str) and text and not (named and (text in PACKAGED or "://" in text)):
            hub = named and not text.startswith((".", "/", "~", "$"))
            values[section][key] = _path(f"{section}.{key}", text, folder, problems, hub)
    for section in ("method", "adapter"):  # folders of earlier runs
        own = values.get(section)
        sources = own.get("sources") if isinstance(own, Mapping) else None
        if isinstance(sources, list | tuple) and all(isinstance(text, str) and text for text in sources):
            values[section]["sources"] = [
                _path(f"{section}.sources.{i}", text, folder, problems) for i, text in enumerate(sources)
            ]


def _path(key: str, text: str, folder: Path, problems: list[str], hub: bool = False) -> str:
    """Where a file or folder lies that a key names; the text itself where it lies nowhere, which is a problem.

    Args:
        hub: whether what lies nowhere may be a name on the hub.
    """
    try:
        path = find_path(text, folder)
    except KeyError as error:
        problems.append(f"{key}: {text!r} names the variable {error.args[0]}, which is not set; set it.")
        return text
    if Path(path).exists() or glob.glob(path):
        return path
    if not hub:
        hint = " (from ${FEDPEFT_DATA}; set it to the folder with your data)" if "${FEDPEFT_DATA}" in text else ""
        problems.append(f"{key}: there is no {path}{hint}; check the path.")
    return text


def _method(values: dict[str, Any], problems: list[str]) -> Method | None:
    """Build the method to check it, and write all of its fields into the values."""
    from fedpeft import methods
    from fedpeft.core.method import plain

    fields = dict(values.get("method", {}))
    name = fields.pop("name", "fedavg")
    if not isinstance(name, str):
        problems.append(f"method.name: {name!r} cannot be used; give one of {', '.join(methods.names())}.")
        del values["method"]
        return None
    try:
        method = methods.build(name, fields)
    except ConfigError as error:
        problems += error.problems
        return None
    except RequestError as error:
        problems.append(f"method.name: {error}")
        return None
    values["method"] = {"name": name, **_plain(plain(method))}
    return method


def _adapter(values: dict[str, Any], method: Method | None, problems: list[str]) -> None:
    """Check the adapter and write all of its settings into the values; without any it is the method's own."""
    given = dict(values.get("adapter", {}))
    own = method.adapter() if method is not None else _usual_adapter(values)
    if own is None and "kind" not in given:
        return  # there is no such method, which is said already: what its adapter would be nobody knows
    kind = given.pop("kind", own.kind if own is not None else "lora")
    if not isinstance(kind, str) or kind not in ADAPTERS:
        problems.append(f"adapter.kind: {kind!r} is not available; what exists: {', '.join(ADAPTERS)}.")
        return
    found = len(problems)
    cls: type[Any] = ADAPTERS[kind]
    types = _types(cls)
    settings = dataclasses.asdict(own) if own is not None and own.kind == kind else {}
    for key, value in given.items():
        if key not in types:
            problems.append(f"adapter.{key}: unknown key for the kind {kind}{nearest(str(key), types)}")
            continue
        try:
            settings[key] = types[key].validate_python(value)
        except ValidationError as error:
            problems.append(value_sentence(f"adapter.{key}", error))
    problems += _out_of_range(settings)
    if len(problems) > found:
        return
    spec = cls(**settings)
    refusal = method.accepts(spec) if method is not None else None
    if refusal:
        problems.append(f"adapter: {refusal}")
    values["adapter"] = {"kind": kind, **_plain(dataclasses.asdict(spec))}


def _usual_adapter(values: Mapping[str, Any]) -> AdapterSpec | None:
    """The adapter that a method trains by default, for where its fields are wrong; None: there is no such method."""
    from fedpeft import methods

    section = values.get("method")
    name = section.get("name", "fedavg") if isinstance(section, Mapping) else None
    try:
        return methods.build(name, {}).adapter() if isinstance(name, str) else None
    except (ConfigError, RequestError):
        return None


def _types(spec: type[Any]) -> dict[str, TypeAdapter[Any]]:
    hints = typing.get_type_hints(spec)
    return {f.name: TypeAdapter(hints[f.name]) for f in dataclasses.fields(spec) if f.init}


def _out_of_range(settings: Mapping[str, Any]) -> list[str]:
    rank, alpha, dropout = (settings.get(key, 0.5) for key in ("rank", "alpha", "dropout"))
    problems = []
    if "rank" in settings and rank < 1:
        problems.append(f"adapter.rank: {rank} cannot be used; give at least 1.")
    if not (alpha > 0 and math.isfinite(alpha)):
        problems.append(f"adapter.alpha: {alpha} cannot be used; give a number above 0.")
    if not 0 <= dropout < 1:
        problems.append(f"adapter.dropout: {dropout} cannot be used; give a number from 0 to below 1.")
    if settings.get("targets") == ():
        problems.append("adapter.targets: an empty list trains nothing; name projections, such as [query, value].")
    return problems


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples as lists, so that a configuration read back from YAML is equal."""
    return {k: _listed(v) for k, v in values.items()}


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value


def _settle_clients(parts: dict[str, Any]) -> None:
    """Fill in the keys whose default depends on other keys: the task's name and the number of clients."""
    task, partition = parts.get("task"), parts.get("partition")
    if task is None:
        return
    if task.name is None:
        parts["task"] = task = task.model_copy(update={"name": _title(task.train)})
    if partition is not None and partition.clients is None:
        demo = task.train is None and task.name == "demo"
        parts["partition"] = partition.model_copy(update={"clients": s.DEMO_CLIENTS if demo else s.CLIENTS})


def _title(train: str | None) -> str:
    if train is None:
        return "demo"
    path = Path(train)
    stem = path.name.split(".")[0]
    return path.parent.name if stem == "train" and path.parent.name else stem


def _scores(task: s.TaskSection, run: s.RunSection | None) -> list[str]:
    """What is wrong with the metric of a format, and with a score that it cannot have."""
    known = metric_names("text" if task.format == "generate" else "labels")
    if task.metric is not None and task.metric not in known:
        return [f"task.metric: {task.metric} is not for format {task.format}; use one of {', '.join(known)}."]
    metric = task.metric or known[0]
    score = None if run is None else run.stop.score
    if score is None or score <= 1 or lower(metric):
        return []
    return [f"run.stop.score: {score:g} cannot be reached, since {metric} is a share; give a number up to 1."]


def _proxied(task: s.TaskSection, proxy: s.ProxySection | None) -> list[str]:
    """What a large model needs that is not there."""
    if proxy is None or (proxy.large is None and proxy.public is None):
        return []
    found = []
    if task.format != "generate":
        key = "proxy.public" if proxy.large is None else "proxy.large"
        found.append(f"{key}: a large model says texts, and task.format is {task.format}; use task.format generate.")
    if proxy.large is None:
        found.append("proxy.public: what is distilled is a large model, and proxy.large is null; name one.")
    if proxy.alpha == "auto" and task.train is not None and task.validation is None:
        found.append(
            "proxy.alpha: auto is chosen on texts that the server has, and task.validation is null (clients cannot ask "
            "the large model); give a file, or a number here (--alpha where the run is used)."
        )
    return found


def _conflicts(parts: Mapping[str, Any]) -> list[str]:
    """What is wrong between keys that are each right; sections that are wrong themselves are left out."""
    task, partition, run = parts.get("task"), parts.get("partition"), parts.get("run")
    problems = []
    fields = parts["method"].fields if "method" in parts else {}
    cohort, model = fields.get("cohort"), parts.get("model")
    if isinstance(cohort, int) and partition is not None and partition.kind not in ("natural", "file"):
        clients = partition.clients  # those of the other kinds are known from the data
        if clients is not None and cohort > clients:
            own, of = not_given(parts["method"], "cohort"), not_given(partition, "clients")
            problems.append(
                f"method.cohort: {cohort}{own} is above partition.clients = {clients}{of}; "
                "lower it, or use 0 for all clients."
            )
    if "bits" in fields and model is not None and model.quantize != "none":
        problems.append(
            f"model.quantize: {model.quantize} packs one base for everybody, and method.bits plans each machine's own; "
            "use none, and formats in run.devices for what a machine may keep."
        )
    if task is not None:
        said = template_problems(task.format, task.template, task.label_words, task.loss_over)
        problems += [f"{problem}." for problem in said]
        adapter = parts.get("adapter")
        if task.format != "head" and adapter is not None and adapter.kind == "head":
            problems.append(f"adapter.kind: head trains the head, and format {task.format} has none; use lora.")
        problems += _scores(task, run)
        problems += _proxied(task, parts.get("proxy"))
    if task is not None and partition is not None:
        if partition.kind == "natural" and partition.by is None and (task.train is not None or task.name != "demo"):
            problems.append("partition.by: kind natural needs it; name the column that tells the client.")
        if partition.kind == "file" and task.train is None:
            problems.append("task.train: partition.kind file needs it; give a folder with one file per client.")
    if run is not None and run.stop.patience is not None and run.stop.patience * run.evaluate_every > run.rounds:
        every, rounds = not_given(run, "evaluate_every"), not_given(run, "rounds")
        problems.append(
            f"run.stop.patience: {count_text(run.stop.patience, 'evaluation')}, one every "
            f"{count_text(run.evaluate_every, 'round')}{every}, do not fit into run.rounds = {run.rounds}{rounds}; "
            "lower run.evaluate_every or the patience."
        )
    return problems
