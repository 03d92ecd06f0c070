"""Who holds which rows: the rows of a task dealt out to simulated clients, as indices with a hash.

Every row of every split belongs to exactly one client. The `dirichlet` process is that of FedPepTAO's authors, made to
end at any alpha: sizes from Dirichlet(size_alpha), label shares per client from Dirichlet(alpha), then row after row a
random client takes the last unused row of a class drawn from its shares.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.counts import dealt
from fedpeft.core.errors import DataError
from fedpeft.core.rng import Rng, rng_for
from fedpeft.data.tasks import SPLITS, Table, Task

Rows: TypeAlias = NDArray[np.int64]

KINDS = ("iid", "dirichlet", "quantity", "natural", "file")
CARVED_SHARE = 0.1  # of a client's training rows, for its selection part
_NO_MASS = 1e-12  # a client's share of the classes that are left, below which it takes what there is most of


@dataclass(frozen=True)
class PartitionSpec:
    """How rows are dealt out to clients: the `partition:` section of a configuration."""

    kind: str = "iid"  # iid, dirichlet (sizes and labels skewed), quantity (sizes only), natural (by column), file
    clients: int = 100  # how many; natural: at most so many, groups are then put together; file: ignored
    alpha: float = 1.0  # dirichlet: evenness of label shares; small: few labels per client, large: all alike
    size_alpha: float = 5.0  # dirichlet and quantity: evenness of client sizes
    by: str | None = None  # natural: the column whose values are the clients; null for the demo: bundle
    seed: int = 0  # of every draw; independent of the run's seed

    def problems(self) -> list[str]:
        """What is wrong with the values themselves, one sentence each."""
        found = []
        if self.kind not in KINDS:
            found.append(f"partition.kind {self.kind!r} does not exist; there are: {', '.join(KINDS)}")
        if self.clients < 1:
            found.append(f"partition.clients is {self.clients}; at least one client is needed")
        for key, value in (("alpha", self.alpha), ("size_alpha", self.size_alpha)):
            if not (value > 0 and math.isfinite(value)):
                found.append(f"partition.{key} is {value}; it must be a positive number (kind iid has no skew)")
        return found


@dataclass(frozen=True, eq=False)
class Partition:
    """The rows of each client.

    Args:
        spec: what it was made from.
        clients: stable ids, sorted.
        names: what a client is in the data: values of the column (several are joined by " + "), else the id.
        labels: label names of the task.
        carved: whether validation indices are into the training table (taken out of `train`) or the validation table.
        train, validation, test: by client, its row indices in ascending order.
        counts: by split and client, its number of rows per label.
        task_sha256: of the task that the indices belong to.
    """

    spec: PartitionSpec
    clients: tuple[str, ...]
    names: Mapping[str, str]
    labels: tuple[str, ...]
    carved: bool
    train: Mapping[str, Rows]
    validation: Mapping[str, Rows]
    test: Mapping[str, Rows]
    counts: Mapping[str, Mapping[str, tuple[int, ...]]]
    task_sha256: str

    def rows(self, split: str) -> Mapping[str, Rows]:
        """Row indices by client of `train`, `validation` or `test`."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]

    def table(self, task: Task, split: str) -> Table | None:
        """The table that a split's indices are into; None where the task has no such split."""
        return task.split("train" if split == "validation" and self.carved else split)

    def label_counts(self, split: str) -> Mapping[str, tuple[int, ...]]:
        """By client, the number of its rows per label."""
        return self.counts[split]

    def check_task(self, task: Task) -> None:
        """Raise DataError unless the task is the one that the indices belong to."""
        if task.sha256 != self.task_sha256:
            raise DataError(
                f"the partition was made for other data (hash {self.task_sha256[:12]}, the task now has "
                f"{task.sha256[:12]}); restore the data files or start a new run"
            )

    @property
    def sha256(self) -> str:
        """Hash over everything that `to_json` writes, in hex."""
        return hashlib.sha256(_canonical(self._content())).hexdigest()

    def to_json(self) -> str:
        """The partition as JSON: spec, and per client indices and label counts; no text of any row; the hash."""
        return json.dumps({**self._content(), "sha256": self.sha256}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Partition:
        """The partition that `to_json` wrote. Raises DataError where it is damaged or changed."""
        try:
            content = json.loads(text)
            stated = content.pop("sha256")
            if hashlib.sha256(_canonical(content)).hexdigest() != stated:
                raise DataError(
                    "the saved partition was changed: its hash is not the stated one; restore partition.json"
                )
            clients = content["clients"]
            indices = {s: {c: _frozen(entry[s]) for c, entry in clients.items()} for s in SPLITS}
            counts = {s: {c: tuple(entry["label_counts"][s]) for c, entry in clients.items()} for s in SPLITS}
            return cls(
                spec=PartitionSpec(**content["spec"]),
                clients=tuple(clients),
                names={client: entry["name"] for client, entry in clients.items()},
                labels=tuple(content["labels"]),
                carved=content["carved"],
                counts=counts,
                task_sha256=content["task_sha256"],
                **indices,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the saved partition cannot be read ({error!r}); restore partition.json") from error

    def _content(self) -> dict[str, Any]:
        return {
            "spec": asdict(self.spec),
            "task_sha256": self.task_sha256,
            "labels": list(self.labels),
            "carved": self.carved,
            "clients": {
                client: {
                    "name": self.names[client],
                    "label_counts": {split: list(self.counts[split][client]) for split in SPLITS},
                    **{split: self.rows(split)[client].tolist() for split in SPLITS},
                }
                for client in self.clients
            },
        }


def partition(spec: PartitionSpec, task: Task) -> Partition:
    """Deal out the rows of all splits of a task.

    Without a validation split each client's is carved from its training rows. Validation and test splits are dealt out
    like training rows, with the same sizes and label shares but draws of their own; with fewer rows than clients some
    clients have none. `natural` and `file` follow the column or the files there too; rows of a group that has no
    training rows, or a split without that column or files, are dealt out evenly at random.

    Raises:
        DataError: a value of the spec is not usable, more clients than training rows, a client without training rows,
            or no such column.
    """
    if problems := spec.problems():
        raise DataError("; ".join(problems))
    deal = _grouped(spec, task) if spec.kind in ("natural", "file") else _drawn(spec, task)
    train = dict(zip(deal.clients, deal.rows(task.train, "train"), strict=True))
    if empty := [client for client, rows in train.items() if not rows.size]:
        raise DataError(
            f"{len(empty)} of {len(train)} clients have no training row, first: {deal.names[empty[0]]!r}; "
            "raise task.limit, keep more of task.classes or leave out these clients' files"
        )
    carved = task.validation is None
    validation: dict[str, Rows] = {}
    if carved:
        for client, rows in train.items():
            train[client], validation[client] = carve(rows, spec.seed, client)
    else:
        validation = dict(zip(deal.clients, deal.rows(task.validation, "validation"), strict=True))
    test = dict(zip(deal.clients, deal.rows(task.test, "test"), strict=True))
    splits = {"train": train, "validation": validation, "test": test}
    tables = {"train": task.train, "validation": task.train if carved else task.validation, "test": task.test}
    return Partition(
        spec=spec,
        clients=deal.clients,
        names=deal.names,
        labels=task.labels,
        carved=carved,
        counts={s: {c: _count(tables[s], rows, len(task.labels)) for c, rows in splits[s].items()} for s in SPLITS},
        task_sha256=task.sha256,
        **{split: {client: _frozen(rows) for client, rows in parts.items()} for split, parts in splits.items()},
    )


def carve(rows: Rows, seed: int, client: str) -> tuple[Rows, Rows]:
    """A client's rows as (training, selection): a random tenth, rounded, is for selection.

    At least one row is, where there are two or more; a single row stays for training.
    """
    if len(rows) < 2:
        return rows, rows[:0]
    size = max(1, math.floor(CARVED_SHARE * len(rows) + 0.5))
    order = rng_for(seed, "partition", "carve", client=client).permutation(len(rows))
    return np.sort(rows[order[size:]]), np.sort(rows[order[:size]])


# --- kinds that draw: iid, quantity, dirichlet ------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    """Clients that differ by drawn sizes and label shares; None: all alike."""

    seed: int
    clients: tuple[str, ...]
    sizes: NDArray[np.float64] | None  # q, (clients,)
    shares: NDArray[np.float64] | None  # pi, (clients, labels)
    names: Mapping[str, str] = field(default_factory=dict)

    def rows(self, table: Table | None, split: str) -> list[Rows]:
        n_rows = 0 if table is None else len(table)
        rng = rng_for(self.seed, "partition", split)
        if table is None or self.sizes is None:
            return _evenly(np.arange(n_rows), len(self.clients), rng)
        quotas = split_quotas(self.sizes, n_rows)
        if self.shares is None:
            return [np.sort(part) for part in np.split(rng.permutation(n_rows), np.cumsum(quotas)[:-1])]
        return draw_rows(table.labels, quotas, self.shares, rng)


def _drawn(spec: PartitionSpec, task: Task) -> _Drawn:
    n = spec.clients
    if n > len(task.train):
        raise DataError(
            f"partition.clients is {n}, but there are only {len(task.train)} training rows; "
            f"use at most {len(task.train)} clients, or more data"
        )
    if spec.kind == "dirichlet" and len(task.labels) < 2:  # texts to be generated need no labels
        raise DataError(
            "partition.kind dirichlet skews categories, and the training rows tell only one; name the column of the "
            "categories in task.label, or use partition.kind quantity, iid or natural"
        )
    sizes = shares = None
    if spec.kind != "iid":
        sizes = rng_for(spec.seed, "partition", "sizes").dirichlet(np.full(n, spec.size_alpha))
    if spec.kind == "dirichlet":
        shares = rng_for(spec.seed, "partition", "shares").dirichlet(np.full(len(task.labels), spec.alpha), size=n)
    clients = _number(n)
    return _Drawn(spec.seed, clients, sizes, shares, {client: client for client in clients})


def split_quotas(sizes: NDArray[np.float64], n_rows: int) -> Rows:
    """Rows per client: shares of `n_rows` rounded down, spare rows to the largest remainders (ties: lower index).

    While a client would have none, it gets one row of the largest client, as long as there are as many rows as clients.

    Args:
        sizes: (clients,) share of each client, sum 1.
    """
    quotas = np.array(dealt(sizes.tolist(), n_rows), dtype=np.int64)
    if n_rows >= len(sizes):
        for client in np.flatnonzero(quotas == 0):
            quotas[np.argmax(quotas)] -= 1
            quotas[client] += 1
    return quotas


def draw_rows(labels: Rows, quotas: Rows, shares: NDArray[np.float64], rng: Rng) -> list[Rows]:
    """The rows of each client, ascending: step 3 of the process in FedPepTAO's specification.

    Until all quotas are 0: a client, uniform among those with quota left; a class, from the client's shares restricted
    to classes with rows left (from the numbers of rows left, where it has no share of these); the last unused row of
    that class. The two uniform numbers per row are drawn in one block.

    Args:
        labels: (rows,) class of each row.
        quotas: (clients,) number of rows of each client; they sum to the number of rows.
        shares: (clients, classes) probability of each class.
    """
    n_classes = shares.shape[1]
    unused = [np.flatnonzero(labels == k).tolist() for k in range(n_classes)]
    probabilities = shares.tolist()
    left = quotas.tolist()
    taken: list[list[int]] = [[] for _ in left]
    open_clients = [i for i, quota in enumerate(left) if quota]
    used_up = sum(not rows for rows in unused)
    sums: dict[int, tuple[int, list[float]]] = {}  # client -> (classes used up when it was made, running sums)
    for u, v in rng.random((len(labels), 2)).tolist():
        place = int(u * len(open_clients))
        client = open_clients[place]
        made, running = sums.get(client, (-1, []))
        if made != used_up:
            pairs = zip(probabilities[client], unused, strict=True)
            running = list(accumulate(share if rows else 0.0 for share, rows in pairs))
            sums[client] = (used_up, running)
        if running[-1] < _NO_MASS:
            running = list(accumulate(float(len(rows)) for rows in unused))
        # The first class whose running sum is above the target has rows; rounding may lift the target to the total.
        k = min(bisect_right(running, v * running[-1]), running.index(running[-1]))
        taken[client].append(unused[k].pop())
        used_up += not unused[k]
        left[client] -= 1
        if not left[client]:
            open_clients[place] = open_clients[-1]
            open_clients.pop()
    return [np.array(sorted(rows), dtype=np.int64) for rows in taken]


# --- kinds that follow the data: natural, file ------------------------------------------------------------------


@dataclass(frozen=True)
class _Grouped:
    """Clients that are groups of rows by a column or by file."""

    seed: int
    clients: tuple[str, ...]
    by: str | None  # column; None: the file
    client_of: Mapping[Any, int]  # value of the column, or id of the file -> number of the client
    names: Mapping[str, str] = field(default_factory=dict)

    def rows(self, table: Table | None, split: str) -> list[Rows]:
        rng = rng_for(self.seed, "partition", split)
        n_rows = 0 if table is None else len(table)
        values = None if table is None else table.files if self.by is None else table.columns.get(self.by)
        owners = np.fromiter((self.client_of.get(v, -1) for v in values or [None] * n_rows), np.int64, count=n_rows)
        strays = _evenly(np.flatnonzero(owners < 0), len(self.clients), rng)
        own = (np.flatnonzero(owners == i) for i in range(len(self.clients)))
        return [np.sort(np.concatenate(parts)) for parts in zip(own, strays, strict=True)]


def _grouped(spec: PartitionSpec, task: Task) -> _Grouped:
    if spec.kind == "file":
        if not task.files:
            raise DataError("partition.kind file needs one file per client: set task.train to a folder or a pattern")
        by_file = {client: i for i, client in enumerate(task.files)}
        return _Grouped(spec.seed, task.files, None, by_file, {client: client for client in task.files})
    by = spec.by or ("bundle" if task.name == "demo" else None)
    if by is None or by not in task.train.columns:
        problem = "partition.kind natural needs partition.by" if by is None else f"there is no column {by!r}"
        raise DataError(f"{problem}; the training data have: {', '.join(task.train.columns)}")
    values = task.train.columns[by]
    for i, value in enumerate(values):
        if value is None or isinstance(value, list | dict) or value == "" or value != value:
            what = f"training row {i + 1} has {value!r} in column {by!r} (partition.by)"
            raise DataError(f"{what}, which is no client; drop such rows")
    groups = sorted_groups(values)
    clients = _number(min(spec.clients, len(groups)))
    client_of = {group: i % len(clients) for i, group in enumerate(groups)}
    names = {client: " + ".join(str(g) for g in groups[i :: len(clients)]) for i, client in enumerate(clients)}
    return _Grouped(spec.seed, clients, by, client_of, names)


def sorted_groups(values: Sequence[Any]) -> list[Any]:
    """The distinct values: numbers by size if all are numbers, else by their text."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(v, int | float) for v in distinct):
        return sorted(distinct)
    return sorted(distinct, key=str)


# --- small parts ------------------------------------------------------------------------------------------------


def _evenly(rows: Rows, n: int, rng: Rng) -> list[Rows]:
    """Rows in random order cut into n parts whose sizes differ by at most one."""
    return [np.sort(part) for part in np.array_split(rng.permutation(rows), n)]


def _number(n: int) -> tuple[str, ...]:
    """Ids of equal width (three digits or more), so that their order as text is their order."""
    width = max(3, len(str(n - 1)))
    return tuple(f"{i:0{width}d}" for i in range(n))


def _count(table: Table | None, rows: Rows, n_labels: int) -> tuple[int, ...]:
    counts = np.zeros(n_labels, np.int64) if table is None else np.bincount(table.labels[rows], minlength=n_labels)
    return tuple(counts.tolist())


def _frozen(rows: Any) -> Rows:
    array = np.array(rows, dtype=np.int64)
    array.flags.writeable = False
    return array


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
