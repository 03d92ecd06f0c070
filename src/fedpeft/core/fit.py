"""Ordinary local training, described as data.

A method's `work` yields a `Fit` and receives a `Fitted`; because a Fit is data, the engine may run one client alone
or a whole cohort in one pass of the shared base (`Model.fit_many`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.errors import FitError, RecordError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params

R = TypeVar("R")
Rate: TypeAlias = float | tuple[float, ...]
Penalty: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101), bias-corrected."""

    lr: Rate = 1e-3  # a tuple gives one rate per step
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent as in torch: b <- momentum b + (g + weight_decay w); w <- w - lr b."""

    lr: Rate = 1e-1  # a tuple gives one rate per step
    momentum: float = 0.0
    weight_decay: float = 0.0


Optimizer: TypeAlias = AdamW | SGD


@dataclass(frozen=True)
class Prox:
    """A pull towards a centre: (mu / 2) ||w - center||²; center None means the parameters that the Fit starts from."""

    mu: float
    center: Params | None = None


@dataclass(frozen=True)
class Soften:
    """Hard rows learn from a mix of their label and the model's own distribution, held fixed (self-evolution learning).

    With q = (1 - share) y + share p, p the model's own, the gradient of the cross-entropy -sum q log p is (1 - share)
    times the plain one, since that of -sum p log p with the first p fixed is zero where both are equal.
    """

    threshold: float  # rows whose loss is above are hard
    share: float  # of the model's own distribution in the target


@dataclass(frozen=True)
class Moments:
    """The state of an optimizer: AdamW fills all three, SGD with momentum `step` and `first`.

    One step count holds for all names. A Fit returns the moments of the names that it trained, and those of other names
    as they came; it refuses moments without a name that it trains, whose bias correction would be wrong.
    """

    step: int = 0
    first: Params = field(default_factory=dict)
    second: Params = field(default_factory=dict)


class Data(Protocol):
    """The examples of one client, already tokenised; a model knows how to collate them."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every row."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of every row."""
        ...

    def epochs(self, epochs: int, batch_size: int, rng: Rng) -> Sequence[Sequence[int]]:
        """Row indices: each epoch a fresh permutation, cut into batches; the last batch may be short."""
        ...

    @property
    def rarities(self) -> NDArray[np.float64]:
        """Of every row, how rare its tokens are among all of these rows: -sum of log(share of the token)."""
        ...

    def truncated(self, tokens: int) -> Data:
        """The same rows, cut to so many tokens; a mask that stands for the label is never cut."""
        ...

    def distinct(self, limit: int) -> Sequence[int]:
        """The first rows of which no two have the same content, at most `limit` of them."""
        ...


@dataclass(frozen=True)
class Fit:
    """Local training of one client, completely.

    Order within a step: loss, penalty and prox gradients, then mask, then clip, then drift, then optimizer and decay,
    then mask of the update.

    Clients train together where their penalties are equal: give a frozen dataclass with `__call__`, or a function of a
    module, not a closure or a method, of which every client would have its own.
    """

    params: Params  # where training starts; all of them are applied in the forward pass
    data: Data
    batches: Sequence[Sequence[int]]  # rows of data, one batch per step, in the order to be used
    optimizer: Optimizer
    train: frozenset[str] | None = None  # names that change (None: all); the rest is applied, frozen
    also: tuple[Params, ...] = ()  # further adapters or base deltas, applied, frozen
    base: str = ""  # the base's precision (bfloat16, nf4, ...), or some of its blocks (`base_of`); "": the model's own
    clip: float | None = None  # bound on the gradient's norm, over all trained parameters of this client
    mask: Params | None = None  # 1 where a number may change, 0 where it stays (drift still enters its moments)
    drift: Params | None = None  # added to the clipped gradient at every step
    prox: Prox | None = None
    penalty: Penalty | None = None  # stacked params, each (clients, ...) -> (clients,), added to the loss; see below
    moments: Moments | None = None  # optimizer state to start from; None: zeros
    rates: Mapping[str, float] = field(
        default_factory=dict
    )  # learning rate by name prefix, instead of the optimizer's; end it with a dot
    seed: int = 0  # of the dropout noise
    dropout: float = 0.0  # probability; 0: the model is deterministic
    soften: Soften | None = None  # targets of hard rows; the losses that are told stay the plain ones
    checkpointing: bool = False  # compute the blocks again in the backward pass: less memory, more time, equal results

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.batches)

    @property
    def trained(self) -> tuple[str, ...]:
        """The names that change, sorted."""
        return tuple(sorted(self.params if self.train is None else self.train))


def base_of(blocks: Sequence[int]) -> str:
    """What the base is called where passes go through these blocks alone: "blocks:0,1,5"."""
    return "blocks:" + ",".join(map(str, blocks))


def blocks_in(base: str) -> tuple[int, ...] | None:
    """The blocks that a name of `base_of` has; None: it is the name of something else."""
    return tuple(map(int, base[7:].split(","))) if re.fullmatch(r"blocks:\d+(,\d+)*", base) else None


@dataclass(frozen=True)
class Fitted:
    """What local training gave."""

    params: dict[str, Tensor]  # all names of Fit.params; frozen ones unchanged
    losses: tuple[float, ...]  # task loss per step, before the update, without penalty and prox
    steps: int
    examples: int  # rows used, repeats counted
    moments: Moments
    tokens: int = 0  # real tokens that went through the model, padding not counted
    pairs: int = 0  # sum of squared lengths: what attention costs
    products: int = 0  # multiply-adds beyond passes through the frozen base: of adapters' matrices, of the base's own
    # weights that trained, of blocks computed again; less those of blocks that were left out, so it may be negative

    @property
    def loss(self) -> float:
        """The mean loss over the steps; 0 where there was no step."""
        return math.fsum(self.losses) / len(self.losses) if self.losses else 0.0


def alone(results: Sequence[R | Exception]) -> R:
    """The only result of a call for many; raises where it is what went wrong."""
    (result,) = results
    if isinstance(result, Exception):
        raise result
    return result


# --- validation -------------------------------------------------------------------------------------------------


def check_fit(fit: Fit) -> None:
    """Raise FitError unless the fit is consistent in itself; a model's own `check` comes after it."""
    if not fit.params:
        raise FitError("a Fit needs parameters; its params are empty")
    unknown = set(fit.trained) - fit.params.keys()
    if unknown:
        raise FitError(f"Fit.train names {min(unknown)!r}, which is not among its params")
    for batch in fit.batches:
        if not len(batch):
            raise FitError("a batch of a Fit has no rows; leave empty batches out")
        low, high = min(batch), max(batch)
        if low < 0 or high >= len(fit.data):
            raise FitError(f"a batch names row {low if low < 0 else high}; the data has rows 0 to {len(fit.data) - 1}")
    _check_optimizer(fit.optimizer)
    _check_rates(fit)
    center = fit.prox.center if fit.prox else None
    if center is not None and (lacking := set(fit.trained) - center.keys()):
        raise FitError(f"Fit.prox.center lacks {min(lacking)!r}; give a centre for every trained parameter, or None")
    for title, params in (("mask", fit.mask), ("drift", fit.drift), ("prox.center", center)):
        _check_part(title, params, fit)
    if fit.moments is not None:
        _check_part("moments.first", fit.moments.first, fit)
        _check_part("moments.second", fit.moments.second, fit)
        late = sorted(set(fit.trained) - fit.moments.first.keys()) if fit.moments.first else []
        if fit.moments.step and late:
            raise FitError(
                f"Fit.moments has made {fit.moments.step} steps without {late[0]!r}, which is trained now; "
                "start with fresh moments, or train the same names"
            )
    if fit.clip is not None and not fit.clip > 0:
        raise FitError(f"Fit.clip is {fit.clip}; it must be positive, or None for no bound")
    if fit.soften is not None and not (fit.soften.threshold >= 0 and 0 <= fit.soften.share < 1):
        raise FitError(f"Fit.soften is {fit.soften}; the threshold must not be negative, the share lie in [0, 1)")
    if not 0 <= fit.dropout < 1:
        raise FitError(f"Fit.dropout is {fit.dropout}; it must lie in [0, 1)")
    for name, t in fit.params.items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise FitError(f"{name!r} is not finite where training would start")


def _check_optimizer(optimizer: Optimizer) -> None:
    bounded = {"weight_decay": optimizer.weight_decay}
    if isinstance(optimizer, AdamW):
        shares = {"betas[0]": optimizer.betas[0], "betas[1]": optimizer.betas[1]}
        bounded["eps"] = optimizer.eps
    else:
        shares = {"momentum": optimizer.momentum}
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise FitError(f"the optimizer's {name} is {value}; it must lie in [0, 1)")
    for name, value in bounded.items():
        if not (math.isfinite(value) and value >= 0):
            raise FitError(f"the optimizer's {name} is {value}; it must be finite and not negative")


def _check_rates(fit: Fit) -> None:
    lr = fit.optimizer.lr
    if isinstance(lr, tuple) and len(lr) != fit.steps:
        raise FitError(f"the optimizer has {len(lr)} rates for {fit.steps} steps; give one rate per step or one number")
    for rate in (*(lr if isinstance(lr, tuple) else (lr,)), *fit.rates.values()):
        if not (math.isfinite(rate) and rate >= 0):
            raise FitError(f"a learning rate is {rate}; it must be finite and not negative")
    if fit.rates and fit.steps and not any(lr if isinstance(lr, tuple) else (lr,)):
        raise FitError("Fit.rates needs an optimizer whose own rate is above 0")


def _check_part(title: str, part: Params | None, fit: Fit) -> None:
    for name, t in (part or {}).items():
        if name not in fit.params:
            raise FitError(f"Fit.{title} names {name!r}, which is not among its params")
        try:
            tree.same_layout({name: fit.params[name]}, {name: t})
        except RecordError as error:
            raise FitError(f"Fit.{title}: {error}") from None
