"""The methods, one file per published algorithm. A method is found by the name of its module.

A module here ends with `METHOD = TheClass`; that is all it takes to exist. `"my_module:MyMethod"` names a class
outside the package.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import io
import pkgutil
import textwrap
import tokenize
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, cast

from fedpeft.core.errors import ConfigError, RequestError
from fedpeft.core.exchange import Method
from fedpeft.core.ranks import Ranked
from fedpeft.methods._schedule import with_schedule

CURRICULUM = ("schedule", "schedule_beta", "schedule_alpha", "schedule_pacing")  # fields that any method may get


class Field(NamedTuple):
    """One field of a method (or of any dataclass): what a user may set."""

    name: str
    type: str
    default: Any  # `dataclasses.MISSING` where the field must be given
    meaning: str


def names() -> list[str]:
    """The names of all methods in the package, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: a module of this package (`"fedavg"`), or `"module:Class"` for a class outside of it.

    Raises:
        RequestError: there is no such method; the message names the nearest.
    """
    if ":" in name:
        return _outside(name)
    if name not in names():
        raise RequestError(f"there is no method {name!r}; {_nearest(name, names())}")
    method: type[Method] = importlib.import_module(f"{__name__}.{name}").METHOD
    return method


def build(name: str, values: Mapping[str, Any]) -> Method:
    """A method with the given hyper-parameters; fields that are not given keep their defaults.

    Args:
        name: as in `load`.
        values: plain data by field name; with `schedule`, the curriculum that is put around any method. Whole numbers
            pass as floats, lists as tuples, and a text as the float that it spells (YAML reads `1e-3` as a text).

    Raises:
        RequestError: there is no such method.
        ConfigError: unknown fields, wrong types, values out of range: all at once.
    """
    cls = load(name)
    own = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    values = dict(values)
    if values.get("schedule") is not None:
        cls = with_schedule(cls)
    else:
        values.pop("schedule", None)  # none: the method as it is
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    problems: list[str] = []
    good: dict[str, Any] = {}
    for key, value in values.items():
        if key in CURRICULUM and key not in fields:
            problems.append(f"method.{key} is of a curriculum, and method.schedule is null; give method.schedule, too")
            continue
        if key not in fields:
            more = _nearest(str(key), own, further=CURRICULUM)
            problems.append(f"method.{key} is not a field of {name}; {more}")
            continue
        try:
            good[key] = _fitted(hints[key], value)
        except TypeError:
            problems.append(f"method.{key} is {value!r}; it must be {_words(hints[key])}")
    try:
        method = cls(**good)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return method


@cache
def describe(cls: type[Any]) -> tuple[Field, ...]:
    """Every field of a dataclass in order; its meaning is the comment behind it in the source, written once there."""
    hints = typing.get_type_hints(cls)
    meanings: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        meanings.update(_comments(owner))
    return tuple(
        Field(f.name, _words(hints[f.name]), _default(f), meanings.get(f.name, ""))
        for f in dataclasses.fields(cls)
        if f.init
    )


def describe_curriculum(name: str) -> tuple[Field, ...]:
    """The fields of `method.schedule` for a method; none where the method refuses every curriculum."""
    try:
        kept = build(name, {"schedule": "random"})
    except (ConfigError, TypeError):  # the latter of a method from outside with fields that must be given
        return ()
    found = {field.name: field for field in describe(type(kept)) if field.name in CURRICULUM}
    kind = found["schedule"]
    return (kind._replace(type=f"null | {kind.type}", default=None), *(found[key] for key in CURRICULUM[1:]))


def traits(name: str) -> tuple[str, ...]:
    """What tells a method from others: its adapter, and what it has that most have not.

    Empty for a class from outside that cannot be made without fields.
    """
    try:
        method: Any = build(name, {})
    except (ConfigError, TypeError):
        return ()
    has = {
        "personal models": method.personalised,
        "own curriculum": method.plans_by_rounds and method.accepts_schedule("length") is not None,
        "unequal ranks": isinstance(method, Ranked),
        "set-up": bool(method.setup()),
    }
    return (method.adapter().kind, *(what for what, holds in has.items() if holds))


def _outside(name: str) -> type[Method]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise RequestError(
            f"method {name!r}: there is no module {error.name!r}; install it or put its folder on PYTHONPATH"
        ) from None
    except ValueError:
        raise RequestError(f"method {name!r} names no module; write it as 'module:Class'") from None
    known = {n: v for n, v in vars(module).items() if inspect.isclass(v) and dataclasses.is_dataclass(v)}
    if attribute not in known:
        own = [n for n, v in known.items() if v.__module__ == module_name]
        raise RequestError(f"{module_name!r} has no method class {attribute!r}; {_nearest(attribute, own)}")
    return cast(type[Method], known[attribute])


def _nearest(name: str, known: Sequence[str], further: Sequence[str] = ()) -> str:
    """What was meant, if it is near or begins with the name; else what there is.

    Args:
        further: what may be meant too, and is not listed.
    """
    every = [*known, *further]
    begun = [one for one in every if len(name) > 2 and one.startswith(name)]
    if close := difflib.get_close_matches(name, every, n=1) or begun:
        return f"did you mean {close[0]!r}?"
    return f"there are: {', '.join(known)}" if known else "there is nothing to choose from"


def _fitted(hint: Any, value: Any) -> Any:
    """The value as the annotation wants it. Raises TypeError where it is something else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in sorted(args, key=lambda option: option is not type(value)):
            try:
                return _fitted(option, value)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in args):
            return value
        raise TypeError
    if origin is tuple and isinstance(value, list | tuple):
        endless = len(args) == 2 and args[1] is Ellipsis
        if not endless and len(args) != len(value):
            raise TypeError
        return tuple(_fitted(args[0] if endless else args[i], v) for i, v in enumerate(value))
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise TypeError from None
    if hint in (int, bool, str, type(None)) and type(value) is hint:
        return value
    raise TypeError


def _words(hint: Any) -> str:
    """An annotation as a reader would say it: `int | None` is "a whole number or null"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(a) for a in args)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin is tuple:
        endless = len(args) == 2 and args[1] is Ellipsis
        return f"a list of {_several(args[0])}" if endless else f"a list of ({', '.join(_words(a) for a in args)})"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return plain.get(hint, str(hint))


def _several(hint: Any) -> str:
    """Several values of an annotation as a reader would say it: `int` is "whole numbers"."""
    if typing.get_origin(hint) is tuple:
        return f"lists{_words(hint).removeprefix('a list')}"
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(hint) or _words(hint)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _comments(cls: type[Any]) -> dict[str, str]:
    """The comment that ends each annotated line of a class body, by the name that the line annotates."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    lines = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
    return {
        node.target.id: lines[node.end_lineno]
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno in lines
    }


__all__ = ["CURRICULUM", "Field", "build", "describe", "describe_curriculum", "load", "names"]
