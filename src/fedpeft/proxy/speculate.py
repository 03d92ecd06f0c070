"""Speculative proxy decoding: the tuned small model drafts, and one call of the large one checks all drafts.

Leviathan et al. 2023 (arXiv 2211.17192) with the combined model as target and the tuned small one as draft, both under
the same bias, penalties, temperature and filters. A draft x is accepted with probability min(1, c(x)/q(x)); at the
first rejection the token comes from max(c - q, 0); where all are accepted the target gives one more. So tokens have
the target's distribution, and greedy ones are those of the plain loop.

Between rounds the caches hold all tokens but the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.maths.logits import acceptable, draw, residual
from fedpeft.models.sessions import SpeakerSession
from fedpeft.proxy.answers import Answer, Emitted, told
from fedpeft.proxy.blackbox import CannotDo, Scores, Session
from fedpeft.proxy.choosing import adjust, probabilities
from fedpeft.proxy.trio import Heard, Trio, combined, hear


@dataclass
class Drafting:
    """What drafts were worth.

    Attributes:
        calls: of the large model, prompts not counted.
        drafted, accepted: tokens.
    """

    calls: int = 0
    drafted: int = 0
    accepted: int = 0


class Speculation:
    """One row that advances by drafts.

    Args:
        trio: all three models.
        answer: the row's.
        prompt, tuned_prompt: what the models read.
        drafts: gamma, most tokens of a draft.
        tally: counts what drafts were worth.

    Raises:
        CannotDo: a large model that scores one position at a time.
    """

    def __init__(
        self,
        trio: Trio,
        answer: Answer,
        prompt: Sequence[int],
        tuned_prompt: Sequence[int],
        drafts: int,
        tally: Drafting,
    ) -> None:
        large, tuned, base = trio.large, trio.tuned, trio.base
        assert large is not None and tuned is not None and base is not None, "drafts need all three"
        if not large.caps.block:
            raise CannotDo(
                large.caps.identity,
                "speculation",
                "it scores one position a call",
                "leave speculate at 0, or use a model in this process or a logit server (fedpeft serve --logits)",
            )
        self._trio, self._answer, self._drafts, self._tally = trio, answer, drafts, tally
        self._large: Session = large.open([prompt], trio.want)
        self._tuned: SpeakerSession = tuned.open([tuned_prompt])
        self._base: SpeakerSession = base.open([prompt])
        self._begun = False

    def step(self) -> list[Emitted]:
        """The tokens of one round, at least one; none where the row is done."""
        if self._answer.finish is not None:
            return []
        if not self._begun:
            self._begun = True
            heard = hear(self._trio, self._large.first, [self._tuned.first, self._base.first])
            scores = combined(heard, [self._answer.settings], 0)
            return [self._take(scores, self._draw(scores)[0], heard)]
        return self._check(*self._draft())

    def _draft(self) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """Drafted tokens, what each was drawn from, and the tuned model's logits behind all tokens but the last."""
        answer = self._answer
        tokens: list[int] = []
        drawn_from: list[Tensor] = []
        small: list[Tensor] = []
        last = answer.last
        while len(tokens) < min(self._drafts, answer.left - 1) and last not in self._trio.ends:
            small.append(self._tuned.logits([[last]]))
            last, shares = self._draw(small[-1][:, 0, : self._trio.vocab])
            tokens.append(last)
            drawn_from.append(shares)
            answer.choice.note(last)
        for token in tokens:
            answer.choice.note(token, -1)
        return tokens, drawn_from, small

    def _check(self, drafts: list[int], drawn_from: list[Tensor], small: list[Tensor]) -> list[Emitted]:
        """Accept drafts from the first on; then one token of the target's own."""
        read = [self._answer.last, *drafts]
        large, base = self._large.scores([read]), self._base.logits([read])
        self._tally.calls += 1
        self._tally.drafted += len(drafts)
        emitted: list[Emitted] = []
        accepted = 0
        for position in range(len(read)):
            if position == len(drafts):  # what the tuned model says behind the last draft is wanted only here
                small.append(self._tuned.logits([read[-1:]]))
            heard = hear(self._trio, _at(large, position), [small[position], base[:, position : position + 1]])
            scores = combined(heard, [self._answer.settings], 0)
            if position == len(drafts):
                emitted.append(self._take(scores, self._draw(scores)[0], heard))
                break
            token = self._settle(scores, drafts[position], drawn_from[position])
            emitted.append(self._take(scores, token, heard))
            if token != drafts[position]:
                break
            accepted += 1
            if self._answer.finish is not None:
                break
        self._tally.accepted += accepted
        if self._answer.finish is None:
            self._go_back(len(drafts), accepted)
        return emitted

    def _go_back(self, drafts: int, accepted: int) -> None:
        """The caches hold all tokens but the last again."""
        if accepted < drafts:
            self._large.rollback(drafts - accepted)
            self._base.rollback(drafts - accepted)
            self._tuned.rollback(drafts - accepted - 1)

    def _draw(self, scores: Tensor) -> tuple[int, Tensor]:
        """A token of one row's scores (1, V), and the (V,) probabilities that it was drawn from."""
        choice = self._answer.choice
        adjusted = adjust(scores, [choice])
        if not choice.settings.temperature:
            return int(adjusted.argmax(dim=-1)), torch.empty(0)
        shares = probabilities(adjusted.cpu(), [choice])[0]
        return draw(shares, choice.rng.random()), shares

    def _settle(self, scores: Tensor, draft: int, drawn_from: Tensor) -> int:
        """The draft where it is accepted, else another token."""
        choice = self._answer.choice
        adjusted = adjust(scores, [choice])
        if not choice.settings.temperature:
            return int(adjusted.argmax(dim=-1))
        shares = probabilities(adjusted.cpu(), [choice])[0]
        if choice.rng.random() < acceptable(shares, drawn_from, draft):
            return draft
        return draw(residual(shares, drawn_from), choice.rng.random())

    def _take(self, scores: Tensor, token: int, heard: Heard) -> Emitted:
        self._answer.heard(float(heard.mass[0, 0]), heard.exact)
        ((logprob, top),) = told(scores, [token], [self._answer.settings.logprobs])
        return self._answer.take(token, logprob, top)

    def close(self) -> None:
        """Close the row's sessions; may be called twice."""
        for session in (self._large, self._tuned, self._base):
            session.close()


def _at(scores: Scores, position: int) -> Scores:
    """Those behind one token."""
    own = slice(position, position + 1)
    ids = None if scores.ids is None else scores.ids[:, own]
    return Scores(scores.values[:, own], ids, scores.mass[:, own], scores.exact)
