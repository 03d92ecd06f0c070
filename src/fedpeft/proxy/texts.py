"""Tokens that come one by one as text that can be shown at once: whole characters, and nothing behind a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"  # what bytes that are no whole character decode to


class Writer:
    """The text of one answer.

    Text is held back while it ends in the middle of a character, or in what may become a stop text.

    Args:
        tokenizer: of transformers; None: there is no text.
        stop: the text ends before the first of these.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._begin = self._read = 0  # where the window begins, and how far its text is known
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """What can be shown now, and whether a stop text was reached."""
        if self._tokenizer is None:
            return "", False
        self._ids.append(token)
        known, now = self._text(self._begin, self._read), self._text(self._begin, len(self._ids))
        if len(now) > len(known) and not now.endswith(_HALF):
            self._held += now[len(known) :]
            self._begin, self._read = self._read, len(self._ids)
        return self._release(self._unsure())

    def flush(self) -> tuple[str, bool]:
        """What was held back, half characters included, and whether a stop text was reached in it."""
        if self._tokenizer is None:
            return "", False
        known, now = self._text(self._begin, self._read), self._text(self._begin, len(self._ids))
        self._held += now[len(known) :]
        self._begin, self._read = self._read, len(self._ids)
        return self._release(0)

    def _text(self, begin: int, end: int) -> str:
        ids = self._ids[begin:end]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _unsure(self) -> int:
        """How many characters at the end may begin a stop text."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stop):
                return n
        return 0

    def _release(self, unsure: int) -> tuple[str, bool]:
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        end = min(places) if places else len(self._held) - unsure
        shown, self._held = self._held[:end], "" if places else self._held[end:]
        return shown, bool(places)
