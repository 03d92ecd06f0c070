"""What a client costs that does nothing: it is sent 1 MB and sends it back. And how long a process takes to get there.

    python -m benchmarks.null_client

Per client: a round over `InProcess` (codec both ways, checks, weighted mean of 1 MB) divided by its clients.
Start: from the start of a fresh interpreter until the first round of one such client is done, without any base model.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks import record
from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, HeadOnly
from fedpeft.core.cohort import everyone
from fedpeft.core.examples import Examples
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Update, Weights
from fedpeft.core.federate import federate
from fedpeft.core.fit import Data, Fit, Fitted
from fedpeft.core.method import Defaults
from fedpeft.core.model import Fisher, FisherProbe, Perturbation, Teacher, TokenNorm
from fedpeft.core.rng import Rng
from fedpeft.engines.inprocess import InProcess

NUMBERS = 250_000  # float32: 1 MB


@dataclass(frozen=True)
class Null(Defaults):
    """Everybody returns what it was sent."""

    state: ClassVar[type[Weights]] = Weights

    def init(self, env: ServerEnv) -> Weights:
        """1 MB of parameters."""
        return Weights(env.initial())

    def round(self) -> tuple[Exchange, ...]:
        """One exchange with everybody."""
        return (Exchange("echo", Weights, Update, everyone, self.send, self.work, self.average),)

    def send(self, state: Weights, client: ClientId) -> Weights:
        """The parameters."""
        return state

    def work(self, down: Weights, memory: Nothing, env: ClientEnv) -> tuple[Update, Nothing]:
        """The same parameters."""
        return Update(down.params, len(env.data), 0.0), memory

    def average(self, state: Weights, ups: Mapping[ClientId, Update], env: ServerEnv) -> Weights:
        """Their mean."""
        return Weights(tree.mean((up.params, up.examples) for up in ups.values()))

    def result(self, state: Weights) -> tree.Params:
        """The parameters."""
        return state.params


class NoModel:
    """A model that only has parameters."""

    spec: AdapterSpec = HeadOnly()
    blocks = 24

    @property
    def sha256(self) -> str:
        """There is no base."""
        return ""

    @property
    def config(self) -> dict[str, Any]:
        """No base."""
        return {}

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """1 MB of random numbers, in as many tensors as an adapter has."""
        parts = np.array_split(rng.standard_normal(NUMBERS, dtype=np.float32), 24)
        return {f"block.{i}.w": torch.from_numpy(part.copy()) for i, part in enumerate(parts)}

    def check(self, fit: Fit) -> None:
        """Never called: the null client does not train."""
        raise NotImplementedError

    def fit_many(self, fits: Sequence[Fit]) -> list[Fitted | Exception]:
        """Called with nothing to do at most."""
        return [NotImplementedError() for _ in fits]

    def fit(self, fit: Fit) -> Fitted:
        """Never called: the null client does not train."""
        raise NotImplementedError

    def logits(self, params: tree.Params | None, data: Data, rows: Sequence[int] | None = None) -> Tensor:
        """Never called: the null client does not predict."""
        raise NotImplementedError

    def token_logits(self, params: tree.Params | None, data: Data, rows: Sequence[int] | None = None) -> Tensor:
        """Never called: there is no text."""
        raise NotImplementedError

    def distil(self, fit: Fit, teach: Teacher, temperature: float = 1.0, share: float = 1.0) -> Fitted:
        """Never called: there is nothing to train."""
        raise NotImplementedError

    def score(self, params: tree.Params, data: Data) -> dict[str, Tensor]:
        """Never called: the null client does not predict."""
        raise NotImplementedError

    def lowest_block(self, names: Iterable[str]) -> int:
        """The first."""
        return 0

    def passes(self, params: tree.Params | None, data: Data, rows: Sequence[int] | None = None) -> tuple[int, int]:
        """Nothing goes through it."""
        return 0, 0

    def cost(self, fit: Fit) -> tuple[int, int, int]:
        """Nothing goes through it."""
        return 0, 0, 0

    def hidden(self, params: tree.Params | None, data: Data, rows: Sequence[int]) -> Tensor:
        """Never called: there are no states."""
        raise NotImplementedError

    def hessian(
        self, params: tree.Params, data: Data, rows: Sequence[int], names: Iterable[str] | None = None
    ) -> Callable[[tree.Params], dict[str, Tensor]]:
        """Never called: there is no loss."""
        raise NotImplementedError

    def losses(
        self,
        params: tree.Params,
        data: Data,
        rows: Sequence[int],
        also: tuple[tree.Params, ...] = (),
        base: str = "",
    ) -> Tensor:
        """Never called: there is no loss."""
        raise NotImplementedError

    def fisher(
        self,
        params: tree.Params,
        data: Data,
        rows: Sequence[int],
        token_norm: TokenNorm = "sqrt",
        also: tuple[tree.Params, ...] = (),
    ) -> Fisher:
        """Never called: there is no loss."""
        raise NotImplementedError

    def fisher_many(self, probes: Sequence[FisherProbe]) -> list[Fisher | Exception]:
        """Never called: there is no loss."""
        raise NotImplementedError

    def sensitivity(
        self, params: tree.Params, data: Data, rows: Sequence[int], perturbation: Perturbation, size: float, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """Never called: there is no loss."""
        raise NotImplementedError


ONE_ROW = Examples((np.zeros(1, np.int32),), np.zeros(1, np.int64))  # the data of a null client


def round_seconds(clients: int, rounds: int) -> tuple[list[float], int, int]:
    """Seconds of every round after the first, and the bytes of a client's messages, down and up."""
    data: dict[str, dict[str, Data]] = {f"client-{i:04d}": {"train": ONE_ROW} for i in range(clients)}
    model = NoModel()
    transport = InProcess(Null, model, data, seed=0)
    times: list[float] = []
    down = up = 0
    start = time.perf_counter()
    for done in federate(Null(), transport, model, rounds=rounds + 1, seed=0):
        times.append(time.perf_counter() - start)
        assert len(done.answered) == clients
        down, up = done.receipts[0].bytes_down, done.receipts[0].bytes_up
        start = time.perf_counter()
    return times[1:], down, up


def start_seconds(repeats: int) -> list[float]:
    """Seconds from the start of a fresh process to the end of its first round."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        command = [sys.executable, "-c", "from benchmarks.null_client import round_seconds; round_seconds(1, 0)"]
        subprocess.run(command, check=True, cwd=record.RESULTS.parents[1])
        times.append(time.perf_counter() - start)
    return times


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    times, down, up = round_seconds(options.clients, options.rounds)
    each = [1000 * t / options.clients for t in times]
    starts = start_seconds(options.starts)
    result = {
        "ms_per_client": {"median": statistics.median(each), "min": min(each), "max": max(each)},
        "start_s": {"median": statistics.median(starts), "min": min(starts), "max": max(starts)},
        "bytes": {"down": down, "up": up, "raw": 4 * NUMBERS},
    }
    record.show([["", "median", "min", "max"], *([k, *result[k].values()] for k in ("ms_per_client", "start_s"))])
    return record.keep("null_client", options, result)


if __name__ == "__main__":
    main()
