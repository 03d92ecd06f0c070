"""YAML, `--set` and paths: from what people type to plain values."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedpeft.core.errors import ConfigError

_VARIABLE = re.compile(r"\$\{(\w+)\}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-3 is a number, `off` is a word; a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, once every key is known to be there once."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is a list or mapping", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_REPLACED = ("bool", "int", "float", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 16 if "x" in node.value else 10))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _number(node.value))


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text; raises ConfigError with the place where it cannot be read."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except (yaml.YAMLError, ValueError) as error:  # the latter: a tag that its value does not fit
        raise ConfigError([_unreadable(name, error)]) from error


_SYNTAX = (  # what the parser says, and what it means to people
    ("stands twice", "{}; remove one"),
    ("a key that is", "{}; give a word"),
    ("mapping values are not allowed", "there is a second `:`, or the line is indented wrongly; quote text with `: `"),
    ("could not find expected ':'", "a key without `:`; write `key: value`"),
    ("'\\t' that cannot start", "a tab; indent with spaces"),
    ("cannot start any token", "a character that begins no value; put the text in quotes"),
    ("unexpected end of stream", "a quote that is opened here is not closed; close it"),
    ("expected ',' or ']'", "a list that is opened here is not closed; close it, separate entries by commas"),
    ("expected ',' or '}'", "a mapping that is opened here is not closed; close it, separate entries by commas"),
    ("<block end>", "indented otherwise than the lines above that it belongs to; mend the indentation"),
    ("undefined alias", "`*` refers to something that is not there; put text that begins with `*` in quotes"),
    ("unknown escape", "`\\` begins an escape in double quotes; use single quotes"),
    ("another document", "a second document begins (`---`); keep one"),
    ("constructor for the tag", "`!` begins a tag, and tags are not read; remove it or put the text in quotes"),
)

_UNFIT = "this does not fit what stands before it; look at the indentation, the colons and the quotes there"


def _unreadable(name: str, error: yaml.YAMLError | ValueError) -> str:
    """One sentence: where a text stops being YAML, and how to mend it."""
    problem = getattr(error, "problem", None) or ""
    begun = getattr(error, "context_mark", None) if "is opened here" in _syntax(problem) else None
    mark = begun or getattr(error, "problem_mark", None)
    if mark is None and not isinstance(error, yaml.YAMLError):
        return f"{name}: not readable as YAML: a value does not fit its tag ({error}); remove the tag."
    if mark is None:
        return f"{name}: not readable as YAML: it has a character that is no text; save it as UTF-8 text."
    return f"{name}: not readable as YAML, line {mark.line + 1}, column {mark.column + 1}: {_syntax(problem)}."


def _syntax(problem: str) -> str:
    return next((words.format(problem) for sign, words in _SYNTAX if sign in problem), _UNFIT)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError where it is missing, unreadable or something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError([f"{path}: no such file; check the path."]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read ({error}); give a YAML text file."]) from error
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError([f"{path}: holds {type(value).__name__}; give a mapping of sections such as `run: ...`."])
    return value


def parse_overrides(items: Sequence[str]) -> dict[str, Any]:
    """The overrides of `--set a.b=c`, typed as in YAML; raises ConfigError naming each that is not `key=value`."""
    overrides: dict[str, Any] = {}
    problems: list[str] = []
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {item}: not of the form key=value; write for example --set run.rounds=10.")
            continue
        try:
            overrides[key.strip()] = parse_yaml(text, f"--set {item}")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return overrides


def apply_overrides(raw: dict[str, Any], overrides: Mapping[str, Any], problems: list[str]) -> None:
    """Put each dotted key's value into the nested mapping, in place."""
    for dotted, value in overrides.items():
        *path, last = dotted.split(".")
        at: Any = raw
        for part in path:
            if at.get(part) is None:
                at[part] = {}
            at = at[part]
            if not isinstance(at, dict):
                problems.append(f"{dotted}: {part!r} holds the single value {at!r}; set {part!r} itself instead.")
                break
        else:
            at[last] = value


def find_path(text: str, folder: Path) -> str:
    """The path with `${NAME}` and `~` expanded: beside the YAML file if it exists there, else from the current folder.

    Raises:
        KeyError: a variable that is not set; FEDPEFT_DATA has a default, `shared/data` beside the repository.
    """

    def variable(found: re.Match[str]) -> str:
        name = found.group(1)
        if name == "FEDPEFT_DATA":
            return os.environ.get(name) or str(_default_data(folder))
        return os.environ[name]

    path = Path(_VARIABLE.sub(variable, text)).expanduser()
    if path.is_absolute():
        return str(path)
    beside = folder / path
    return str((beside if beside.exists() else Path.cwd() / path).resolve())


def _default_data(folder: Path) -> Path:
    for root in _upwards(folder, Path.cwd()):
        if (root / "pyproject.toml").exists() or (root / ".git").exists():
            return root.parent / "shared" / "data"
    return folder / "shared" / "data"


def _upwards(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        start = folder.resolve()
        yield from (start, *start.parents)
