"""What is asked of a language model that nobody can open: scores of next tokens, and nothing else.

A backend is a `BlackBoxLM`: it says in `caps` what it can do, and opens sessions. What it cannot do is refused before
the first token, with a remedy. Parameters, gradients and hidden states are no part of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from fedpeft.core.errors import RequestError

FEWEST_CANDIDATES = 5  # below that the wrong continuations crowd out the right one (measured, docs/results/fedpt.md)


@dataclass(frozen=True)
class Caps:
    """What a backend can do.

    Attributes:
        identity: what the model is called wherever it is named; two models never share one.
        fingerprint: of its tokenizer (`proxy/tokenizers.py`); None where the server does not tell.
        vocab: how many scores a full row has; 0 where the server does not tell.
        full: whether it gives the scores of all tokens.
        top_k: of how many likeliest tokens it gives the scores.
        block: whether one call scores several positions, and positions can be taken back.
        max_context: tokens that it reads; prompt and answer together.
        max_batch: rows of one session.
        deterministic: whether equal questions get equal bits.
    """

    identity: str
    fingerprint: str | None
    vocab: int
    full: bool
    top_k: int
    block: bool
    max_context: int
    max_batch: int
    deterministic: bool


@dataclass(frozen=True)
class Full:
    """Ask for the scores of all tokens."""


@dataclass(frozen=True)
class TopK:
    """Ask for the scores of the k likeliest tokens."""

    k: int


@dataclass(frozen=True)
class Labels:
    """Ask for the scores of these tokens alone."""

    ids: tuple[int, ...]


Want: TypeAlias = Full | TopK | Labels


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of next tokens.

    Attributes:
        values: (rows, positions, n) float32.
        ids: (rows, positions, n) int64, whose they are; None: of all tokens, in order.
        mass: (rows, positions) float32, the probability that they cover together.
        exact: whether they are known to be those of the model's own float32 logits, to rounding.
    """

    values: Tensor
    ids: Tensor | None
    mass: Tensor
    exact: bool


class Session(Protocol):
    """Texts that go on side by side, one row each; what was read is kept (a cache) where the backend can."""

    @property
    def first(self) -> Scores:
        """Scores behind each prompt: one position per row."""
        ...

    def scores(self, new: Sequence[Sequence[int]]) -> Scores:
        """Append tokens to each row, as many to every row; scores behind each of them.

        Raises:
            CannotDo: more than one token per row, and the backend has no `block`.
            BackendError: it did not answer, or not as agreed.
        """
        ...

    def rollback(self, n: int) -> None:
        """Take the last n tokens of every row back. Raises CannotDo without `block`."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        ...

    def close(self) -> None:
        """Give back what the session holds; may be called twice."""
        ...


class BlackBoxLM(Protocol):
    """A language model that is asked and never opened."""

    @property
    def caps(self) -> Caps:
        """What it can do."""
        ...

    def open(self, prompts: Sequence[Sequence[int]], want: Want) -> Session:
        """Begin with prompts of at least one token each; they may differ in length.

        Raises:
            CannotDo: what is wanted is beyond `caps`.
            BackendError: it does not answer.
        """
        ...


def elsewhere(large: BlackBoxLM | None) -> bool:
    """Whether calls of a backend wait for another machine: those have an attribute `elsewhere` that is true."""
    return bool(getattr(large, "elsewhere", False))


class CannotDo(RequestError):
    """A backend was asked for what it cannot do.

    Args:
        backend: its identity.
        asked: what was asked for, as a noun phrase.
        missing: what it would need.
        remedy: what would work.
    """

    def __init__(self, backend: str, asked: str, missing: str, remedy: str) -> None:
        self.backend, self.asked, self.missing, self.remedy = backend, asked, missing, remedy
        super().__init__(f"{backend} cannot do {asked}: {missing}; {remedy}")


class BackendError(RequestError):
    """A backend that did not answer, or not as agreed; the message names it and says what to look at."""


class NoAnswer(BackendError):
    """A backend that was waited for as long as one may wait; whoever asks it next may wait as long."""
