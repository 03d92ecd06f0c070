"""The answer of one row as it grows: its tokens, its text, when it is done, and what it was drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedpeft.core.errors import FedpeftError, RequestError
from fedpeft.proxy.blackbox import BackendError
from fedpeft.proxy.choosing import NONE_LEFT, Choice, none_left
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.texts import Writer
from fedpeft.proxy.trio import Trio

Finish = Literal["stop", "length"]
Top = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Emitted:
    """One token of one row.

    Attributes:
        row: index of the prompt.
        token: the token; an end token is told too, though it is no part of the answer.
        text: what can be shown now: whole characters, and nothing that may begin a stop text.
        logprob: of the token, under the combined model before bias, penalties and filters.
        top: (token, log-probability) of the likeliest ones, as many as `Settings.logprobs`.
        finish: why the answer ends here: an end token or a stop text, or the most tokens; None: it goes on.
    """

    row: int
    token: int
    text: str
    logprob: float
    top: Top
    finish: Finish | None


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        tokens: without the end token; with those that a stop text was made of.
        text: what the tokens say, up to a stop text.
        finish: see `Emitted`.
        logprobs: of the tokens; see `Emitted`.
        top: of the tokens; see `Emitted`.
        alpha: that was used; None: nothing was added.
        mass: mean probability that the large model's scores covered; 1 where it gives all of them.
        least_mass: the least.
        exact: whether all scores were the large model's own float32 ones.
    """

    tokens: tuple[int, ...]
    text: str
    finish: Finish
    logprobs: tuple[float, ...]
    top: tuple[Top, ...]
    alpha: float | None
    mass: float
    least_mass: float
    exact: bool


class NotFinite(BackendError):
    """The score of a row's token is not a number."""


OWN_ERRORS = (RequestError, NotFinite)  # what one row has done or heard; others may go on


class Answer:
    """A row while it is decoded.

    Args:
        row: index of its prompt.
        room: most tokens that it can have.

    Attributes:
        error: what ended it before its time.
    """

    def __init__(self, row: int, prompt: Sequence[int], settings: Settings, trio: Trio, room: int) -> None:
        self.row, self.settings, self.room = row, settings, room
        self.choice = Choice(settings, prompt, trio.vocab)
        self.tokens: list[int] = []
        self.last = -1
        self.finish: Finish | None = None
        self.error: FedpeftError | None = None
        self.exact = True
        self._masses: list[float] = []
        self._told: list[tuple[float, Top]] = []
        self._texts: list[str] = []
        self._trio = trio
        self._writer = Writer(trio.tokenizer, settings.stop)

    @property
    def left(self) -> int:
        """How many tokens it may still have."""
        return self.room - len(self.tokens)

    def heard(self, mass: float, exact: bool) -> None:
        """Remember what the next token is drawn from."""
        self._masses.append(mass)
        self.exact = self.exact and exact

    def take(self, token: int, logprob: float, top: Top) -> Emitted:
        """The row's next token.

        Args:
            token: `NONE_LEFT` where there is none.

        Raises:
            NotFinite: its score is not a number.
            RequestError: there is none.
        """
        if token == NONE_LEFT:
            raise none_left()
        if not math.isfinite(logprob):
            raise NotFinite(f"{self._trio.name} gave scores that are not finite; look at its log")
        self.last = token
        if token in self._trio.ends:
            text, _ = self._writer.flush()
            self.finish = "stop"
        else:
            self.tokens.append(token)
            self._told.append((logprob, top))
            self.choice.note(token)
            text = self._say(token)
        self._texts.append(text)
        return Emitted(self.row, token, text, logprob, top, self.finish)

    def fail(self, error: FedpeftError) -> None:
        """The row ends with an error of its own."""
        self.error, self.finish = error, "length"

    def _say(self, token: int) -> str:
        text, stopped = self._writer.add(token)
        if not stopped and not self.left:
            rest, stopped = self._writer.flush()
            text, self.finish = text + rest, "length"
        if stopped:
            self.finish = "stop"
        return text

    @property
    def completion(self) -> Completion:
        """What came of it so far; a row that was dropped counts as ended for length."""
        masses = self._masses or [1.0]
        steered = self._trio.steered
        return Completion(
            tokens=tuple(self.tokens),
            text="".join(self._texts),
            finish=self.finish or "length",
            logprobs=tuple(logprob for logprob, _ in self._told),
            top=tuple(top for _, top in self._told),
            alpha=self.settings.alpha if steered else None,
            mass=sum(masses) / len(masses),
            least_mass=min(masses),
            exact=self.exact,
        )


def told(scores: Tensor, tokens: Sequence[int], n_top: Sequence[int]) -> list[tuple[float, Top]]:
    """Log-probability of each row's token, and of its likeliest ones.

    Args:
        scores: (rows, V) combined.
        n_top: how many of the likeliest per row.
    """
    whole = scores.logsumexp(dim=-1).tolist()
    most = min(max(n_top), scores.shape[-1])
    values, ids = scores.topk(most, dim=-1) if most else (scores[:, :0], scores[:, :0])
    found = []
    rows = zip(scores, whole, tokens, n_top, values.tolist(), ids.tolist(), strict=True)
    for row, total, token, n, best, whose in rows:
        pairs = zip(whose[:n], best[:n], strict=True)
        top = tuple((int(id), value - total) for id, value in pairs if value > -math.inf)
        found.append((float(row[token]) - total, top))
    return found
