"""`fedpeft list`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from fedpeft.cli.options import Json
from fedpeft.core.errors import RequestError

MODELS = {
    "demo": "a small BERT-style encoder that comes with the package",
    "demo-small": "a causal model of 86 thousand parameters that comes with the package",
    "demo-large": "its larger sister, 743 thousand parameters, with the same tokenizer",
    "minilm": "MiniLM-L6, 22 million parameters",
    "PATH": "a folder in Hugging Face format with safetensors weights",
    "HUB_ID": "a model of the Hugging Face hub with safetensors weights",
}
TASKS = {
    "demo": "docstrings of Python's standard library, seven topics; comes with the package",
    "FILE": "task.train, task.validation and task.test: .jsonl[.gz], .csv[.gz] or .parquet",
    "HUB_ID": "a data set of the Hugging Face hub; needs the extra `data`",
}

SCHEDULES = {  # of method.schedule
    "fisher": "easy rows first, by the Fisher information of LoRA's factors",
    "loss": "easy rows first, by the loss of the model as it comes",
    "random": "more and more rows in an order of chance: what any curriculum has to beat",
    "rarity": "rows of common words first",
    "length": "texts cut short at first, longer in every round",
    "two_stage": "texts cut to a quarter in the first half of the rounds, whole ones then",
}
EASY_FIRST = ("fisher", "loss", "random")  # which have a pace
OWN_FIELDS = {"method": ("methods", "NAME"), "adapter": ("adapters", "KIND")}  # sections that hold more than their keys


class Things(StrEnum):
    """What can be listed."""

    methods = "methods"
    tasks = "tasks"
    models = "models"
    adapters = "adapters"
    schedules = "schedules"
    options = "options"


def list_things(
    what: Annotated[Things, typer.Argument(help="What to list; `options` are the keys of a configuration.")],
    name: Annotated[str | None, typer.Argument(help="Only this one, with its options.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """List what there is; with a NAME its options, their defaults and meanings."""
    from fedpeft.cli import render

    found = _found(what)
    if name is None:
        from fedpeft import methods

        render.print_names(found, json, {n: methods.traits(n) for n in found} if what is Things.methods else {})
        return
    if name not in found and not (what is Things.methods and ":" in name):
        raise RequestError(_no_such(what, name, found))
    title, options = _options(what, name)
    adapter = _adapter(name) if what is Things.methods else None
    render.print_options(name, found.get(name, title), options, json, adapter)
    if what is Things.options and name in OWN_FIELDS and not json:
        of, which = OWN_FIELDS[name]
        typer.echo(f"\nEach {name} has fields of its own besides: fedpeft list {of} {which}")


def _no_such(what: Things, name: str, found: Mapping[str, str]) -> str:
    """What to ask for instead of a name that is not there."""
    from fedpeft.config.problems import nearest

    section, _, key = name.partition(".")
    if what is Things.options and key and section in found:
        of, which = OWN_FIELDS.get(section, ("options", section))
        more = f", and those of its own with: fedpeft list {of} {which}" if section in OWN_FIELDS else ""
        return f"{name!r} is one key; list all keys of {section} with: fedpeft list options {section}{more}"
    for other in (Things.methods, Things.adapters, Things.options):
        if other is not what and name in _found(other):
            return f"{what.value} has no {name!r}; use: fedpeft list {other.value} {name}"
    return f"{what.value} has no {name!r}{nearest(name, found)}"


def _found(what: Things) -> Mapping[str, str]:
    """Names with one sentence each."""
    if what is Things.methods:
        from fedpeft import methods

        return {name: _first_line(methods.load(name)) for name in methods.names()}
    if what is Things.adapters:
        from fedpeft.core.adapter import ADAPTERS

        return {kind: _first_line(spec) for kind, spec in ADAPTERS.items()}
    if what is Things.options:
        from fedpeft.config.sections import SECTIONS

        return {name: _first_line(section) for name, section in SECTIONS.items()}
    return {Things.models: MODELS, Things.tasks: TASKS, Things.schedules: SCHEDULES}[what]


def _options(what: Things, name: str) -> tuple[str, list[dict[str, Any]]]:
    """One sentence about the thing, and its options: name, type, default, meaning."""
    from fedpeft import methods

    if what in (Things.methods, Things.adapters):
        from fedpeft.core.adapter import ADAPTERS

        cls: Any = methods.load(name) if what is Things.methods else ADAPTERS[name]
        fields = (*methods.describe(cls), *(methods.describe_curriculum(name) if what is Things.methods else ()))
        return _first_line(cls), [{**field._asdict(), "default": _shown(field.default)} for field in fields]
    if what is Things.schedules:
        paces = methods.describe_curriculum("fedavg")[1:] if name in EASY_FIRST else ()
        return SCHEDULES[name], [field._asdict() for field in paces]
    from fedpeft.config.sections import SECTIONS

    section = {Things.models: "model", Things.tasks: "task"}.get(what, name)
    around = methods.describe_curriculum("fedavg") if section == "method" else ()  # the same around every method
    return _first_line(SECTIONS[section]), [*_keys(SECTIONS[section]), *(field._asdict() for field in around)]


def _adapter(name: str) -> dict[str, Any] | None:
    """The adapter that a method trains unless another is named; None for a class that cannot be made without fields."""
    import dataclasses

    from fedpeft import methods
    from fedpeft.core.errors import FedpeftError

    try:
        spec = methods.build(name, {}).adapter()
    except (FedpeftError, TypeError):
        return None
    return {"kind": spec.kind, **dataclasses.asdict(spec)}


def _keys(section: Any, path: str = "") -> list[dict[str, Any]]:
    """The keys of a section of the configuration, those of sections inside it too."""
    from pydantic import BaseModel

    found: list[dict[str, Any]] = []
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += _keys(kind, f"{path}{key}.")
            continue
        meaning = " ".join((field.description or "").split())
        found.append({"name": path + key, "type": _type_words(kind), "default": field.default, "meaning": meaning})
    return found


def _shown(default: Any) -> Any:
    import dataclasses

    return "must be given" if default is dataclasses.MISSING else default


def _type_words(annotation: Any) -> str:
    import types
    import typing

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_words(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_words(a) for a in arguments)
    if origin is typing.Literal:
        return " | ".join(str(a) for a in arguments)
    if origin is tuple:
        return f"[{_type_words(arguments[0])}, ..]"
    return {type(None): "null", str: "text", int: "whole number", float: "number"}.get(annotation, str(annotation))


def _first_line(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]
