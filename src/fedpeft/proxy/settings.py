"""How the tokens of one answer are chosen; every row of a batch has its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeft.core.errors import RequestError

MOST_STOPS = 4  # as in OpenAI's completions
ALPHAS = (-100.0, 100.0)  # least and most alpha, wherever one is given; below 0 it steers the other way
PENALTIES = (0.01, 10.0)  # least and most repetition penalty; one that is 0 in float32 makes 0 times infinity
ALPHA_WORDS = f"a number from {ALPHAS[0]:g} to {ALPHAS[1]:g}"
_AT_LEAST_0: tuple[Callable[[Any], bool], str] = (lambda x: x >= 0, "0 or more")
_SHARE: tuple[Callable[[Any], bool], str] = (lambda x: 0 <= x <= 1, "from 0 to 1")
_ANY: tuple[Callable[[Any], bool], str] = (lambda x: True, "a finite number")
_BOUNDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda x: x >= 1, "1 or more"),
    "temperature": _AT_LEAST_0,
    "top_k": _AT_LEAST_0,
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": _SHARE,
    "repetition_penalty": (
        lambda x: PENALTIES[0] <= x <= PENALTIES[1],
        f"from {PENALTIES[0]:g} to {PENALTIES[1]:g}; 1 leaves all as it is",
    ),
    "presence_penalty": _ANY,
    "frequency_penalty": _ANY,
    "seed": _AT_LEAST_0,
    "beta": _SHARE,
    "logprobs": _AT_LEAST_0,
}


def alpha_fits(alpha: float) -> bool:
    """Whether an alpha is in the range; NaN is not."""
    return ALPHAS[0] <= alpha <= ALPHAS[1]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the tokens of one answer are chosen. All of it acts on the combined scores, in this order.

    Attributes:
        max_tokens: most tokens of the answer; the context may end it earlier.
        alpha: how much of the small model's change is added; it has no default where there is one.
        beta: tokens below this share of the large model's greatest probability are out; 0: none is.
        logit_bias: added to the scores of tokens.
        bans: tokens that are never chosen.
        repetition_penalty: see `maths.logits.penalise_repeats`; over prompt and answer, on the log-probabilities of
            the combined model, as a backend's scores are known up to a constant alone.
        presence_penalty, frequency_penalty: see `maths.logits.penalise_counts`; over the answer.
        temperature: 0: the likeliest token (the lowest id on ties).
        top_k, top_p, min_p: each of what the one before left; 0, 1 and 0: all.
        stop: the answer ends before the first of these texts.
        seed: of this row's own draws.
        logprobs: how many of the likeliest tokens are told with each token.

    Raises:
        RequestError: values out of range, all at once.
    """

    max_tokens: int = 128
    alpha: float | None = None
    beta: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bans: frozenset[int] = frozenset()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value}; it must be {words}"
            for name, (fits, words) in _BOUNDS.items()
            if not (math.isfinite(value := getattr(self, name)) and fits(value))
        ]
        if self.alpha is not None and not alpha_fits(self.alpha):
            wrong.append(f"alpha is {self.alpha}; it must be {ALPHA_WORDS}, such as 0.5")
        for token, bias in self.logit_bias.items():
            if not math.isfinite(bias):
                wrong.append(
                    f"logit_bias of token {token} is {bias}; it must be finite: use bans for tokens to leave out"
                )
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            wrong.append(f"stop is {list(self.stop)}; give at most {MOST_STOPS} texts, none of them empty")
        if wrong:
            raise RequestError("; ".join(wrong))
