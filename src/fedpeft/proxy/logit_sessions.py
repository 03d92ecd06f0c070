"""Sessions that the logit server holds for its clients: how many, how large, for how long."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fedpeft.core.errors import RequestError
from fedpeft.proxy import demands, protocol
from fedpeft.proxy.blackbox import BlackBoxLM, Scores, Session, Want
from fedpeft.proxy.protocol import Begin, Begun, Hello, Step
from fedpeft.proxy.refusal import OVERLOADED, Refusal, refusal_of

T = TypeVar("T")

log = logging.getLogger("fedpeft")


@dataclass(frozen=True)
class Limits:
    """What the server bears.

    Attributes:
        max_sessions: open at a time.
        max_tokens: kept in the caches of all sessions together, padding included.
        max_waiting: requests that wait for their turn.
        max_body_bytes: of a request.
        max_answer_bytes: of the scores in an answer.
        idle_s: after so long without a step a session is closed.
        timeout_s: until a request has had its turn.
        body_s: until a request's body has come.
        wires: precisions in which scores may travel.
    """

    max_sessions: int = 16
    max_tokens: int = 1 << 18
    max_waiting: int = 64
    max_body_bytes: int = 16 << 20
    max_answer_bytes: int = 256 << 20
    idle_s: float = 300.0
    timeout_s: float = 60.0
    body_s: float = 30.0
    wires: tuple[str, ...] = protocol.WIRES

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "wires" and not value > 0:
                raise RequestError(f"the server's limit {name} is {value}; give a positive number")


def limits_of(
    wire: str, sessions: int, tokens: int, body_bytes: int, answer_bytes: int, idle_s: float, turn_s: float
) -> Limits:
    """Limits by what the command line says.

    Args:
        wire: the most precise scores that travel; clients may ask for less.

    Raises:
        RequestError: a wire that is not known, or a limit that is not positive.
    """
    if wire not in protocol.WIRES:
        raise RequestError(f"--wire is {wire!r}; use {' or '.join(protocol.WIRES)}")
    return Limits(
        max_sessions=sessions,
        max_tokens=tokens,
        max_body_bytes=body_bytes,
        max_answer_bytes=answer_bytes,
        idle_s=idle_s,
        timeout_s=turn_s,
        wires=protocol.WIRES[protocol.WIRES.index(wire) :],
    )


@dataclass
class Held:
    """One session.

    Attributes:
        prompts: tokens of each row that cannot be taken back.
        lengths: tokens of each row.
        width: tokens of a row of its cache: rows that leave do not make it narrower.
        done: steps that it made.
        used: when it was last asked, in seconds of a clock.
    """

    session: Session
    want: Want
    wire: str
    prompts: list[int]
    lengths: list[int]
    width: int
    used: float
    done: int = 0

    @property
    def tokens(self) -> int:
        """In its cache, padding included."""
        return len(self.lengths) * self.width


@dataclass
class LogitSessions:
    """The sessions over one model; used by one thread at a time.

    Args:
        model: the backend that is asked.
        clock: seconds that only grow.
    """

    model: BlackBoxLM
    limits: Limits = field(default_factory=Limits)
    clock: Callable[[], float] = time.monotonic
    held: dict[str, Held] = field(default_factory=dict)

    @property
    def hello(self) -> Hello:
        """What the server tells first."""
        return Hello(protocol.PROTOCOL, self.model.caps, self.limits.wires, self.limits.max_answer_bytes)

    @property
    def tokens(self) -> int:
        """In all caches."""
        return sum(own.tokens for own in self.held.values())

    def begin(self, told: Begin) -> Begun:
        """Open a session. Raises Refusal, or RequestError for prompts that the model cannot read."""
        self.sweep()
        prompts = _prompts(told)
        if told.wire not in self.limits.wires:
            raise Refusal(
                f"scores travel as {' or '.join(self.limits.wires)} here, not {told.wire[:20]!r}", None, "wire", 400
            )
        demands.check_open(self.model.caps, prompts, told.want)
        self._check_room(len(prompts) * max(map(len, prompts)))
        if len(self.held) >= self.limits.max_sessions:
            text = f"{len(self.held)} sessions are open, the most there may be; close one, or let the server take more"
            raise Refusal(f"{text} (--max-sessions)", None, "too_many_sessions", 503, OVERLOADED)
        self._check_answer(told.want, told.wire, len(prompts), 1)
        session = _guarded(lambda: self.model.open(prompts, told.want))
        lengths = list(map(len, prompts))
        name = secrets.token_urlsafe(24)
        self.held[name] = Held(session, told.want, told.wire, lengths, list(lengths), max(lengths), self.clock())
        return Begun(name, self.model.caps.identity, protocol.narrowed(session.first, told.wire))

    def step(self, name: str, told: Step) -> Scores:
        """Go on with a session. Raises Refusal, or RequestError for what it cannot do; then nothing has changed."""
        self.sweep()
        own = self.held.get(name)
        if own is None:
            raise Refusal("the session is closed, perhaps for idleness; begin it again", None, "gone", 410)
        if told.done != own.done:
            text = f"the session has made {own.done} steps, not {told.done}; begin it again"
            raise Refusal(text, None, "out_of_step", 409)
        rows, new = self._plan(own, told)
        try:
            scores = _guarded(lambda: _advance(own.session, rows, told.drop, new))
        except Refusal:
            self.end(name)
            raise
        own.prompts = [own.prompts[row] for row in rows]
        own.lengths = [own.lengths[row] - told.drop + len(new[0]) for row in rows]
        own.width += len(new[0]) - told.drop
        own.done += 1
        own.used = self.clock()
        return protocol.narrowed(scores, own.wire)

    def end(self, name: str) -> None:
        """Close a session; nothing happens where there is none."""
        own = self.held.pop(name, None)
        if own is not None:
            own.session.close()

    def sweep(self) -> None:
        """Close the sessions that were idle for too long."""
        since = self.clock() - self.limits.idle_s
        for name in [name for name, own in self.held.items() if own.used < since]:
            self.end(name)

    def close(self) -> None:
        """Close all of them."""
        for name in list(self.held):
            self.end(name)

    def _plan(self, own: Held, told: Step) -> tuple[list[int], list[list[int]]]:
        """The rows that stay and their new tokens, when all is well."""
        rows = list(range(len(own.lengths))) if told.keep is None else _whole(told.keep, 1, "keep").tolist()
        demands.check_rows(rows, len(own.lengths))
        new: list[list[int]] = _whole(told.new, 2, "new").tolist()
        demands.check_rollback([own.lengths[row] for row in rows], [own.prompts[row] for row in rows], told.drop)
        kept = [own.lengths[row] - told.drop for row in rows]
        demands.check_new(self.model.caps, kept, new)
        self._check_room(len(rows) * (own.width - told.drop + len(new[0])) - own.tokens)
        self._check_answer(own.want, own.wire, len(rows), len(new[0]))
        return rows, new

    def _check_room(self, more: int) -> None:
        if self.tokens + more > self.limits.max_tokens:
            text = f"the server keeps {self.tokens} tokens and may keep {self.limits.max_tokens}"
            text = f"{text}; send fewer or shorter texts, or let it keep more (--max-kept)"
            raise Refusal(text, None, "too_many_tokens", 503, OVERLOADED)

    def _check_answer(self, want: Want, wire: str, rows: int, positions: int) -> None:
        size = rows * positions * protocol.bytes_per_position(self.model.caps, protocol.width_of(want), wire)
        if size > self.limits.max_answer_bytes:
            text = f"the answer would have {size} bytes, of {self.limits.max_answer_bytes} allowed"
            raise Refusal(f"{text}; ask for fewer positions at a time", None, "answer_too_large", 413)


def _advance(session: Session, rows: list[int], drop: int, new: list[list[int]]) -> Scores:
    session.keep(rows)
    if drop:
        session.rollback(drop)
    return session.scores(new)


def _guarded(work: Callable[[], T]) -> T:
    """What the model says. Raises Refusal for whatever goes wrong in it; texts stay out of the log."""
    try:
        return work()
    except Exception as error:
        refusal = refusal_of(error)
        if refusal.status >= 500:
            log.error("the model failed with %s", type(error).__name__)
        raise refusal from error


def _prompts(told: Begin) -> list[list[int]]:
    ids, lengths = _whole(told.ids, 1, "ids"), _whole(told.lengths, 1, "lengths")
    if bool((lengths < 1).any()) or int(lengths.sum()) != len(ids):
        raise RequestError(f"the prompts' lengths do not add up to {len(ids)} tokens; each has at least one")
    return [part.tolist() for part in torch.split(ids, lengths.tolist())] if len(ids) else []


def _whole(t: Tensor, dims: int, name: str) -> Tensor:
    if t.dtype != torch.int64 or t.dim() != dims:
        raise RequestError(f"{name} is a {t.dtype} tensor of {t.dim()} dimensions; send int64 of {dims}")
    return t
