"""What is wrong with a configuration, one sentence each: key, value, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

_EXPECTED = {
    "int_parsing": "a whole number",
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
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "a number above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "a number below {lt:g}",
    "string_too_short": "text that is not empty",
}


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
    for item in error.errors(include_url=False, include_context=True):
        grouped.setdefault(_key(item, section, key), []).append(item)
    return [_sentence(name, items, section, key, later) for name, items in grouped.items()]


def value_sentence(key: str, error: ValidationError) -> str:
    """The sentence for one value that pydantic refused."""
    return _refused(key, error.errors(include_url=False))


def _key(item: Mapping[str, Any], section: type[BaseModel], key: str) -> str:
    at: Any = section
    for part in item["loc"]:
        fields = at.model_fields if isinstance(at, type) and issubclass(at, BaseModel) else None
        if fields is None:
            break
        key = f"{key}.{part}"
        at = fields[part].annotation if part in fields else None
    return key


def _sentence(
    name: str, items: Sequence[Mapping[str, Any]], section: type[BaseModel], key: str, later: Mapping[str, str]
) -> str:
    if items[0]["type"] == "extra_forbidden":
        at: Any = section
        for part in items[0]["loc"][:-1]:
            at = at.model_fields[part].annotation
        return unknown(name, at.model_fields, later)
    return _refused(name, items)


def _refused(name: str, items: Sequence[Mapping[str, Any]]) -> str:
    value = items[0]["input"]
    literals = [item["ctx"]["expected"] for item in items if item["type"] == "literal_error"]
    if len(literals) == len(items):
        return f"{name}: {value!r} is not available; what exists: {', '.join(dict.fromkeys(literals))}."
    wanted = []
    for item in items:
        if item["type"] == "literal_error":
            wanted.append(str(item["ctx"]["expected"]).replace(" or ", ", "))
        elif item["type"] in _EXPECTED:
            wanted.append(_EXPECTED[item["type"]].format(**item.get("ctx", {})))
        else:
            wanted.append(str(item["msg"]).removeprefix("Value error, "))
    return f"{name}: {value!r} cannot be used; give {', or '.join(dict.fromkeys(wanted))}."
