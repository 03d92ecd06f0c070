"""Partitions: every row once, no empty client, the process of the specification, and a file that resists tampering.

The mean shares of a client's most frequent label are those that the FedPepTAO specification measured (section 11).
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.core.errors import DataError
from fedpeft.core.rng import rng_for
from fedpeft.data.partition import Partition, PartitionSpec, carve, draw_rows, partition, sorted_groups, split_quotas
from fedpeft.data.tasks import SPLITS, Table, Task, TaskSpec, load_task

DATA = Path(os.environ.get("FEDPEFT_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")


def table(labels, columns=None, files=None):
    labels = np.array(labels, dtype=np.int64)
    return Table(tuple(f"row {i}" for i in range(len(labels))), None, labels, columns or {}, files)


def task(train, validation=None, test=None, classes=None, files=()):
    """A task from label lists or tables."""
    made = [t if t is None or isinstance(t, Table) else table(t) for t in (train, validation, test)]
    n = classes or int(max(t.labels.max(initial=0) for t in made if t is not None)) + 1
    return Task("toy", tuple(f"label {k}" for k in range(n)), "accuracy", *made, sha256="ab" * 32, files=files)


def random_labels(rows, classes, seed=0):
    return np.random.default_rng(seed).integers(0, classes, size=rows)


def assert_every_row_once(made, given_task):
    """Each table's rows belong to exactly one client (and, of train, one of training and carved validation)."""
    for name in SPLITS:
        parts = list(made.rows(name).values())
        if name == "train" and made.carved:
            parts += list(made.validation.values())
        if name == "validation" and made.carved:
            continue
        n_rows = len(given_task.split(name) or ())
        assert sorted(np.concatenate(parts).tolist()) == list(range(n_rows))
        assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    assert all(made.train[client].size for client in made.clients)


def arrays(made):
    return {(s, c): made.rows(s)[c].tolist() for s in SPLITS for c in made.clients}


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["iid", "dirichlet", "quantity"]),
    clients=st.integers(1, 12),
    extra=st.integers(0, 60),
    classes=st.integers(2, 5),
    alpha=st.sampled_from([0.01, 0.1, 1.0, 100.0]),
    others=st.tuples(st.integers(0, 30), st.one_of(st.none(), st.integers(1, 30))),
    seed=st.integers(0, 10_000),
)
def test_every_row_belongs_to_exactly_one_client(kind, clients, extra, classes, alpha, others, seed):
    rng = np.random.default_rng(seed)
    test, validation = (None if n is None else rng.integers(0, classes, size=n) for n in others)
    whole = task(rng.integers(0, classes, size=clients + extra), validation, test, classes)
    made = partition(PartitionSpec(kind, clients, alpha, size_alpha=alpha, seed=seed), whole)
    assert len(made.clients) == clients and made.carved == (validation is None)
    assert_every_row_once(made, whole)
    for split in SPLITS:
        source = made.table(whole, split)
        for client in made.clients:
            rows = made.rows(split)[client]
            expected = [int((source.labels[rows] == k).sum()) for k in range(classes)]
            assert list(made.label_counts(split)[client]) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=20), st.integers(0, 200))
def test_quotas_add_up_and_leave_no_client_without_rows(weights, n_rows):
    sizes = np.array(weights) / sum(weights)
    quotas = split_quotas(sizes, n_rows)
    assert quotas.sum() == n_rows and (quotas >= 0).all()
    if n_rows >= len(sizes):
        assert (quotas > 0).all()


def test_quotas_by_hand():
    # .5, .3, .2 of 7 rows: 3.5, 2.1, 1.4 -> 3, 2, 1 and one spare row to the largest remainder.
    assert split_quotas(np.array([0.5, 0.3, 0.2]), 7).tolist() == [4, 2, 1]
    # 2.5, 1.25, 1.25 -> 2, 1, 1 and one spare; of 4 equal remainders the lower index wins.
    assert split_quotas(np.array([0.25, 0.25, 0.25, 0.25]), 6).tolist() == [2, 2, 1, 1]
    # .02 and .03 of 10 rows round to 0: each gets one from the largest.
    assert split_quotas(np.array([0.95, 0.02, 0.03]), 10).tolist() == [8, 1, 1]
    # Fewer rows than clients: somebody has none.
    assert split_quotas(np.array([0.6, 0.3, 0.1]), 2).tolist() == [1, 1, 0]


def plain_process(labels, quotas, shares, uniforms):
    """Step 3 of the specification, written down again: no running sums, no shortcut; clients in the same open list."""
    unused = {k: [i for i, y in enumerate(labels) if y == k] for k in range(shares.shape[1])}
    left, taken, waiting = list(quotas), [[] for _ in quotas], [i for i, q in enumerate(quotas) if q]
    for u, v in uniforms:
        place = int(np.floor(u * len(waiting)))
        client = waiting[place]
        counts = np.array([len(unused[k]) for k in unused], dtype=float)
        weights = np.where(counts > 0, shares[client], 0.0)
        if weights.sum() < 1e-12:
            weights = counts
        edges = np.cumsum(weights / weights.sum())
        k = int(np.argmax(edges > v))
        taken[client].append(unused[k].pop(-1))
        left[client] -= 1
        if left[client] == 0:
            waiting[place] = waiting[-1]
            del waiting[-1]
    return [sorted(rows) for rows in taken]


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.1, 1.0, 50.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_process_equals_its_plain_form(alpha, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, size=300)
    quotas = split_quotas(rng.dirichlet(np.full(15, 5.0)), 300)
    shares = rng.dirichlet(np.full(5, alpha), size=15)  # the fifth class has no row at all
    got = draw_rows(labels, quotas, shares, rng_for(seed, "test"))
    expected = plain_process(labels, quotas, shares, rng_for(seed, "test").random((300, 2)))
    assert [rows.tolist() for rows in got] == expected


def test_a_client_takes_the_last_unused_rows_of_its_classes():
    labels = np.array([0, 1, 0, 1, 0, 1])
    shares = np.array([[1.0, 0.0], [0.0, 1.0]])
    rows = draw_rows(labels, np.array([2, 4]), shares, rng_for(0, "test"))
    # Client 0 wants class 0 (rows 0, 2, 4), client 1 class 1 (1, 3, 5) and, when that is used up, what is left.
    assert rows[0].size == 2 and set(rows[1].tolist()) >= {1, 3, 5} and set(rows[0].tolist()) <= {0, 2, 4}
    alone = draw_rows(labels, np.array([2, 0]), shares, _Fixed([[0.3, 0.5], [0.3, 0.5]]))
    assert alone[0].tolist() == [2, 4]


class _Fixed:
    """A generator that gives the numbers it was told to."""

    def __init__(self, numbers):
        self.numbers = np.array(numbers)

    def random(self, shape):
        return self.numbers


def test_whole_dirichlet_partition_from_the_addresses_of_its_draws():
    labels, test = random_labels(400, 3), random_labels(90, 3, 1)
    made = partition(PartitionSpec("dirichlet", 20, alpha=0.5, seed=7), task(labels, [0, 1, 2] * 10, test))
    sizes = rng_for(7, "partition", "sizes").dirichlet(np.full(20, 5.0))
    shares = rng_for(7, "partition", "shares").dirichlet(np.full(3, 0.5), size=20)
    for split, values in (("train", labels), ("test", test)):
        uniforms = rng_for(7, "partition", split).random((len(values), 2))
        expected = plain_process(values, split_quotas(sizes, len(values)), shares, uniforms)
        assert [made.rows(split)[c].tolist() for c in made.clients] == expected


def test_iid_sizes_differ_by_at_most_one_and_quantity_follows_its_shares():
    whole = task(random_labels(103, 2), [0] * 10, [1] * 45)
    made = partition(PartitionSpec("iid", 10), whole)
    assert sorted(len(r) for r in made.train.values()) == [10] * 7 + [11] * 3
    assert made.clients == tuple(f"{i:03d}" for i in range(10)) and made.names["004"] == "004"
    skewed = partition(PartitionSpec("quantity", 10, size_alpha=1.0, seed=3), whole)
    sizes = rng_for(3, "partition", "sizes").dirichlet(np.ones(10))
    assert [len(r) for r in skewed.train.values()] == split_quotas(sizes, 103).tolist()
    assert [len(r) for r in skewed.test.values()] == split_quotas(sizes, 45).tolist()


def test_more_than_a_thousand_clients_have_ids_whose_order_is_stable():
    made = partition(PartitionSpec("iid", 1001), task([0, 1] * 600))
    assert made.clients[:2] == ("0000", "0001") and list(made.clients) == sorted(made.clients)


def test_natural_follows_the_column_and_strays_are_not_lost():
    town = ("b", "a", "c", "b", "a", "c", "b", "b")
    test = table([0, 1, 0, 1, 0], {"town": ("c", "z", "b", "z", None)})
    whole = task(table([0, 1] * 4, {"town": town, "x": town}), table([0, 1, 1]), test)
    made = partition(PartitionSpec("natural", by="town"), whole)
    assert made.clients == ("000", "001", "002")
    assert made.names == {"000": "a", "001": "b", "002": "c"}
    assert [r.tolist() for r in made.train.values()] == [[1, 4], [0, 3, 6, 7], [2, 5]]
    assert 2 in made.test["001"] and 0 in made.test["002"]  # the rows of z and of nobody went to anyone
    assert_every_row_once(made, whole)
    assert [len(r) for r in made.validation.values()] == [1, 1, 1]  # that split has no such column: evenly
    fewer = partition(PartitionSpec("natural", clients=2, by="town"), whole)
    assert fewer.names == {"000": "a + c", "001": "b"}
    assert fewer.train["000"].tolist() == [1, 2, 4, 5]


def test_natural_groups_are_sorted_numbers_by_size():
    assert sorted_groups([10, 9, 2.5, 9]) == [2.5, 9, 10]
    assert sorted_groups(["10", "9", "a"]) == ["10", "9", "a"]


def test_natural_of_the_demo_is_by_bundle():
    whole = task(table([0, 1, 0, 1], {"bundle": ("p", "q", "p", "q"), "module": tuple("abcd")}))
    named = Task("demo", whole.labels, "accuracy", whole.train, None, None, "ab" * 32)
    assert list(partition(PartitionSpec("natural"), named).names.values()) == ["p", "q"]


def test_one_client_per_file(tmp_path):
    for client, labels in (("ward", [0, 1, 1, 0]), ("lab", [1, 1])):
        lines = [json.dumps({"text": f"{client} {i}", "label": y}) for i, y in enumerate(labels)]
        for folder in ("train", "test"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{client}.jsonl").write_text("\n".join(lines))
    whole = load_task(TaskSpec(train=str(tmp_path / "train"), test=str(tmp_path / "test")))
    made = partition(PartitionSpec("file", clients=1), whole)
    assert made.clients == ("lab", "ward")
    assert {whole.test.texts[i].split()[0] for i in made.test["ward"]} == {"ward"}
    assert len(made.train["ward"]) + len(made.validation["ward"]) == 4 and len(made.test["lab"]) == 2
    assert_every_row_once(made, whole)
    one = load_task(TaskSpec(train=str(tmp_path / "train"), test=str(tmp_path / "test" / "ward.jsonl")))
    assert_every_row_once(partition(PartitionSpec("file"), one), one)


def test_validation_is_a_tenth_of_each_client_and_at_least_one_row():
    for n, expected in ((1, 0), (2, 1), (14, 1), (15, 2), (100, 10)):
        train, validation = carve(np.arange(1000, 1000 + n), 0, "000")
        assert len(validation) == expected
        assert sorted([*train.tolist(), *validation.tolist()]) == list(range(1000, 1000 + n))
    rows = np.arange(100)
    assert carve(rows, 0, "000")[1].tolist() == carve(rows, 0, "000")[1].tolist()
    assert carve(rows, 0, "000")[1].tolist() != carve(rows, 0, "001")[1].tolist()
    assert carve(rows, 0, "000")[1].tolist() != carve(rows, 1, "000")[1].tolist()


def test_same_seed_same_hash_other_seed_other_rows():
    whole = task(random_labels(300, 3), None, random_labels(60, 3, 1))
    for kind in ("iid", "dirichlet", "quantity"):
        one, two, other = (partition(PartitionSpec(kind, 10, seed=s), whole) for s in (0, 0, 1))
        assert one.sha256 == two.sha256 and arrays(one) == arrays(two)
        assert one.sha256 != other.sha256 and arrays(one) != arrays(other)


def test_json_round_trip_and_no_text_in_it():
    whole = task(table(random_labels(50, 2), {"town": tuple("äb" * 25)}), None, [0, 1])
    for spec in (PartitionSpec("dirichlet", 5, alpha=0.3), PartitionSpec("natural", by="town")):
        made = partition(spec, whole)
        text = made.to_json()
        read = Partition.from_json(text)
        assert read.to_json() == text and read.sha256 == made.sha256 == json.loads(text)["sha256"]
        assert (read.spec, read.clients, read.names, read.labels) == (spec, made.clients, made.names, made.labels)
        assert arrays(read) == arrays(made) and read.counts == made.counts and read.carved
        assert not read.train["000"].flags.writeable and not made.train["000"].flags.writeable
        assert "row 1" not in text


def test_a_changed_or_damaged_file_is_refused():
    made = partition(PartitionSpec("iid", 2), task([0, 1] * 10))
    content = json.loads(made.to_json())
    first = content["clients"]["000"]
    for changed in (
        content | {"carved": False},
        content | {"spec": content["spec"] | {"seed": 1}},
        content | {"clients": content["clients"] | {"000": first | {"train": first["train"][:-1]}}},
        content | {"clients": content["clients"] | {"000": first | {"name": "x"}}},
        content | {"sha256": "0" * 64},
    ):
        with pytest.raises(DataError, match="was changed"):
            Partition.from_json(json.dumps(changed))
    for damaged in ("", "{", "[]", "{}", "null", made.to_json()[:-20]):
        with pytest.raises(DataError, match="cannot be read"):
            Partition.from_json(damaged)


def test_other_data_are_refused():
    whole = task([0, 1] * 10)
    made = partition(PartitionSpec("iid", 2), whole)
    made.check_task(whole)
    other = Task("toy", whole.labels, "accuracy", whole.train, None, None, "cd" * 32)
    with pytest.raises(DataError, match="made for other data"):
        made.check_task(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "random"}, "kind 'random' does not exist; there are: iid, dirichlet, quantity, natural, file"),
        ({"clients": 0}, "clients is 0; at least one"),
        ({"kind": "dirichlet", "alpha": 0.0}, r"partition\.alpha is 0\.0; it must be a positive number"),
        ({"kind": "dirichlet", "alpha": float("nan")}, "alpha is nan"),
        ({"kind": "quantity", "size_alpha": -1.0}, r"size_alpha is -1\.0"),
        ({"clients": 21}, "clients is 21, but there are only 20 training rows; use at most 20 clients"),
        ({"kind": "natural"}, r"needs partition\.by; the training data have: town"),
        ({"kind": "natural", "by": "city"}, "there is no column 'city'; the training data have: town"),
        ({"kind": "file"}, r"needs one file per client: set task\.train to a folder"),
    ],
)
def test_errors(options, message):
    whole = task(table([0, 1] * 10, {"town": ("a", "b") * 10}))
    with pytest.raises(DataError, match=message):
        partition(PartitionSpec(**options), whole)


def test_all_problems_come_at_once():
    assert len(PartitionSpec("x", 0, alpha=0, size_alpha=float("inf")).problems()) == 4
    assert PartitionSpec("dirichlet").problems() == []


def test_a_row_without_a_client_and_a_client_without_rows():
    for bad in (None, "", float("nan"), [1]):
        whole = task(table([0, 1, 1], {"town": ("a", bad, "a")}))
        with pytest.raises(DataError, match=r"training row 2 has .* in column 'town'"):
            partition(PartitionSpec("natural", by="town"), whole)
    whole = task(table([0, 1], files=("a", "a")), files=("a", "empty"))
    with pytest.raises(DataError, match=r"1 of 2 clients have no training row, first: 'empty'; raise task\.limit"):
        partition(PartitionSpec("file"), whole)


# --- on real data -----------------------------------------------------------------------------------------------


def real_task(name):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}")
    return load_task(TaskSpec(train=str(folder / "train.jsonl.gz"), test=str(folder / "test.jsonl.gz")))


@pytest.mark.parametrize(
    ("name", "at_1", "at_01"), [("rte", 0.76, 0.91), ("mrpc", 0.75, 0.85), ("cola", 0.75, 0.84), ("trec", 0.46, 0.77)]
)
def test_mean_share_of_the_most_frequent_label(name, at_1, at_01):
    whole = real_task(name)
    for alpha, expected, tolerance in ((1.0, at_1, 0.03), (0.1, at_01, 0.06)):
        made = partition(PartitionSpec("dirichlet", 100, alpha=alpha), whole)
        assert_every_row_once(made, whole)
        counts = np.array([made.counts["train"][c] for c in made.clients])
        counts += np.array([made.counts["validation"][c] for c in made.clients])
        assert np.mean(counts.max(axis=1) / counts.sum(axis=1)) == pytest.approx(expected, abs=tolerance)


def test_small_test_splits_and_tiny_alpha():
    whole = real_task("rte")
    made = partition(PartitionSpec("dirichlet", 100, alpha=0.01), whole)
    assert_every_row_once(made, whole)
    assert min(len(r) for r in made.test.values()) >= 1 and max(len(r) for r in made.test.values()) <= 9


def test_67_thousand_rows_take_less_than_two_seconds():
    whole = task(random_labels(67_000, 2))
    started = time.process_time()
    made = partition(PartitionSpec("dirichlet", 100, alpha=0.1), whole)
    Partition.from_json(made.to_json())
    assert time.process_time() - started < 2.0
