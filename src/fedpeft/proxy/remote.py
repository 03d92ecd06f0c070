"""The client of our own logit server: exact scores over HTTP, in sessions that come back after they were closed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fedpeft.core import records
from fedpeft.core.errors import RecordError, RequestError
from fedpeft.proxy import demands, protocol
from fedpeft.proxy.blackbox import BackendError, Caps, Scores, Want
from fedpeft.proxy.connection import Connection, Refused
from fedpeft.proxy.protocol import RECORD, Begun, Hello, Step

LOST = (409, 410)  # what the server says where it has not the session, or not as the client thinks
HEADER_BYTES = 1 << 16  # of a record, besides its scores


class Remote:
    """A model behind `fedpeft serve --logits`.

    Args:
        connection: to the server.
        wire: precision in which scores travel: float32 is exact, float16 half as long and within 0.004 above -16.

    Raises:
        RequestError: a wire that is not known.
    """

    elsewhere = True  # calls wait for another machine

    def __init__(self, connection: Connection, wire: str = "float32") -> None:
        if wire not in protocol.WIRES:
            raise RequestError(f"wire {wire!r} is not known; use {' or '.join(protocol.WIRES)}")
        self.connection, self.wire = connection, wire

    @cached_property
    def hello(self) -> Hello:
        """What the server told first. Raises BackendError."""
        body = self.connection.send("GET", "/v1/model")
        try:
            found = records.decode(body, Hello)
        except RecordError as error:
            text = f"{self.connection.url} is no logit server of fedpeft, or of another version: {error}"
            raise BackendError(f"{text}; start one with fedpeft serve --logits MODEL") from error
        if found.protocol != protocol.PROTOCOL:
            raise BackendError(
                f"{self.connection.url} speaks version {found.protocol} of the protocol, this is {protocol.PROTOCOL}; "
                "use the same version of fedpeft on both sides"
            )
        if self.wire not in found.wires:
            raise RequestError(f"{self.connection.url} sends {' or '.join(found.wires)}, not {self.wire}; ask for that")
        return found

    @property
    def caps(self) -> Caps:
        """What the model there can do."""
        return self.hello.caps

    def open(self, prompts: Sequence[Sequence[int]], want: Want) -> RemoteSession:
        """See `BlackBoxLM.open`."""
        demands.check_open(self.caps, prompts, want)
        return RemoteSession(self, [list(map(int, prompt)) for prompt in prompts], want)


class RemoteSession:
    """A session on the server.

    Rows that leave and tokens that are taken back are told with the next step, so they cost no call of their own. Where
    the server has closed the session, it is opened again with the whole text of each row.
    """

    def __init__(self, model: Remote, prompts: list[list[int]], want: Want) -> None:
        self._model, self._want, self._wanted = model, want, protocol.width_of(want)
        self._texts = prompts
        self._prompts = list(map(len, prompts))
        self._open: str | None = None
        self._closed = False
        self._rows: list[int] = []  # of those that the session there has
        self._there = self._done = self._drop = self._added = 0
        self.first = self._begin()

    def scores(self, new: Sequence[Sequence[int]]) -> Scores:
        """See `Session.scores`; many positions come in several answers."""
        if self._closed:
            raise RequestError("the session is closed; open another")
        demands.check_new(self._model.caps, list(map(len, self._texts)), new)
        most = self._positions()
        parts = [[list(map(int, own[i : i + most])) for own in new] for i in range(0, len(new[0]), most)]
        return _joined([self._advance(part) for part in parts])

    def rollback(self, n: int) -> None:
        """See `Session.rollback`."""
        demands.check_rollback(list(map(len, self._texts)), self._prompts, n)
        if n:
            self._drop += n
            self._texts = [own[:-n] for own in self._texts]

    def keep(self, rows: Sequence[int]) -> None:
        """See `Session.keep`."""
        demands.check_rows(rows, len(self._texts))
        self._texts = [self._texts[row] for row in rows]
        self._prompts = [self._prompts[row] for row in rows]
        self._rows = [self._rows[row] for row in rows]
        if not rows:
            self.close()

    def close(self) -> None:
        """See `Session.close`."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        """Close the session there, where one is open."""
        if self._open is not None:
            with suppress(BackendError):  # it is closed there too, or will be for idleness
                self._model.connection.send("DELETE", f"/v1/sessions/{self._open}")
            self._open = None

    def _begin(self) -> Scores:
        """Open the session with the whole text of each row; scores behind each."""
        told = records.encode(protocol.begin(self._texts, self._want, self._model.wire))
        body = self._model.connection.send("POST", "/v1/sessions", told, RECORD, self._most_bytes)
        begun = self._decoded(body, Begun)
        self._open = begun.session
        if begun.identity != self._model.caps.identity:
            self._end()
            raise BackendError(
                f"{self._model.connection.url} gives the scores of {begun.identity} now, and gave those of "
                f"{self._model.caps.identity} before; start it with that model again, or start anew here"
            )
        self._there, self._done, self._drop, self._added = len(self._texts), 0, 0, 0
        self._rows = list(range(len(self._texts)))
        return self._checked(begun.scores, 1)

    def _advance(self, new: list[list[int]]) -> Scores:
        if self._drop > self._added:  # tokens that the session there was begun with, because it had been lost before
            self._again()
        for attempt in range(2):
            try:
                return self._step(new)
            except Refused as error:
                if error.status not in LOST or attempt:
                    raise
            self._again()
        raise AssertionError("unreachable")

    def _again(self) -> None:
        self._end()
        self._begin()

    def _step(self, new: list[list[int]]) -> Scores:
        keep = None if self._rows == list(range(self._there)) else torch.tensor(self._rows, dtype=torch.int64)
        step = Step(self._done, keep, self._drop, torch.tensor(new, dtype=torch.int64))
        path = f"/v1/sessions/{self._open}"
        body = self._model.connection.send("POST", path, records.encode(step), RECORD, self._most_bytes)
        self._done += 1
        self._added += len(new[0]) - self._drop
        self._drop, self._there, self._rows = 0, len(self._texts), list(range(len(self._texts)))
        self._texts = [[*own, *more] for own, more in zip(self._texts, new, strict=True)]
        return self._checked(self._decoded(body, Scores), len(new[0]))

    @property
    def _most_bytes(self) -> int:
        return self._model.hello.max_answer_bytes + HEADER_BYTES

    def _positions(self) -> int:
        """So many fit into an answer."""
        size = protocol.bytes_per_position(self._model.caps, self._wanted, self._model.wire) * len(self._texts)
        return max(1, self._model.hello.max_answer_bytes // size)

    def _decoded(self, body: bytes, cls: type[records.R]) -> records.R:
        try:
            return records.decode(body, cls)
        except RecordError as error:
            raise BackendError(f"{self._model.connection.url} did not answer as agreed: {error}") from error

    def _checked(self, scores: Scores, positions: int) -> Scores:
        """The scores in float32, when they are what was asked for."""
        caps, rows = self._model.caps, len(self._texts)
        width = caps.vocab if self._wanted is None else self._wanted
        values, ids = scores.values, scores.ids
        fits = tuple(values.shape) == (rows, positions, width) and tuple(scores.mass.shape) == (rows, positions)
        fits = fits and values.is_floating_point() and not bool(values.isnan().any())
        fits = fits and (ids is None) == (self._wanted is None)
        if ids is not None and fits:
            fits = ids.shape == values.shape and ids.dtype == torch.int64 and _within(ids, caps.vocab)
        if not fits:
            raise BackendError(f"{self._model.connection.url} answered with scores of another form than was asked for")
        return protocol.widened(scores)


def _within(ids: Tensor, vocab: int) -> bool:
    return bool(((ids >= 0) & (ids < vocab)).all())


def _joined(parts: list[Scores]) -> Scores:
    """Scores of positions that follow each other."""
    if len(parts) == 1:
        return parts[0]
    ids = [part.ids for part in parts if part.ids is not None]
    return replace(
        parts[0],
        values=torch.cat([part.values for part in parts], dim=1),
        ids=torch.cat(ids, dim=1) if ids else None,
        mass=torch.cat([part.mass for part in parts], dim=1),
        exact=all(part.exact for part in parts),
    )
