"""Where the rows of a task come from: files, a folder of files, the embedded task or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.data.load import Row, Source, client_files, hub_splits, read_hub, read_rows

if TYPE_CHECKING:
    from fedpeft.data.tasks import TaskSpec


def read_sources(spec: TaskSpec) -> tuple[dict[str, Source], Mapping[str, tuple[str, ...]]]:
    """The raw splits, and the label names by column that the data declare."""
    if spec.train is not None:
        given = {"train": spec.train, "validation": spec.validation, "test": spec.test}
        return {split: from_files(source) for split, source in given.items() if source is not None}, {}
    if spec.name == "demo":
        from fedpeft.data.demo import load_demo

        demo = load_demo()
        own = {"train": demo.train, "validation": demo.validation, "test": demo.test}
        sources = {split: Source(f"the demo's {split} split", [dict(r) for r in rows]) for split, rows in own.items()}
        given = {"validation": spec.validation, "test": spec.test}
        sources |= {split: from_files(source) for split, source in given.items() if source is not None}
        return sources, {"label": demo.labels}
    return _from_hub(spec)


def from_files(source: str) -> Source:
    """The rows of one file, or of all files of a folder or pattern."""
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
    for split, hub_split in zip(("train", "validation", "test"), ("train", spec.validation, test), strict=True):
        if hub_split is not None:
            read = read_hub(name, hub_split)
            labels = labels or read.labels
            sources[split] = Source(f"split {hub_split!r} of hub data set {name!r}", read.rows)
    return sources, labels


def folder_of(spec: TaskSpec) -> Path:
    """The folder of the training data; a path without a name where they are not files."""
    if spec.train is None:
        return Path()
    path = Path(spec.train).expanduser().absolute()
    return path if path.is_dir() else path.parent
