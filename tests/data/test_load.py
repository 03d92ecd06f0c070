"""Reading rows: every kind of file, the hub, and what is said when it does not work."""

import csv
import gzip
import hashlib
import json
import sys
from types import MappingProxyType, ModuleType, SimpleNamespace

import pytest

from fedpeft.core.errors import DataError
from fedpeft.data import load

ROWS = [{"text": "one, two\nthree", "label": 1, "score": 0.5}, {"text": "ü \u2028 ende", "label": 0, "score": None}]


def write_json_lines(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


@pytest.mark.parametrize(("name", "opener"), [("a.jsonl", open), ("a.jsonl.gz", gzip.open), ("A.JSONL.GZ", gzip.open)])
def test_json_lines_keep_their_types(tmp_path, name, opener):
    path = write_json_lines(tmp_path / name, ROWS, opener)
    assert load.read_rows(path) == ROWS
    assert load.read_rows(str(path)) == ROWS


def test_blank_lines_and_a_byte_order_mark_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert load.read_rows(path) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(("name", "opener"), [("a.csv", open), ("a.csv.gz", gzip.open)])
def test_csv_gives_strings(tmp_path, name, opener):
    with opener(tmp_path / name, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label", "score"])
        writer.writeheader()
        writer.writerows(ROWS)
    read = load.read_rows(tmp_path / name)
    assert read == [{k: "" if v is None else str(v) for k, v in row.items()} for row in ROWS]


def test_csv_fields_may_be_long_and_the_limit_is_put_back(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * (limit + 1) + "\n")
    assert len(load.read_rows(tmp_path / "a.csv")[0]["text"]) == limit + 1
    assert csv.field_size_limit() == limit


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert load.read_rows(tmp_path / "a.parquet") == ROWS
    (tmp_path / "b.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read as parquet"):
        load.read_rows(tmp_path / "b.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: install fedpeft\[data\]"):
        load.read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\nnot json\n', r"line 2 of .*a\.jsonl is not JSON \(.*'not json'"),
        ("a.jsonl", b'\n{"text": "a"}\n[1, 2]\n', r"line 3 of .*a\.jsonl is not a JSON object: '\[1, 2\]'"),
        ("a.jsonl", b"\n \n", r"a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.jsonl.gz", b'{"text": "a"}\n', r"a\.jsonl\.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12], r"a\.jsonl\.gz cannot be read"),
        ("a.csv", b"text,label\n", r"a\.csv is empty"),
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.csv", b"text,label\na,1\nb,c,0\n", r"row that ends in line 3 of .*a\.csv has 3 fields, the header 2"),
        ("a.csv", b"text,text\na,1\n", "names a column twice: text, text"),
        ("a.csv", b'text,label\n"a"b,1\n', r"line 2 of .*a\.csv is not CSV"),
        ("a.txt", b"text", r"a\.txt has an ending that is not read; use \.jsonl, \.jsonl\.gz, \.csv"),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load.read_rows(tmp_path / name)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"there is no data file .*nowhere\.jsonl"):
        load.read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        load.read_rows(tmp_path)


def test_client_files_of_a_folder_and_a_pattern(tmp_path):
    for name in ("b.jsonl.gz", "a.csv", "meta.json", ".c.csv"):
        (tmp_path / name).touch()
    assert load.client_files(tmp_path / "a.csv") is None
    found = load.client_files(tmp_path)
    assert found == {"a": tmp_path / "a.csv", "b": tmp_path / "b.jsonl.gz"}
    assert list(found) == ["a", "b"]
    assert load.client_files(str(tmp_path / "*.csv")) == {"a": tmp_path / "a.csv"}
    with pytest.raises(DataError, match="holds no data file"):
        load.client_files(tmp_path / "*.tsv")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"a\.csv and .*a\.jsonl would both be client 'a'"):
        load.client_files(tmp_path)


def test_file_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert load.file_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


class FakeSplit:
    features = MappingProxyType({"label": SimpleNamespace(names=["neg", "pos"]), "text": SimpleNamespace()})

    def __init__(self, rows):
        self.rows = rows

    def to_list(self):
        return self.rows


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets` with one data set; records how it is called."""
    module = ModuleType("datasets")
    calls = []

    def load_dataset(path, name=None, *, split):
        calls.append((path, name, split))
        if path != "owner/reviews":
            raise FileNotFoundError(f"{path} is not on the hub")
        return FakeSplit([{"text": "fine", "label": 1}, {"text": "bad", "label": 0}] if split == "train" else [])

    module.load_dataset = load_dataset
    module.get_dataset_split_names = lambda path, name=None: ["train", "test"]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("fedpeft.core.hub.hub_answers", lambda: True)
    return calls


def test_hub_rows_with_label_names(hub):
    read = load.read_hub("owner/reviews:small", "train")
    assert hub == [("owner/reviews", "small", "train")]
    assert read.rows == [{"text": "fine", "label": 1}, {"text": "bad", "label": 0}]
    assert read.labels == {"label": ("neg", "pos")}
    assert load.hub_splits("owner/reviews") == ("train", "test")


def test_hub_errors_are_clear(hub, monkeypatch):
    with pytest.raises(DataError, match=r"hub data set 'owner/none' cannot be loaded \(FileNotFoundError: .*network"):
        load.read_hub("owner/none", "train")
    with pytest.raises(DataError, match="split 'test' of hub data set 'owner/reviews' is empty"):
        load.read_hub("owner/reviews", "test")
    monkeypatch.setattr("fedpeft.core.hub.hub_answers", lambda: False)
    with pytest.raises(DataError, match=r"\(ConnectionError: \S+ does not answer, and owner/none was not downloaded"):
        load.read_hub("owner/none", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the library datasets: install fedpeft\[data\]"):
        load.read_hub("owner/reviews", "train")


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "b"))
    assert load.cache_folder(tmp_path / "a") == tmp_path / "a"
    assert load.cache_folder() == tmp_path / "b"
    monkeypatch.delenv("FEDPEFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load.cache_folder() == tmp_path / ".cache" / "fedpeft"
