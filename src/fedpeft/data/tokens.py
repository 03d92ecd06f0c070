"""Texts to token ids, once: the result is kept on disk and read from there the next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.errors import DataError
from fedpeft.core.examples import Examples
from fedpeft.data.load import cache_folder
from fedpeft.data.templates import Rendered, Template

if TYPE_CHECKING:
    from fedpeft.data.tasks import Table

_RECIPE = 1  # raise it whenever the content of a cache file changes its meaning
_CHUNK = 1000  # rows that are tokenised at once where every token's place in the text is wanted


def tokenise(
    table: Table,
    tokenizer: Callable[..., Any],
    max_length: int,
    cache: Path | None = None,
    template: Template | None = None,
    reserve: int = 0,
) -> Examples:
    """The table as token ids: special tokens added, cut to `max_length` tokens (of a pair the longer text), not padded.

    Segments are kept where there are pairs and the tokenizer tells them apart. A damaged cache file is written anew; a
    folder that cannot be used is done without. Cache files hold the texts' token ids: only their owner can read them.

    With a template a row is one sequence, whatever it has of texts; the texts are cut and the template never is. Where
    the template has a mask, `marks` is the place of that one: a mask that a text holds is a token like others. Where it
    has none, an answer is to follow, so special tokens behind the text are left out.

    Args:
        tokenizer: a tokenizer of transformers; its own `model_max_length` is an upper bound too.
        max_length: tokens per row, special tokens included.
        cache: folder of the cache files; default `$FEDPEFT_CACHE`, then `~/.cache/fedpeft`.
        template: without an answer, and with a fast tokenizer.
        reserve: tokens of `max_length` that are left free.

    Raises:
        DataError: no room for a token of text beside the special ones and the template, or a row without any token.
    """
    pair = table.pairs is not None
    max_length = min(max_length, int(getattr(tokenizer, "model_max_length", max_length))) - reserve
    special = getattr(tokenizer, "num_special_tokens_to_add", lambda pair: 0)(pair=pair)
    if template is None and max_length < special + 1 + pair:
        raise DataError(
            f"task.max_length {max_length} leaves no room for text beside {special} special tokens; "
            f"use at least {special + 1 + pair}"
        )
    identity = identity_of(tokenizer)
    filling = "" if template is None else json.dumps([*template.pieces, str(getattr(tokenizer, "mask_token", ""))])
    folder = cache_folder(cache)
    path = None
    if identity is not None and folder is not None:
        path = folder / f"tokens-{key_of(table, identity, max_length, filling)}.npz"
    stored = None if path is None else read_arrays(path, len(table))
    if stored is None:
        if template is None:
            stored = _encode(table, tokenizer, max_length)
        else:
            stored = _encode_filled(table, tokenizer, max_length, template)
        if path is not None:
            write_arrays(path, stored)
    tokens = _cut(stored["ids"], stored["lengths"])
    segments = _cut(stored["segments"], stored["lengths"]) if "segments" in stored else None
    return Examples(tokens, table.labels, segments, stored.get("marks"))


def _encode(table: Table, tokenizer: Callable[..., Any], max_length: int) -> dict[str, NDArray[Any]]:
    encoded = tokenizer(
        list(table.texts),
        None if table.pairs is None else list(table.pairs),
        truncation="longest_first",
        max_length=max_length,
        padding=False,
        add_special_tokens=True,
        return_attention_mask=False,
    )
    ids = encoded["input_ids"]
    lengths = np.fromiter((len(row) for row in ids), dtype=np.int64, count=len(ids))
    if (empty := np.flatnonzero(lengths == 0)).size:
        raise DataError(f"{empty.size} texts give no token, first: row {empty[0] + 1} of the split; drop these rows")
    arrays: dict[str, NDArray[Any]] = {"ids": _join(ids), "lengths": lengths}
    if table.pairs is not None and "token_type_ids" in encoded:
        arrays["segments"] = _join(encoded["token_type_ids"])
    return arrays


def _encode_filled(table: Table, tokenizer: Any, max_length: int, template: Template) -> dict[str, NDArray[Any]]:
    rows: list[list[int]] = []
    marks: list[int] = []
    pairs: Sequence[str | None] = table.pairs or (None,) * len(table)
    mask = str(tokenizer.mask_token) if template.masked else ""
    for start in range(0, len(table), _CHUNK):
        part = zip(table.texts[start : start + _CHUNK], pairs[start : start + _CHUNK], strict=True)
        filled = [template.render(text, pair, mask) for text, pair in part]
        encoded = tokenizer(
            [row.text for row in filled],
            truncation=False,
            padding=False,
            add_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        if encoded.encodings is None:
            raise DataError("formats with a template need a fast tokenizer; add the model's tokenizer.json")
        for row, encoding in zip(filled, encoded.encodings, strict=True):
            kept = _kept(row, encoding, max_length, tokenizer.truncation_side == "left")
            ids = encoding.ids
            rows.append([ids[i] for i in kept])
            if row.mask is not None:
                marks.append(kept.index(_mark(row.mask, encoding, tokenizer.mask_token_id)))
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    if (empty := np.flatnonzero(lengths == 0)).size:
        raise DataError(f"{empty.size} texts give no token, first: row {empty[0] + 1} of the split; drop these rows")
    arrays: dict[str, NDArray[Any]] = {"ids": _join(rows), "lengths": lengths}
    return arrays | ({"marks": np.asarray(marks, dtype=np.int64)} if template.masked else {})


def _kept(row: Rendered, encoding: Any, max_length: int, left: bool) -> list[int]:
    """Places of the tokens that stay: of the texts' own as many as there is room for, the longer one cut first."""
    kept = list(range(len(encoding.ids)))
    if row.mask is None:
        while kept and encoding.special_tokens_mask[kept[-1]]:
            kept.pop()
    over = len(kept) - max_length
    if over <= 0:
        return kept
    own = [_within(span, row.text, encoding) for span in row.spans]
    fixed = len(kept) - sum(map(len, own))
    if max_length < fixed + len(own):
        raise DataError(
            f"task.max_length leaves {max_length} tokens for a row, and the template takes {fixed} with special "
            f"tokens; use at least {fixed + len(own) - max_length} more"
        )
    gone: set[int] = set()
    for _ in range(over):
        gone.add(max(own, key=len).pop(0 if left else -1))
    return [i for i in kept if i not in gone]


def _within(span: tuple[int, int], text: str, encoding: Any) -> list[int]:
    """Places of the tokens that hold characters of a span and none of what stands around it, blanks before it aside.

    Where a tokenizer trims blanks off the places of tokens, one that is but a blank is empty and ends behind the blank.
    """
    found = []
    for i, ((start, end), special) in enumerate(zip(encoding.offsets, encoding.special_tokens_mask, strict=True)):
        if text[start:end].strip():
            start = end - len(text[start:end].lstrip())
        blank = start == end and not special and span[0] < start
        if end <= span[1] and (blank or span[0] <= start < end):
            found.append(i)
    return found


def _mark(at: int, encoding: Any, mask: int) -> int:
    """The place of the mask that begins at a character; a tokenizer may count the blank before it as a part of it."""
    for i, (start, end) in enumerate(encoding.offsets):
        if start <= at < end and encoding.ids[i] == mask:
            return i
    raise DataError("the tokenizer does not keep the mask of task.template as one token; put blanks around <mask>")


def _join(rows: Iterable[Iterable[int]]) -> NDArray[np.int32]:
    return np.fromiter((token for row in rows for token in row), dtype=np.int32)


def _cut(values: NDArray[np.int32], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int32], ...]:
    return tuple(np.split(values, np.cumsum(lengths)[:-1]))


def identity_of(tokenizer: Callable[..., Any]) -> str | None:
    """What a tokenizer's output depends on, besides the text and its length; None where that is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    content = json.loads(backend.to_str())
    for key in ("truncation", "padding"):  # set by every call, so they tell what was done last
        content.pop(key, None)
    sides = [getattr(tokenizer, name, None) for name in ("truncation_side", "model_input_names")]
    text = json.dumps([content, sides], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(table: Table, identity: str, max_length: int, filling: str) -> str:
    """The name of a table's tokens: a hash of its texts and of all that they are made with."""
    digest = hashlib.sha256(f"{_RECIPE} {identity} {max_length} {table.pairs is not None} {len(table)}".encode())
    digest.update(filling.encode())
    for text in (*table.texts, *(table.pairs or ()), *(table.responses or ())):
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def read_arrays(path: Path, rows: int) -> dict[str, NDArray[Any]] | None:
    """The arrays of a cache file, or None unless they are all there and fit together."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        ids, lengths = arrays["ids"], arrays["lengths"]
        segments, marks = arrays.get("segments", ids), arrays.get("marks", lengths - 1)
    except Exception:  # a damaged zip file raises errors of many kinds, and all mean: write it anew
        return None
    whole = lengths.shape == (rows,) and lengths.dtype == np.int64 and bool((lengths > 0).all())
    whole = whole and ids.dtype == segments.dtype == np.int32 and marks.dtype == np.int64
    whole = whole and marks.shape == (rows,) and bool(((marks >= 0) & (marks < lengths)).all())
    return arrays if whole and ids.shape == segments.shape == (int(lengths.sum()),) else None


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a cache file so that readers see all of it or nothing of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(part)
