"""All clients in one process, a cohort at a time in one pass of the shared base."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from fedpeft.core import records
from fedpeft.core.client import Job, Metered, protocol, reason, run_jobs
from fedpeft.core.errors import FedpeftError, RecordError
from fedpeft.core.evaluate import Evaluate
from fedpeft.core.exchange import (
    Answers,
    Call,
    ClientEnv,
    ClientId,
    Exchange,
    Meter,
    Method,
    Model,
    Nothing,
    Receipt,
    Record,
)
from fedpeft.core.fit import Data
from fedpeft.core.memories import InMemory, Memories
from fedpeft.core.spool import Spool

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

    def exchange(self, call: Call, downs: Mapping[ClientId, Record]) -> Answers:
        """Let every client that was sent a record work on it, `batch` of them at a time."""
        asked = list(downs)
        answers = Spool(call.exchange.up)
        receipts: list[Receipt] = []
        encode = _Encoder()
        for i in range(0, len(asked), self.batch):
            group = [_Turn(self, call, client, downs[client], encode) for client in asked[i : i + self.batch]]
            start = time.perf_counter()
            run_jobs([turn.job for turn in group if turn.job is not None], self.model)
            seconds = time.perf_counter() - start
            total = sum(turn.meter.trained_tokens for turn in group)
            for turn in group:
                share = turn.meter.trained_tokens / total if total else 1 / len(group)
                receipts.append(turn.finish(answers, seconds * share))
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


class _Turn:
    """One client's part of one exchange."""

    def __init__(
        self, engine: InProcess, call: Call, client: ClientId, down: Record, encode: Callable[[Record], bytes]
    ) -> None:
        self.engine, self.call, self.client = engine, call, client
        self.meter = Meter()
        self.job: Job | None = None
        self.lost = engine.fault(client, call) if engine.fault else None
        self.bytes_down = 0
        if self.lost is not None:
            return
        sent = encode(down)
        self.bytes_down = len(sent)
        method = engine.make()
        self.exchange = self._own_exchange(method)
        self.down = records.decode(sent, self.exchange.down)
        env = ClientEnv(
            client, cast(Model, Metered(engine.model, self.meter)), engine.data[client], engine.seed, call.rounds,
            call.round, call.exchange.name, call.attempt, engine.resources.get(client), self.meter,
        )  # fmt: skip
        self.committed = call.versions.get(client)
        self.memory_type = method.memory
        if self.committed is not None:
            self.memory = engine.memories.load(client, self.committed, method.memory)
        else:
            try:
                self.memory = method.init_client(env)
            except Exception as error:  # the client's own work: it loses this client alone
                self.lost = reason(error)
                return
        self.job = Job(self.exchange, self.down, self.memory, env)

    def _own_exchange(self, method: Method) -> Exchange:
        exchange = protocol(method, Evaluate(method).exchange())[self.call.exchange.name]
        return self.engine.wire(exchange) if self.engine.wire else exchange

    def finish(self, answers: Spool, seconds: float) -> Receipt:
        """Carry the answer back, check it as one from afar, and stage the memory that goes with it."""
        receipt = Receipt(self.client, self.bytes_down, 0, seconds, 0.0, self.meter, self.lost)
        if self.job is None:
            return receipt
        if self.job.error is not None:
            return replace(receipt, lost=reason(self.job.error))
        assert self.job.result is not None, "a job without an error has a result"
        up, memory = self.job.result
        data, why = self._answer(up, memory)
        if data is None:
            return replace(receipt, lost=why)
        receipt = replace(receipt, bytes_up=len(data))
        if self.engine.clock is not None:
            receipt = replace(receipt, simulated_seconds=self.engine.clock(receipt))
        late = self.engine.deadline_s
        if late is not None and receipt.simulated_seconds > late:
            return replace(receipt, lost=f"late: {receipt.simulated_seconds:.3g} s, deadline {late:g} s")
        try:
            got = records.decode(data, self.call.exchange.up)
            records.check_finite(got)
            self.call.exchange.accept(self.down, got)
        except Exception as error:  # whatever an answer from afar makes a check do
            return replace(receipt, lost=f"refused: {reason(error)}")
        if memory is not self.memory and not isinstance(memory, Nothing):
            try:
                self.engine.memories.stage(self.client, self.call.version, memory, self.committed)
            except RecordError as error:
                return replace(receipt, lost=f"its memory cannot be kept: {reason(error)}")
            receipt = replace(receipt, staged=True)
        answers.add(self.client, got, data)
        return receipt

    def _answer(self, up: Record, memory: Record) -> tuple[bytes | None, str | None]:
        """The bytes that come back, or why none do."""
        if not isinstance(memory, self.memory_type):
            was, wanted = type(memory).__name__, self.memory_type.__name__
            return None, f"the work left a {was} where a memory {wanted} was expected"
        try:
            data = records.encode(up)
        except FedpeftError as error:
            return None, f"refused: {reason(error)}"
        if self.engine.carry is None:
            return data, None
        return self.engine.carry(self.client, self.call, data), "no answer"
