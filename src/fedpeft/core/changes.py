"""Changes of the frozen base that pile up, round after round, and how clients keep up with them.

Methods that fold what was learned into the base have, beside their parameters, a *base delta* (`delta.s.left` and
`.right`, or `delta.s.dense`; see `models/adapters/delta`). The server adds one step of factors per round. A client
keeps a copy with its version and gets the steps that it missed, or the whole where that is smaller. Both apply the same
steps in the same order, so equal versions have equal bits; for that, `News` is not narrowed by any `run.wire`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedpeft.core import pairs, tree
from fedpeft.core.tree import Params

PREFIX = "delta."  # of the names of all parts of a base delta
LEFT, RIGHT, DENSE = ".left", ".right", ".dense"


@dataclass(frozen=True)
class Changed:
    """What the server knows of the base's changes."""

    total: Params = field(default_factory=dict)  # all steps together
    version: int = 0  # how many steps that were
    steps: tuple[Params, ...] = ()  # the newest of them, which cost less than the whole
    known: Mapping[str, int] = field(default_factory=dict)  # the version that a client has


@dataclass(frozen=True)
class Copy:
    """What a client keeps of it."""

    total: Params = field(default_factory=dict)
    version: int = 0


@dataclass(frozen=True)
class News:
    """What travels to a client: all steps that it missed, or the whole."""

    exact: ClassVar[bool] = True  # as they are, by a narrow wire too

    version: int  # that the client has afterwards
    steps: tuple[Params, ...] = ()
    whole: Params | None = None


def news_for(changed: Changed, client: str) -> News:
    """What the client lacks."""
    missed = changed.version - changed.known.get(client, 0)
    if missed <= len(changed.steps):
        return News(changed.version, changed.steps[len(changed.steps) - missed :])
    return News(changed.version, whole=changed.total)


def kept_up(copy: Copy, news: News) -> Copy:
    """The client's copy with the news."""
    if news.whole is not None:
        return Copy(news.whole, news.version)
    total = copy.total
    for step in news.steps:
        total = grown(total, step)
    return Copy(total, news.version)


def advanced(changed: Changed, step: Params, answered: Iterable[str]) -> Changed:
    """The server's record after a round.

    Args:
        step: factors of this round's change, by slot.
        answered: the clients that now have the version before the step.
    """
    total = grown(changed.total, step)
    steps = [*changed.steps, step]
    while steps and sum(map(tree.count, steps)) >= tree.count(total):
        steps.pop(0)
    known = {**changed.known, **dict.fromkeys(answered, changed.version)}
    return replace(changed, total=total, version=changed.version + 1, steps=tuple(steps), known=known)


def grown(total: Params, step: Params) -> dict[str, Tensor]:
    """The total with one more step of factors: a longer row of factors, or one dense matrix where that is smaller."""
    made = dict(total)
    for name in step:
        if not name.endswith(LEFT):
            continue
        stem = name.removesuffix(LEFT)
        left, right = step[stem + LEFT], step[stem + RIGHT]
        if stem + DENSE in made:
            dense = made[stem + DENSE]
            made[stem + DENSE] = torch.addmm(dense, left.to(dense.dtype), right.to(dense.dtype))
            continue
        if stem + LEFT in made:
            left = torch.cat([made[stem + LEFT], left], dim=1)
            right = torch.cat([made[stem + RIGHT], right])
        if left.numel() + right.numel() < left.shape[0] * right.shape[1]:
            made |= {stem + LEFT: left, stem + RIGHT: right}
        else:
            made.pop(stem + LEFT, None)
            made.pop(stem + RIGHT, None)
            made[stem + DENSE] = left @ right
    return made


def as_delta(factors: Params, scale: float) -> dict[str, Tensor]:
    """The base delta that adds scale * B A to every slot's weight: the scale sits on the left factor."""
    made: dict[str, Tensor] = {}
    for stem in pairs.stems(factors):
        b, a = pairs.pair(factors, stem)
        made |= {f"{PREFIX}{stem}{LEFT}": b * scale, f"{PREFIX}{stem}{RIGHT}": a.clone()}
    return made


def dense_name(stem: str) -> str:
    """What the dense change of a slot's weight is called."""
    return f"{PREFIX}{stem}{DENSE}"
