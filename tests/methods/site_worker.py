"""A site in a process of its own: rebuilds method, model and data from plain data, works, and answers with bytes.

Started once per test session by the conformance suite; reads frames from stdin and writes frames to stdout until
stdin ends. A client's memory is not kept here: it comes with the request and goes back with the answer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).parents[1]))

import toy
import transports
from fedpeft import methods
from fedpeft.core import records
from fedpeft.core.client import answer, protocol
from fedpeft.core.errors import FedpeftError
from fedpeft.core.evaluate import Evaluate
from fedpeft.core.exchange import ClientEnv
from fedpeft.core.method import rebuild


def work(head: dict[str, Any], down: bytes, memory: bytes | None) -> tuple[bytes, bytes]:
    """One client's answer and new memory."""
    cls = methods.load(head["method"])
    method = rebuild(cls, head["values"])
    model = toy.ToyModel(**head["model"])
    env = ClientEnv(
        head["client"], model, toy.splits(head["data"]), head["seed"], head["rounds"], head["round"],
        head["exchange"], head["attempt"],
    )  # fmt: skip
    exchange = protocol(method, Evaluate(method).exchange())[head["exchange"]]
    known = method.init_client(env) if memory is None else records.decode(memory, cls.memory)
    up, kept = answer(exchange, records.decode(down, exchange.down), known, env)
    return records.encode(up), records.encode(kept)


def serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answer until there is nothing more to read."""
    while (frame := transports.read_frame(stdin)) is not None:
        head, (down, memory) = frame
        assert down is not None
        try:
            transports.write_frame(stdout, {}, work(head, down, memory))
        except FedpeftError as error:
            transports.write_frame(stdout, {"error": str(error)}, [None, None])


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
