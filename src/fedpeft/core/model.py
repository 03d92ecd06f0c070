"""What a method asks of a model: to train, to predict, and to be looked into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

from fedpeft.core.adapter import AdapterSpec
from fedpeft.core.fit import Data, Fit, Fitted
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params

TokenNorm: TypeAlias = Literal["sqrt", "mean", "sum"]
Perturbation: TypeAlias = Literal["l2", "inf", "random"]


@dataclass(frozen=True)
class Target:
    """What a student should say at some positions.

    Attributes:
        logits: (positions, n) float32, before the softmax.
        ids: (positions, n) int64, whose they are; None: of the first n tokens of the vocabulary, in order.
        vocab: how many of the student's tokens are real, the rest being padding of its matrix; None: n without ids,
            else all.
    """

    logits: Tensor
    ids: Tensor | None = None
    vocab: int | None = None


Teacher: TypeAlias = Callable[[Sequence[int]], Target]
"""Rows of the data to the target at all of their positions (`Model.token_logits`), row after row."""


class Model(Protocol):
    """A frozen base with an adapter bound to it; see `models/hf.py` for transformers, `tests/toy.py` for a toy."""

    @property
    def spec(self) -> AdapterSpec:
        """The adapter that `init` draws."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The base's configuration as plain data (`config.json`), from which its cost follows."""
        ...

    @property
    def sha256(self) -> str:
        """Of the base's weights, in hex."""
        ...

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Fresh adapter parameters; a new adapter leaves the base's outputs unchanged wherever its kind allows."""
        ...

    def check(self, fit: Fit) -> None:
        """Raise FitError, naming value and remedy, unless the fit can be run."""
        ...

    def fit_many(self, fits: Sequence[Fit]) -> list[Fitted | Exception]:
        """Train every fit, together where possible; a failed fit gives its exception and leaves the others alone."""
        ...

    def fit(self, fit: Fit) -> Fitted:
        """Train one fit; raises what went wrong."""
        ...

    def logits(self, params: Params | None, data: Data, rows: Sequence[int] | None = None) -> Tensor:
        """Predictions before the softmax, (rows, classes), without gradient; params None: the base alone."""
        ...

    def losses(
        self, params: Params, data: Data, rows: Sequence[int], also: tuple[Params, ...] = (), base: str = ""
    ) -> Tensor:
        """(rows,) the loss of each row's own label, without gradient and dropout; `also` and `base` as in a Fit."""
        ...

    def token_logits(self, params: Params | None, data: Data, rows: Sequence[int] | None = None) -> Tensor:
        """(positions, vocabulary) float32 logits where text is predicted, row after row, without gradient.

        A row's positions are those that predict its answer's tokens; of a row without an answer, its last one.
        """
        ...

    def distil(self, fit: Fit, teach: Teacher, temperature: float = 1.0, share: float = 1.0) -> Fitted:
        """Train a student as the Fit says, with the loss

            share tau^2 KL(teacher^(1/tau) || student^(1/tau)) + (1 - share) cross-entropy of the rows' own answers,

        the mean over the positions of a step; the second term is 0 where a row has no answer.
        """
        ...

    def score(self, params: Params, data: Data) -> dict[str, Tensor]:
        """Sums that pool over clients by addition and from which every metric follows; see `runs/metrics.py`."""
        ...

    @property
    def blocks(self) -> int:
        """How many blocks (layers) the base has."""
        ...

    def lowest_block(self, names: Iterable[str]) -> int:
        """The lowest block that these parameters act in, `blocks` where they act above all of them."""
        ...

    def passes(self, params: Params | None, data: Data, rows: Sequence[int] | None = None) -> tuple[int, int]:
        """Tokens, and pairs of tokens that see each other, of forward passes that predict the rows: what they cost."""
        ...

    def cost(self, fit: Fit) -> tuple[int, int, int]:
        """Tokens and pairs of the passes of a Fit, and further multiply-adds, see `Fitted.products`."""
        ...

    def hidden(self, params: Params | None, data: Data, rows: Sequence[int]) -> Tensor:
        """(blocks, rows, tokens, d) outputs of the blocks, zero at padding, without gradient; params None: the base."""
        ...

    def hessian(
        self, params: Params, data: Data, rows: Sequence[int], names: Iterable[str] | None = None
    ) -> Callable[[Params], dict[str, Tensor]]:
        """v -> H v: H of the mean loss of the rows over the named parameters (None: all), without dropout."""
        ...

    def fisher(
        self,
        params: Params,
        data: Data,
        rows: Sequence[int],
        token_norm: TokenNorm = "sqrt",
        also: tuple[Params, ...] = (),
    ) -> Fisher:
        """The Fisher information of LoRA's factors at the observed labels, sample by sample, without dropout.

        Args:
            token_norm: what the gradient of an answer of several tokens is: the "sum" over them, their "mean", or the
                sum divided by the square root of their number, which prefers neither short nor long answers.
            also: further adapters or base deltas, applied, as in a Fit.
        """
        ...

    def fisher_many(self, probes: Sequence[FisherProbe]) -> list[Fisher | Exception]:
        """`fisher` of everybody's rows, together where possible; a failed one gives its exception."""
        ...

    def sensitivity(
        self, params: Params, data: Data, rows: Sequence[int], perturbation: Perturbation, size: float, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """How the blocks' outputs change when the embeddings are perturbed by `size` times their mean norm.

        Args:
            perturbation: along the loss's gradient (`l2`), along its signs (`inf`), or in a `random` direction.
            rng: of the random directions.

        Returns:
            changes, sizes: (blocks + 1, rows) Frobenius norms over real tokens of h_l(e + ε) - h_l(e) and of h_l(e);
            first those of what enters the lowest block.
        """
        ...


@dataclass(frozen=True)
class FisherProbe:
    """The arguments of `Model.fisher`. Work may yield one, as it yields a Fit: a cohort's are then taken together."""

    params: Params
    data: Data
    rows: Sequence[int]
    token_norm: TokenNorm = "sqrt"
    also: tuple[Params, ...] = ()
    base: str = ""  # as in a Fit


@dataclass(frozen=True)
class Fisher:
    """The diagonal Fisher information of LoRA's factors: squared gradients of the log-likelihood.

    Attributes:
        trace: (rows,) float32, of each row of data: the squared norm of its gradient.
        rows: per factor, (rows of the matrix,): the mean over the data, and over the numbers of that row.
    """

    trace: Tensor
    rows: dict[str, Tensor]
