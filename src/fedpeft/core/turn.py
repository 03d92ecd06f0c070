"""One client's part of one exchange, from the bytes that came to the bytes that go back, on whatever engine.

    bytes -> Turn(site, task, bytes) -> turn.job, run by `client.run_jobs` -> turn.answer() -> bytes, and turn.stage()
    at the server: bytes -> receive(exchange, down, bytes) -> an answer that may be folded

An engine carries the bytes and decides who trains together; everything that a client does is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from fedpeft.core import records
from fedpeft.core.client import Job, Metered, protocol
from fedpeft.core.errors import ClientError, RecordError
from fedpeft.core.evaluate import Evaluate
from fedpeft.core.exchange import Call, ClientEnv, ClientId, Exchange, Meter, Method, Nothing, Record
from fedpeft.core.fit import Data
from fedpeft.core.memories import Memories
from fedpeft.core.model import Model


@dataclass(frozen=True)
class Site:
    """What a client brings to every turn.

    Attributes:
        make: a fresh method from its hyper-parameters; every turn has its own.
        memories: where its memory lies between its turns.
        wire: rewrites an exchange as the wire in use needs it; None: as it is.
    """

    client: ClientId
    make: Callable[[], Method]
    model: Model
    splits: Mapping[str, Data]
    memories: Memories
    seed: int
    resources: object = None
    wire: Callable[[Exchange], Exchange] | None = None


@dataclass(frozen=True)
class TurnTask:
    """What is asked beside the record: the place in the run, and which versions of the memory to read and write."""

    exchange: str
    round: int
    rounds: int
    attempt: int
    version: int  # under which a new memory is staged
    committed: int | None  # the memory that counts; None: the client has none yet

    @classmethod
    def of(cls, call: Call, client: ClientId) -> TurnTask:
        """This client's part of a call."""
        committed = call.versions.get(client)
        return cls(call.exchange.name, call.round, call.rounds, call.attempt, call.version, committed)


def initial_memory(method: Method, env: ClientEnv) -> Record:
    """The memory of a client that never took part: the same whenever and wherever it is asked for."""
    return method.init_client(replace(env, exchange="init", round=0, attempt=0))


class Turn:
    """A client's work on one message.

    Attributes:
        job: the work; None where it could not begin.
        meter: what the work has cost so far.
        error: why it could not begin.
    """

    def __init__(self, site: Site, task: TurnTask, sent: bytes) -> None:
        self.site, self.task = site, task
        self.meter = Meter()
        self.job: Job | None = None
        self.error: Exception | None = None
        try:
            self._begin(sent)
        except Exception as error:  # a damaged memory, a message that is not what it should be: this client is lost
            self.error = error

    def _begin(self, sent: bytes) -> None:
        site, task = self.site, self.task
        method = site.make()
        self._kind = method.memory
        exchange = protocol(method, Evaluate(method).exchange())[task.exchange]
        exchange = site.wire(exchange) if site.wire else exchange
        model = cast(Model, Metered(site.model, self.meter))
        env = ClientEnv(
            site.client,
            model,
            site.splits,
            site.seed,
            task.rounds,
            task.round,
            task.exchange,
            task.attempt,
            site.resources,
            self.meter,
        )
        down = records.decode(sent, exchange.down)
        if task.committed is None:
            self._before = initial_memory(method, env)
        else:
            self._before = site.memories.load(site.client, task.committed, method.memory)
        self.job = Job(exchange, down, self._before, env)

    def answer(self) -> bytes:
        """The encoded answer.

        Raises:
            Exception: whatever the work raised, or what is wrong with what it left.
        """
        if self.error is not None:
            raise self.error
        assert self.job is not None, "a turn without a job has an error"
        if self.job.error is not None:
            raise self.job.error
        assert self.job.result is not None, "an answer needs work that has been run to its end"
        up, self._after = self.job.result
        if not isinstance(self._after, self._kind):
            was, wanted = type(self._after).__name__, self._kind.__name__
            raise ClientError(f"the work left a {was} where a memory {wanted} was expected")
        return records.encode(up)

    def stage(self) -> bool:
        """Keep the memory that goes with the answer beside the committed one; False where it did not change."""
        if self._after is self._before or isinstance(self._after, Nothing):
            return False
        try:
            self.site.memories.stage(self.site.client, self.task.version, self._after, self.task.committed)
        except RecordError as error:
            raise ClientError(f"its memory cannot be kept: {error}") from error
        return True


def receive(exchange: Exchange, down: Record, data: bytes, max_bytes: int | None = None) -> Record:
    """The answer, if it may be folded: of the declared type, finite, and fitting to what was sent.

    Args:
        down: what the server sent to this client.
        max_bytes: upper limit of the answer's length; None: no limit.

    Raises:
        Exception: whatever an answer from afar makes a check do; the client is then lost.
    """
    up = records.decode(data, exchange.up, max_bytes=max_bytes)
    records.check_finite(up)
    exchange.accept(down, up)
    return cast(Record, up)
