"""What a large model says about given texts, asked once and kept on disk.

Its scores of validation and of public texts never change during a run, and are the dearest part of an alpha curve and
of a distillation. They are kept beside the run, by the model's identity and a hash of the texts: whole rows where these
fit, else the likeliest candidates of each position.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.core.errors import StoreError
from fedpeft.core.model import Target
from fedpeft.core.spool import write_at
from fedpeft.proxy.blackbox import BlackBoxLM, Caps, Full, Scores, Session, Want
from fedpeft.proxy.demands import check_scorable

MOST_BYTES = 2 * 2**30  # of whole rows
CANDIDATES = 128  # of a position, where whole rows take more
BATCH_SCORES = 2**25  # numbers that are asked for at once, padding included: 128 MiB
Texts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Recorded:
    """A large model that remembers what it said at every scored position of some texts.

    It is a `BlackBoxLM` itself: what is asked of it otherwise goes to the model.

    Args:
        large: who is asked; it must give several positions a call.
        sequences: token ids.
        starts: where the scored part of each begins, at least 1; a text without one (the start is its length) has one
            position, its last.
        vocab: V_eff, to which rows are cut.
        folder: where the scores are kept; None: nowhere, every question asks again.
        bits: of a kept number; 32 keeps rows exactly, 16 to 0.004 where they are above -16.
        most_bytes: above it only the `CANDIDATES` likeliest tokens of a position are kept, or nothing where `whole`.
        whole: whether whole rows are needed.

    Raises:
        CannotDo: a model that does not give scores of given texts.
    """

    large: BlackBoxLM
    sequences: Texts
    starts: Sequence[int]
    vocab: int
    folder: Path | None = None
    bits: int = 32
    most_bytes: int = MOST_BYTES
    whole: bool = True

    def __post_init__(self) -> None:
        check_scorable(self.large.caps, max(map(self._positions, range(len(self.starts))), default=1))

    @property
    def caps(self) -> Caps:
        """Those of the model."""
        return self.large.caps

    def open(self, prompts: Texts, want: Want) -> Session:
        """A session of the model."""
        return self.large.open(prompts, want)

    @property
    def size_bytes(self) -> int:
        """What whole rows take on disk."""
        return sum(map(self._positions, range(len(self.starts)))) * self.vocab * self.bits // 8

    @property
    def candidates(self) -> int | None:
        """How many tokens of a position are kept; None: all."""
        return None if self.size_bytes <= self.most_bytes or self.whole else min(CANDIDATES, self.vocab)

    def forced(self, rows: Sequence[int]) -> Target:
        """Log-probabilities at all positions of these texts, text after text.

        Returns:
            (positions, V_eff) float32, or (positions, candidates) with their ids.
        """
        if self.folder is None or (self.whole and self.size_bytes > self.most_bytes):
            found = dict(ask(self.large, self.sequences, self.starts, self.vocab, rows))
            return Target(torch.cat([found[row] for row in rows]))
        places = [place for row in rows for place in range(self._places[row], self._places[row + 1])]
        values, ids = self._kept
        logits = torch.from_numpy(values[places].astype(np.float32))
        return Target(logits, None if ids is None else torch.from_numpy(ids[places].astype(np.int64)))

    def find(self, sequence: Sequence[int], start: int) -> int | None:
        """The number of a text among those that are remembered; None: it is none of them."""
        return self._numbers.get((tuple(sequence), start))

    @cached_property
    def key(self) -> str:
        """Of the model, the texts and the form in which the scores are kept."""
        texts = [[list(map(int, own)), int(start)] for own, start in zip(self.sequences, self.starts, strict=True)]
        form = [self.large.caps.identity, self.vocab, self.bits, self.candidates, texts]
        return hashlib.sha256(json.dumps(form).encode()).hexdigest()

    def _positions(self, row: int) -> int:
        return max(1, len(self.sequences[row]) - self.starts[row])

    @cached_property
    def _places(self) -> list[int]:
        return [0, *itertools.accumulate(map(self._positions, range(len(self.starts))))]

    @cached_property
    def _numbers(self) -> dict[tuple[tuple[int, ...], int], int]:
        texts = zip(self.sequences, self.starts, strict=True)
        return {(tuple(map(int, own)), int(start)): row for row, (own, start) in enumerate(texts)}

    @cached_property
    def _kept(self) -> tuple[NDArray[np.floating], NDArray[np.int32] | None]:
        """The file's rows, asked for and written where there is none yet; it is read as it is needed."""
        assert self.folder is not None, "there is a place to keep them"
        n = self.candidates or self.vocab
        kind: Any = np.float16 if self.bits == 16 else np.float32
        shape = (self._places[-1], n)
        path = self.folder / f"{self.key[:32]}.scores"
        ids_path = path.with_suffix(".ids") if self.candidates else None
        paths = [path] if ids_path is None else [path, ids_path]
        if not all(own.is_file() for own in paths):
            self._write(path, ids_path, kind, shape)
        values = np.memmap(path, dtype=kind, mode="r", shape=shape)
        return values, None if ids_path is None else np.memmap(ids_path, dtype=np.int32, mode="r", shape=shape)

    def _write(self, path: Path, ids_path: Path | None, kind: Any, shape: tuple[int, int]) -> None:
        """Drafts that take their names when they are complete, so that a kill leaves no half of one.

        Rows are written and not mapped: a full disk answers a write with an error, and a mapped page with SIGBUS.
        """
        drafts = {own: own.with_name(f"{own.name}.tmp") for own in (path, ids_path) if own is not None}
        kinds = [np.dtype(kind), np.dtype(np.int32)]
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with ExitStack() as stack:
                files = [stack.enter_context(_draft(draft)) for draft in drafts.values()]
                for row, scores in ask(self.large, self.sequences, self.starts, self.vocab):
                    told = [scores] if ids_path is None else scores.topk(shape[1], dim=1)
                    for file, dtype, part in zip(files, kinds, told, strict=False):
                        place = self._places[row] * shape[1] * dtype.itemsize
                        write_at(file, part.numpy().astype(dtype).tobytes(), place)
                for file in files:
                    os.fsync(file)
                for target, draft in drafts.items():
                    os.replace(draft, target)
        except OSError as error:
            raise StoreError(
                f"cannot keep what the large model said in {path.parent}: {error.strerror or error}; free space there "
                "or mend its permissions, then resume the run"
            ) from error


@contextmanager
def _draft(path: Path) -> Iterator[int]:
    """An empty file that its owner alone reads and one process alone writes; gone where it was not renamed."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"another process is writing {path} now; wait until it is done, then try again") from error
        try:
            os.ftruncate(file, 0)
            yield file
        finally:
            with suppress(FileNotFoundError):
                path.unlink()
    finally:
        os.close(file)


def ask(
    large: BlackBoxLM, sequences: Texts, starts: Sequence[int], vocab: int, rows: Sequence[int] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Texts with (positions, V_eff) log-probabilities at their scored positions, those of like length together.

    Raises:
        BackendError: the model does not answer.
    """
    lengths = {row: len(sequences[row]) - starts[row] for row in (range(len(starts)) if rows is None else rows)}
    order = sorted(lengths, key=lambda row: (lengths[row], starts[row]))
    while order:
        batch = order[:1]
        for row in order[1 : large.caps.max_batch]:
            width = max(starts[own] for own in (*batch, row)) + max(1, lengths[row])
            if width > large.caps.max_context or width * (len(batch) + 1) * vocab > BATCH_SCORES:
                break
            batch.append(row)
        order = order[len(batch) :]
        own = [sequences[row] for row in batch], [starts[row] for row in batch]
        yield from zip(batch, asked(large, *own, lambda said: said.values[..., :vocab].cpu()), strict=True)


def asked(large: BlackBoxLM, sequences: Texts, starts: Sequence[int], form: Callable[[Scores], Tensor]) -> list[Tensor]:
    """(positions, V_eff) at the scored positions of each text, in one session; shorter ones are padded behind.

    Args:
        form: (rows, positions, V_eff) of the model's scores of all tokens.
    """
    rests = [list(map(int, own[start:-1])) for own, start in zip(sequences, starts, strict=True)]
    longest = max(map(len, rests))
    session = large.open([list(map(int, own[:start])) for own, start in zip(sequences, starts, strict=True)], Full())
    try:
        parts: list[Scores] = [session.first]
        if longest:
            parts.append(session.scores([rest + [0] * (longest - len(rest)) for rest in rests]))
    finally:
        session.close()
    scores = torch.cat([form(part) for part in parts], dim=1)
    return [own[: len(rest) + 1] for own, rest in zip(scores, rests, strict=True)]
