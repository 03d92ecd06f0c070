"""What happens on a client, whatever carried the message."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fedpeft.core import pairs
from fedpeft.core.errors import ClientError, FedpeftError
from fedpeft.core.exchange import ClientEnv, Exchange, Meter, Method, Record, Steps
from fedpeft.core.fit import SGD, Data, Fit, Fitted
from fedpeft.core.model import Fisher, FisherProbe, Model, Perturbation, TokenNorm
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params

Protocol = Mapping[str, Exchange]


def protocol(method: Method, *further: Exchange) -> dict[str, Exchange]:
    """A client's own view of the exchanges: what it can be asked to do, by name. No code is named on the wire.

    Raises:
        ValueError: two exchanges have one name, so that a client could not tell them apart.
    """
    every = (*method.setup(), *method.round(), *further)
    found = {e.name: e for e in every}
    if len(found) < len(every):
        twice = next(name for name in found if sum(e.name == name for e in every) > 1)
        raise ValueError(f"{type(method).__name__} has two exchanges named {twice!r}; give each a name of its own")
    return found


class Job:
    """One client's work on one exchange: runs until it waits for something, and goes on when it gets that.

    Attributes:
        fit: the Fit that the work waits for, or None.
        probe: the FisherProbe that it waits for, or None.
        result: (up, memory) when the work is done.
        error: what the work raised; the client is lost.
    """

    def __init__(self, exchange: Exchange, down: Record, memory: Record, env: ClientEnv) -> None:
        self.env = env
        self.fit: Fit | None = None
        self.probe: FisherProbe | None = None
        self.result: tuple[Record, Record] | None = None
        self.error: Exception | None = None
        self._work: Steps | None = None
        try:
            work = exchange.work(down, memory, env)
        except Exception as error:
            self.error = error
            return
        if isinstance(work, Generator):
            self._work = work
            self._advance(lambda: next(work))
        else:
            self._finish(work)

    def resume(self, given: Fitted | Fisher | Exception) -> None:
        """Give the work what it waits for, or throw what went wrong into it."""
        work = self._work
        waits = self.fit is not None or self.probe is not None
        assert work is not None and waits, "resume needs a job that waits for something"
        if isinstance(given, Exception):
            error = given
            self._advance(lambda: work.throw(error))
            return
        if isinstance(given, Fitted) and self.fit is not None:
            self.env.meter.add(self.fit, given, self.env.model.lowest_block(self.fit.trained))
        elif self.probe is not None:
            charge(self.env.meter, self.env.model, self.probe)
        self._advance(lambda: work.send(given))

    def _advance(self, step: Callable[[], object]) -> None:
        self.fit = self.probe = None
        try:
            wanted = step()
        except StopIteration as stop:
            self._finish(stop.value)
        except Exception as error:
            self.error = error
        else:
            if isinstance(wanted, Fit):
                self.fit = wanted
            elif isinstance(wanted, FisherProbe):
                self.probe = wanted
            else:
                self.error = ClientError(f"the work yielded a {type(wanted).__name__} where a Fit was expected")

    def _finish(self, result: object) -> None:
        if isinstance(result, tuple) and len(result) == 2:
            self.result = result
        else:
            self.error = ClientError(f"the work gave a {type(result).__name__} where (up, memory) was expected")


def run_jobs(jobs: Sequence[Job], model: Model) -> None:
    """Run all jobs to their end; each wave of Fits that they wait for is one `fit_many`.

    Probes come first, so that whoever has to look at its rows before it trains joins the others' wave.
    """
    while waiting := [job for job in jobs if job.fit is not None or job.probe is not None]:
        probing = [job for job in waiting if job.probe is not None]
        served = probing or waiting
        results: Sequence[Fitted | Fisher | Exception]
        try:
            if probing:
                results = model.fisher_many([job.probe for job in probing if job.probe is not None])
            else:
                results = model.fit_many([job.fit for job in waiting if job.fit is not None])
        except Exception as error:
            results = [error] * len(served)
        for job, given in zip(served, results, strict=True):
            job.resume(given)


def charge(meter: Meter, model: Model, probe: FisherProbe) -> None:
    """Count what a Fisher information costs: a pass of training over the rows, back to the lowest factor."""
    lowest = model.lowest_block(pairs.factors(probe.params))
    tokens, of_rows, products = model.cost(_pass(probe.params, probe.data, probe.rows, None, probe.also, probe.base))
    meter.train(tokens, of_rows, lowest)
    meter.products += products


def _pass(
    params: Params,
    data: Data,
    rows: Sequence[int],
    names: Iterable[str] | None = None,
    also: tuple[Params, ...] = (),
    base: str = "",
) -> Fit:
    """One pass over the rows as training makes it, with the gradient of these names (None: all), to be counted."""
    train = None if names is None else frozenset(names)
    return Fit(params, data, [rows], SGD(0.0), train=train, also=also, base=base)


def reason(error: Exception) -> str:
    """One line for the record of the run: fedpeft's own messages as they are, others with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FedpeftError) else f"{type(error).__name__}: {text}"


class Metered:
    """A model that counts the passes which a client's work makes directly."""

    def __init__(self, model: Model, meter: Meter) -> None:
        self.inner = model
        self._meter = meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def logits(self, params: Params | None, data: Data, rows: Sequence[int] | None = None) -> Tensor:
        """See `Model.logits`."""
        self._count(params, data, rows)
        return self.inner.logits(params, data, rows)

    def losses(
        self, params: Params, data: Data, rows: Sequence[int], also: tuple[Params, ...] = (), base: str = ""
    ) -> Tensor:
        """See `Model.losses`."""
        self._forward(params, data, rows, also, base)
        return self.inner.losses(params, data, rows, also, base)

    def score(self, params: Params, data: Data) -> dict[str, Tensor]:
        """See `Model.score`."""
        self._count(params, data, None)
        return self.inner.score(params, data)

    def hidden(self, params: Params | None, data: Data, rows: Sequence[int]) -> Tensor:
        """See `Model.hidden`."""
        self._count(params, data, rows)
        return self.inner.hidden(params, data, rows)

    def hessian(
        self, params: Params, data: Data, rows: Sequence[int], names: Iterable[str] | None = None
    ) -> Callable[[Params], dict[str, Tensor]]:
        """See `Model.hessian`; a product costs about what two gradients cost."""
        over = tuple(params if names is None else names)
        tokens, of_rows, products = self.inner.cost(_pass(params, data, rows, over))
        multiply = self.inner.hessian(params, data, rows, over)

        def product(vector: Params) -> dict[str, Tensor]:
            self._meter.train(2 * tokens, 2 * of_rows, self.inner.lowest_block(over))
            self._meter.products += 2 * products
            return multiply(vector)

        return product

    def fisher(
        self,
        params: Params,
        data: Data,
        rows: Sequence[int],
        token_norm: TokenNorm = "sqrt",
        also: tuple[Params, ...] = (),
    ) -> Fisher:
        """See `Model.fisher`."""
        charge(self._meter, self.inner, FisherProbe(params, data, rows, also=also))
        return self.inner.fisher(params, data, rows, token_norm, also)

    def fisher_many(self, probes: Sequence[FisherProbe]) -> list[Fisher | Exception]:
        """See `Model.fisher_many`."""
        for probe in probes:
            charge(self._meter, self.inner, probe)
        return self.inner.fisher_many(probes)

    def sensitivity(
        self, params: Params, data: Data, rows: Sequence[int], perturbation: Perturbation, size: float, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """See `Model.sensitivity`: forward, and backward through all blocks; forward once more."""
        tokens, of_rows, products = self.inner.cost(_pass(params, data, rows))
        self._meter.train(tokens, of_rows, 0)
        self._meter.products += products
        self._forward(params, data, rows)
        return self.inner.sensitivity(params, data, rows, perturbation, size, rng)

    def _forward(
        self, params: Params, data: Data, rows: Sequence[int], also: tuple[Params, ...] = (), base: str = ""
    ) -> None:
        """Count a pass forward over the rows as they are trained on: with their own label or answer, once each."""
        tokens, of_rows, products = self.inner.cost(_pass(params, data, rows, (), also, base))
        self._meter.forward_tokens += tokens
        self._meter.forward_pairs += of_rows
        self._meter.products += products

    def _count(self, params: Params | None, data: Data, rows: Sequence[int] | None) -> None:
        """Count passes forward that predict."""
        tokens, pairs = self.inner.passes(params, data, rows)
        self._meter.forward_tokens += tokens
        self._meter.forward_pairs += pairs


def answer(work: Exchange, down: Record, memory: Record, env: ClientEnv) -> tuple[Record, Record]:
    """The whole of one client's work, alone: (up, memory). Raises ClientError with the reason it failed."""
    job = Job(work, down, memory, env)
    run_jobs([job], env.model.inner if isinstance(env.model, Metered) else env.model)  # the job counts what it yields
    if job.error is not None:
        raise ClientError(reason(job.error)) from job.error
    assert job.result is not None
    return job.result


__all__ = ["Job", "Metered", "Protocol", "Rng", "answer", "protocol", "reason", "run_jobs"]
