"""`method.schedule`: a curriculum for any method, put around its local training.

A schedule changes which rows a client may train on in a round, or how long they are, and nothing else: the method's
work finds them in its surroundings (`ClientEnv.usable`, `ClientEnv.longest`), from which `local_batches` and
`ordinary_fit` take them. How they are cut into batches and Fits, what travels, and what the server does, stay the
method's own; so does what it measures with Fits of another making. What a client must remember, the order of its rows,
lies beside its memory.
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
from fedpeft.core.difficulty import Difficulty, difficulties
from fedpeft.core.errors import ConfigError
from fedpeft.core.exchange import ClientEnv, Exchange, Record, Steps
from fedpeft.core.model import Fisher, FisherProbe
from fedpeft.core.tree import Params
from fedpeft.maths import curriculum
from fedpeft.maths.curriculum import Pacing

Kind: TypeAlias = Literal["fisher", "loss", "random", "rarity", "length", "two_stage"]
RANKED: dict[str, Difficulty] = {"fisher": "fisher", "loss": "loss", "random": "random"}


def restricted(env: ClientEnv, method: Any, order: Sequence[int]) -> ClientEnv:
    """The client's surroundings with the rows of this round, and how long their texts are.

    Args:
        method: has the fields of a schedule, and `batch_size`.
        order: the rows from easy to hard, for the kinds that rank; empty: they were not ranked yet, and all are usable.
    """
    t, rows = env.round - 1, len(env.data)
    if not rows or (method.schedule in RANKED and not order):
        return env
    if method.schedule in RANKED:
        pacing = method.schedule_pacing, method.schedule_beta, method.schedule_alpha
        return replace(env, usable=order[: max(method.batch_size, curriculum.pace(t, env.rounds, rows, *pacing))])
    if method.schedule == "rarity":
        common = curriculum.common_words(env.data.rarities.tolist(), t, env.rounds, method.batch_size)
        return replace(env, usable=common)
    tokens = curriculum.tokens_at if method.schedule == "length" else curriculum.two_stages
    return replace(env, longest=tokens(t, env.rounds, int(env.data.lengths.max())))


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
        plans_by_rounds: ClassVar[bool] = True
        chooses_rows: ClassVar[bool] = True
        memory: ClassVar[type[Any]] = kept

        def __post_init__(self) -> None:
            problems: list[str] = []
            try:
                super().__post_init__()
            except ConfigError as error:
                problems += error.problems
            shares = {"schedule_beta": self.schedule_beta, "schedule_alpha": self.schedule_alpha}
            wrong = [(name, share) for name, share in shares.items() if not 0 < share <= 1]
            if refusal := self.accepts_schedule(self.schedule):
                problems.append(f"{refusal}; leave method.schedule out")
            else:
                problems += [f"method.{n} is {v}; it must be above 0 and at most 1" for n, v in wrong]
            if problems:
                raise ConfigError(problems)

        def accepts(self, spec: AdapterSpec) -> str | None:
            if self.schedule == "fisher" and not isinstance(spec, Lora):
                return "method.schedule fisher is of LoRA's factors; use adapter.kind lora, or method.schedule loss"
            refusal: str | None = super().accepts(spec)
            return refusal

        def idle(self) -> dict[str, str]:
            own, why = dict(super().idle()), f"method.schedule {self.schedule} has a pace of its own"
            paces = ("schedule_beta", "schedule_alpha", "schedule_pacing")
            return own if self.schedule in RANKED else own | dict.fromkeys(paces, why)

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


def _work(inner: Callable[..., Any], method: Any, down: Record, memory: Any, env: ClientEnv) -> Steps:
    """The method's work on its own memory, with the rows of this round.

    Args:
        method: with a schedule; None: all rows may be used.
    """
    rows: Tensor = memory.rows
    if method is not None:
        if method.schedule in RANKED and not len(rows):
            rows = yield from _ranked(inner, method, down, memory.inner, env)
        env = restricted(env, method, rows.tolist())
    steps: Any = inner(down, memory.inner, env)
    up, own = (yield from steps) if isinstance(steps, Generator) else steps
    return up, memory if own is memory.inner and rows is memory.rows else replace(memory, inner=own, rows=rows)


def _ranked(
    inner: Callable[..., Any], method: Any, down: Record, memory: Record, env: ClientEnv
) -> Generator[FisherProbe, Fisher, Tensor]:
    """The client's rows from easy to hard, for the model that its work is about to train; empty where it trains none.

    The work is begun only to see its first Fit over these rows, and then begun anew: it is a pure function.
    """
    steps: Any = inner(down, memory, env)
    fit: Any = next(steps, None) if isinstance(steps, Generator) else None
    while isinstance(fit, FisherProbe):
        found = yield fit
        try:
            fit = steps.send(found)
        except StopIteration:
            return _no_rows()
    if fit is None or fit.data is not env.data or not fit.steps:
        return _no_rows()
    steps.close()
    if method.schedule_beta == 1:
        return torch.arange(len(env.data))
    difficulty = yield from difficulties(RANKED[method.schedule], fit.params, env, also=fit.also, base=fit.base)
    return torch.tensor(curriculum.easy_first(difficulty), dtype=torch.int64)
