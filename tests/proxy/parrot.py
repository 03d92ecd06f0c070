"""A black box that says one text, whatever it is asked, and then ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedpeft.proxy.blackbox import Caps, Scores, Want
from fedpeft.proxy.trio import Trio
from proxy.served import CAPS, TOKENIZER, Artefact

LONG = replace(CAPS, max_context=400)


@dataclass
class Parrot:
    """It."""

    text: str
    caps: Caps = LONG
    session: type[Said] | None = None

    def open(self, prompts: Sequence[Sequence[int]], want: Want) -> Said:
        return (self.session or Said)([*TOKENIZER(self.text)["input_ids"], 0], len(prompts))


class Said:
    """Its texts."""

    def __init__(self, tokens: list[int], rows: int) -> None:
        self.tokens, self.rows, self.place = tokens, rows, 0
        self.first = self._now()

    def _now(self) -> Scores:
        values = torch.full((self.rows, 1, 257), -20.0)
        values[:, :, self.tokens[self.place]] = -0.01
        return Scores(values, None, torch.ones(self.rows, 1), True)

    def scores(self, new: Sequence[Sequence[int]]) -> Scores:
        self.place += 1
        return self._now()

    def rollback(self, n: int) -> None:
        self.place -= n

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = len(rows)

    def close(self) -> None:
        self.rows = 0


def speaking(text: str) -> Artefact:
    """It alone, to be served."""
    return Artefact(Trio(Parrot(text), None, None, TOKENIZER, 257, frozenset({0})))
