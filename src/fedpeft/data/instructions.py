"""Rows of instruction, context and response, or of plain text: tables of the format `generate`.

A row's label is its category where the data have one (the column `task.label`, else `category`): nothing learns it, but
partitions can be skewed by it, and the report shows who has what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.core.errors import DataError
from fedpeft.core.metrics import check_metric
from fedpeft.data.load import Source, client_files
from fedpeft.data.sources import read_sources

if TYPE_CHECKING:
    from fedpeft.data.tasks import Table, Task, TaskSpec

INSTRUCTION, CONTEXT, CATEGORY = "instruction", "context", "category"
NO_CATEGORY = "none"  # of a row that tells none


def load_instructions(spec: TaskSpec) -> Task:
    """All splits of a task of the format `generate`.

    Raises:
        DataError: a file, a column or a row is not usable; the message names it.
    """
    from fedpeft.data.tasks import SPLITS, Task, limited, splits_sha256, title

    for key in ("labels", "classes"):
        if getattr(spec, key) is not None:
            raise DataError(f"task.{key} is for labels, and task.format generate predicts texts; leave it out")
    sources, _ = read_sources(spec)
    text, context, response = _columns(spec, sources["train"])
    for source in sources.values():
        for key, column in (("task.text", text), ("task.text_pair", context), ("task.response", response)):
            if column is not None and column not in source.columns:
                raise DataError(f"{source.where} has no column {column!r} ({key}); it has: {', '.join(source.columns)}")
    names, keys = _categories(spec, sources)
    number = {name: i for i, name in enumerate(names)}
    tables: dict[str, Table] = {}
    for split, source in sources.items():
        labels = np.fromiter((number[key] for key in keys[split]), np.int64, count=len(source.rows))
        tables[split] = _table(source, labels, text, context, response)
        for i, options in enumerate(choices_of(tables[split], spec.choices)):
            if options and options.count(_response(tables[split], i)) != 1:
                raise DataError(f"{source.row(i)}: its response is not one of its {spec.choices}, or is there twice")
    metric = spec.metric or "perplexity"
    check_metric(metric, of="text")
    if metric == "choice_accuracy" and not any(spec.choices in source.columns for source in sources.values()):
        raise DataError(f"task.metric choice_accuracy needs a column {spec.choices!r} (task.choices); use perplexity")
    tables["train"] = limited(tables["train"], spec.limit)
    splits = [tables.get(split) for split in SPLITS]
    files = tuple(client_files(spec.train) or ()) if spec.train else ()
    return Task(
        title(spec), names, metric, tables["train"], splits[1], splits[2], splits_sha256(names, splits), files, text,
        context, spec.template, response=response,
    )  # fmt: skip


def read_prompts(task: Task, source: Source) -> Table:
    """Rows for which something is to be said: a response is not needed, and neither is a context.

    Raises:
        DataError: the column of the instructions is not there.
    """
    if task.text not in source.columns:
        optional = f", and a column {task.text_pair!r} is optional" if task.text_pair else ""
        raise DataError(
            f"{source.where} has no column {task.text!r} (task.text), which the instructions are in{optional}; "
            f"it has: {', '.join(source.columns)}"
        )
    context = task.text_pair if task.text_pair in source.columns else None
    table = _table(source, np.zeros(len(source.rows), dtype=np.int64), task.text, context, None)
    return replace(table, responses=("",) * len(table))


def read_public(task: Task, source: Source) -> Table:
    """Rows that the server may show a large model: as `read_prompts`, with the responses that there are.

    Returns:
        a table whose responses are empty texts where a row has none; of plain texts one without responses.

    Raises:
        DataError: the column of the texts is not there, or a text is none.
    """
    from fedpeft.data.tasks import read_column

    if task.response is None:
        if task.text not in source.columns:
            raise DataError(
                f"{source.where} has no column {task.text!r} (task.text); it has: {', '.join(source.columns)}"
            )
        return _table(source, np.zeros(len(source.rows), dtype=np.int64), task.text, None, None)
    table = read_prompts(task, source)
    if task.response not in source.columns:
        return table
    rows = [{task.response: "" if row.get(task.response) is None else row[task.response]} for row in source.rows]
    return replace(table, responses=read_column(Source(source.where, rows, source.parts), task.response))


def choices_of(table: Table, column: str) -> list[list[str]]:
    """The answers that each row offers; empty where it offers none."""
    return [listed(value) for value in table.columns.get(column, (None,) * len(table))]


def references_of(table: Table, column: str) -> list[list[str]]:
    """All right answers of each row, its response first."""
    others = [listed(value) for value in table.columns.get(column, (None,) * len(table))]
    return [list(dict.fromkeys([_response(table, i), *own])) for i, own in enumerate(others)]


def listed(value: Any) -> list[str]:
    """Texts from a list, or from a file format that has none: JSON in a text, else the text alone."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if isinstance(value, list | tuple):
        return [str(one) for one in value]
    return [value] if isinstance(value, str) and value.strip() else []


def _response(table: Table, row: int) -> str:
    assert table.responses is not None, "rows of instructions have responses"
    return table.responses[row]


def _columns(spec: TaskSpec, train: Source) -> tuple[str, str | None, str | None]:
    """The columns of instruction, context and response; of plain text the first alone."""
    columns, text = train.columns, spec.text
    answered = spec.response in columns
    if text == "text" and INSTRUCTION in columns and (answered or "text" not in columns):
        text = INSTRUCTION
    if text == INSTRUCTION or (text != "text" and answered) or spec.response != "response":
        context = spec.text_pair or (CONTEXT if CONTEXT in columns and text != CONTEXT else None)
        return text, context, spec.response
    if answered:
        return text, spec.text_pair or (CONTEXT if CONTEXT in columns else None), spec.response
    if spec.text_pair is not None:
        raise DataError(f"task.text_pair is a context, and {train.where} has no column {spec.response!r} to go with it")
    if spec.template is not None:
        raise DataError(f"task.template is for rows with a response, and {train.where} has no column {spec.response!r}")
    return text, None, None


def _table(source: Source, labels: Any, text: str, context: str | None, response: str | None) -> Table:
    from fedpeft.data.tasks import Table, read_column

    others = [name for name in source.columns if name not in (text, context, response)]
    columns = {name: tuple(row.get(name) for row in source.rows) for name in others}
    contexts = None
    if context is not None:  # a row may have none
        filled = [{context: ""} if row.get(context) is None else row for row in source.rows]
        contexts = read_column(Source(source.where, filled, source.parts), context)
    responses = None if response is None else read_column(source, response)
    return Table(read_column(source, text), contexts, labels, columns, source.files(), responses)


def _categories(spec: TaskSpec, sources: Mapping[str, Source]) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """The categories of all splits, sorted, and each row's; one for all rows where the data tell none."""
    columns = sources["train"].columns
    column = next((name for name in (spec.label, CATEGORY) if name in columns), None)
    keys = {split: [_category(row.get(str(column))) for row in source.rows] for split, source in sources.items()}
    names = sorted({key for own in keys.values() for key in own})
    return tuple(names), keys


def _category(value: Any) -> str:
    return NO_CATEGORY if value is None or not str(value).strip() else str(value).strip()
