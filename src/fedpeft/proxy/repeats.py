"""Drafts that cost no call: where the last tokens stood before in the text, what followed them there.

Prompt lookup decoding (Saxena 2023): answers repeat names, code and phrases of their prompt and of themselves. The
longer the agreement, the more is drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

LEAST = 2  # tokens that must agree


class Repeats:
    """A text as it grows, with the latest place behind every pair of tokens.

    Args:
        tokens: its beginning.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._text: list[int] = []
        self._behind: dict[tuple[int, int], int] = {}
        self._earlier: int | None = None  # the place behind the last pair where it stood before
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """Go on with these tokens."""
        text = self._text
        for token in tokens:
            text.append(token)
            if len(text) >= LEAST:
                pair = (text[-2], text[-1])
                self._earlier = self._behind.get(pair)
                self._behind[pair] = len(text)

    def draft(self, most: int) -> list[int]:
        """What followed the last tokens where they stood before; as many as agreed there, and no more than `most`.

        A repetition that reaches up to the end of the text goes on round and round.
        """
        if self._earlier is None:
            return []
        text, begin = self._text, self._earlier
        agreed = LEAST
        while agreed < min(most, begin) and text[begin - 1 - agreed] == text[-1 - agreed]:
            agreed += 1
        period = len(text) - begin
        return [text[begin + place % period] for place in range(min(most, agreed))]
