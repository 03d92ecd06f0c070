"""The text that the demo model is trained on. None of it belongs to the demo task, whose modules are left out whole.

Code text: comments and docstrings of the standard library's other modules (its test suite, tkinter, idlelib, distutils
and the like) and the language reference in `pydoc_data`. Code words: the names and words in the code of those modules.
Prose: public-domain books. A passage or line that shares ten successive words with an example of the task is dropped.
"""

import ast
import gzip
import json
import keyword
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpeft.data.demo import TOPICS, build_rows, standard_library

SHINGLE_WORDS = 10
_TASK_MODULES = frozenset(name for names in TOPICS.values() for name in names)
_COMMENT = re.compile(rb"^\s*#+[ \t]?(.*)$")
_WORD = re.compile(r"[a-z0-9]+")
_NAME = re.compile(r"[A-Za-z][A-Za-z]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_EVERYWHERE = frozenset({*keyword.kwlist, "self", "cls", "assert", "equal", "test"})
WORDS_PER_FILE = 20_000


@dataclass(frozen=True)
class Code:
    """Two texts per file: comments with docstrings, and the words of the code; short ones are left out."""

    documents: list[str]
    words: list[str]


def read_code(source: Path | None = None) -> Code:
    """The text of every file outside the task, in order of path; `documents` ends with the pydoc topics."""
    source = source or standard_library()
    taken = {shingle for row in build_rows(source) for shingle in _shingles(row["text"])}
    seen: set[str] = set()
    seen_lines: set[str] = set()
    documents, words = [], []
    for path in sorted(source.rglob("*.py")):
        if _is_foreign(path.relative_to(source).parts):
            documents.append(_keep_new(_passages(path), taken, seen))
            words.append(_code_words(path, taken, seen_lines))
    for topic in _pydoc_topics(source):
        documents.append(_keep_new(topic.split("\n\n"), taken, seen))
    return Code([text for text in documents if len(text) >= 200], [text for text in words if len(text) >= 200])


def read_books(data: Path) -> list[str]:
    """One text per public-domain book in ``data/classic_books`` (or none, with a note, where the folder is absent)."""
    path = data / "classic_books" / "chunks.jsonl.gz"
    if not path.exists():
        print(f"no books at {path}: training on code text alone", file=sys.stderr)
        return []
    books: dict[str, list[str]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            books.setdefault(row["title"], []).append(row["text"])
    return [" ".join(" ".join(chunks).split()) for _, chunks in sorted(books.items())]


def _is_foreign(parts: tuple[str, ...]) -> bool:
    """Whether a file of the library lies outside the task's modules (tests of the task's packages do)."""
    if parts[0] in {"site-packages", "dist-packages", "__pycache__", "pydoc_data"} or "lib2to3" in parts[1:]:
        return False
    return parts[0].removesuffix(".py") not in _TASK_MODULES or "test" in parts or "tests" in parts


def _passages(path: Path) -> Iterator[str]:
    """Comment blocks and docstrings of a source file in order of line, white space collapsed."""
    try:
        code = path.read_bytes()
        tree = ast.parse(code)
    except (SyntaxError, ValueError):  # the test suite has broken files on purpose
        return
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                found.append((node.body[0].lineno, text))
    block: list[str] = []
    for number, line in enumerate([*code.splitlines(), b""], start=1):
        comment = _COMMENT.match(line)
        if comment:
            block.append(comment[1].decode("utf-8", "replace"))
        elif block:
            found.append((number, " ".join(block)))
            block = []
    for _, text in sorted(found, key=lambda item: item[0]):
        yield " ".join(text.split())


def _code_words(path: Path, taken: set[str], seen: set[str]) -> str:
    """The words of the lines of code that no earlier file had; names are split at underscores and capitals."""
    words: list[str] = []
    for line in map(str.strip, path.read_text("utf-8", "replace").splitlines()):
        if not line or line.startswith("#") or line in seen or len(words) > WORDS_PER_FILE:
            continue
        seen.add(line)
        names = [name.lower() for name in _NAME.findall(_CAMEL.sub(" ", line))]
        found = [name for name in names if name not in _EVERYWHERE]
        if len(found) < SHINGLE_WORDS or taken.isdisjoint(_shingles(" ".join(found))):
            words.extend(found)
    return " ".join(words)


def _pydoc_topics(source: Path) -> Iterator[str]:
    """The texts of `pydoc_data.topics`, read with `ast` and not imported."""
    tree = ast.parse((source / "pydoc_data" / "topics.py").read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (value.value for value in node.values if isinstance(value, ast.Constant))


def _keep_new(passages: Iterable[str], taken: set[str], seen: set[str]) -> str:
    """Join the passages that were not seen in another file and share no shingle with the task."""
    kept = []
    for passage in passages:
        text = " ".join(passage.split())
        if len(text) >= 16 and text.lower() not in seen and taken.isdisjoint(_shingles(text)):
            seen.add(text.lower())
            kept.append(text)
    return "\n".join(kept)


def _shingles(text: str) -> Iterator[str]:
    words = _WORD.findall(text.lower())
    for start in range(max(1, len(words) - SHINGLE_WORDS + 1)):
        yield " ".join(words[start : start + SHINGLE_WORDS])
