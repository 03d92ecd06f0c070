"""Text of the running interpreter's standard library: what its programmers say, apart from what they program.

Nothing is shipped and nothing imported: the sources are read with `ast`. The embedded pair was pre-trained on prose of
the files that are not held out; code was never shown to it, so code is a text that both its models have yet to learn.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpeft.data.demo import standard_library

LARGEST_BYTES = 200_000
TEST_BELOW, VALIDATION_BELOW = 0.15, 0.25  # of the hash of a file's name, as a number in [0, 1)
_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "encodings"})
_COMMENT = re.compile(r"^\s*#+!?[ \t]?(.*)$")


@dataclass(frozen=True)
class LibraryFile:
    """One source file.

    Attributes:
        name: its path in the library, with slashes.
        split: train, validation or test; it depends on the name alone, so that it is the same in every version.
        prose: docstrings and blocks of full-line comments, in order of line.
        code: all other lines that are not blank.
    """

    name: str
    split: str
    prose: tuple[str, ...]
    code: str


def read_library(source: Path | None = None, *splits: str) -> list[LibraryFile]:
    """The files of the standard library in order of name, without its tests, idlelib, encodings and largest files.

    Args:
        source: the library's folder; None: the running interpreter's.
        splits: which of train, validation and test are read; none: all.
    """
    folder = source or standard_library()
    found = []
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).parts):
        name = path.relative_to(folder).as_posix()
        split = split_of(name)
        if not _SKIPPED.isdisjoint(name.split("/")) or (splits and split not in splits):
            continue
        if path.stat().st_size < LARGEST_BYTES and (parts := _parts(path.read_bytes())) is not None:
            found.append(LibraryFile(name, split, *parts))
    return found


def split_of(name: str) -> str:
    """The split of a file of this name: about 15 in 100 are test, 10 in 100 validation."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return "test" if place < TEST_BELOW else "validation" if place < VALIDATION_BELOW else "train"


def docstrings(source: bytes) -> Iterator[tuple[str, str]]:
    """(head, first sentence of the docstring) of every documented function and class, in order of line.

    A head is the `def` or `class` statement without its body, decorators left out, as `ast` writes it: one line.
    """
    tree = _parse(source)
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)] if tree else []
    for node in sorted(nodes, key=lambda node: node.lineno):
        text = ast.get_docstring(node)
        if text and (first := " ".join(text.split("\n\n")[0].split())):
            node.decorator_list, node.body = [], [ast.Pass()]
            head = ast.unparse(node).rsplit("\n", 1)[0]
            yield head, re.split(r"(?<=[.!?]) ", first)[0]


def _parts(source: bytes) -> tuple[tuple[str, ...], str] | None:
    """(prose, code) of a file; None where it is no Python of this version."""
    tree = _parse(source)
    if tree is None:
        return None
    lines = source.decode("utf-8", "replace").splitlines()
    said: dict[int, str] = {}
    spoken: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                place = node.body[0]
                said[place.lineno] = inspect.cleandoc(text)
                spoken.update(range(place.lineno, (place.end_lineno or place.lineno) + 1))
    block: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        comment = _COMMENT.match(line) if number not in spoken else None
        if comment:
            block.append(comment[1].rstrip())
            spoken.add(number)
        elif block:
            said[number - len(block)] = "\n".join(block).strip()
            block = []
    prose = tuple(text for _, text in sorted(said.items()) if text)
    code = "\n".join(line.rstrip() for i, line in enumerate(lines, 1) if i not in spoken and line.strip())
    return prose, code


def _parse(source: bytes) -> ast.Module | None:
    try:
        with warnings.catch_warnings():  # of old escapes in strings
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError):  # lib2to3 has files for other versions, say
        return None
