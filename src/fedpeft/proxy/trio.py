"""The three models of proxy-tuning in step: a large one that is asked, a small one tuned, and the same one untuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedpeft.core.errors import RequestError
from fedpeft.maths.logits import combine, offsets, plausible, scatter
from fedpeft.models.sessions import Speaker, SpeakerSession
from fedpeft.proxy.blackbox import FEWEST_CANDIDATES, BlackBoxLM, CannotDo, Full, Scores, Session, TopK
from fedpeft.proxy.expert import Expert
from fedpeft.proxy.settings import Settings

CANDIDATES = 20  # of a backend that does not give the scores of all tokens

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Trio:
    """What decodes together.

    Attributes:
        large: L; None: the tuned small model answers alone.
        tuned: T; None, as is `base`: the large model answers alone.
        base: B, the small model as it was before tuning.
        tokenizer: of transformers, the same for all; None: only tokens come out, no text.
        vocab: V_eff, the number of real tokens; every row of scores is cut to it.
        ends: tokens that end an answer.
        candidates: ask the large model for so many of the likeliest tokens; None: for all where it gives them, else
            for 20.
        expert: what T alone reads around a prompt; None: it reads what the others read.

    Raises:
        RequestError: a combination that cannot decode.
        CannotDo: fewer candidates than make sense.
    """

    large: BlackBoxLM | None
    tuned: Speaker | None
    base: Speaker | None
    tokenizer: Any
    vocab: int
    ends: frozenset[int]
    candidates: int | None = None
    expert: Expert | None = None

    def __post_init__(self) -> None:
        have = tuple(model is not None for model in (self.large, self.tuned, self.base))
        if have not in ((True, True, True), (True, False, False), (False, True, False)):
            raise RequestError(
                "these models cannot decode together: give the large, the tuned and the base one, the large one alone, "
                "or the tuned one alone"
            )
        if self.vocab < 1 or any(not 0 <= end < self.vocab for end in self.ends):
            raise RequestError(f"the end tokens {sorted(self.ends)} are not among {self.vocab} tokens")
        if isinstance(self.want, TopK) and self.want.k < FEWEST_CANDIDATES:
            assert self.large is not None
            raise CannotDo(
                self.large.caps.identity,
                f"decoding from {self.want.k} candidates",
                f"wrong continuations crowd out the right one below {FEWEST_CANDIDATES}",
                "let the server give more log-probabilities (proxy.top_k), or use a backend that gives all",
            )

    @property
    def want(self) -> Full | TopK:
        """What the large model is asked for."""
        if self.large is None or (self.large.caps.full and self.candidates is None):
            return Full()
        return TopK(min(self.candidates or CANDIDATES, self.large.caps.top_k))

    @property
    def steered(self) -> bool:
        """Whether all three decode."""
        return self.large is not None and self.tuned is not None

    @property
    def name(self) -> str:
        """What answers."""
        return self.large.caps.identity if self.large is not None else self._small.name

    @property
    def _small(self) -> Speaker:
        assert self.tuned is not None, "without a large model there is a tuned one"
        return self.tuned

    def tuned_prompts(self, prompts: Prompts) -> Prompts:
        """What T reads for these prompts."""
        return prompts if self.expert is None else [self.expert.around(own) for own in prompts]

    def room(self, prompt: Sequence[int]) -> int | None:
        """Tokens of an answer that all models can read behind a prompt; None: no bound is known."""
        (tuned,) = self.tuned_prompts([prompt])
        rooms = [] if self.large is None else [self.large.caps.max_context - len(prompt)]
        for speaker, own in ((self.tuned, tuned), (self.base, prompt)):
            if speaker is not None and speaker.positions is not None:
                rooms.append(speaker.positions - len(own))
        return min(rooms, default=None)

    def large_scores(self, scores: Scores) -> Tensor:
        """(rows, positions, V_eff) z_L, minus infinity where the large model gave nothing."""
        values = scores.values if self.tuned is None else scores.values.to(self.tuned.model.device)
        if scores.ids is not None:
            return scatter(values, scores.ids.to(values.device), self.vocab)
        if values.shape[-1] < self.vocab:
            every = torch.arange(values.shape[-1], device=values.device).expand_as(values)
            return scatter(values, every, self.vocab)
        return values[..., : self.vocab]


@dataclass(frozen=True)
class Heard:
    """What the models say about next tokens.

    Attributes:
        large: (rows, positions, V_eff) z_L, or z_T where the small model answers alone.
        change: (rows, positions, V_eff) z_T - z_B; None where nothing is added.
        mass: (rows, positions) probability that the large model's scores cover.
        exact: whether they are the large model's own float32 scores.
    """

    large: Tensor
    change: Tensor | None
    mass: Tensor
    exact: bool

    @property
    def turned(self) -> Heard:
        """The same with rows for positions."""
        change = None if self.change is None else self.change.transpose(0, 1)
        return Heard(self.large.transpose(0, 1), change, self.mass.transpose(0, 1), self.exact)


class Small:
    """Sessions of the small models of a trio, of which there are two, one or none, over the same texts.

    Args:
        trio: the models.
        prompts: what the base model reads.
        tuned_prompts: what the tuned model reads.
        steer: whether they take part beside a large one.
    """

    def __init__(self, trio: Trio, prompts: Prompts, tuned_prompts: Prompts, steer: bool) -> None:
        tuned, base = trio.tuned, trio.base
        self._halves = tuned is not None and base is not None and tuned.beside(base)
        self._sessions: list[SpeakerSession] = []
        if tuned is None or not (steer or trio.large is None):
            return
        if base is not None and self._halves:
            self._sessions = [tuned.open_beside(tuned_prompts, base, prompts)]
        else:
            self._sessions = [tuned.open(tuned_prompts)] + ([] if base is None else [base.open(prompts)])

    @property
    def first(self) -> list[Tensor]:
        """(rows, 1, V) logits of each model behind the prompts."""
        return self._each([session.first for session in self._sessions])

    def say(self, tokens: Sequence[int]) -> list[Tensor]:
        """Append one token to each row; (rows, 1, V) logits of each model behind it."""
        new = [[token] for token in tokens] * (2 if self._halves else 1)
        return self._each([session.logits(new) for session in self._sessions])

    def read(self, tokens: Sequence[int]) -> list[Tensor]:
        """Append several tokens to the only row; (1, tokens, V) logits of each model behind each of them."""
        new = [list(tokens)] * (2 if self._halves else 1)
        return self._each([session.logits(new) for session in self._sessions])

    def rollback(self, n: int) -> None:
        """Take the last n tokens of every row back."""
        for session in self._sessions:
            session.rollback(n)

    def keep(self, rows: Sequence[int], of: int) -> None:
        """Go on with these of so many rows."""
        for session in self._sessions:
            session.keep([*rows, *(of + row for row in rows)] if self._halves else rows)

    def close(self) -> None:
        """Close all sessions; may be called twice."""
        for session in self._sessions:
            session.close()

    def _each(self, logits: list[Tensor]) -> list[Tensor]:
        return list(logits[0].chunk(2)) if self._halves and logits else logits


class Voices:
    """Sessions of all of a trio's models over the same texts.

    Args:
        trio: the models.
        prompts: what the large and the base model read.
        tuned_prompts: what the tuned model reads instead (`Trio.tuned_prompts`).
        steer: whether the small models take part beside a large one.

    Raises:
        RequestError: prompts that a model cannot read.
        BackendError, CannotDo: see `BlackBoxLM.open`.
    """

    def __init__(self, trio: Trio, prompts: Prompts, tuned_prompts: Prompts, steer: bool) -> None:
        self._trio = trio
        self.small = Small(trio, prompts, tuned_prompts, steer)
        self.large: Session | None = None if trio.large is None else trio.large.open(prompts, trio.want)

    @property
    def first(self) -> Heard:
        """What is said behind the prompts."""
        return hear(self._trio, None if self.large is None else self.large.first, self.small.first)

    def say(self, tokens: Sequence[int]) -> Heard:
        """Append one token to each row; what is said behind it."""
        large = None if self.large is None else self.large.scores([[token] for token in tokens])
        return hear(self._trio, large, self.small.say(tokens))

    def keep(self, rows: Sequence[int], of: int) -> None:
        """Go on with these of so many rows."""
        if self.large is not None:
            self.large.keep(rows)
        self.small.keep(rows, of)

    def close(self) -> None:
        """Close all sessions; may be called twice."""
        self.small.close()
        if self.large is not None:
            self.large.close()


def hear(trio: Trio, large: Scores | None, small: Sequence[Tensor]) -> Heard:
    """What the models say together.

    Args:
        small: (rows, positions, V) logits of the tuned and of the base model, of the tuned one alone, or of none.
    """
    if large is None:
        own = small[0][..., : trio.vocab]
        return Heard(own, None, torch.ones(own.shape[:2]), True)
    change = offsets(small[0], small[1], trio.vocab) if small else None
    return Heard(trio.large_scores(large), change, large.mass, large.exact)


def combined(heard: Heard, settings: Sequence[Settings], position: int) -> Tensor:
    """(rows, V_eff) z at one position, without what is implausible to the large model."""
    large = heard.large[:, position]
    scores = large
    if heard.change is not None:
        alpha = torch.tensor([own.alpha for own in settings], device=large.device)
        scores = combine(large, heard.change[:, position], alpha[:, None])
    if any(own.beta for own in settings):
        scores = plausible(scores, large, torch.tensor([own.beta for own in settings]))
    return scores
