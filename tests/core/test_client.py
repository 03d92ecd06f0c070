"""Work on a client: generators that wait for Fits, errors that lose one client only, and what is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.core.client import Job, Metered, answer, protocol, reason, run_jobs
from fedpeft.core.cohort import everyone
from fedpeft.core.errors import ClientError, DivergedError
from fedpeft.core.examples import Examples
from fedpeft.core.exchange import ClientEnv, Exchange, Meter, Nothing, Weights
from fedpeft.core.fit import SGD, Fit, Fitted, Moments
from fedpeft.core.method import Defaults
from fedpeft.core.model import Fisher, FisherProbe, Model

DATA = Examples(tuple(np.ones(n, np.int32) for n in (2, 3, 5)), np.zeros(3, np.int64))


@dataclass
class Counting:
    """A model whose fit adds one to w, or fails where w is negative."""

    waves: list[int] = field(default_factory=list)

    def fit_many(self, fits: Sequence[Fit]) -> list[Fitted | Exception]:
        self.waves.append(len(fits))
        return [self._fit(f) for f in fits]

    def _fit(self, f: Fit) -> Fitted | Exception:
        if f.params["w"] < 0:
            return DivergedError("the loss is not finite")
        return Fitted({"w": f.params["w"] + 1}, (0.5, 1.5), 2, 7, Moments(2), tokens=30, pairs=90)

    def fisher_many(self, probes: Sequence[FisherProbe]) -> list[Fisher | Exception]:
        self.waves.append(-len(probes))
        wrong = ClientError("there is no row 5")
        return [wrong if 5 in p.rows else Fisher(p.params["w"] * 0 + 9.0, {}) for p in probes]

    def lowest_block(self, names: Any) -> int:
        return 1

    def passes(self, params: Any, data: Examples, rows: Sequence[int] | None = None) -> tuple[int, int]:
        lengths = data.lengths if rows is None else data.lengths[list(rows)]
        return int(lengths.sum()), int((lengths**2).sum())

    def cost(self, fit: Fit) -> tuple[int, int, int]:
        rows = [row for batch in fit.batches for row in batch]
        return *self.passes(fit.params, fit.data, rows), 100 if fit.trained else 10

    def losses(self, params: Any, data: Examples, rows: Sequence[int], also: Any = (), base: str = "") -> torch.Tensor:
        return torch.zeros(len(rows))

    def hidden(self, params: Any, data: Examples, rows: Sequence[int]) -> torch.Tensor:
        return torch.zeros(1, len(rows), 2, 4)

    def hessian(self, params: Any, data: Examples, rows: Sequence[int], names: Any = None) -> Any:
        return lambda vector: vector

    def logits(self, params: Any, data: Examples, rows: Sequence[int] | None = None) -> torch.Tensor:
        return torch.zeros(len(data) if rows is None else len(rows), 2)

    def score(self, params: Any, data: Examples) -> dict[str, torch.Tensor]:
        return {"n": torch.tensor(len(data))}


def env(model: Any = None) -> ClientEnv:
    meter = Meter()
    return ClientEnv("a", Metered(model or Counting(), meter), {"train": DATA}, 0, 1, meter=meter)  # type: ignore[arg-type]


Training = Generator[Fit, Fitted, tuple[Weights, Any]]


def fit_times(n: int) -> Any:
    def work(down: Weights, memory: Any, env: ClientEnv) -> Training:
        params = down.params
        for _ in range(n):
            fitted = yield Fit(params, env.data, [[0, 1], [2]], SGD())
            params = fitted.params
        return Weights(params), memory

    return work


def exchange(work: Any, name: str = "train") -> Exchange:
    return Exchange(name, Weights, Weights, everyone, lambda s, c: s, work, lambda s, ups, env: s)


def job(work: Any, w: float = 0.0) -> Job:
    return Job(exchange(work), Weights({"w": torch.tensor(w)}), Nothing(), env())


def value(job: Job) -> float:
    assert job.result is not None and job.error is None and job.fit is None
    return float(job.result[0].params["w"])


def test_plain_work_is_done_at_once() -> None:
    assert value(job(lambda down, memory, env: (Weights({"w": down.params["w"] * 2}), memory), 3.0)) == 6.0


def test_work_that_waits_goes_on_with_what_it_waited_for() -> None:
    one = job(fit_times(2))
    assert one.fit is not None and one.fit.batches == [[0, 1], [2]] and one.result is None
    run_jobs([one], Counting())
    assert value(one) == 2.0


def test_each_wave_of_fits_is_one_call() -> None:
    """Four clients that want 0, 1, 3 and 3 fits make waves of 3, 2 and 2."""
    model = Counting()
    jobs = [job(fit_times(n)) for n in (0, 1, 3, 3)]
    run_jobs(jobs, model)
    assert [value(j) for j in jobs] == [0.0, 1.0, 3.0, 3.0]
    assert model.waves == [3, 2, 2]


def test_a_failed_fit_is_thrown_into_its_own_work_only() -> None:
    jobs = [job(fit_times(2)), job(fit_times(2), -5.0), job(fit_times(2), 1.0)]
    run_jobs(jobs, Counting())
    assert (value(jobs[0]), value(jobs[2])) == (2.0, 3.0)
    assert isinstance(jobs[1].error, DivergedError) and jobs[1].result is None and jobs[1].fit is None


def test_work_may_catch_what_is_thrown_and_try_again() -> None:
    def stubborn(down: Weights, memory: Any, env: ClientEnv) -> Training:
        try:
            yield Fit(down.params, env.data, [[0]], SGD())
        except DivergedError:
            fitted = yield Fit({"w": -down.params["w"]}, env.data, [[0]], SGD())
        return Weights(fitted.params), memory

    one = job(stubborn, -5.0)
    run_jobs([one], Counting())
    assert value(one) == 6.0


def fails_at_once(down: Any, memory: Any, env: Any) -> Any:
    raise ValueError("bad  \n down")


def fails_before_its_fit(down: Any, memory: Any, env: Any) -> Any:
    raise ValueError("bad down")
    yield


def fails_after_its_fit(down: Any, memory: Any, env: Any) -> Any:
    yield Fit(down.params, env.data, [[0]], SGD())
    raise ZeroDivisionError("no rows")


def yields_nonsense(down: Any, memory: Any, env: Any) -> Any:
    yield None


def gives_nonsense(down: Any, memory: Any, env: Any) -> Any:
    return Weights({})


def ends_with_nonsense(down: Any, memory: Any, env: Any) -> Any:
    yield Fit(down.params, env.data, [[0]], SGD())


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (fails_at_once, "ValueError: bad down"),
        (fails_before_its_fit, "ValueError: bad down"),
        (fails_after_its_fit, "ZeroDivisionError: no rows"),
        (yields_nonsense, "the work yielded a NoneType where a Fit was expected"),
        (gives_nonsense, "the work gave a Weights where (up, memory) was expected"),
        (ends_with_nonsense, "the work gave a NoneType where (up, memory) was expected"),
    ],
)
def test_an_error_in_work_loses_that_client_only(work: Any, words: str) -> None:
    jobs = [job(fit_times(1)), job(work), job(fit_times(2))]
    run_jobs(jobs, Counting())
    assert (value(jobs[0]), value(jobs[2])) == (1.0, 2.0)
    assert jobs[1].error is not None and jobs[1].result is None and reason(jobs[1].error) == words
    with pytest.raises(ClientError) as caught:
        answer(exchange(work), Weights({"w": torch.tensor(0.0)}), Nothing(), env())
    assert str(caught.value) == words


def test_the_answer_of_one_client_alone() -> None:
    up, memory = answer(exchange(fit_times(2)), Weights({"w": torch.tensor(1.0)}), Moments(4), env())
    assert up.params["w"] == 3.0 and memory == Moments(4)


def test_what_keeps_the_process_from_running_is_not_caught() -> None:
    def interrupted(down: Any, memory: Any, env: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(interrupted)


def test_the_meter_counts_fits_and_forward_passes() -> None:
    """Lengths 2, 3 and 5: all rows have 10 tokens and 4 + 9 + 25 = 38 pairs, rows 0 and 2 have 7 and 29."""

    def work(down: Weights, memory: Any, env: ClientEnv) -> Training:
        env.model.logits(None, env.data)
        env.model.logits(down.params, env.data, [0, 2])
        env.model.score(down.params, env.data)
        yield Fit(down.params, env.data, [[0]], SGD())
        fitted = yield Fit(down.params, env.data, [[0]], SGD())
        return Weights(fitted.params), memory

    one = job(work)
    run_jobs([one], Counting())
    labels = Counter({0: 2})  # of row 0, twice
    wanted = Meter(steps=4, examples=14, trained={1: (60, 180)}, forward_tokens=27, forward_pairs=105, labels=labels)
    assert one.env.meter == wanted


def test_the_meter_counts_probes() -> None:
    """Hidden states and losses cost a forward pass, a Fisher information a gradient, a product with the Hessian two."""

    def work(down: Weights, memory: Any, env: ClientEnv) -> Any:
        env.model.hidden(None, env.data, [0, 2])
        env.model.losses(down.params, env.data, [1])
        env.model.fisher_many([FisherProbe(down.params, env.data, [1])])
        product = env.model.hessian(down.params, env.data, [1])
        return Weights(product(product(down.params))), memory

    one = job(work)
    trained = {1: (3 + 2 * 2 * 3, 9 + 2 * 2 * 9)}
    products = 10 + 100 + 2 * 2 * 100
    assert one.env.meter == Meter(trained=trained, forward_tokens=10, forward_pairs=38, products=products)


def test_probes_come_before_fits_and_are_counted() -> None:
    """One looks at its rows before it trains, another trains twice: their first Fits are still one wave."""

    def looks(down: Weights, memory: Any, env: ClientEnv) -> Any:
        found = yield FisherProbe(down.params, env.data, [0, 2])
        fitted = yield Fit(down.params, env.data, [[0]], SGD())
        return Weights({"w": fitted.params["w"] + found.trace}), memory

    jobs, model = [job(looks), job(fit_times(2)), job(looks, -1.0)], Counting()
    run_jobs(jobs, model)
    assert model.waves == [-2, 3, 1]
    assert jobs[0].result is not None and jobs[0].result[0].params["w"] == 9.0 + 1
    assert jobs[0].env.meter.trained == {1: (30 + 7, 90 + 29)}
    assert isinstance(jobs[2].error, DivergedError)
    alone = env()
    answer(exchange(looks), Weights({"w": torch.tensor(1.0)}), Nothing(), alone)
    assert alone.meter.trained == jobs[0].env.meter.trained


def test_a_probe_that_fails_is_thrown_into_its_own_work() -> None:
    def looks(down: Weights, memory: Any, env: ClientEnv) -> Any:
        try:
            yield FisherProbe(down.params, env.data, [5])
        except ClientError:
            return Weights({}), memory

    lost, kept = job(looks), job(fit_times(1))
    run_jobs([lost, kept], Counting())
    assert lost.result is not None and lost.result[0] == Weights({})
    assert kept.result is not None and lost.env.meter == Meter()


def test_a_failed_fit_costs_nothing() -> None:
    one = job(fit_times(1), -1.0)
    run_jobs([one], Counting())
    assert one.env.meter == Meter()


def test_metering_hides_nothing_of_the_model() -> None:
    model = Counting()
    metered: Model = env(model).model
    metered.fit_many([])
    assert model.waves == [0] and metered.logits(None, DATA, [1]).shape == (1, 2)


def test_a_protocol_names_every_exchange_once() -> None:
    class Two(Defaults):
        def setup(self) -> Sequence[Exchange]:
            return (exchange(fails_at_once, "hello"),)

        def round(self) -> Sequence[Exchange]:
            return (exchange(fit_times(1)),)

    found = protocol(Two(), exchange(fit_times(1), "evaluate"))  # type: ignore[arg-type]
    assert list(found) == ["hello", "train", "evaluate"]
    assert all(name == e.name for name, e in found.items())
