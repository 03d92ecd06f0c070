"""What most methods have in common, as functions to share: a method states what is different about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from fedpeft.core.adapter import AdapterSpec, Lora, frozen
from fedpeft.core.errors import ConfigError
from fedpeft.core.examples import epoch_batches
from fedpeft.core.exchange import ClientEnv, Exchange, Method, Nothing, Record
from fedpeft.core.fit import SGD, AdamW, Fit, Optimizer
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params

M = TypeVar("M", bound=Method)


class Defaults:
    """The parts of `Method` that most papers do not mention: LoRA, no set-up, no client memory, no personal model."""

    memory: ClassVar[type[Record]] = Nothing
    pooled: ClassVar[bool] = False  # True: the method runs on one client that holds everybody's rows
    plans_by_rounds: ClassVar[bool] = False  # True: how many rounds there are changes what is done in each
    plans_memory: ClassVar[bool] = False  # True: the method itself sees to it that clients' devices have room
    chooses_rows: ClassVar[bool] = False  # True: the report shows which labels were trained on, round by round

    def adapter(self) -> AdapterSpec:
        """LoRA of rank 8 on query and value."""
        return Lora()

    def accepts(self, spec: AdapterSpec) -> str | None:
        """Any adapter."""
        return None

    def accepts_schedule(self, kind: str) -> str | None:
        """Any schedule, where the method takes its rows from `local_batches`; those that are pooled do not."""
        return f"method {name_of(self)} goes through everybody's rows in an order of its own" if self.pooled else None

    def idle(self) -> Mapping[str, str]:
        """None: every field counts."""
        return {}

    def init_client(self, env: ClientEnv) -> Record:
        """No memory."""
        return Nothing()

    def setup(self) -> Sequence[Exchange]:
        """No set-up."""
        return ()

    def personal(self, params: Params, memory: Any) -> Params:
        """Everybody's model is the global one."""
        return params

    @property
    def personalised(self) -> bool:
        """Where the method says what a client's own model is, it has one."""
        return type(self).personal is not Defaults.personal

    def shared_names(self, state: Any) -> Sequence[str]:
        """None: what a client has of its own, it keeps."""
        return ()

    def trains_on(self, layers: int) -> str:
        """The base as the server has it."""
        return ""

    def rows_of_round(self, rows: float) -> float:
        """Those of ordinary local training, from the fields `steps` and `batch_size`, or `epochs`."""
        steps: int | None = getattr(self, "steps", None)
        if steps is not None:
            return steps * min(int(getattr(self, "batch_size", 1)), rows)
        return int(getattr(self, "epochs", 1)) * rows

    def choices(self, state: Any) -> Mapping[str, Any]:
        """Nothing was decided."""
        return {}


def name_of(method: Defaults) -> str:
    """What the method is found by: its module's name, whatever is put around its class."""
    names = (cls.__module__.rpartition(".")[2] for cls in type(method).__mro__)
    return next(name for name in names if not name.startswith("_"))


def plain(method: Method) -> dict[str, Any]:
    """The hyper-parameters as plain data that JSON can carry."""
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}  # type: ignore[arg-type]


def rebuild(cls: type[M], values: Mapping[str, Any]) -> M:
    """A fresh method from plain data: JSON's lists become the tuples that frozen dataclasses hold."""
    return cls(**{name: frozen(value) for name, value in values.items()})


# --- ordinary local training, from a method's fields -------------------------------------------------------------


class Replies(Protocol):
    """What `mean_loss` reads of an answer."""

    @property
    def examples(self) -> int: ...

    @property
    def loss(self) -> float: ...


class Schedule(Protocol):
    """The fields that say how much a client trains in one round."""

    @property
    def epochs(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def steps(self) -> int | None: ...


class Training(Schedule, Protocol):
    """The fields that say how a client trains."""

    @property
    def lr(self) -> float: ...

    @property
    def head_lr(self) -> float | None: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def clip(self) -> float | None: ...


def local_batches(
    method: Schedule, env: ClientEnv, purpose: str = "batches", among: Sequence[int] | None = None
) -> Sequence[Sequence[int]]:
    """The batches of one round: whole epochs, or exactly `method.steps` batches of as many epochs as that takes.

    Args:
        among: the rows that may be used, `env.usable` if None. Of all rows the batches are the same either way.
    """
    among = env.usable if among is None else among
    rng, used = env.rng(purpose), sorted(range(len(env.data)) if among is None else among)
    epochs, steps = method.epochs, method.steps
    if steps is not None:
        epochs = math.ceil(steps / max(1, math.ceil(len(used) / method.batch_size)))
    batches = epoch_batches(len(used), epochs, method.batch_size, rng)
    return [[used[i] for i in batch] for batch in batches[:steps]]


def stream_batches(env: ClientEnv, cursor: int, steps: int, batch_size: int) -> list[list[int]]:
    """Whole batches from the client's endless stream of rows: one shuffled epoch after another, from a place on.

    A client that stops early in one round goes on there in the next, and sees all of its rows over the rounds.
    """
    n, last = len(env.data), cursor + steps * batch_size
    epochs = range(cursor // n, (last - 1) // n + 1)
    orders = {e: rng_for(env.seed, "stream", round=e, client=env.client).permutation(n) for e in epochs}
    rows = [int(orders[place // n][place % n]) for place in range(cursor, last)]
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def local_optimizer(name: str, method: Training) -> Optimizer:
    """AdamW or SGD with the method's rate and decay."""
    if name == "sgd":
        return SGD(method.lr, weight_decay=method.weight_decay)
    return AdamW(method.lr, weight_decay=method.weight_decay)


def ordinary_fit(method: Training, params: Params, env: ClientEnv, **changes: Any) -> Fit:
    """The Fit that a method's fields describe: its own rate for the head, the adapter's dropout, this place's seed.

    It is over the rows that may be used now, and cut as long as they may be (`env.usable`, `env.longest`).

    Args:
        method: where it has a field `optimizer` ("adamw" or "sgd") that is used, else AdamW.
        params: where training starts.
        changes: fields of Fit that replace the ordinary ones.
    """
    fields: dict[str, Any] = {
        "optimizer": local_optimizer(getattr(method, "optimizer", "adamw"), method),
        "clip": method.clip,
        "rates": {} if method.head_lr is None else {"head.": method.head_lr},
        "seed": env.seed_for("dropout"),
        "dropout": getattr(env.model.spec, "dropout", 0.0),
    }
    if "batches" not in changes:
        fields["batches"] = local_batches(method, env)
    data = env.data if env.longest is None else env.data.truncated(env.longest)
    return Fit(params, data, **(fields | changes))


def mean_loss(ups: Iterable[Replies]) -> float:
    """The training loss of a cohort: each client's mean loss, weighted by its number of examples."""
    pairs = [(up.loss, up.examples) for up in ups]
    total = sum(n for _, n in pairs)
    return math.fsum(loss * n for loss, n in pairs) / total if total else 0.0


# --- ranges of fields --------------------------------------------------------------------------------------------

AT_LEAST = {"cohort": 0, "epochs": 1, "batch_size": 1, "steps": 1, "weight_decay": 0}
ABOVE = {"lr": 0, "head_lr": 0, "clip": 0}


def check_ranges(
    method: Any,
    at_least: Mapping[str, float] | None = None,
    above: Mapping[str, float] | None = None,
    below: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
) -> None:
    """Raise ConfigError, with all problems, unless the method's numbers are finite and within their bounds.

    The bounds of the common fields (`AT_LEAST`, `ABOVE`) hold wherever a method has them, a method's own bound in place
    of them only where it is narrower; None passes.
    """
    rules = (
        ("at least", _narrower(AT_LEAST, at_least or {}), float.__ge__),
        ("above", _narrower(ABOVE, above or {}), float.__gt__),
        ("below", below or {}, float.__lt__),
        ("at most", at_most or {}, float.__le__),
    )
    problems = []
    for name in dict.fromkeys(name for _, bounds, _ in rules for name in bounds):
        value = getattr(method, name, None)
        own = [(word, float(bounds[name]), holds) for word, bounds, holds in rules if name in bounds]
        if value is None or (math.isfinite(value) and all(holds(float(value), bound) for _, bound, holds in own)):
            continue
        words = [f"{word} {bound:g}" for word, bound, _ in own]
        if len(own) == 1 and isinstance(value, float):  # whole numbers and those of a range are finite anyway
            words.insert(0, "finite")
        problems.append(f"method.{name} is {value}; it must be {' and '.join(words)}")
    if problems:
        raise ConfigError(problems)


def _narrower(common: Mapping[str, float], own: Mapping[str, float]) -> dict[str, float]:
    """Lower bounds by name, the higher one of each."""
    return {name: max(common.get(name, -math.inf), own.get(name, -math.inf)) for name in {**common, **own}}
