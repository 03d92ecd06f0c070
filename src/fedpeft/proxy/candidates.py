"""Servers that give the likeliest tokens of one position a call: rows keep their ids and send the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from fedpeft.core.errors import RequestError
from fedpeft.proxy import demands
from fedpeft.proxy.blackbox import BackendError, CannotDo, Caps, Labels, Scores, TopK, Want

Found = dict[int, float]  # log-probability by token
SLACK = 1e-3  # by which probabilities may sum to more than one


class Asked(Protocol):
    """A server that scores the position behind each text."""

    @property
    def caps(self) -> Caps: ...

    def ask(self, texts: Sequence[Sequence[int]], want: TopK | Labels) -> list[Found]:
        """At least the wanted tokens of each text. Raises BackendError, CannotDo."""
        ...


class CandidateSession:
    """A session over a server without sessions."""

    def __init__(self, model: Asked, prompts: Sequence[Sequence[int]], want: Want) -> None:
        demands.check_open(model.caps, prompts, want)
        assert isinstance(want, TopK | Labels), "a server without full rows was refused these"
        self._model, self._want = model, want
        self._texts = [list(map(int, prompt)) for prompt in prompts]
        self._closed = False
        self.first = self._asked()

    def scores(self, new: Sequence[Sequence[int]]) -> Scores:
        """See `Session.scores`."""
        if self._closed:
            raise RequestError("the session is closed; open another")
        demands.check_new(self._model.caps, list(map(len, self._texts)), new)
        self._texts = [[*own, *map(int, more)] for own, more in zip(self._texts, new, strict=True)]
        return self._asked()

    def rollback(self, n: int) -> None:
        """Refused. Raises CannotDo."""
        caps = self._model.caps
        raise CannotDo(caps.identity, "taking tokens back", "it keeps no texts", "set proxy.speculate to 0")

    def keep(self, rows: Sequence[int]) -> None:
        """See `Session.keep`."""
        demands.check_rows(rows, len(self._texts))
        self._texts = [self._texts[row] for row in rows]

    def close(self) -> None:
        """See `Session.close`."""
        self._closed = True

    def _asked(self) -> Scores:
        found = self._model.ask(self._texts, self._want)
        return gathered(found, self._want, self._model.caps.identity)


def gathered(found: Sequence[Found], want: TopK | Labels, identity: str) -> Scores:
    """What a server gave, as (rows, 1, n).

    The k likeliest stand in falling order, of equal ones the lower id first; labels in their order. How precise the
    server's model is, nobody knows: `exact` is False.

    Raises:
        BackendError: fewer tokens than were wanted, or values that are no log-probabilities.
    """
    rows: list[list[tuple[int, float]]] = []
    for own in found:
        if isinstance(want, Labels):
            if missing := [i for i in want.ids if i not in own]:
                raise BackendError(f"{identity} gave no score of token {missing[0]}, which was asked for")
            rows.append([(i, own[i]) for i in want.ids])
            continue
        best = sorted(own.items(), key=lambda item: (-item[1], item[0]))[: want.k]
        if len(best) < want.k:
            raise BackendError(
                f"{identity} gave {len(best)} candidates where {want.k} were asked for; let it give more, or set "
                "proxy.top_k to what it gives"
            )
        rows.append(best)
    values = torch.tensor([[value for _, value in own] for own in rows], dtype=torch.float32)[:, None]
    ids = torch.tensor([[i for i, _ in own] for own in rows], dtype=torch.int64)[:, None]
    mass = values.double().exp().sum(dim=-1)
    if bool((mass > 1 + SLACK).any()) or bool(values.isnan().any()):
        raise BackendError(
            f"{identity} gave scores that are no log-probabilities: they sum to {float(mass.max()):.4g}; with vLLM use "
            "--logprobs-mode raw_logprobs"
        )
    return Scores(values, ids, mass.clamp(max=1.0).float(), False)
