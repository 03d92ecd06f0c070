"""The text that the pair is pre-trained on: prose of the standard library, and public-domain books beside it.

No code is in it, and no prose of the files that `data/library.py` holds out. A book that quotes a play is left out,
since Shakespeare's plays are what the pair is fine-tuned and tested on.
"""

import gzip
import json
import sys
from pathlib import Path

from fedpeft.data.library import read_library

QUOTING = frozenset({"The Picture of Dorian Gray"})  # from Romeo and Juliet, and others


def read_prose() -> list[str]:
    """Docstrings and comments of the library's files that are not held out; each passage once."""
    passages = (passage for file in read_library(None, "train") for passage in file.prose)
    return list(dict.fromkeys(passages))


def read_books(folder: Path) -> list[str]:
    """One text per book in ``folder/classic_books`` (or none, with a note, where the folder is absent)."""
    path = folder / "classic_books" / "chunks.jsonl.gz"
    if not path.exists():
        print(f"no books at {path}: training on prose of the standard library alone", file=sys.stderr)
        return []
    books: dict[str, list[str]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["title"] not in QUOTING:
                books.setdefault(row["title"], []).append(row["text"])
    return ["\n".join(chunks) for _, chunks in sorted(books.items())]
