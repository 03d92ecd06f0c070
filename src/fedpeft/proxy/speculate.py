"""Speculative proxy decoding: drafts from what the text said before or by the small model, checked by the large one.

Leviathan et al. 2023 (arXiv 2211.17192) with the combined model as target and the tuned small one as draft, both under
the same bias, penalties, temperature and filters. A draft x is accepted with probability min(1, c(x)/q(x)); at the
first rejection the token comes from max(c - q, 0); where all are accepted the target gives one more. So tokens have
the target's distribution, and greedy ones are those of the plain loop.

Where the last tokens stood before in the text, what followed them there is drafted first (`repeats.py`): that costs
no call of the small model, and all three models read the drafts at once. Such a draft has probability 1 under q.

Between rounds the caches hold all tokens but the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import cast

import torch
from torch import Tensor

from fedpeft.maths.logits import acceptable, draw, residual
from fedpeft.proxy.answers import Answer, Emitted, told
from fedpeft.proxy.blackbox import CannotDo, Scores, Session
from fedpeft.proxy.choosing import adjust, probabilities
from fedpeft.proxy.repeats import Repeats
from fedpeft.proxy.trio import Trio, Voices, combined, hear

SURE = 0.4  # probability below which a greedy draft ends: most such drafts would be rejected


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
        large = trio.large
        assert large is not None, "drafts are checked by a large model"
        if not large.caps.block:
            raise CannotDo(
                large.caps.identity,
                "speculation",
                "it scores one position a call",
                "leave speculate at 0, or use a model in this process or a logit server (fedpeft serve --logits)",
            )
        self._trio, self._answer, self._drafts, self._tally = trio, answer, drafts, tally
        self._voices = Voices(trio, [prompt], [tuned_prompt], True)
        self._large = cast(Session, self._voices.large)
        self._small = self._voices.small
        self._repeats = Repeats(prompt)
        self._begun = False

    def step(self) -> list[Emitted]:
        """The tokens of one round, at least one; none where the row is done."""
        if self._answer.finish is not None:
            return []
        if self._begun:
            return self._check(*self._draft())
        self._begun = True
        place = self._places(self._large.first, [self._small.first], 0)
        emitted = self._take([self._draw(adjust(place.scores, [self._answer.choice]))[0]], place)
        self._repeats.add([each.token for each in emitted])
        return emitted

    def _draft(self) -> tuple[list[int], list[Tensor], list[list[Tensor]]]:
        """Drafted tokens, what each was drawn from, and the small models' logits as far as they have read.

        The base model reads along in the same passes. A greedy draft ends where the tuned model is not sure; the
        logits serve the target there.
        """
        answer = self._answer
        most = min(self._drafts, answer.left - 1)
        if repeated := self._repeated(most):
            return repeated
        tokens: list[int] = []
        drawn_from: list[Tensor] = []
        small: list[list[Tensor]] = []
        last = answer.last
        while len(tokens) < most and last not in self._trio.ends:
            small.append(self._small.say([last]))
            adjusted = adjust(small[-1][0][:, 0, : self._trio.vocab], [answer.choice])
            if not answer.settings.temperature and float(adjusted.softmax(dim=-1).max()) < SURE:
                break
            last, shares = self._draw(adjusted)
            tokens.append(last)
            drawn_from.append(shares)
            answer.choice.note(last)
        for token in tokens:
            answer.choice.note(token, -1)
        return tokens, drawn_from, small

    def _repeated(self, most: int) -> tuple[list[int], list[Tensor], list[list[Tensor]]] | None:
        """As `_draft`, of what the text said before; None where it did not."""
        tokens = self._repeats.draft(most)
        trio = self._trio
        tokens = list(takewhile(lambda token: token < trio.vocab and token not in trio.ends, tokens))
        if not tokens:
            return None
        read = self._small.read([self._answer.last, *tokens])
        small = [[each[:, place : place + 1] for each in read] for place in range(len(tokens) + 1)]
        drawn_from = [torch.zeros(trio.vocab, dtype=torch.float64) for _ in tokens]
        for shares, token in zip(drawn_from, tokens, strict=True):
            shares[token] = 1.0
        return tokens, drawn_from, small

    def _check(self, drafts: list[int], drawn_from: list[Tensor], small: list[list[Tensor]]) -> list[Emitted]:
        """Accept drafts from the first on; then one token of the target's own."""
        read = [self._answer.last, *drafts]
        large = self._large.scores([read])
        places = self._places(large, small, 0) if small else None
        tokens = [] if places is None else self._settled(places.scores, drafts, drawn_from)
        accepted = sum(token == draft for token, draft in zip(tokens, drafts, strict=False))
        if accepted == len(drafts) and read[-1] not in self._trio.ends:
            if places is None or len(small) == len(drafts):  # behind the last draft it is asked only here
                small.append(self._small.say(read[-1:]))
                places = _Places.joined(places, self._places(large, small[-1:], len(drafts)))
            tokens.append(self._own(places.scores[len(drafts) :], tokens))
        assert places is not None, "a draft is checked where the tuned model has spoken"
        self._tally.calls += 1
        self._tally.drafted += len(drafts)
        self._tally.accepted += accepted
        emitted = self._take(tokens, places)
        if self._answer.finish is None:
            self._repeats.add([each.token for each in emitted])
            self._large.rollback(len(drafts) - accepted)
            self._small.rollback(len(small) - 1 - accepted)
        return emitted

    def _places(self, large: Scores, small: list[list[Tensor]], first: int) -> _Places:
        """What the models say together at as many places as the small ones were asked at, from one on.

        Args:
            large: at all places.
            small: by place, (1, 1, V) logits of the tuned and of the base model.
        """
        own = slice(first, first + len(small))
        ids = None if large.ids is None else large.ids[:, own]
        part = Scores(large.values[:, own], ids, large.mass[:, own], large.exact)
        heard = hear(self._trio, part, [torch.cat(each, dim=1) for each in zip(*small, strict=True)])
        scores = combined(heard.turned, [self._answer.settings] * len(small), 0)
        return _Places(scores, heard.mass[0].tolist(), heard.exact)

    def _settled(self, scores: Tensor, drafts: list[int], drawn_from: list[Tensor]) -> list[int]:
        """Accepted drafts, and a token of the target's in the place of the first that is not."""
        choice = self._answer.choice
        alike = None if choice.remembers else adjust(scores, [choice] * len(scores))
        tokens: list[int] = []
        for place, (draft, shares) in enumerate(zip(drafts, drawn_from, strict=True)):
            own = slice(place, place + 1)
            adjusted = adjust(scores[own], [choice]) if alike is None else alike[own]
            tokens.append(self._settle(adjusted, draft, shares))
            choice.note(tokens[-1])
            if tokens[-1] != draft:
                break
        for token in tokens:
            choice.note(token, -1)
        return tokens

    def _settle(self, adjusted: Tensor, draft: int, drawn_from: Tensor) -> int:
        """The draft where it is accepted, else another token."""
        choice = self._answer.choice
        if not choice.settings.temperature:
            return int(adjusted.argmax(dim=-1))
        shares = probabilities(adjusted.cpu(), [choice])[0]
        if choice.rng.random() < acceptable(shares, drawn_from, draft):
            return draft
        return draw(residual(shares, drawn_from), choice.rng.random())

    def _own(self, scores: Tensor, before: list[int]) -> int:
        """A token of the target behind accepted ones."""
        choice = self._answer.choice
        for token in before:
            choice.note(token)
        token, _ = self._draw(adjust(scores, [choice]))
        for earlier in before:
            choice.note(earlier, -1)
        return token

    def _draw(self, adjusted: Tensor) -> tuple[int, Tensor]:
        """A token of one row's scores (1, V), and the (V,) probabilities that it was drawn from."""
        choice = self._answer.choice
        if not choice.settings.temperature:
            return int(adjusted.argmax(dim=-1)), torch.empty(0)
        shares = probabilities(adjusted.cpu(), [choice])[0]
        return draw(shares, choice.rng.random()), shares

    def _take(self, tokens: list[int], places: _Places) -> list[Emitted]:
        """Tokens up to where the answer ends."""
        answer, n = self._answer, len(tokens)
        emitted: list[Emitted] = []
        words = told(places.scores[:n], tokens, [answer.settings.logprobs] * n)
        for token, (logprob, top), mass in zip(tokens, words, places.masses, strict=False):
            answer.heard(mass, places.exact)
            emitted.append(answer.take(token, logprob, top))
            if answer.finish is not None:
                break
        return emitted

    def close(self) -> None:
        """Close the row's sessions; may be called twice."""
        self._voices.close()


@dataclass(frozen=True)
class _Places:
    """What the models say together at consecutive places.

    Attributes:
        scores: (places, V_eff) combined.
        masses: probability that the large model's scores cover.
    """

    scores: Tensor
    masses: list[float]
    exact: bool

    @classmethod
    def joined(cls, before: _Places | None, last: _Places) -> _Places:
        """Both, in order."""
        if before is None:
            return last
        scores = torch.cat([before.scores, last.scores])
        return cls(scores, before.masses + last.masses, before.exact and last.exact)
