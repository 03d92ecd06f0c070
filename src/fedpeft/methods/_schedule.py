"""`method.schedule`: a curriculum for any method, put around its local training.

A schedule changes which rows a client trains on in a round, or how long they are, and nothing else. It stands between
the method's work and the engine: the batches of every Fit over the client's rows are replaced; what travels, and what
the server does, stays the method's own. What a client must remember, the order of its rows, lies beside its memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from fedpeft.core.adapter import AdapterSpec, Lora
from fedpeft.core.errors import ConfigError
from fedpeft.core.exchange import ClientEnv, Exchange, Record
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import local_batches
from fedpeft.core.tree import Params
from fedpeft.maths import curriculum
from fedpeft.maths.curriculum import Difficulty, Pacing, common_words, two_stages, warm_up

Kind: TypeAlias = Literal["fisher", "loss", "random", "rarity", "length", "two_stage"]
RANKED: dict[str, Difficulty] = {"fisher": "fisher", "loss": "loss", "random": "random"}


def scheduled(fit: Fit, method: Any, rows: Sequence[int], env: ClientEnv) -> Fit:
    """The Fit with the rows of this round.

    Args:
        method: has the fields of a schedule, and `epochs`, `batch_size`, `steps`.
        rows: from easy to hard, for the kinds that rank at a first visit.
    """
    t, kind = env.round - 1, method.schedule
    if kind in RANKED:
        n = curriculum.pace(
            t, env.rounds, len(rows), method.schedule_pacing, method.schedule_beta, method.schedule_alpha
        )
        return replace(fit, batches=local_batches(method, env, among=rows[: max(n, min(method.batch_size, len(rows)))]))
    if kind == "rarity":
        return replace(fit, batches=local_batches(method, env, among=common_words(method, env)))
    return replace(fit, data=env.data.truncated(warm_up(t, env) if kind == "length" else two_stages(t, env)))


# --- around any method ------------------------------------------------------------------------------------------------


def _no_rows() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@cache
def with_schedule(cls: type[Any]) -> type[Any]:
    """The method's class with the fields of a schedule; its memory holds the method's own and the rows' order."""
    kept = dataclasses.make_dataclass(
        f"Scheduled{cls.memory.__name__}",
        [("inner", cls.memory), ("rows", Tensor, field(default_factory=_no_rows))],
        frozen=True,
    )

    @dataclass(frozen=True)
    class Scheduled(cls):  # type: ignore[misc]
        __doc__ = cls.__doc__
        schedule: Kind = "fisher"  # which rows a client trains on in a round: by difficulty, by words, or how long
        schedule_beta: float = 0.6  # share of the rows in use at first (fisher, loss, random)
        schedule_alpha: float = 0.8  # share of the rounds after which all are (fisher, loss, random)
        schedule_pacing: Pacing = "linear"  # how the share grows (fisher, loss, random)
        memory: ClassVar[type[Any]] = kept

        def __post_init__(self) -> None:
            super().__post_init__()
            shares = {"schedule_beta": self.schedule_beta, "schedule_alpha": self.schedule_alpha}
            wrong = [(name, share) for name, share in shares.items() if not 0 < share <= 1]
            if wrong:
                raise ConfigError([f"method.{n} is {v}; it must be above 0 and at most 1" for n, v in wrong])

        def accepts(self, spec: AdapterSpec) -> str | None:
            if self.schedule == "fisher" and not isinstance(spec, Lora):
                return "method.schedule fisher is of LoRA's factors; use adapter.kind lora, or method.schedule loss"
            refusal: str | None = super().accepts(spec)
            return refusal

        def init_client(self, env: ClientEnv) -> Record:
            return kept(super().init_client(env))

        def personal(self, params: Params, memory: Any) -> Params:
            own: Params = super().personal(params, memory.inner)
            return own

        @property
        def personalised(self) -> bool:
            plain = cls(**{f.name: getattr(self, f.name) for f in dataclasses.fields(cls) if f.init})
            return bool(plain.personalised)

        def setup(self) -> tuple[Exchange, ...]:
            return tuple(replace(e, work=partial(_work, e.work, None)) for e in super().setup())

        def round(self) -> tuple[Exchange, ...]:
            return tuple(replace(e, work=partial(_work, e.work, self)) for e in super().round())

    return Scheduled


def _work(
    inner: Callable[..., Any], method: Any, down: Record, memory: Any, env: ClientEnv
) -> Generator[Fit, Fitted, tuple[Record, Record]]:
    """The method's work on its own memory; Fits over the client's rows get the rows of this round.

    Args:
        method: with a schedule; None: Fits stay as they are.
    """
    rows: Tensor = memory.rows
    steps: Any = inner(down, memory.inner, env)
    if not isinstance(steps, Generator):
        up, own = steps
        return up, memory if own is memory.inner else replace(memory, inner=own)
    answer: Callable[[], Any] = partial(next, steps)
    while True:
        try:
            fit = answer()
        except StopIteration as stop:
            up, own = stop.value
            return up, memory if own is memory.inner and rows is memory.rows else replace(memory, inner=own, rows=rows)
        if method is not None and fit.data is env.data and fit.steps:
            if method.schedule in RANKED and not len(rows):
                difficulty = curriculum.difficulties(RANKED[method.schedule], fit.params, env)
                rows = torch.tensor(curriculum.easy_first(difficulty))
            fit = scheduled(fit, method, rows.tolist(), env)
        try:
            fitted = yield fit
        except Exception as error:
            answer = partial(steps.throw, error)
        else:
            answer = partial(steps.send, fitted)
