"""Transports for tests: no codec at all, a process of its own, answers that are lost or out of order."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from fedpeft.core import records
from fedpeft.core.client import Job, protocol, run_jobs
from fedpeft.core.evaluate import Evaluate
from fedpeft.core.exchange import Answers, Call, ClientEnv, ClientId, Method, Receipt, Record, Transport
from fedpeft.core.fit import Data
from fedpeft.core.model import Model
from fedpeft.engines.inprocess import InProcess


@dataclass
class Direct:
    """Hands the records over as they are: what a transport is, in a dozen lines."""

    method: Method
    model: Model
    data: Mapping[ClientId, Mapping[str, Data]]
    seed: int
    memories: dict[tuple[ClientId, int], Record] = field(default_factory=dict)

    def clients(self) -> list[ClientId]:
        return sorted(self.data)

    def exchange(self, call: Call, downs: Mapping[ClientId, Record]) -> Answers:
        exchange = protocol(self.method, Evaluate(self.method).exchange())[call.exchange.name]
        ups: dict[ClientId, Record] = {}
        for client, down in downs.items():
            env = ClientEnv(
                client, self.model, self.data[client], self.seed, call.rounds, call.round, exchange.name, call.attempt
            )
            version = call.versions.get(client)
            memory = self.method.init_client(env) if version is None else self.memories[client, version]
            job = Job(exchange, down, memory, env)
            run_jobs([job], self.model)
            if job.error is not None:
                raise job.error
            assert job.result is not None
            ups[client], self.memories[client, call.version] = job.result
        return Answers(ups, tuple(Receipt(client, staged=True) for client in ups))


# --- a process of its own -----------------------------------------------------------------------------------------


def write_frame(pipe: BinaryIO, head: Mapping[str, Any], parts: Iterable[bytes | None]) -> None:
    """A line of JSON that also says how long the parts are, then the parts."""
    given = list(parts)
    lengths = [None if part is None else len(part) for part in given]
    pipe.write(json.dumps({"head": head, "parts": lengths}).encode() + b"\n")
    for part in given:
        pipe.write(part or b"")
    pipe.flush()


def read_frame(pipe: BinaryIO) -> tuple[dict[str, Any], list[bytes | None]] | None:
    """What `write_frame` wrote; None at the end."""
    line = pipe.readline()
    if not line:
        return None
    frame = json.loads(line)
    return frame["head"], [None if n is None else pipe.read(n) for n in frame["parts"]]


@dataclass
class Pipes:
    """Sends plain data to `site_worker.py`, which knows nothing else, and gets bytes back."""

    process: subprocess.Popen[bytes]
    method: str
    values: Mapping[str, Any]
    cls: type[Method]
    data: Mapping[ClientId, Mapping[str, list[list[float]]]]
    model: Mapping[str, Any]
    seed: int
    memories: dict[tuple[ClientId, int], bytes | None] = field(default_factory=dict)

    def clients(self) -> list[ClientId]:
        return sorted(self.data)

    def exchange(self, call: Call, downs: Mapping[ClientId, Record]) -> Answers:
        assert self.process.stdin is not None and self.process.stdout is not None
        ups: dict[ClientId, Record] = {}
        for client, down in downs.items():
            head = {
                "method": self.method, "values": self.values, "data": self.data[client], "model": self.model,
                "client": client, "seed": self.seed, "rounds": call.rounds, "round": call.round,
                "exchange": call.exchange.name, "attempt": call.attempt,
            }  # fmt: skip
            version = call.versions.get(client)
            memory = None if version is None else self.memories[client, version]
            write_frame(self.process.stdin, head, [records.encode(down), memory])
            answer = read_frame(self.process.stdout)
            assert answer is not None, "the worker has ended"
            found, (up, self.memories[client, call.version]) = answer
            assert up is not None, found["error"]
            ups[client] = records.decode(up, call.exchange.up)
        return Answers(ups, tuple(Receipt(client, staged=True) for client in ups))


# --- what can happen on the way -----------------------------------------------------------------------------------


@dataclass
class Recording:
    """Keeps every call and its answers."""

    inner: Transport
    calls: list[tuple[Call, Mapping[ClientId, Record], Answers]] = field(default_factory=list)

    def clients(self) -> list[ClientId]:
        return list(self.inner.clients())

    def exchange(self, call: Call, downs: Mapping[ClientId, Record]) -> Answers:
        answers = self.inner.exchange(call, downs)
        self.calls.append((call, downs, answers))
        return answers


@dataclass
class Rewritten:
    """Changes what comes back, or what is asked, between the loop and an engine."""

    inner: Transport
    asked: Callable[[Call, Mapping[ClientId, Record]], Mapping[ClientId, Record]] = lambda call, downs: downs
    answered: Callable[[Answers], Answers] = lambda answers: answers

    def clients(self) -> list[ClientId]:
        return list(self.inner.clients())

    def exchange(self, call: Call, downs: Mapping[ClientId, Record]) -> Answers:
        return self.answered(self.inner.exchange(call, self.asked(call, downs)))


@dataclass
class Silent:
    """The answer of one client of every cohort is lost on its way, in the first attempt at each exchange."""

    inner: InProcess
    place: int  # in the cohort: 0 the first, -1 the last

    def clients(self) -> list[ClientId]:
        return list(self.inner.clients())

    def exchange(self, call: Call, downs: Mapping[ClientId, Record]) -> Answers:
        victim = list(downs)[self.place] if downs and call.attempt == 0 else None
        self.inner.carry = lambda client, _, data: None if client == victim else data
        try:
            return self.inner.exchange(call, downs)
        finally:
            self.inner.carry = None
