"""What the logit server and its client tell each other: records, as `core/records.py` writes them.

    GET    /health                 {"status": "ok", ..} as JSON; needs no key
    GET    /v1/model               -> Hello
    POST   /v1/sessions            Begin -> Begun
    POST   /v1/sessions/{id}       Step -> Scores; 409: the session is not where the client thinks, 410: it is gone
    DELETE /v1/sessions/{id}       204

Errors are JSON, {"error": {"message", "type", "code"}}. A session that is gone is begun again with its whole text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpeft.proxy.blackbox import Caps, Full, Scores, TopK, Want

PROTOCOL = 2
RECORD = "application/x-fedpeft-record"  # no web page can send it to another site without being asked first
WIRES = ("float32", "float16")
LOWEST = -65504.0  # of float16


@dataclass(frozen=True)
class Hello:
    """Who answers.

    Attributes:
        protocol: version of this file's records.
        caps: of the model.
        wires: precisions in which scores may travel.
        max_answer_bytes: most bytes of scores in one answer.
    """

    protocol: int
    caps: Caps
    wires: tuple[str, ...]
    max_answer_bytes: int


@dataclass(frozen=True)
class Begin:
    """Prompts of a new session.

    Attributes:
        ids: (tokens,) int64, all prompts one after the other.
        lengths: (rows,) int64.
        wire: precision of all of the session's scores.
    """

    ids: Tensor
    lengths: Tensor
    want: Want
    wire: str


@dataclass(frozen=True)
class Begun:
    """The session, by a name that nobody can guess, and scores behind each prompt.

    Attributes:
        identity: of the model that gave them: behind the same address may be another than at the first answer.
    """

    session: str
    identity: str
    scores: Scores


@dataclass(frozen=True)
class Step:
    """What happens to a session: rows leave, then tokens are taken back, then tokens are appended.

    Attributes:
        done: steps before this one; a repeated or a lost one shows.
        keep: (rows,) int64; None: all stay.
        drop: tokens to take back from every row.
        new: (rows, positions) int64.
    """

    done: int
    keep: Tensor | None
    drop: int
    new: Tensor


def begin(prompts: list[list[int]], want: Want, wire: str) -> Begin:
    """The record of these prompts."""
    flat = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64)
    return Begin(flat, torch.tensor(list(map(len, prompts)), dtype=torch.int64), want, wire)


def width_of(want: Want) -> int | None:
    """How many candidates or labels are asked for; None: all tokens."""
    if isinstance(want, Full):
        return None
    return want.k if isinstance(want, TopK) else len(want.ids)


def bytes_per_position(caps: Caps, wanted: int | None, wire: str) -> int:
    """Of one row's scores in an answer.

    Args:
        wanted: see `width_of`.
    """
    width = 2 if wire == "float16" else 4
    return 4 + (caps.vocab * width if wanted is None else wanted * (width + 8))


def narrowed(scores: Scores, wire: str) -> Scores:
    """As they travel; float16 changes values above -16 by at most 0.004."""
    if wire == "float32":
        return scores
    values = torch.where(scores.values.isfinite(), scores.values.clamp(min=LOWEST), scores.values)
    return replace(scores, values=values.half(), exact=False)


def widened(scores: Scores) -> Scores:
    """As they are used: float32."""
    return replace(scores, values=scores.values.float())
