"""Proxy-tuned decoding, token by token: the one loop that combines, filters and draws.

z = z_L + alpha (z_T - z_B) at the last position of three cached models (FedPT, arXiv 2410.00362; Liu et al. 2024,
arXiv 2401.08565). Bias, penalties, temperature and filters act after the combination: `transformers.generate` puts
them before a user's processor, so they would act on z_L alone there.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from fedpeft.core.errors import FedpeftError, RequestError
from fedpeft.proxy.answers import OWN_ERRORS, Answer, Completion, Emitted, told
from fedpeft.proxy.choosing import choose
from fedpeft.proxy.demands import check_prompts
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.speculate import Drafting, Speculation
from fedpeft.proxy.trio import Prompts, Trio, Voices, combined


class _Way(Protocol):
    """How rows advance."""

    def step(self) -> list[Emitted]: ...

    def close(self) -> None: ...


class Decoding:
    """Answers to a batch of prompts, one step at a time.

    Args:
        trio: the models.
        prompts: token ids, at least one each; they may differ in length.
        settings: one for each prompt.
        speculate: tokens that are drafted ahead, from what the text said before or by the small model, and checked in
            one call of the large one; 0: none. Rows then advance one by one. Greedy tokens are the same, drawn ones
            have the same distribution.

    Raises:
        RequestError: prompts or settings that do not fit together or the models.
        CannotDo: the large model cannot do what is asked.
        BackendError: it does not answer.
    """

    def __init__(
        self,
        trio: Trio,
        prompts: Prompts,
        settings: Sequence[Settings],
        speculate: int = 0,
    ) -> None:
        own = trio.tuned_prompts(prompts)
        self.answers = [
            Answer(row, prompt, setting, trio, _room(trio, prompt, setting, row))
            for row, (prompt, setting) in enumerate(_checked(trio, prompts, settings, speculate))
        ]
        self.drafting = Drafting()
        if speculate:
            rows: list[Speculation] = []
            self._way: _Way = _OneByOne(self.answers, rows)
            try:
                for answer, prompt, other in zip(self.answers, prompts, own, strict=True):
                    rows.append(Speculation(trio, answer, prompt, other, speculate, self.drafting))
            except BaseException:
                self.close()
                raise
        else:
            self._way = _Together(trio, self.answers, prompts, own)

    @property
    def active(self) -> list[int]:
        """Rows that are not done."""
        return [answer.row for answer in self.answers if answer.finish is None]

    def step(self) -> list[Emitted]:
        """As `advance`. Raises what ended a row, too."""
        emitted = self.advance()
        for error in self.errors.values():
            raise error
        return emitted

    def advance(self) -> list[Emitted]:
        """The next token of every row that is not done, or several where drafts were accepted; none: all are done.

        A row that ends with an error of its own is told in `errors`, and the others go on.

        Raises:
            BackendError: the large model has died; the decoding is of no use any more.
        """
        return self._way.step() if self.active else []

    @property
    def errors(self) -> dict[int, FedpeftError]:
        """What ended rows before their time, by row."""
        return {answer.row: answer.error for answer in self.answers if answer.error is not None}

    def drop(self, row: int) -> None:
        """End a row early; it leaves the caches before the next step."""
        if self.answers[row].finish is None:
            self.answers[row].finish = "length"

    def completions(self) -> list[Completion]:
        """What was said so far, in the order of the prompts."""
        return [answer.completion for answer in self.answers]

    def close(self) -> None:
        """Give back what the sessions hold; may be called twice."""
        self._way.close()

    def __enter__(self) -> Decoding:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def decode(trio: Trio, prompts: Prompts, settings: Sequence[Settings], speculate: int = 0) -> list[Completion]:
    """The answers to all prompts, in batches that the large model takes; see `Decoding`."""
    size = len(prompts) if trio.large is None else trio.large.caps.max_batch
    found: list[Completion] = []
    for begin in range(0, len(prompts), max(1, size)):
        part = slice(begin, begin + size)
        with Decoding(trio, prompts[part], settings[part], speculate) as decoding:
            while decoding.step():
                pass
            found += decoding.completions()
    return found


class _Together:
    """All rows in one left-padded batch, one token a step."""

    def __init__(self, trio: Trio, answers: Sequence[Answer], prompts: Prompts, tuned_prompts: Prompts) -> None:
        self._rows = list(answers)
        steer = trio.steered and any(answer.settings.alpha for answer in answers)
        self._voices = Voices(trio, prompts, tuned_prompts, steer)
        self._begun = False

    def step(self) -> list[Emitted]:
        if self._begun:
            self._leave()
            heard = self._voices.say([answer.last for answer in self._rows])
        else:
            heard, self._begun = self._voices.first, True
        rows = [i for i, answer in enumerate(self._rows) if answer.finish is None]
        answers = [self._rows[i] for i in rows]
        scores = combined(heard, [answer.settings for answer in self._rows], 0)
        scores = scores if len(rows) == len(self._rows) else scores[rows]
        tokens = choose(scores, [answer.choice for answer in answers])
        masses = heard.mass[:, 0].tolist()
        emitted = []
        words = told(scores, tokens, [answer.settings.logprobs for answer in answers])
        for i, answer, token, (logprob, top) in zip(rows, answers, tokens, words, strict=True):
            answer.heard(masses[i], heard.exact)
            try:
                emitted.append(answer.take(token, logprob, top))
            except OWN_ERRORS as error:
                answer.fail(error)
        return emitted

    def _leave(self) -> None:
        stay = [i for i, answer in enumerate(self._rows) if answer.finish is None]
        if len(stay) < len(self._rows):
            self._voices.keep(stay, len(self._rows))
            self._rows = [self._rows[i] for i in stay]

    def close(self) -> None:
        self._voices.close()


class _OneByOne:
    """Rows that advance each for itself."""

    def __init__(self, answers: Sequence[Answer], rows: Sequence[Speculation]) -> None:
        self._answers, self._rows = answers, rows

    def step(self) -> list[Emitted]:
        emitted: list[Emitted] = []
        for answer, row in zip(self._answers, self._rows, strict=True):
            try:
                emitted += row.step()
            except OWN_ERRORS as error:
                answer.fail(error)
        return emitted

    def close(self) -> None:
        for row in self._rows:
            row.close()


def _checked(
    trio: Trio, prompts: Prompts, settings: Sequence[Settings], speculate: int
) -> list[tuple[Sequence[int], Settings]]:
    """Prompt and settings of each row."""
    if not prompts or len(prompts) != len(settings):
        raise RequestError(
            f"{len(prompts)} prompts came with {len(settings)} settings; give at least one, and settings for each"
        )
    check_prompts(prompts)
    for row, own in enumerate(settings):
        if trio.steered and own.alpha is None:
            raise RequestError(
                f"row {row} has no alpha, and there is no good default; take that of the alpha curve (--alpha)"
            )
        if own.stop and trio.tokenizer is None:
            raise RequestError(
                f"row {row} has the stop texts {list(own.stop)} and there is no tokenizer; leave them out"
            )
    if speculate < 0 or (speculate and not trio.steered):
        raise RequestError(
            f"speculate is {speculate}; it must be 0 or more, and drafts need a large, a tuned and a base model"
        )
    if trio.large is not None and not speculate and len(prompts) > trio.large.caps.max_batch:
        raise RequestError(
            f"{len(prompts)} prompts are more than {trio.name} takes at once; use {trio.large.caps.max_batch} at most"
        )
    return list(zip(prompts, settings, strict=True))


def _room(trio: Trio, prompt: Sequence[int], settings: Settings, row: int) -> int:
    """Most tokens of a row's answer."""
    room = trio.room(prompt)
    if room is not None and room < 1:
        raise RequestError(
            f"prompt {row} has {len(prompt)} tokens and leaves no room for an answer: the models read "
            f"{max(0, len(prompt) + room)} at most; shorten it"
        )
    return settings.max_tokens if room is None else min(settings.max_tokens, room)


__all__ = ["Completion", "Decoding", "Emitted", "Settings", "Trio", "decode"]
