"""A large model in this process behind the interface of those that nobody can open, and what such a one may lack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpeft.models.sessions import Speaker, SpeakerSession
from fedpeft.proxy.blackbox import BackendError, CannotDo, Caps, Full, Labels, Scores, TopK, Want


@dataclass
class Box:
    """A speaker as a black box.

    Attributes:
        caps: what it says that it can do; more than it says is refused.
        raw: give logits in place of log-probabilities.
        dies_after: calls of `scores` that it answers.
        calls: of `scores`, (rows, positions) each.
        open_sessions: how many are not closed.
    """

    speaker: Speaker
    caps: Caps
    raw: bool = False
    dies_after: int | None = None

    def __post_init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.open_sessions = 0

    def open(self, prompts: Sequence[Sequence[int]], want: Want) -> BoxSession:
        if isinstance(want, Full) and not self.caps.full:
            raise CannotDo(self.caps.identity, "full scores", "it gives few", "ask for fewer")
        assert len(prompts) <= self.caps.max_batch and max(map(len, prompts)) <= self.caps.max_context
        self.open_sessions += 1
        return BoxSession(self, self.speaker.open(prompts), want)


class BoxSession:
    """Scores of one speaker's session, in the form that was asked for."""

    def __init__(self, box: Box, session: SpeakerSession, want: Want) -> None:
        self._box, self._session, self._want = box, session, want
        self._closed = False

    @property
    def first(self) -> Scores:
        return self._scores(self._session.first)

    def scores(self, new: Sequence[Sequence[int]]) -> Scores:
        box = self._box
        if len(new[0]) > 1 and not box.caps.block:
            raise CannotDo(box.caps.identity, "several positions", "no block", "ask for one")
        if box.dies_after is not None and len(box.calls) >= box.dies_after:
            raise BackendError(f"{box.caps.identity} has died; start it again")
        box.calls.append((len(new), len(new[0])))
        assert max(self._session.lengths) + len(new[0]) <= box.caps.max_context
        return self._scores(self._session.logits(new))

    def _scores(self, logits: Tensor) -> Scores:
        known = logits.log_softmax(dim=-1)
        values = logits if self._box.raw else known
        if isinstance(self._want, Full):
            return Scores(values, None, torch.ones(values.shape[:2]), True)
        if isinstance(self._want, TopK):
            ids = values.topk(self._want.k, dim=-1).indices
        else:
            assert isinstance(self._want, Labels)
            ids = torch.tensor(self._want.ids).expand(*values.shape[:2], -1)
        return Scores(values.gather(-1, ids), ids, known.gather(-1, ids).exp().sum(dim=-1), True)

    def rollback(self, n: int) -> None:
        assert self._box.caps.block
        self._session.rollback(n)

    def keep(self, rows: Sequence[int]) -> None:
        self._session.keep(rows)

    def close(self) -> None:
        self._box.open_sessions -= not self._closed
        self._closed = True
        self._session.close()


def box(speaker: Speaker, raw: bool = False, dies_after: int | None = None, **caps: object) -> Box:
    """By default it can do everything, on texts as long as the model reads."""
    positions = speaker.positions or 10**6
    whole = Caps("box", None, speaker.vocab, True, speaker.vocab, True, positions, 64, True)
    return Box(speaker, replace(whole, **caps), raw, dies_after)  # type: ignore[arg-type]
