"""All clients in one process, a cohort at a time in one pass of the shared base."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedpeft.core import records
from fedpeft.core.client import reason, run_jobs
from fedpeft.core.errors import ClientError
from fedpeft.core.exchange import Answers, Call, ClientId, Exchange, Meter, Method, Receipt, Record
from fedpeft.core.fit import Data
from fedpeft.core.memories import InMemory, Memories
from fedpeft.core.model import Model
from fedpeft.core.spool import Spool
from fedpeft.core.turn import Site, Turn, TurnTask, receive

Carry = Callable[[ClientId, Call, bytes], "bytes | None"]


@dataclass
class InProcess:
    """A Transport that does all clients' work in this process.

    Every record goes through the codec both ways, so a client gets its own copy and the bytes are counted; every
    client works with its own copy of the method and its own memory, which lies in `memories` between its turns.

    Attributes:
        make: a fresh method from its hyper-parameters, one per client and exchange.
        model: the one base with its adapter.
        data: the splits of each client.
        batch: how many clients train together; 1 trains them one by one.
        clock: simulated seconds of a receipt on the client's device; None: not simulated.
        deadline_s: simulated seconds after which an answer counts as lost; None: no deadline.
        fault: why a client that is asked does not answer at all (availability), or None.
        carry: what the wire makes of an answer's bytes; None from it is silence. For tests of faulty wires.
        wire: rewrites an exchange as the wire in use needs it (`wire.wired`); identity by default.
    """

    make: Callable[[], Method]
    model: Model
    data: Mapping[ClientId, Mapping[str, Data]]
    seed: int
    batch: int = 1
    memories: Memories = field(default_factory=InMemory)
    resources: Mapping[ClientId, object] = field(default_factory=dict)
    clock: Callable[[Receipt], float] | None = None
    deadline_s: float | None = None
    fault: Callable[[ClientId, Call], str | None] | None = None
    carry: Carry | None = None
    wire: Callable[[Exchange], Exchange] | None = None

    def clients(self) -> Sequence[ClientId]:
        """All clients that have data, sorted."""
        return sorted(self.data)

    def site(self, client: ClientId) -> Site:
        """What this client brings to its turns."""
        own = self.data[client], self.memories, self.seed, self.resources.get(client), self.wire
        return Site(client, self.make, self.model, *own)

    def exchange(self, call: Call, downs: Mapping[ClientId, Record]) -> Answers:
        """Let every client that was sent a record work on it, `batch` of them at a time."""
        asked = list(downs)
        answers = Spool(call.exchange.up)
        receipts: list[Receipt] = []
        encode = _Encoder()
        for i in range(0, len(asked), self.batch):
            start = time.perf_counter()  # work that waits for no Fit is done when a visit begins
            group = [_Visit(self, call, client, downs[client], encode) for client in asked[i : i + self.batch]]
            run_jobs([visit.turn.job for visit in group if visit.turn and visit.turn.job], self.model)
            seconds = time.perf_counter() - start
            total = sum(visit.meter.trained_tokens for visit in group)
            for visit in group:
                share = visit.meter.trained_tokens / total if total else 1 / len(group)
                receipts.append(visit.end(answers, seconds * share))
        return Answers(answers, tuple(receipts))


class _Encoder:
    """Encodes records, and remembers the newest: a cohort is mostly sent the same values in records of their own."""

    def __init__(self) -> None:
        self._values: tuple[object, ...] = ()
        self._sent = b""

    def __call__(self, record: Record) -> bytes:
        values = (type(record), *vars(record).values())
        same = len(values) == len(self._values) and all(a is b for a, b in zip(values, self._values, strict=True))
        if not same:
            self._sent, self._values = records.encode(record), values
        return self._sent


class _Visit:
    """What the engine does around one client's turn: availability, bytes, clock, deadline, checks."""

    def __init__(
        self, engine: InProcess, call: Call, client: ClientId, down: Record, encode: Callable[[Record], bytes]
    ) -> None:
        self.engine, self.call, self.client, self.down = engine, call, client, down
        self.turn: Turn | None = None
        self.meter = Meter()
        self.bytes_down = 0
        self.lost = engine.fault(client, call) if engine.fault else None
        if self.lost is None:
            sent = encode(down)
            self.bytes_down = len(sent)
            self.turn = Turn(engine.site(client), TurnTask.of(call, client), sent)
            self.meter = self.turn.meter

    def end(self, answers: Spool, seconds: float) -> Receipt:
        """Carry the answer back, check it as one from afar, and stage the memory that goes with it."""
        engine, attempt = self.engine, self.call.attempt
        receipt = Receipt(self.client, self.bytes_down, 0, seconds, 0.0, self.meter, self.lost, attempt=attempt)
        if self.turn is None:
            return receipt
        try:
            data: bytes | None = self.turn.answer()
        except Exception as error:
            return replace(receipt, lost=reason(error))
        if engine.carry is not None and data is not None:
            data = engine.carry(self.client, self.call, data)
        if data is None:
            return replace(receipt, lost="no answer")
        receipt = replace(receipt, bytes_up=len(data))
        if engine.clock is not None:
            receipt = replace(receipt, simulated_seconds=engine.clock(receipt))
        late = engine.deadline_s
        if late is not None and receipt.simulated_seconds > late:
            why = f"late: {receipt.simulated_seconds:.3g} s, deadline {late:g} s"
            return replace(receipt, simulated_seconds=late, lost=why)
        try:
            up = receive(self.call.exchange, self.down, data)
        except Exception as error:
            return replace(receipt, lost=f"refused: {reason(error)}")
        try:
            receipt = replace(receipt, staged=self.turn.stage())
        except ClientError as error:
            return replace(receipt, lost=reason(error))
        answers.add(self.client, up, data)
        return receipt
