"""Texts to token ids, once: the result is kept on disk and read from there the next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.errors import DataError
from fedpeft.core.examples import Examples
from fedpeft.data.load import cache_folder

if TYPE_CHECKING:
    from fedpeft.data.tasks import Table

_RECIPE = 1  # raise it whenever the content of a cache file changes its meaning


def tokenise(table: Table, tokenizer: Callable[..., Any], max_length: int, cache: Path | None = None) -> Examples:
    """The table as token ids: special tokens added, cut to `max_length` tokens (of a pair the longer text), not padded.

    Segments are kept where there are pairs and the tokenizer tells them apart. A damaged cache file is written anew; a
    folder that cannot be used is done without. Cache files hold the texts' token ids: only their owner can read them.

    Args:
        tokenizer: a tokenizer of transformers; its own `model_max_length` is an upper bound too.
        max_length: tokens per row, special tokens included.
        cache: folder of the cache files; default `$FEDPEFT_CACHE`, then `~/.cache/fedpeft`.

    Raises:
        DataError: no room for a token of text beside the special ones, or a row without any token.
    """
    pair = table.pairs is not None
    max_length = min(max_length, int(getattr(tokenizer, "model_max_length", max_length)))
    special = getattr(tokenizer, "num_special_tokens_to_add", lambda pair: 0)(pair=pair)
    if max_length < special + 1 + pair:
        raise DataError(
            f"task.max_length {max_length} leaves no room for text beside {special} special tokens; "
            f"use at least {special + 1 + pair}"
        )
    identity = _identity(tokenizer)
    folder = cache_folder(cache)
    path = None
    if identity is not None and folder is not None:
        path = folder / f"tokens-{_key(table, identity, max_length)}.npz"
    stored = None if path is None else _read(path, len(table))
    if stored is None:
        stored = _encode(table, tokenizer, max_length)
        if path is not None:
            _write(path, stored)
    tokens = _cut(stored["ids"], stored["lengths"])
    segments = _cut(stored["segments"], stored["lengths"]) if "segments" in stored else None
    return Examples(tokens, table.labels, segments)


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


def _join(rows: Iterable[Iterable[int]]) -> NDArray[np.int32]:
    return np.fromiter((token for row in rows for token in row), dtype=np.int32)


def _cut(values: NDArray[np.int32], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int32], ...]:
    return tuple(np.split(values, np.cumsum(lengths)[:-1]))


def _identity(tokenizer: Callable[..., Any]) -> str | None:
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


def _key(table: Table, identity: str, max_length: int) -> str:
    digest = hashlib.sha256(f"{_RECIPE} {identity} {max_length} {table.pairs is not None} {len(table)}".encode())
    for text in (*table.texts, *(table.pairs or ())):
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _read(path: Path, rows: int) -> dict[str, NDArray[Any]] | None:
    """The arrays of a cache file, or None unless they are all there and fit together."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        ids, lengths = arrays["ids"], arrays["lengths"]
        segments = arrays.get("segments", ids)
    except Exception:  # a damaged zip file raises errors of many kinds, and all mean: write it anew
        return None
    whole = lengths.shape == (rows,) and lengths.dtype == np.int64 and bool((lengths > 0).all())
    whole = whole and ids.dtype == segments.dtype == np.int32
    return arrays if whole and ids.shape == segments.shape == (int(lengths.sum()),) else None


def _write(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
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
