"""The embedded demo task: which of seven topics does a docstring of the standard library talk about?

No text is shipped. The docstrings are read with ``ast`` from the source files of the running interpreter the first
time they are wanted (a few seconds) and kept in a cache; no module is imported for it. What the task is: real English
of programmers, about 5,500 short texts in seven unequal classes, ready-made non-IID clients. What it is not: a
benchmark to compare with the literature, since its text differs a little from one Python version to the next.
"""

import ast
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, str]

MIN_CHARACTERS = 24
MIN_EXAMPLES = 5_000
N_BUNDLES = 24
TOPICS_PER_BUNDLE = 3
VALIDATION_FROM, TEST_FROM = 0.7, 0.8  # where the hash, as a number in [0, 1), leaves train and validation

# Top-level modules and packages that 3.11, 3.12 and 3.13 have on every distribution (so no tkinter and nothing that
# 3.12 or 3.13 removed). Files that only some versions have (_pydatetime) stand beside the one they replace. Modules
# that straddle two topics are left out (pydoc, selectors, socketserver, wsgiref and a few more).
TOPICS: dict[str, tuple[str, ...]] = {
    "network": (
        *("ftplib", "http", "imaplib", "ipaddress", "netrc", "poplib", "smtplib", "socket", "ssl", "urllib"),
        *("webbrowser", "xmlrpc"),
    ),
    "text": (
        *("_markupbase", "base64", "codecs", "configparser", "csv", "difflib", "email", "encodings", "gettext"),
        *("html", "json", "locale", "mailbox", "mimetypes", "plistlib", "pprint", "quopri", "re", "reprlib"),
        *("shlex", "string", "stringprep", "textwrap", "tomllib", "xml"),
    ),
    "concurrency": (
        *("_threading_local", "asyncio", "concurrent", "contextvars", "multiprocessing", "queue", "signal"),
        *("subprocess", "threading"),
    ),
    "files": (
        *("_compression", "_pyio", "bz2", "dbm", "filecmp", "fileinput", "fnmatch", "genericpath", "glob", "gzip"),
        *("io", "linecache", "lzma", "nturl2path", "ntpath", "os", "pathlib", "pickle", "posixpath", "shelve"),
        *("shutil", "sqlite3", "stat", "tarfile", "tempfile", "wave", "zipapp", "zipfile"),
    ),
    "language": (
        *("_collections_abc", "_py_abc", "abc", "collections", "contextlib", "copy", "copyreg", "dataclasses"),
        *("enum", "functools", "importlib", "keyword", "operator", "pkgutil", "runpy", "types", "typing"),
        *("warnings", "weakref", "zipimport"),
    ),
    "numbers": (
        *("_pydatetime", "_pydecimal", "_pylong", "bisect", "calendar", "colorsys", "datetime", "decimal"),
        *("fractions", "hashlib", "heapq", "hmac", "numbers", "random", "secrets", "statistics", "uuid", "zoneinfo"),
    ),
    "tooling": (
        *("argparse", "ast", "bdb", "cProfile", "cmd", "code", "codeop", "compileall", "dis", "doctest", "getopt"),
        *("inspect", "logging", "opcode", "optparse", "pdb", "pickletools", "platform", "profile", "pstats"),
        *("py_compile", "pyclbr", "rlcompleter", "symtable", "tabnanny", "timeit", "token", "tokenize"),
        *("traceback", "tracemalloc", "unittest", "venv"),
    ),
}
LABELS: tuple[str, ...] = tuple(TOPICS)
_SKIPPED_FOLDERS = frozenset({"__pycache__", "test", "tests"})  # not every distribution ships the tests
_FIELDS = frozenset({"text", "label", "module", "bundle", "split"})


@dataclass(frozen=True)
class DemoTask:
    """The demo task, split; rows are ``{"text", "label" (a topic's name), "module", "bundle"}``."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: tuple[str, ...] = LABELS


def load_demo(cache: Path | None = None) -> DemoTask:
    """The demo task of the running interpreter, from the cache if it is there and whole, else built and cached.

    Args:
        cache: folder of the cache file; default ``$FEDPEFT_CACHE``, then ``~/.cache/fedpeft``. A damaged file is
            rebuilt; a folder that cannot be read or written is done without.

    Raises:
        fedpeft.core.errors.DataError: the installed standard library yields fewer than 5,000 examples or lacks a topic.
    """
    try:
        folder = cache or Path(os.environ.get("FEDPEFT_CACHE") or Path.home() / ".cache" / "fedpeft")
    except RuntimeError:  # an account without a home folder
        return _as_task(build_rows(standard_library()))
    source = standard_library()
    path = folder / cache_name(source)
    rows = _read_cache(path)
    if rows is None:
        rows = build_rows(source)
        _write_cache(path, rows)
    return _as_task(rows)


def standard_library() -> Path:
    """The folder of the running interpreter's pure-Python standard library."""
    return Path(os.__file__).resolve().parent


def cache_name(source: Path) -> str:
    """The cache file's name: Python version, and a hash of where the library lies and of this recipe."""
    version = ".".join(map(str, sys.version_info[:3]))
    recipe = hashlib.sha256(str(source).encode() + b"\0" + Path(__file__).read_bytes()).hexdigest()
    return f"demo-py{version}-{recipe[:12]}.jsonl"


def build_rows(source: Path) -> list[Row]:
    """All examples of the standard library in folder ``source``, with bundle and split, in order of module and line.

    Of texts that are equal after lower-casing the first is kept; if their topics differ, none is.

    Raises:
        fedpeft.core.errors.DataError: fewer than ``MIN_EXAMPLES`` rows, or a topic without any.
    """
    found: dict[str, Row] = {}
    topics: dict[str, set[str]] = {}
    for label, module, path in sorted(_find_modules(source), key=lambda item: item[1]):
        for top, text in extract_docstrings(path):
            key = text.lower()
            topics.setdefault(key, set()).add(label)
            row = {"text": text, "label": label, "module": module, "split": split_of(module, top)}
            found.setdefault(key, row)
    rows = [row for key, row in found.items() if len(topics[key]) == 1]
    _check_rows(rows, source)
    bundles = bundle_modules(rows)
    return [{**row, "bundle": bundles[row["module"]]} for row in rows]


def extract_docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ``(top-level name, text)`` for the module, class and function docstrings of a source file, outer first.

    White space is collapsed; texts under ``MIN_CHARACTERS`` are left out, and so is a file that cannot be parsed. The
    top-level name is "" for the module's own docstring.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]
    while waiting:
        node, top = waiting.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            top = top or node.name
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node, clean=False) or "").split())
            if len(text) >= MIN_CHARACTERS:
                yield top, text
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler)]
        waiting.extend((child, top) for child in reversed(children))


def split_of(module: str, top: str) -> str:
    """Train, validation or test (70/10/20) by the sha256 of ``module:top-level name``: a class is never torn apart.

    A random split by example would put methods of one class on both sides and flatter every model by some six points.
    """
    digest = hashlib.sha256(f"{module}:{top}".encode()).digest()
    place = int.from_bytes(digest[:6]) / 2**48
    return "train" if place < VALIDATION_FROM else "validation" if place < TEST_FROM else "test"


def bundle_modules(rows: Sequence[Row]) -> dict[str, str]:
    """Deal the modules into ``N_BUNDLES`` bundles of similar size with (about) three topics each; module -> bundle.

    One module per client would give each client a single label, and averaging would learn nothing. Every topic gets
    places in bundles in proportion to its rows, no bundle twice; then each module, the largest first, goes to the
    smallest bundle with a place for its topic.
    """
    topic_sizes = Counter(row["label"] for row in rows)
    places = _share_places(topic_sizes, N_BUNDLES * TOPICS_PER_BUNDLE)
    homes: dict[str, list[int]] = {}
    dealt = 0
    for label in sorted(places):
        homes[label] = [(dealt + i) % N_BUNDLES for i in range(places[label])]
        dealt += places[label]
    sizes = [0] * N_BUNDLES
    chosen: dict[str, str] = {}
    modules = Counter((row["module"], row["label"]) for row in rows)
    for (module, label), n_rows in sorted(modules.items(), key=lambda item: (-item[1], item[0])):
        home = min(homes[label], key=lambda b: (sizes[b], b))
        sizes[home] += n_rows
        chosen[module] = f"bundle-{home + 1:02d}"
    return chosen


def _share_places(sizes: Counter[str], n_places: int) -> dict[str, int]:
    """Share places in proportion to sizes: at least one each, at most ``N_BUNDLES``, by largest quotient (D'Hondt)."""
    places = dict.fromkeys(sizes, 1)
    while sum(places.values()) < n_places:
        open_labels = [label for label in places if places[label] < N_BUNDLES]
        if not open_labels:
            break
        places[max(open_labels, key=lambda label: (sizes[label] / (places[label] + 1), label))] += 1
    return places


def _find_modules(source: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield ``(topic, dotted module name, file)`` for every module of ``TOPICS`` that the library has."""
    for label, names in TOPICS.items():
        for name in names:
            for path in [source / f"{name}.py", *(source / name).rglob("*.py")]:
                parts = path.relative_to(source).with_suffix("").parts
                if path.is_file() and _SKIPPED_FOLDERS.isdisjoint(parts):
                    yield label, ".".join(parts).removesuffix(".__init__"), path


def _check_rows(rows: Sequence[Row], source: Path) -> None:
    missing = [label for label in LABELS if label not in {row["label"] for row in rows}]
    if len(rows) >= MIN_EXAMPLES and not missing:
        return
    from fedpeft.core.errors import DataError  # late: only a failure needs it

    lacking = f" and none of topic {', '.join(missing)}" if missing else ""
    raise DataError(
        f"the demo task needs {MIN_EXAMPLES} docstrings of the standard library, but {source} gives {len(rows)}"
        f"{lacking}. Its .py files seem to be missing (a stripped or zipped Python?): use a full Python 3.11 to 3.13, "
        "or give your own files in task.train."
    )


def _as_task(rows: Sequence[Row]) -> DemoTask:
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        splits[row["split"]].append({key: row[key] for key in ("text", "label", "module", "bundle")})
    return DemoTask(splits["train"], splits["validation"], splits["test"])


def _read_cache(path: Path) -> list[Row] | None:
    """The rows of a cache file, or None if it is absent, unreadable or not what ``_write_cache`` wrote."""
    try:
        checksum, _, body = path.read_bytes().partition(b"\n")
        if checksum.decode() != json.dumps({"sha256": hashlib.sha256(body).hexdigest()}):
            return None
        rows: list[Row] = [json.loads(line) for line in body.splitlines()]
    except (OSError, ValueError):
        return None
    return rows if all(row.keys() == _FIELDS for row in rows) else None


def _write_cache(path: Path, rows: Sequence[Row]) -> None:
    """Write a line with the checksum, then a line a row; readers see the old file or the new one, never a part."""
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    head = json.dumps({"sha256": hashlib.sha256(body).hexdigest()}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    except OSError:
        return
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(head + b"\n" + body)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
