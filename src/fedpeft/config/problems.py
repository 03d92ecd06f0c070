"""What is wrong with a configuration, one sentence each: key, value, remedy."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from fedpeft.runs.units import count_text

_EXPECTED = {  # what is allowed where pydantic refuses a value, in our words
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "mapping_type": "a mapping of keys to values",
    "none_required": "null",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "a number above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "a number below {lt:g}",
    "string_too_short": "text that is not empty",
}
_SIZES = {"too_short": ("at least", "min_length"), "too_long": ("at most", "max_length")}  # of lists and mappings


def nearest(key: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or, where nothing is near, the list of what is known."""
    options = list(known)
    near = difflib.get_close_matches(key, options, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(options)}." if options else "; it takes none."


def unknown(key: str, known: Iterable[str], later: Mapping[str, str]) -> str:
    """The sentence for a key that does not exist: what it waits for where it is planned, else the nearest key."""
    if key in later:
        return f"{key}: not in this version: {later[key]}; remove it."
    return f"{key}: unknown key{nearest(key.rpartition('.')[2], known)}"


def sentences(error: ValidationError, section: type[BaseModel], key: str, later: Mapping[str, str]) -> list[str]:
    """One sentence for each key that pydantic complains about; the branches of a union are told together."""
    grouped: dict[str, list[Any]] = {}
    items = error.errors(include_url=False, include_context=True)
    for item in items:
        if item["type"] == "too_short" and any(item["loc"] == other["loc"][:-2] for other in items):
            continue  # entries that are wrong themselves are told already, and pydantic does not count them
        grouped.setdefault(_place(item, section, key)[0], []).append(item)
    return [_sentence(name, items, section, key, later) for name, items in grouped.items()]


def value_sentence(key: str, error: ValidationError) -> str:
    """The sentence for one value that pydantic refused."""
    return _refused(key, error.errors(include_url=False))


def _place(item: Mapping[str, Any], section: type[BaseModel], key: str) -> tuple[str, type[BaseModel]]:
    """What people call the place that pydantic complains about, and the section that the last key belongs to."""
    at: Any = section
    holder, behind = section, "."
    for part in item["loc"]:
        model, entry = _model(at), _entry(at)
        if model is not None:
            key, holder, behind = f"{key}{behind}{part}", model, "."
            at = model.model_fields[part].annotation if part in model.model_fields else None
        elif isinstance(part, int) and _model(entry) is not None:
            key, at, behind = f"{key}, entry {part + 1}", entry, ", "
        elif typing.get_origin(at) is dict:
            key, at = f"{key}.{part}", typing.get_args(at)[1]
        else:
            break
    return key, holder


def _model(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation means, None where it means something else."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return next((found for part in typing.get_args(annotation) if (found := _model(part)) is not None), None)
    return None


def _entry(annotation: Any) -> Any:
    """What the entries of a list are, None where the annotation means no list."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (tuple, list):
        return parts[0]
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return next((found for part in parts if (found := _entry(part)) is not None), None)
    return None


def _sentence(
    name: str, items: Sequence[Mapping[str, Any]], section: type[BaseModel], key: str, later: Mapping[str, str]
) -> str:
    kind = items[0]["type"]
    if kind not in ("extra_forbidden", "missing"):
        planned = later.get(f"{name}: {items[0]['input']}")
        return _refused(name, items) if planned is None else f"{name}: {items[0]['input']} {planned}."
    _, holder = _place(items[0], section, key)
    if kind == "extra_forbidden":
        return unknown(name, holder.model_fields, later)
    meaning = " ".join((holder.model_fields[items[0]["loc"][-1]].description or "its value").split())
    return f"{name}: is missing; give it: {meaning[0].lower()}{meaning[1:].rstrip('.')}."


def _refused(name: str, items: Sequence[Mapping[str, Any]]) -> str:
    value = items[0]["input"]
    literals = [item["ctx"]["expected"] for item in items if item["type"] == "literal_error"]
    if len(literals) == len(items):
        return f"{name}: {_shown(value)} is not available; what exists: {', '.join(dict.fromkeys(literals))}."
    wanted = dict.fromkeys(_wanted(item) for item in items)
    return f"{name}: {_shown(value)} cannot be used; give {', or '.join(wanted)}."


def _wanted(item: Mapping[str, Any]) -> str:
    """What is allowed instead."""
    kind, bounds = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return str(bounds["expected"]).replace(" or ", ", ")
    if kind in _SIZES:
        words, bound = _SIZES[kind]
        return f"{words} {count_text(bounds[bound], 'entry', 'entries')}"
    if kind in _EXPECTED:
        return _EXPECTED[kind].format(**bounds)
    return str(item["msg"]).removeprefix("Value error, ")  # raised by a check of ours, which says what is allowed


def _shown(value: Any) -> str:
    """The value as people wrote it, within reason."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
