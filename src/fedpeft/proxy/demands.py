"""What may be asked of a backend: checked before it is asked, so that a refusal comes before the first token."""

from __future__ import annotations

from collections.abc import Sequence

from fedpeft.core.errors import RequestError
from fedpeft.proxy.blackbox import FEWEST_CANDIDATES, CannotDo, Caps, Full, Labels, TopK, Want

_HTTP = "use a model in this process or our own logit server (http://HOST:PORT)"


def check_candidates(identity: str, k: int) -> None:
    """Raise CannotDo where so few candidates make no sense."""
    if k < FEWEST_CANDIDATES:
        raise CannotDo(
            identity,
            f"decoding from {k} candidates",
            f"wrong continuations crowd out the right one below {FEWEST_CANDIDATES}",
            f"set proxy.top_k to {FEWEST_CANDIDATES} or more, as far as the server gives so many",
        )


def check_open(caps: Caps, prompts: Sequence[Sequence[int]], want: Want) -> None:
    """Refuse prompts that a backend cannot read, and scores that it cannot give.

    Raises:
        RequestError: no prompts or too many, one that is empty or too long, a token that does not exist.
        CannotDo: what is wanted is beyond `caps`.
    """
    check_prompts(prompts)
    if len(prompts) > caps.max_batch:
        raise RequestError(
            f"{len(prompts)} prompts came at once, and {caps.identity} takes {caps.max_batch}; send fewer at a time"
        )
    check_length(caps, max(map(len, prompts)))
    check_tokens(caps, prompts)
    if isinstance(want, Full) and not caps.full:
        raise CannotDo(
            caps.identity,
            "the scores of all tokens",
            f"it gives the {caps.top_k} likeliest",
            f"ask for these, or {_HTTP}",
        )
    if isinstance(want, TopK):
        check_candidates(caps.identity, want.k)
        if want.k > caps.top_k:
            raise CannotDo(
                caps.identity,
                f"the scores of {want.k} tokens",
                f"it gives {caps.top_k}",
                "set proxy.top_k to that or less",
            )
    if isinstance(want, Labels):
        if not want.ids or len(set(want.ids)) != len(want.ids):
            raise RequestError(f"the labels {want.ids} are none, or one is twice among them; give different tokens")
        check_tokens(caps, [want.ids])


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Raise RequestError where there is no prompt, or one without tokens."""
    if not prompts or not all(map(len, prompts)):
        raise RequestError("a prompt has no tokens; begin with at least one, such as the beginning-of-text token")


def check_length(caps: Caps, tokens: int) -> None:
    """Raise RequestError for a text longer than the model reads."""
    if tokens > caps.max_context:
        raise RequestError(f"a text has {tokens} tokens, and {caps.identity} reads {caps.max_context}; shorten it")


def check_tokens(caps: Caps, rows: Sequence[Sequence[int]]) -> None:
    """Raise RequestError for a token that does not exist, where the backend tells its vocabulary."""
    least, most = min(map(min, rows)), max(map(max, rows))
    if least < 0 or (caps.vocab and most >= caps.vocab):
        wrong = least if least < 0 else most
        raise RequestError(f"token {wrong} does not exist: {caps.identity} knows 0 to {caps.vocab - 1}")


def check_new(caps: Caps, lengths: Sequence[int], new: Sequence[Sequence[int]]) -> None:
    """Refuse tokens that cannot be appended to rows of these lengths.

    Raises:
        RequestError: not as many for every row, a token that does not exist, a text that becomes too long.
        CannotDo: more than one for each, and there is no `block`.
    """
    counts = sorted(set(map(len, new)))
    if len(new) != len(lengths) or len(counts) != 1 or counts[0] < 1:
        raise RequestError(
            f"{len(lengths)} rows got {[len(own) for own in new]} tokens; give each as many, at least one"
        )
    if counts[0] > 1 and not caps.block:
        raise CannotDo(caps.identity, "scores of several positions", "it scores one position a call", _HTTP)
    check_length(caps, max(lengths) + counts[0])
    check_tokens(caps, new)


def check_rollback(lengths: Sequence[int], prompts: Sequence[int], n: int) -> None:
    """Raise RequestError where so many tokens were not added to each of the rows.

    Args:
        lengths: tokens of each row.
        prompts: how many of them it began with.
    """
    room = min((now - own for now, own in zip(lengths, prompts, strict=True)), default=0)
    if not 0 <= n <= room:
        raise RequestError(f"{n} tokens cannot be taken back: {room} were added to the prompts")


def check_rows(rows: Sequence[int], of: int) -> None:
    """Raise RequestError where rows are kept that are not there, or twice."""
    if len(set(rows)) != len(rows) or not all(0 <= row < of for row in rows):
        raise RequestError(f"rows {list(rows)} cannot be kept of {of}; name each at most once, from 0 to {of - 1}")


def check_scorable(caps: Caps, positions: int) -> None:
    """Refuse a model that does not give all scores of given texts.

    Raises:
        CannotDo: it gives some candidates alone, or one position a call where a text has several.
    """
    remedy = "use a model in this process or a logit server (fedpeft serve --logits)"
    if not caps.full:
        raise CannotDo(caps.identity, "scores of given texts", f"it gives the {caps.top_k} likeliest tokens", remedy)
    if positions > 1 and not caps.block:
        raise CannotDo(caps.identity, "scores of given texts", "it scores one position a call", remedy)
