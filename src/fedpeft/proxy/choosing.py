"""From a row's combined scores to its next token: bias, penalties, temperature, filters, and draws of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedpeft.core.errors import RequestError
from fedpeft.core.rng import rng_for
from fedpeft.maths.logits import draw, keep_min_p, keep_top_k, keep_top_p, penalise_counts, penalise_repeats
from fedpeft.proxy.settings import Settings

NONE_LEFT = -1  # in the place of a token: all candidates are banned


class Choice:
    """How one row chooses, and what it remembers for it.

    Args:
        settings: of the row.
        prompt: its tokens.
        vocab: V_eff.

    Raises:
        RequestError: a bias or a ban of a token that does not exist.
    """

    def __init__(self, settings: Settings, prompt: Sequence[int], vocab: int) -> None:
        self.settings = settings
        self.rng = rng_for(settings.seed, "decode")
        for token in (*settings.logit_bias, *settings.bans):
            if not 0 <= token < vocab:
                raise RequestError(f"token {token} in logit_bias or bans does not exist; use 0 to {vocab - 1}")
        self.bias = _bias(settings, vocab) if settings.logit_bias or settings.bans else None
        self.counted = bool(settings.presence_penalty or settings.frequency_penalty)
        self.repeated = settings.repetition_penalty != 1
        self.remembers = self.counted or self.repeated
        self.counts = torch.zeros(vocab) if self.remembers else None
        self.prompted = torch.zeros(vocab, dtype=torch.bool)
        if self.repeated:
            self.prompted[[token for token in prompt if token < vocab]] = True

    def note(self, token: int, times: int = 1) -> None:
        """The token was said; -1 times: it is taken back."""
        if self.counts is not None:
            self.counts[token] += times

    @property
    def seen(self) -> Tensor:
        """(V,) whether a token stands in the prompt or in the answer."""
        assert self.counts is not None, "only rows with a penalty remember"
        return self.prompted | (self.counts > 0)


def adjust(scores: Tensor, rows: Sequence[Choice]) -> Tensor:
    """(rows, V) with each row's bias, bans and penalties.

    Raises:
        RequestError: a row has no token left.
    """
    scores = _adjusted(scores, rows)
    if any(_banned(scores, rows)):
        raise none_left()
    return scores


def none_left() -> RequestError:
    """The error of a row that may say nothing."""
    return RequestError("all candidates of a row are banned; ban fewer tokens, or ask for more candidates")


def probabilities(adjusted: Tensor, rows: Sequence[Choice]) -> Tensor:
    """(rows, V) float64 of rows that draw: divided by the temperature, then top-k, top-p and min-p."""

    def each(name: str) -> Tensor:
        own = [getattr(row.settings, name) for row in rows]
        return torch.tensor(own, dtype=torch.float64, device=adjusted.device)

    scores = adjusted.double()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / each("temperature")[
        :, None
    ]  # no quotient overflows upwards
    if any(row.settings.top_k for row in rows):
        scores = keep_top_k(scores, each("top_k"))
    if any(row.settings.top_p < 1 for row in rows):
        scores = keep_top_p(scores, each("top_p"))
    if any(row.settings.min_p for row in rows):
        scores = keep_min_p(scores, each("min_p"))
    return scores.softmax(dim=-1)


def choose(scores: Tensor, rows: Sequence[Choice]) -> list[int]:
    """The next token of each row, from its own generator: no row depends on the others.

    Args:
        scores: (rows, V) combined.

    Returns:
        `NONE_LEFT` for a row that has no token left.
    """
    adjusted = _adjusted(scores, rows)
    banned = _banned(adjusted, rows)
    tokens = [NONE_LEFT if out else best for out, best in zip(banned, adjusted.argmax(dim=-1).tolist(), strict=True)]
    drawing = [i for i, row in enumerate(rows) if row.settings.temperature > 0 and not banned[i]]
    if drawing:
        own = [rows[i] for i in drawing]
        chosen = adjusted if len(own) == len(rows) else adjusted[drawing]
        shares = probabilities(chosen.cpu(), own)
        for i, row, share in zip(drawing, own, shares, strict=True):
            tokens[i] = draw(share, row.rng.random())
    return tokens


def _adjusted(scores: Tensor, rows: Sequence[Choice]) -> Tensor:
    scores = _where(scores, rows, lambda row: row.bias is not None, _add_bias)
    scores = _where(scores, rows, lambda row: row.repeated, _repeats)
    return _where(scores, rows, lambda row: row.counted, _counts)


def _banned(adjusted: Tensor, rows: Sequence[Choice]) -> list[bool]:
    """Of each row, whether its biases and bans left nothing."""
    if all(row.bias is None for row in rows):
        return [False] * len(rows)
    nothing = (adjusted.amax(dim=-1) == -math.inf).tolist()
    return [row.bias is not None and none for row, none in zip(rows, nothing, strict=True)]


def _bias(settings: Settings, vocab: int) -> Tensor:
    bias = torch.zeros(vocab)
    for token, value in settings.logit_bias.items():
        bias[token] = value
    bias[list(settings.bans)] = -math.inf
    return bias


def _where(
    scores: Tensor,
    rows: Sequence[Choice],
    which: Callable[[Choice], bool],
    change: Callable[[Tensor, Sequence[Choice]], Tensor],
) -> Tensor:
    """The scores, changed in those rows alone."""
    chosen = [i for i, row in enumerate(rows) if which(row)]
    if not chosen:
        return scores
    changed = scores.clone()
    changed[chosen] = change(scores[chosen], [rows[i] for i in chosen])
    return changed


def _stacked(tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
    return torch.stack([t for t in tensors if t is not None]).to(like.device)


def _add_bias(scores: Tensor, rows: Sequence[Choice]) -> Tensor:
    return scores + _stacked([row.bias for row in rows], scores)


def _repeats(scores: Tensor, rows: Sequence[Choice]) -> Tensor:
    by = torch.tensor([row.settings.repetition_penalty for row in rows])
    return penalise_repeats(scores.log_softmax(dim=-1), _stacked([row.seen for row in rows], scores), by)


def _counts(scores: Tensor, rows: Sequence[Choice]) -> Tensor:
    presence = torch.tensor([row.settings.presence_penalty for row in rows])
    frequency = torch.tensor([row.settings.frequency_penalty for row in rows])
    return penalise_counts(scores, _stacked([row.counts for row in rows], scores), presence, frequency)
