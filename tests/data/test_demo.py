"""The demo task: what every Python must give, splits, bundles, the cache, and the model files in the package."""

import ast
import hashlib
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

from fedpeft.core.errors import DataError
from fedpeft.data import demo

ASSETS = Path(demo.__file__).parents[1] / "assets" / "demo"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def task(cache: Path) -> demo.DemoTask:
    return demo.load_demo(cache)


def all_rows(task: demo.DemoTask) -> list[dict[str, str]]:
    return [*task.train, *task.validation, *task.test]


def test_task_has_enough_rows_of_every_topic(task: demo.DemoTask) -> None:
    rows = all_rows(task)
    assert len(rows) >= 5_000
    assert task.labels == demo.LABELS and len(demo.LABELS) == 7
    for split in (task.train, task.validation, task.test):
        assert {row["label"] for row in split} == set(demo.LABELS)
    for share, split in ((0.7, task.train), (0.1, task.validation), (0.2, task.test)):
        assert len(split) / len(rows) == pytest.approx(share, abs=0.03)
    assert max(Counter(row["label"] for row in rows).values()) / len(rows) < 0.25


def test_rows_have_the_promised_fields_and_length(task: demo.DemoTask) -> None:
    for row in all_rows(task):
        assert row.keys() == {"text", "label", "module", "bundle"}
        assert len(row["text"]) >= 24
        assert row["text"] == " ".join(row["text"].split())


def test_no_text_occurs_twice_ignoring_case(task: demo.DemoTask) -> None:
    texts = [row["text"].lower() for row in all_rows(task)]
    assert len(texts) == len(set(texts))


def test_topics_name_each_module_once() -> None:
    names = [name for names in demo.TOPICS.values() for name in names]
    assert len(names) == len(set(names))
    removed = {"asynchat", "asyncore", "cgi", "cgitb", "distutils", "imp", "nntplib", "smtpd", "telnetlib", "tkinter"}
    assert removed.isdisjoint(names)


def test_split_is_the_hash_of_module_and_top_level_name() -> None:
    """sha256("json:dumps") begins with the six bytes that the split reads as a number in [0, 1)."""
    for module, top in (("json", "dumps"), ("http.client", "HTTPConnection"), ("enum", "")):
        number = int(hashlib.sha256(f"{module}:{top}".encode()).hexdigest()[:12], 16) / 16**12
        wanted = "train" if number < 0.7 else "validation" if number < 0.8 else "test"
        assert demo.split_of(module, top) == wanted
    assert [demo.split_of("a", str(i)) for i in range(8)] == [
        "train",
        "train",
        "test",
        "train",
        "train",
        "test",
        "train",
        "train",
    ]


def test_docstrings_know_their_top_level_name(tmp_path: Path) -> None:
    source = tmp_path / "m.py"
    source.write_text(
        '"""The docstring   of\\n    the module itself."""\n'
        "try:\n    def guarded():\n        'Defined inside of a try statement.'\n"
        "except ImportError:\n    def fallback():\n        'Defined when the import fails.'\n"
        "class Outer:\n    '''A class that has one method.'''\n"
        "    async def method(self):\n        'A method of the outer class.'\n"
        "    def short(self):\n        'Too short.'\n"
    )
    assert list(demo.extract_docstrings(source)) == [
        ("", "The docstring of the module itself."),
        ("guarded", "Defined inside of a try statement."),
        ("fallback", "Defined when the import fails."),
        ("Outer", "A class that has one method."),
        ("Outer", "A method of the outer class."),
    ]


def test_file_that_cannot_be_parsed_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def broken(:\n")
    assert list(demo.extract_docstrings(tmp_path / "m.py")) == []
    assert list(demo.extract_docstrings(tmp_path / "absent.py")) == []


def test_conflicting_texts_are_dropped_and_equal_ones_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "MIN_EXAMPLES", 1)
    monkeypatch.setattr(demo, "LABELS", ("network", "files"))
    (tmp_path / "ftplib.py").write_text(
        '"""Said by both of the modules."""\ndef f():\n    "Only about file transfer."\n'
    )
    (tmp_path / "glob.py").write_text('"""SAID by both of the modules."""\ndef f():\n    "Only about file patterns."\n')
    (tmp_path / "gzip.py").write_text('def f():\n    "Only ABOUT file patterns."\n')
    texts = [row["text"] for row in demo.build_rows(tmp_path)]
    assert texts == ["Only about file transfer.", "Only about file patterns."]


def test_bundles_are_balanced_and_mix_topics(task: demo.DemoTask) -> None:
    rows = all_rows(task)
    sizes = Counter(row["bundle"] for row in rows)
    assert len(sizes) == demo.N_BUNDLES
    assert max(sizes.values()) < 1.5 * min(sizes.values())
    topics = {bundle: {row["label"] for row in rows if row["bundle"] == bundle} for bundle in sizes}
    assert all(2 <= len(labels) <= demo.TOPICS_PER_BUNDLE for labels in topics.values())
    assert len({(row["module"], row["bundle"]) for row in rows}) == len({row["module"] for row in rows})


def test_cache_gives_the_same_task_without_reading_the_library(
    task: demo.DemoTask, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "build_rows", lambda source: pytest.fail("the cache was not used"))
    assert demo.load_demo(cache) == task
    monkeypatch.setenv("FEDPEFT_CACHE", str(cache))
    assert demo.load_demo() == task


def test_building_twice_gives_the_same_rows(task: demo.DemoTask, tmp_path: Path) -> None:
    assert demo.load_demo(tmp_path) == task


@pytest.fixture
def quick_build(task: demo.DemoTask, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the build give its known result at once."""
    (file,) = cache.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    monkeypatch.setattr(demo, "build_rows", lambda source: rows)


@pytest.mark.usefixtures("quick_build")
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "noise"])
def test_damaged_cache_is_rebuilt(damage: str, task: demo.DemoTask, cache: Path, tmp_path: Path) -> None:
    (whole,) = cache.glob("*.jsonl")
    content = whole.read_bytes()
    damaged = {
        "cut": content[:-100],
        "changed": content.replace(b'"network"', b'"tooling"', 1),
        "empty": b"",
        "noise": bytes(range(256)),
    }
    file = tmp_path / whole.name
    file.write_bytes(damaged[damage])
    assert demo.load_demo(tmp_path) == task
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.usefixtures("quick_build")
def test_cache_folder_that_cannot_be_used_is_done_without(task: demo.DemoTask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert demo.load_demo(tmp_path / "file" / "cache") == task


def test_library_without_sources_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gives 0 and none of topic network.*use a full Python"):
        demo.build_rows(tmp_path)


def test_modules_are_read_and_never_imported() -> None:
    code = (
        "import sys; from pathlib import Path; import fedpeft.data.demo as d; before = set(sys.modules)\n"
        "d.build_rows(d.standard_library()); new = set(sys.modules) - before\n"
        "assert not new & {'ftplib', 'mailbox', 'doctest', 'xmlrpc', 'wave'}, new\n"
        "assert not {'numpy', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_model_files_are_small_and_name_no_machine() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    for path in files:
        assert not any(word in path.read_bytes() for word in (b"/root/", b"/home/", b"/work/", b"/tmp/")), path


def test_model_loads_with_a_tied_head() -> None:
    from transformers import AutoModel, AutoModelForMaskedLM

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForMaskedLM.from_pretrained(ASSETS)
        encoder = AutoModel.from_pretrained(ASSETS, add_pooling_layer=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.0e6
    shape = (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size)
    assert shape == (2, 128, 4096)
    assert encoder.get_input_embeddings().weight.equal(model.get_input_embeddings().weight)


def test_tokenizer_lower_cases_and_covers_the_vocabulary() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    assert len(tokenizer) == 4096
    assert tokenizer.mask_token_id is not None and tokenizer.pad_token_id == 0
    pieces = tokenizer.tokenize("Open a SOCKET to the server.")
    assert pieces == ["open", "a", "socket", "to", "the", "server", "."]
    encoded = tokenizer("Return the file's name.", truncation=True, max_length=32)
    assert encoded["input_ids"][0] == tokenizer.cls_token_id and encoded["input_ids"][-1] == tokenizer.sep_token_id


def test_docstring_extraction_agrees_with_ast(task: demo.DemoTask) -> None:
    """An independent walk over one file finds the same texts."""
    path = demo.standard_library() / "heapq.py"
    found = [text for _, text in demo.extract_docstrings(path)]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
    texts = [" ".join((ast.get_docstring(node) or "").split()) for node in nodes]
    assert sorted(found) == sorted(text for text in texts if len(text) >= 24)
