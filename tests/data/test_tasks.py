"""Tasks: columns, labels, classes, metric; the errors of a wrong file; tokens and their cache."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fedpeft.core.errors import DataError
from fedpeft.data import demo, sources, tokens
from fedpeft.data.load import HubRows
from fedpeft.data.tasks import Table, TaskSpec, load_task, tokenise

DATA = Path(os.environ.get("FEDPEFT_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def animals(tmp_path):
    """Six training rows with three named labels and a column besides, two test rows."""
    labels = ["dog", "cat", "dog", "eel", "cat", "dog"]
    train = [{"text": f"text {i}", "label": name, "farm": i % 2} for i, name in enumerate(labels)]
    test = [{"label": "eel", "text": "wet"}, {"label": "cat", "text": "dry", "farm": 7}]
    return {"train": write(tmp_path / "zoo/train.jsonl", train), "test": write(tmp_path / "zoo/test.jsonl", test)}


def test_columns_and_labels_are_found(animals):
    task = load_task(TaskSpec(**animals))
    assert (task.name, task.metric, task.labels) == ("zoo", "accuracy", ("cat", "dog", "eel"))
    assert task.train.texts == tuple(f"text {i}" for i in range(6))
    assert task.train.labels.tolist() == [1, 0, 1, 2, 0, 1] and task.train.labels.dtype == np.int64
    assert task.train.columns == {"label": ("dog", "cat", "dog", "eel", "cat", "dog"), "farm": (0, 1, 0, 1, 0, 1)}
    assert task.train.pairs is None and task.train.files is None and task.validation is None
    assert task.test.labels.tolist() == [2, 0] and task.test.columns["farm"] == (None, 7)
    part = task.train.take(np.array([3, 0]))
    assert part.texts == ("text 3", "text 0") and part.labels.tolist() == [2, 1] and part.columns["farm"] == (1, 0)


def test_pairs_are_found_and_columns_can_be_named(tmp_path):
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "label": i, "gold": 1 - i} for i in (0, 1)]
    path = write(tmp_path / "a.jsonl", rows)
    task = load_task(TaskSpec(train=path))
    assert (task.train.texts, task.train.pairs, task.train.labels.tolist()) == (("a0", "a1"), ("b0", "b1"), [0, 1])
    assert task.train.take([1]).pairs == ("b1",)
    named = load_task(TaskSpec(train=path, text="sentence2", label="gold", name="mine"))
    assert (named.name, named.train.texts, named.train.pairs) == ("mine", ("b0", "b1"), None)
    assert named.train.labels.tolist() == [1, 0] and named.sha256 != task.sha256
    both = load_task(TaskSpec(train=path, text="sentence2", text_pair="sentence1"))
    assert both.train.texts == ("b0", "b1") and both.train.pairs == ("a0", "a1")


def test_integer_labels_are_sorted_as_numbers_from_any_kind_of_file(tmp_path):
    values = [10, 9, 2, 10]
    path = write(tmp_path / "a.jsonl", [{"text": "t", "label": v} for v in values])
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *(["t", v] for v in values)])
    floats = write(tmp_path / "b.jsonl", [{"text": "t", "label": float(v)} for v in values])
    read = [load_task(TaskSpec(train=str(p))) for p in (path, tmp_path / "a.csv", floats)]
    for task in read:
        assert task.labels == ("2", "9", "10") and task.train.labels.tolist() == [2, 1, 0, 2]
    assert len({task.sha256 for task in read}) == 1


def test_label_names_from_the_spec_then_from_meta_json(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "t", "label": v} for v in (1, 0, 1)])
    (tmp_path / "meta.json").write_text('{"labels": ["no", "yes"], "metric": "macro_f1"}')
    task = load_task(TaskSpec(train=path))
    assert (task.labels, task.metric, task.train.labels.tolist()) == (("no", "yes"), "macro_f1", [1, 0, 1])
    task = load_task(TaskSpec(train=path, labels=["bad", "good", "odd"], metric="matthews"))
    assert (task.labels, task.metric) == (("bad", "good", "odd"), "matthews")
    by_name = load_task(TaskSpec(train=path, labels=("1", "0")))  # names win over indices
    assert by_name.train.labels.tolist() == [0, 1, 0]
    for content in ('{"labels": "no"}', "[]", '{"labels": ["a", "a"]}', "{", '{"labels": [], "metric": "bleu"}'):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(DataError, match=r"meta\.json"):
            load_task(TaskSpec(train=path))


def test_the_metric_that_goes_with_a_known_folder_or_name(tmp_path, animals):
    rows = [{"text": "t", "label": v} for v in (0, 1)]
    expected = {"cola": "matthews", "mrpc": "acc_f1", "rte": "accuracy"}
    assert {n: load_task(TaskSpec(train=write(tmp_path / n / "a.jsonl", rows))).metric for n in expected} == expected
    assert load_task(TaskSpec(train=write(tmp_path / "a.jsonl", rows), name="glue:cola")).metric == "matthews"
    with pytest.raises(DataError, match="acc_f1 is for two labels, the task has 3"):
        load_task(TaskSpec(**animals, metric="acc_f1"))


def test_classes_keep_and_renumber(animals):
    named = load_task(TaskSpec(**animals, classes=["eel", "cat"]))
    assert named.labels == ("cat", "eel") and named.train.texts == ("text 1", "text 3", "text 4")
    assert named.train.labels.tolist() == [0, 1, 0] and named.test.labels.tolist() == [1, 0]
    first = load_task(TaskSpec(**animals, classes=2))
    assert first.labels == ("cat", "dog") and len(first.train) == 5 and first.test.texts == ("dry",)
    with pytest.raises(DataError, match=r"asks for fox; the task has 3: cat, dog, eel"):
        load_task(TaskSpec(**animals, classes=["cat", "fox"]))
    with pytest.raises(DataError, match="asks for 4 labels; the task has 3"):
        load_task(TaskSpec(**animals, classes=4))


def test_limit_is_a_sample_in_file_order_the_same_every_time(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": str(i), "label": i % 2} for i in range(500)])
    task, again = (load_task(TaskSpec(train=path, test=path, limit=50)) for _ in range(2))
    numbers = [int(t) for t in task.train.texts]
    assert len(set(numbers)) == 50 and numbers == sorted(numbers) and numbers != list(range(50))
    assert again.train.texts == task.train.texts and len(task.test) == 500
    assert len(load_task(TaskSpec(train=path, limit=999)).train) == 500


def test_one_file_per_client(tmp_path):
    for client in ("north", "south"):
        write(tmp_path / f"{client}.jsonl", [{"text": client, "label": v} for v in (0, 1)])
    task = load_task(TaskSpec(train=str(tmp_path)))
    assert task.files == ("north", "south") and task.train.files == ("north", "north", "south", "south")
    assert task.train.take([2]).files == ("south",)
    write(tmp_path / "south.jsonl", [{"text": "t", "label": 1}, {"text": None, "label": 1}])
    with pytest.raises(DataError, match=r"row 2 of data file .*south\.jsonl: column 'text' is None"):
        load_task(TaskSpec(train=str(tmp_path / "*.jsonl")))


def test_the_demo(monkeypatch):
    rows = [{"text": f"t{i}", "label": demo.LABELS[i % 7], "module": "m", "bundle": f"b{i % 3}"} for i in range(14)]
    monkeypatch.setattr(demo, "load_demo", lambda: demo.DemoTask(rows, rows[:7], rows[:3]))
    task = load_task(TaskSpec(name="demo"))
    assert (task.name, task.labels, task.metric) == ("demo", demo.LABELS, "accuracy")
    assert [len(t) for t in (task.train, task.validation, task.test)] == [14, 7, 3]
    assert task.train.labels.tolist() == [i % 7 for i in range(14)] and task.train.columns["bundle"][4] == "b1"


def test_a_hub_data_set(monkeypatch):
    read = []

    def read_hub(name, split):
        read.append((name, split))
        return HubRows([{"text": "t", "label": v} for v in (1, 0)], {"label": ("bad", "good")})

    monkeypatch.setattr(sources, "hub_splits", lambda name: ("train", "test"))
    monkeypatch.setattr(sources, "read_hub", read_hub)
    task = load_task(TaskSpec(name="owner/reviews"))
    assert read == [("owner/reviews", "train"), ("owner/reviews", "test")]
    assert task.labels == ("bad", "good") and task.train.labels.tolist() == [1, 0] and task.validation is None
    load_task(TaskSpec(name="owner/reviews", validation="dev", test="train"))
    assert read[2:] == [("owner/reviews", s) for s in ("train", "dev", "train")]


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        ([{"text": "a", "label": 0}], None, {}, "has a single label, '0'"),
        ([{"body": "a", "label": 0}], None, {}, r"has no column 'text' \(task\.text\); it has: body, label"),
        ([{"text": "a", "y": 0}], None, {}, r"has no column 'label' \(task\.label\); it has: text, y"),
        ([{"text": "a", "label": 0}], None, {"text_pair": "b"}, r"no column 'b' \(task\.text_pair\)"),
        ([{"text": "a", "label": 0}, {"text": 3, "label": 1}], None, {}, r"row 2 of .*a\.jsonl: column 'text' is 3"),
        ([{"text": "\ud800", "label": 0}, {"text": "", "label": 1}], None, {}, "row 1 .* half of a surrogate pair"),
        ([{"text": "a", "label": 0}, {"text": "a"}], None, {}, "row 2 .* has the label None"),
        ([{"text": "a", "label": 0}, {"text": "a", "label": 0.5}], None, {}, "row 2 .* has the label 0.5"),
        ([{"text": "a", "label": 0}, {"text": "a", "label": 2}], None, {"labels": ["x", "y"]}, "label 2 is out of"),
        ([{"text": "a", "label": 0}, {"text": "a", "label": -1}], None, {"labels": ["x", "y"]}, "label -1 is out of"),
        ([{"text": "a", "label": "z"}], None, {"labels": ["x", "y"]}, "row 1 .* label 'z' is not one of the 2 .*x, y"),
        (
            [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}],
            [{"text": "a", "label": "x"}, {"text": "a", "label": "z"}],
            {},
            r"row 2 of .*b\.jsonl: label 'z' is not one of the 2 labels",
        ),
        (
            [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}],
            [{"words": "a", "label": "x"}],
            {},
            r"b\.jsonl has no column 'text' \(task\.text\); it has: words, label",
        ),
    ],
)
def test_errors_name_row_and_value(tmp_path, train, test, options, message):
    files = {"train": write(tmp_path / "a.jsonl", train)}
    if test:
        files["test"] = write(tmp_path / "b.jsonl", test)
    with pytest.raises(DataError, match=message):
        load_task(TaskSpec(**files, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"task\.train and task\.name are both null"),
        ({"format": "clozed"}, "format 'clozed' does not exist; there are: head, cloze, verbalizer"),
        ({"template": "{text} <mask>"}, r"task.template belongs to the formats cloze, verbalizer and generate"),
        ({"metric": "bleu"}, "metric 'bleu' does not exist; there are: accuracy, macro_f1, matthews, acc_f1"),
        ({"max_length": 2}, "max_length is 2"),
        ({"limit": 0}, "limit is 0"),
        ({"labels": ["a", "a", "b"]}, "labels is .* needs at least two different"),
        ({"labels": []}, "labels is"),
        ({"classes": 1}, "classes is 1"),
        ({"classes": ["a"]}, "classes is"),
    ],
)
def test_problems_of_the_spec_itself(options, message):
    with pytest.raises(DataError, match=message):
        load_task(TaskSpec(**({"name": "demo"} if options else {}), **options))


def test_all_problems_come_at_once():
    assert len(TaskSpec(format="x", metric="y", limit=-1).problems()) == 4
    assert TaskSpec(name="demo", classes=("a", "b"), labels=["a", "b", "c"]).problems() == []


@pytest.mark.parametrize("name", ["cola", "mr", "mrpc", "rte", "trec"])
def test_real_data(name):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}")
    task = load_task(TaskSpec(train=str(folder / "train.jsonl.gz"), test=str(folder / "test.jsonl.gz")))
    meta = json.loads((folder / "meta.json").read_text())
    assert list(task.labels) == meta["labels"]
    for split in ("train", "test"):
        assert np.bincount(task.split(split).labels).tolist() == meta["label_counts"][split]
    assert (task.train.pairs is not None) == (name in ("mrpc", "rte"))


# --- tokens -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """A word-level tokenizer with BERT's frame; its backend's own settings pad and cut, as MiniLM's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    backend.enable_padding(length=9)
    backend.enable_truncation(4)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names, model_max_length=16
    )


class Counted:
    """A tokenizer that counts how often it is asked."""

    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **options):
        self.calls += 1
        return self.inner(*args, **options)


def table(texts, pairs=None):
    return Table(tuple(texts), None if pairs is None else tuple(pairs), np.arange(len(texts)))


CLS, SEP, A, B, C, D = 2, 3, 4, 5, 6, 7


def test_tokens_by_hand(tokenizer, tmp_path):
    examples = tokenise(table(["a b c d", "", "d z"]), tokenizer, 5, tmp_path)
    assert [t.tolist() for t in examples.tokens] == [[CLS, A, B, C, SEP], [CLS, SEP], [CLS, D, 1, SEP]]
    assert examples.labels.tolist() == [0, 1, 2] and examples.segments is None
    assert {t.dtype for t in examples.tokens} == {np.dtype(np.int32)}


def test_of_a_pair_the_longer_text_is_cut(tokenizer, tmp_path):
    examples = tokenise(table(["a b c d", "a"], ["d", "b c d"]), tokenizer, 6, tmp_path)
    assert [t.tolist() for t in examples.tokens] == [[CLS, A, B, SEP, D, SEP], [CLS, A, SEP, B, C, SEP]]
    assert [s.tolist() for s in examples.segments] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]


def test_the_cache_is_used_and_keyed_by_everything_that_matters(tokenizer, tmp_path):
    counted = Counted(tokenizer)
    first = tokenise(table(["a b", "c"], ["d", "e f"]), counted, 8, tmp_path)
    second = tokenise(table(["a b", "c"], ["d", "e f"]), counted, 8, tmp_path)
    assert counted.calls == 1
    for one, two in ((first.tokens, second.tokens), (first.segments, second.segments)):
        assert [x.tolist() for x in one] == [x.tolist() for x in two]
    tokenise(table(["a b", "c"], ["d", "e f"]), counted, 7, tmp_path)
    tokenise(table(["a b", "cd"], ["", "e f"]), counted, 8, tmp_path)
    tokenise(table(["a b", "c", "d", "e f"]), counted, 8, tmp_path)
    tokenise(table(["a b", "c"], ["e f", "d"]), counted, 8, tmp_path)
    assert counted.calls == 5
    before = tokenizer.truncation_side
    tokenizer.truncation_side = "left"
    tokenise(table(["a b", "c"], ["d", "e f"]), counted, 8, tmp_path)
    tokenizer.truncation_side = before
    assert counted.calls == 6
    files = list(tmp_path.iterdir())
    assert len(files) == 6 and {f.stat().st_mode & 0o077 for f in files} == {0}


def test_a_damaged_cache_is_built_anew(tokenizer, tmp_path):
    counted = Counted(tokenizer)
    rows = table(["a b", "c"])
    expected = [t.tolist() for t in tokenise(rows, counted, 8, tmp_path).tokens]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = [b"", b"nonsense", whole[: len(whole) // 2], whole.replace(b"\x02\x00\x00\x00", b"\x07\x00\x00\x00")]
    for n, content in enumerate(damaged, 2):
        assert content != whole
        path.write_bytes(content)
        assert [t.tolist() for t in tokenise(rows, counted, 8, tmp_path).tokens] == expected
        assert counted.calls == n and path.read_bytes() == whole
    np.savez(path, ids=np.arange(3, dtype=np.int32), lengths=np.array([2, 2]))  # readable, but not whole
    assert [t.tolist() for t in tokenise(rows, counted, 8, tmp_path).tokens] == expected


def test_no_cache_is_no_error(tokenizer, tmp_path):
    (tmp_path / "file").touch()
    examples = tokenise(table(["a"]), tokenizer, 8, tmp_path / "file" / "below")
    assert examples.tokens[0].tolist() == [CLS, A, SEP]

    def plain(texts, pairs, **options):  # no backend: what it depends on is not known
        return {"input_ids": [[len(t)] for t in texts]}

    assert tokenise(table(["abc"]), plain, 8, tmp_path).tokens[0].tolist() == [3]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_length_limits(tokenizer, tmp_path):
    assert tokenise(table(["a " * 40]), tokenizer, 512, tmp_path).lengths.tolist() == [16]  # model_max_length
    with pytest.raises(DataError, match="max_length 4 leaves no room for text beside 3 special tokens; use at least 5"):
        tokenise(table(["a"], ["b"]), tokenizer, 4, tmp_path)
    with pytest.raises(DataError, match="1 texts give no token, first: row 2"):
        tokenise(table(["a", ""]), lambda texts, pairs, **options: {"input_ids": [list(t) for t in texts]}, 8, tmp_path)


def test_rows_equal_those_of_the_backend_alone(tokenizer, tmp_path):
    """An independent way: every row by itself through the `tokenizers` library."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), size=n)) for n in rng.integers(1, 30, size=50)]
    got = tokenise(table(texts), tokenizer, 12, tmp_path)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(12)
    assert [t.tolist() for t in got.tokens] == [backend.encode(text).ids for text in texts]
    assert tokens.tokenise is tokenise
