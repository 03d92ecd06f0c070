"""A task: texts or text pairs with a label each, split into train, validation and test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.errors import DataError
from fedpeft.core.metrics import names as metric_names
from fedpeft.core.rng import rng_for
from fedpeft.data.labels import label_indices, label_keys, sorted_values
from fedpeft.data.load import Source, client_files
from fedpeft.data.sources import folder_of, from_files, read_sources
from fedpeft.data.templates import FORMATS, PAIR, Template, known, parse, template_problems
from fedpeft.data.tokens import tokenise

METRICS = metric_names("labels")
SPLITS = ("train", "validation", "test")

_USUAL_METRIC = {"cola": "matthews", "mrpc": "acc_f1"}  # by name of the task or of its folder, as GLUE scores them


@dataclass(frozen=True)
class TaskSpec:
    """Which data, which columns, which labels: the `task:` section of a configuration."""

    name: str | None = None  # demo, or a hub data set: owner/name or owner/name:configuration; beside files a mere name
    train: str | None = None  # training file; a folder or glob pattern: one file per client; null: the data named above
    validation: str | None = None  # selection file (hub: split); null: a tenth of each client's rows, or the demo's own
    test: str | None = None  # test file (hub: split); null: no test; demo and hub: their own
    format: str = "head"  # how labels are predicted: head, cloze or verbalizer; or generate, which predicts texts
    template: str | None = None  # of all but head; null: the known one of the data set, else a general one
    label_words: Sequence[str] | None = None  # in the order of the labels that are kept; null: known ones, else names
    loss_over: str = "vocabulary"  # of cloze: vocabulary or labels, what the label word is told from in training
    text: str = "text"  # column of the text; where there is no column `text`: sentence1 with sentence2
    text_pair: str | None = None  # column of the second text of a pair; null: single texts
    label: str = "label"  # column of the label: a name or an index
    labels: Sequence[str] | None = None  # names in order; null: from meta.json beside the file, else the sorted values
    max_length: int = 128  # tokens per row, special tokens included; longer texts are cut
    metric: str | None = None  # accuracy, macro_f1, matthews or acc_f1; null: as meta.json or the task's name says
    limit: int | None = None  # at most so many training rows: a random sample (the same every time) in file order
    classes: Sequence[str] | int | None = None  # keep only these labels, or the first n; the other rows are dropped
    response: str = "response"  # of generate: column of what is to be said; without it the text itself is learnt
    references: str = "references"  # of generate: column with lists of further right answers, for ROUGE-L alone
    choices: str = "choices"  # of generate: column with lists of answers of which the response is one
    end: str | None = None  # of generate: the token that ends an answer; null: the tokenizer's or the model's
    match: str = "text"  # of generate: what an exact match compares: the text, or the last number in it
    generate_rows: int = 64  # of generate: test rows that texts are generated for, at the end
    generate_tokens: int = 64  # of generate: most tokens of a generated text

    def problems(self) -> list[str]:
        """What is wrong with the values themselves, one sentence each; files are not looked at."""
        found = []
        if self.train is None and not self.name:
            found.append("task.train and task.name are both null; set task.train to a file or task.name to demo")
        found += template_problems(self.format, self.template, self.label_words, self.loss_over)
        metrics = metric_names("text" if self.format == "generate" else "labels")
        if self.metric is not None and self.metric not in metrics:
            found.append(f"task.metric {self.metric!r} does not exist; there are: {', '.join(metrics)}")
        if self.max_length < 3:
            found.append(f"task.max_length is {self.max_length}; at least 3 tokens are needed")
        if self.limit is not None and self.limit < 1:
            found.append(f"task.limit is {self.limit}; use at least 1, or null for all rows")
        for key, names in (("labels", self.labels), ("classes", self.classes)):
            count = names if isinstance(names, int) else 2 if names is None else len({str(n) for n in names})
            if count < 2 or (isinstance(names, Sequence) and count < len(names)):
                found.append(f"task.{key} is {names!r}; it needs at least two different labels")
        return found


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of one split, column by column.

    Args:
        texts: one text per row.
        pairs: the second text per row, None for single texts.
        labels: (rows,) index into `Task.labels`, int64.
        columns: all other columns as they were read, None where a row lacks one; the raw label is one of them.
        files: the client id of the file that a row is from, None where the split is not a file per client.
        responses: what each row's answer is, None where rows have no answers. Then `texts` are instructions and `pairs`
            their contexts.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: NDArray[np.int64]
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    files: tuple[str, ...] | None = None
    responses: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | NDArray[np.integer]) -> Table:
        """The given rows in the given order."""
        index = [int(i) for i in rows]

        def pick(values: tuple[Any, ...] | None) -> Any:
            return None if values is None else tuple(values[i] for i in index)

        columns = {name: pick(values) for name, values in self.columns.items()}
        texts, pairs, files, responses = map(pick, (self.texts, self.pairs, self.files, self.responses))
        return Table(texts, pairs, self.labels[index], columns, files, responses)


@dataclass(frozen=True, eq=False)
class Task:
    """A task that is ready to be partitioned and tokenised.

    Args:
        name: what tables and run folders call it.
        labels: label names; a row's label is an index into them.
        metric: one of `core/metrics.py`.
        train, validation, test: the splits; None where there is none (validation: it is carved from train).
        sha256: over label names, texts and labels of all splits, in hex.
        files: ids of all clients where train is one file per client, else empty.
        text, text_pair: the columns that the texts are from.
        template: as it was written; None in the format head, and in generate where it is the usual one.
        words: the word of each label; None in the format head.
        named: whether the words are the labels' own names for want of others.
        response: the column that answers are from; None: rows have none.
    """

    name: str
    labels: tuple[str, ...]
    metric: str
    train: Table
    validation: Table | None
    test: Table | None
    sha256: str
    files: tuple[str, ...] = ()
    text: str = "text"
    text_pair: str | None = None
    template: str | None = None
    words: tuple[str, ...] | None = None
    named: bool = False
    response: str | None = None

    @property
    def pattern(self) -> Template | None:
        """The template in pieces."""
        return None if self.template is None else parse(self.template)

    def split(self, name: str) -> Table | None:
        """The table of `train`, `validation` or `test`."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


def load_task(spec: TaskSpec) -> Task:
    """Read, check and label all splits of a task.

    Raises:
        DataError: a value of the spec, a file, a column or a label is not usable; the message names it.
    """
    if problems := spec.problems():
        raise DataError("; ".join(problems))
    if spec.format == "generate":
        from fedpeft.data.instructions import load_instructions

        return load_instructions(spec)
    sources, known = read_sources(spec)
    train = sources["train"]
    meta = _read_meta(spec)
    text, pair = _text_columns(spec, train)
    for source in sources.values():
        for key, column in (("task.text", text), ("task.text_pair", pair), ("task.label", spec.label)):
            if column is not None and column not in source.columns:
                hint = ". Rows with a response are for task.format generate" if spec.response in source.columns else ""
                has = f"it has: {', '.join(source.columns)}{hint}"
                raise DataError(f"{source.where} has no column {column!r} ({key}); {has}")
    keys = {split: label_keys(source, spec.label) for split, source in sources.items()}
    declared = spec.labels or meta.get("labels") or known.get(spec.label)
    names = tuple(str(n) for n in declared) if declared else sorted_values(keys["train"])
    if len(names) < 2:
        raise DataError(f"{train.where} has a single label, {names[0]!r}; classification needs at least two")
    by_name = set(keys["train"]) <= set(names)
    tables = {}
    for split, source in sources.items():
        labels = label_indices(keys[split], names, by_name, source)
        tables[split] = _make_table(source, labels, text, pair)
    tables, kept = _keep_classes(tables, names, spec.classes, sources)
    tables["train"] = limited(tables["train"], spec.limit)
    metric = spec.metric or _usual_metric(spec, meta)
    if metric == "acc_f1" and len(kept) != 2:
        raise DataError(f"task.metric acc_f1 is for two labels, the task has {len(kept)}; use accuracy or macro_f1")
    name = title(spec)
    splits = [tables.get(split) for split in SPLITS]
    files = tuple(client_files(spec.train) or ()) if spec.train else ()
    sha256, prompt = splits_sha256(kept, splits), _prompt(spec, kept, pair is not None)
    return Task(name, kept, metric, tables["train"], splits[1], splits[2], sha256, files, text, pair, *prompt)


# --- sources ----------------------------------------------------------------------------------------------------


def title(spec: TaskSpec) -> str:
    """What tables and run folders call the task."""
    return spec.name or folder_of(spec).name or "task"


def limited(table: Table, limit: int | None) -> Table:
    """At most so many rows: a random sample, the same every time, in the rows' order."""
    if limit is None or limit >= len(table):
        return table
    return table.take(np.sort(rng_for(0, "limit").choice(len(table), size=limit, replace=False)))


def _read_meta(spec: TaskSpec) -> dict[str, Any]:
    path = folder_of(spec) / "meta.json"
    if spec.train is None or not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); mend or remove it") from error
    labels = meta.get("labels", []) if isinstance(meta, dict) else None
    if not isinstance(labels, list) or not all(isinstance(n, str) for n in labels) or len({*labels}) < len(labels):
        raise DataError(f"{path} does not hold an object whose 'labels' are different names; mend or remove it")
    if meta.get("metric", METRICS[0]) not in METRICS:
        raise DataError(f"{path} names the metric {meta['metric']!r}; there are: {', '.join(METRICS)}")
    return dict(meta)


def _usual_metric(spec: TaskSpec, meta: Mapping[str, Any]) -> str:
    if "metric" in meta:
        return str(meta["metric"])
    return next((_USUAL_METRIC[n] for n in _titles(spec) if n in _USUAL_METRIC), METRICS[0])


def _titles(spec: TaskSpec) -> tuple[str, str]:
    """What a data set may be known by: the name of its folder, and the last part of its own."""
    return folder_of(spec).name.lower(), (spec.name or "").lower().replace(":", "/").rpartition("/")[2]


def _prompt(spec: TaskSpec, labels: tuple[str, ...], pairs: bool) -> tuple[str | None, tuple[str, ...] | None, bool]:
    """The template, the label words, and whether these are the labels' own names."""
    if spec.format == "head":
        return None, None, False
    template, words = known(spec.format, _titles(spec), labels, pairs)
    template = template if spec.template is None else spec.template
    if pairs != (PAIR in parse(template).pieces):
        wrong = "has no {b}, and rows have two texts" if pairs else "has {b}, and rows have one text"
        raise DataError(f"task.template {template!r} {wrong}; change the template, or task.text and task.text_pair")
    if spec.label_words is None:
        return template, words or labels, words is None
    given = tuple(str(word).strip() for word in spec.label_words)
    if len(given) != len(labels):
        raise DataError(f"task.label_words has {len(given)} words; give one for each of {', '.join(labels)}")
    return template, given, False


# --- columns and labels -----------------------------------------------------------------------------------------


def _text_columns(spec: TaskSpec, train: Source) -> tuple[str, str | None]:
    columns = train.columns
    if spec.text == "text" and "text" not in columns and spec.text_pair is None and "sentence1" in columns:
        return "sentence1", "sentence2" if "sentence2" in columns else None
    return spec.text, spec.text_pair


def read_column(source: Source, column: str) -> tuple[str, ...]:
    """A column of texts. Raises DataError at a row that has none."""
    texts = []
    for i, row in enumerate(source.rows):
        text = row.get(column)
        if not isinstance(text, str):
            raise DataError(f"{source.row(i)}: column {column!r} is {text!r} and not a text; mend or drop the row")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise DataError(f"{source.row(i)}: column {column!r} holds half of a surrogate pair; mend or drop the row")
        texts.append(text)
    return tuple(texts)


def _make_table(source: Source, labels: NDArray[np.int64], text: str, pair: str | None) -> Table:
    others = [name for name in source.columns if name not in (text, pair)]
    columns = {name: tuple(row.get(name) for row in source.rows) for name in others}
    pairs = None if pair is None else read_column(source, pair)
    return Table(read_column(source, text), pairs, labels, columns, source.files())


def _keep_classes(
    tables: Mapping[str, Table],
    names: tuple[str, ...],
    classes: Sequence[str] | int | None,
    sources: Mapping[str, Source],
) -> tuple[dict[str, Table], tuple[str, ...]]:
    """The rows whose label is kept, labels numbered anew in the same order, and the kept names."""
    if classes is None:
        return dict(tables), names
    if isinstance(classes, int):
        wanted = set(names[:classes])
        missing = [] if classes <= len(names) else [f"{classes} labels"]
    else:
        wanted = {str(c) for c in classes}
        missing = sorted(wanted - set(names))
    if missing:
        raise DataError(f"task.classes asks for {', '.join(missing)}; the task has {len(names)}: {', '.join(names)}")
    kept = [i for i, name in enumerate(names) if name in wanted]
    number = np.full(len(names), -1, dtype=np.int64)
    number[kept] = np.arange(len(kept))
    result = {}
    for split, table in tables.items():
        rows = np.flatnonzero(number[table.labels] >= 0)
        if not rows.size:
            raise DataError(f"{sources[split].where} has no row of task.classes {classes!r}; choose other labels")
        result[split] = replace(table.take(rows), labels=number[table.labels[rows]])
    return result, tuple(names[i] for i in kept)


def splits_sha256(labels: Sequence[str], splits: Sequence[Table | None]) -> str:
    def parts() -> Iterator[bytes]:
        yield json.dumps(list(labels)).encode()
        for table in splits:
            if table is None:
                yield b"none"
                continue
            yield json.dumps([len(table), table.pairs is not None]).encode()
            yield table.labels.astype("<i8").tobytes()
            for text in (*table.texts, *(table.pairs or ()), *(table.responses or ())):
                yield text.encode()

    digest = hashlib.sha256()
    for part in parts():
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


__all__ = ["FORMATS", "METRICS", "SPLITS", "Table", "Task", "TaskSpec", "load_task", "tokenise"]


def read_texts(task: Task, source: str | Path) -> Table:
    """The texts of a file in the task's columns, for predictions: it needs no label, and all labels are 0.

    Raises:
        DataError: the file or a column is not there.
    """
    found = from_files(str(source))
    if task.response is not None:
        from fedpeft.data.instructions import read_prompts

        return read_prompts(task, found)
    for column in (task.text, task.text_pair):
        if column is not None and column not in found.columns:
            raise DataError(
                f"{found.where} has no column {column!r}, which the task's texts are in; it has: "
                f"{', '.join(found.columns)}"
            )
    return _make_table(found, np.zeros(len(found.rows), dtype=np.int64), task.text, task.text_pair)
