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
from fedpeft.core.rng import rng_for
from fedpeft.data.labels import label_indices, label_keys, sorted_values
from fedpeft.data.load import Row, Source, client_files, hub_splits, read_hub, read_rows
from fedpeft.data.templates import FORMATS, PAIR, Template, known, parse, template_problems
from fedpeft.data.tokens import tokenise

METRICS = ("accuracy", "macro_f1", "matthews", "acc_f1")  # acc_f1: mean of accuracy and F1 of the second label
SPLITS = ("train", "validation", "test")

_USUAL_METRIC = {"cola": "matthews", "mrpc": "acc_f1"}  # by name of the task or of its folder, as GLUE scores them


@dataclass(frozen=True)
class TaskSpec:
    """Which data, which columns, which labels: the `task:` section of a configuration."""

    name: str | None = None  # demo, or a hub data set: owner/name or owner/name:configuration; beside files a mere name
    train: str | None = None  # training file; a folder or glob pattern: one file per client; null: the data named above
    validation: str | None = None  # selection file (hub: split); null: a tenth of each client's rows, or the demo's own
    test: str | None = None  # test file (hub: split); null: no test; demo and hub: their own
    format: str = "head"  # how labels are predicted: head, cloze or verbalizer
    template: str | None = None  # of cloze and verbalizer; null: the known one of the data set, else a general one
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

    def problems(self) -> list[str]:
        """What is wrong with the values themselves, one sentence each; files are not looked at."""
        found = []
        if self.train is None and not self.name:
            found.append("task.train and task.name are both null; set task.train to a file or task.name to demo")
        found += template_problems(self.format, self.template, self.label_words, self.loss_over)
        if self.metric is not None and self.metric not in METRICS:
            found.append(f"task.metric {self.metric!r} does not exist; there are: {', '.join(METRICS)}")
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
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: NDArray[np.int64]
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    files: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | NDArray[np.integer]) -> Table:
        """The given rows in the given order."""
        index = [int(i) for i in rows]

        def pick(values: tuple[Any, ...] | None) -> Any:
            return None if values is None else tuple(values[i] for i in index)

        columns = {name: pick(values) for name, values in self.columns.items()}
        return Table(pick(self.texts), pick(self.pairs), self.labels[index], columns, pick(self.files))


@dataclass(frozen=True, eq=False)
class Task:
    """A task that is ready to be partitioned and tokenised.

    Args:
        name: what tables and run folders call it.
        labels: label names; a row's label is an index into them.
        metric: one of `METRICS`.
        train, validation, test: the splits; None where there is none (validation: it is carved from train).
        sha256: over label names, texts and labels of all splits, in hex.
        files: ids of all clients where train is one file per client, else empty.
        text, text_pair: the columns that the texts are from.
        template: as it was written; None in the format head.
        words: the word of each label; None in the format head.
        named: whether the words are the labels' own names for want of others.
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
    sources, known = _read_sources(spec)
    train = sources["train"]
    meta = _read_meta(spec)
    text, pair = _text_columns(spec, train)
    for source in sources.values():
        for key, column in (("task.text", text), ("task.text_pair", pair), ("task.label", spec.label)):
            if column is not None and column not in source.columns:
                raise DataError(f"{source.where} has no column {column!r} ({key}); it has: {', '.join(source.columns)}")
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
    if spec.limit is not None and spec.limit < len(tables["train"]):
        chosen = rng_for(0, "limit").choice(len(tables["train"]), size=spec.limit, replace=False)
        tables["train"] = tables["train"].take(np.sort(chosen))
    metric = spec.metric or _usual_metric(spec, meta)
    if metric == "acc_f1" and len(kept) != 2:
        raise DataError(f"task.metric acc_f1 is for two labels, the task has {len(kept)}; use accuracy or macro_f1")
    name = spec.name or _folder(spec).name or "task"
    splits = [tables.get(split) for split in SPLITS]
    files = tuple(client_files(spec.train) or ()) if spec.train else ()
    sha256, prompt = _sha256(kept, splits), _prompt(spec, kept, pair is not None)
    return Task(name, kept, metric, tables["train"], splits[1], splits[2], sha256, files, text, pair, *prompt)


# --- sources ----------------------------------------------------------------------------------------------------


def _read_sources(spec: TaskSpec) -> tuple[dict[str, Source], Mapping[str, tuple[str, ...]]]:
    """The raw splits, and the label names by column that the data declare."""
    if spec.train is not None:
        given = {"train": spec.train, "validation": spec.validation, "test": spec.test}
        return {split: _from_files(source) for split, source in given.items() if source is not None}, {}
    if spec.name == "demo":
        from fedpeft.data.demo import load_demo

        demo = load_demo()
        own = {"train": demo.train, "validation": demo.validation, "test": demo.test}
        sources = {split: Source(f"the demo's {split} split", [dict(r) for r in rows]) for split, rows in own.items()}
        given = {"validation": spec.validation, "test": spec.test}
        sources |= {split: _from_files(source) for split, source in given.items() if source is not None}
        return sources, {"label": demo.labels}
    return _from_hub(spec)


def _from_files(source: str) -> Source:
    files = client_files(source)
    if files is None:
        return Source(f"data file {source}", read_rows(source))
    rows: list[Row] = []
    parts = []
    for client, path in files.items():
        parts.append((f"data file {path}", len(rows), client))
        rows += read_rows(path)
    return Source(f"data folder {source}", rows, tuple(parts))


def _from_hub(spec: TaskSpec) -> tuple[dict[str, Source], Mapping[str, tuple[str, ...]]]:
    name = str(spec.name)
    test = spec.test or ("test" if "test" in hub_splits(name) else None)
    labels: Mapping[str, tuple[str, ...]] = {}
    sources = {}
    for split, hub_split in zip(SPLITS, ("train", spec.validation, test), strict=True):
        if hub_split is not None:
            read = read_hub(name, hub_split)
            labels = labels or read.labels
            sources[split] = Source(f"split {hub_split!r} of hub data set {name!r}", read.rows)
    return sources, labels


def _folder(spec: TaskSpec) -> Path:
    """The folder of the training data; a path without a name where they are not files."""
    if spec.train is None:
        return Path()
    path = Path(spec.train).expanduser().absolute()
    return path if path.is_dir() else path.parent


def _read_meta(spec: TaskSpec) -> dict[str, Any]:
    path = _folder(spec) / "meta.json"
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
    return _folder(spec).name.lower(), (spec.name or "").lower().replace(":", "/").rpartition("/")[2]


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


def _texts(source: Source, column: str) -> tuple[str, ...]:
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
    pairs = None if pair is None else _texts(source, pair)
    return Table(_texts(source, text), pairs, labels, columns, source.files())


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


def _sha256(labels: Sequence[str], splits: Sequence[Table | None]) -> str:
    def parts() -> Iterator[bytes]:
        yield json.dumps(list(labels)).encode()
        for table in splits:
            if table is None:
                yield b"none"
                continue
            yield json.dumps([len(table), table.pairs is not None]).encode()
            yield table.labels.astype("<i8").tobytes()
            for text in (*table.texts, *(table.pairs or ())):
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
    found = _from_files(str(source))
    for column in (task.text, task.text_pair):
        if column is not None and column not in found.columns:
            raise DataError(
                f"{found.where} has no column {column!r}, which the task's texts are in; it has: "
                f"{', '.join(found.columns)}"
            )
    return _make_table(found, np.zeros(len(found.rows), dtype=np.int64), task.text, task.text_pair)
