"""Prose and code of the standard library, apart; splits that depend on names alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.data.demo import standard_library
from fedpeft.data.library import docstrings, read_library, split_of

SOURCE = '''#!/usr/bin/env python
"""What it is.

More of it."""
import os  # stays with its code


class A(dict):
    """A class, in two sentences. The second is left out.

    And a paragraph."""

    # a comment
    # of two lines
    x = "# no comment"

    @property
    def f(self, a: int = 1, *, b="x\\ny") -> int:
        \'\'\'One
        sentence\'\'\'
        return """no docstring"""  # noqa

    async def g(self):
        """"""
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.py", "b/c.py", "test/d.py", "b/tests/e.py", "site-packages/f.py", "idlelib/g.py", "h.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SOURCE)
    (tmp_path / "broken.py").write_text("print 'old'")
    (tmp_path / "large.py").write_text(SOURCE + "#" * 200_000)
    return tmp_path


def test_prose_and_code_share_no_line(folder: Path) -> None:
    found = read_library(folder)
    assert [file.name for file in found] == ["a.py", "b/c.py"]
    assert found[0].prose == (
        "/usr/bin/env python",
        "What it is.\n\nMore of it.",
        "A class, in two sentences. The second is left out.\n\nAnd a paragraph.",
        "a comment\nof two lines",
        "One\nsentence",
    )
    assert found[0].code.splitlines() == [
        "import os  # stays with its code",
        "class A(dict):",
        '    x = "# no comment"',
        "    @property",
        '    def f(self, a: int = 1, *, b="x\\ny") -> int:',
        '        return """no docstring"""  # noqa',
        "    async def g(self):",
    ]


def test_heads_and_first_sentences() -> None:
    assert list(docstrings(SOURCE.encode())) == [
        ("class A(dict):", "A class, in two sentences."),
        ("def f(self, a: int=1, *, b='x\\ny') -> int:", "One sentence"),
    ]
    assert list(docstrings(b"print 'old'")) == []


def test_a_split_depends_on_the_name_alone(folder: Path) -> None:
    splits = {name: split_of(name) for name in ("json/decoder.py", "calendar.py", "bz2.py", "argparse.py")}
    assert splits == {"json/decoder.py": "validation", "calendar.py": "test", "bz2.py": "test", "argparse.py": "train"}
    names = [f"{i}.py" for i in range(4000)]
    shares = {split: sum(split_of(name) == split for name in names) / 4000 for split in ("test", "validation")}
    assert shares == pytest.approx({"test": 0.15, "validation": 0.10}, abs=0.02)
    assert {f.split for f in read_library(folder, "train")} <= {"train"}
    assert sum(len(read_library(folder, split)) for split in ("train", "validation", "test")) == 2


def test_the_running_library_has_held_out_code() -> None:
    files = read_library(standard_library(), "validation")
    assert sum(len(file.code) > 4000 for file in files) >= 10
    assert all(file.split == "validation" for file in files)
