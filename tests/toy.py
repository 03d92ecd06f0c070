"""A model of three numbers, on which every method can be checked with a pencil.

The parameters are one point w, cut into two tensors so that names matter: `block.0.w` holds all numbers but the last,
`head.w` the last one; a model of several blocks shares the former out among `block.0.w`, `block.1.w`, .... A row of
data is a point x and its loss is 1/2 ||w - x||², so the gradient of a batch is w - mean(x), a step of SGD moves w by
lr (mean(x) - w), and a client's optimum is the mean of its rows. A block without parameters stands at 0.

With a rank, the numbers of a block are 2 B A instead, a product of LoRA's factors `block.0.w.B` (1, rank) and
`block.0.w.A` (rank, numbers), and a base delta (`delta.block.0.w.left` and so on) is added to them. With a size, they
are what a bottleneck makes of the input 1: `up.weight` GELU(`down.weight` + `down.bias`) + `up.bias`.

A base of another precision has rounded points (`GRIDS`). In one with some of its blocks, the others stand at 0, as they
do where they have no parameters. `Fit.checkpointing` changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.core.adapter import AdaLora, AdapterSpec, Bottleneck, Lora
from fedpeft.core.errors import FitError
from fedpeft.core.examples import epoch_batches
from fedpeft.core.exchange import Method
from fedpeft.core.federate import Done, federate
from fedpeft.core.fit import Fit, Fitted, blocks_in
from fedpeft.core.model import Fisher, FisherProbe, Perturbation, TokenNorm
from fedpeft.core.rng import Rng, key_for, rng_for
from fedpeft.core.train import Stack, train_many
from fedpeft.core.tree import Params, block_of
from fedpeft.engines.inprocess import InProcess

BODY, HEAD = "block.0.w", "head.w"
BODIES = {f"{start}block.{i}" for i in range(4) for start in ("", "delta.")}
SCALE = 2.0  # alpha / rank of the factors
GRIDS = {"int8": 2.0**-7, "nf4": 2.0**-3, "nf4dq": 2.0**-3}  # what a quantised base rounds the points to, in training


@dataclass(frozen=True)
class Points:
    """Rows of data: x, (rows, width)."""

    x: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    @property
    def lengths(self) -> np.ndarray:
        """Every point counts as three tokens."""
        return np.full(len(self), 3)

    @property
    def labels(self) -> np.ndarray:
        """The side of zero on which a point's first number is."""
        return (self.x[:, 0] > 0).astype(np.int64)

    def epochs(self, epochs: int, batch_size: int, rng: Rng) -> Sequence[Sequence[int]]:
        return epoch_batches(len(self), epochs, batch_size, rng)

    @property
    def rarities(self) -> np.ndarray:
        return np.abs(self.x).sum(axis=1)

    def truncated(self, tokens: int) -> Points:
        return self

    def distinct(self, limit: int) -> Sequence[int]:
        first = {row.tobytes(): i for i, row in reversed(list(enumerate(self.x)))}
        return sorted(first.values())[:limit]


def points(*rows: Sequence[float]) -> Points:
    """Data from literal rows."""
    return Points(np.array(rows, dtype=np.float64))


def params(*numbers: float, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Parameters from their numbers."""
    return {BODY: torch.tensor(numbers[:-1], dtype=dtype), HEAD: torch.tensor(numbers[-1:], dtype=dtype)}


def vector(p: Params) -> list[float]:
    """The numbers of parameters."""
    return [number for name in sorted(p) for number in p[name].tolist()]


def cut(numbers: Tensor, blocks: int) -> dict[str, Tensor]:
    """A point as the parameters of a model of so many blocks."""
    parts = torch.tensor_split(numbers[:-1], blocks)
    return {f"block.{i}.w": part for i, part in enumerate(parts)} | {HEAD: numbers[-1:]}


class ToyModel:
    """The `Model` over points; `dirt` is what the last user left behind, and must not matter.

    Args:
        start: the numbers that `init` gives, instead of drawing them.
        width: how many numbers `init` draws.
        dtype: of the parameters, by name.
        dropout: of the adapter's specification.
        blocks: how many blocks it has.
        rank: of LoRA's factors; 0: the blocks hold their numbers themselves.
        triplets: whether the factors are AdaLoRA's P, E and Q.
        size: of bottlenecks; 0: there are none.
    """

    device = torch.device("cpu")
    sha256 = "toy"

    def __init__(
        self,
        start: Sequence[float] | None = None,
        width: int = 3,
        dtype: str = "float64",
        dropout: float = 0.0,
        blocks: int = 1,
        rank: int = 0,
        triplets: bool = False,
        size: int = 0,
    ) -> None:
        self.triplets = triplets
        self.size = size
        self.blocks = blocks
        self.rank = rank
        self.start = start
        self.width = width
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.spec: AdapterSpec = Lora(rank or 8, SCALE * (rank or 8), dropout=dropout)
        if triplets:
            self.spec = AdaLora(rank, SCALE * rank)
        if size:
            self.spec = Bottleneck(size)
        self.dirt: Any = None
        self.calls: list[int] = []  # how many fits each call of fit_many was given
        self.probes: list[int] = []  # and each call of fisher_many

    @property
    def config(self) -> dict[str, Any]:
        """As costly as the smallest of transformers: what a planner would like to know."""
        return {"num_hidden_layers": self.blocks, "hidden_size": 4, "num_attention_heads": 1, "vocab_size": 8}

    def init(self, rng: Rng) -> dict[str, Tensor]:
        numbers = rng.standard_normal(self.width) if self.start is None else self.start
        plain = cut(torch.tensor(numbers, dtype=self.dtype), self.blocks)
        if not self.rank and not self.size:
            return plain
        made = {HEAD: plain.pop(HEAD)}
        for name, own in plain.items():
            if self.size:
                made[f"{name}.down.weight"] = torch.from_numpy(rng.standard_normal((self.size, 1))).to(self.dtype)
                for side, shape in (("down.bias", [self.size]), ("up.weight", [len(own), self.size])):
                    made[f"{name}.{side}"] = torch.zeros(shape, dtype=self.dtype)
                made[f"{name}.up.bias"] = torch.zeros_like(own)
                continue
            if self.triplets:
                for side, shape in (("P", (1, self.rank)), ("Q", (self.rank, len(own)))):
                    made[f"{name}.{side}"] = torch.from_numpy(rng.standard_normal(shape)).to(self.dtype)
                made[f"{name}.E"] = torch.zeros(self.rank, dtype=self.dtype)
                continue
            made[f"{name}.A"] = torch.from_numpy(rng.standard_normal((self.rank, len(own)))).to(self.dtype)
            made[f"{name}.B"] = torch.zeros(1, self.rank, dtype=self.dtype)
        return made

    def lowest_block(self, names: Iterable[str]) -> int:
        return min((block for name in names if (block := block_of(name)) is not None), default=self.blocks)

    def passes(self, params: Params | None, data: Points, rows: Sequence[int] | None = None) -> tuple[int, int]:
        count = len(data) if rows is None else len(rows)
        return 3 * count, 9 * count

    def cost(self, fit: Fit) -> tuple[int, int, int]:
        return *self.passes(None, fit.data, [row for batch in fit.batches for row in batch]), 0

    def check(self, fit: Fit) -> None:
        kept = blocks_in(fit.base)
        if fit.base and fit.base not in GRIDS and kept is None:
            raise FitError(f"the toy's base has no precision {fit.base!r}; use one of {sorted(GRIDS)}")
        if kept is not None and any(block_of(name) not in (None, *kept) for name in fit.params):
            raise FitError(f"the toy's base {fit.base!r} leaves a block out that the fit has: {sorted(fit.params)}")
        known = cut(torch.zeros(3), self.blocks).keys()
        if self.rank or self.size:
            if HEAD not in fit.params or any(name.split(".w.")[0] not in BODIES for name in fit.params.keys() - {HEAD}):
                raise FitError(f"the toy has factors, bottlenecks, deltas and a head, the fit has {sorted(fit.params)}")
            return
        if not (HEAD in fit.params and fit.params.keys() <= known and (self.blocks > 1 or len(fit.params) == 2)):
            raise FitError(f"the toy has {sorted(known)}, the fit has {sorted(fit.params)}")

    def fit_many(self, fits: Sequence[Fit]) -> list[Fitted | Exception]:
        self.calls.append(len(fits))
        return train_many(fits, self, self.check)

    def fit(self, fit: Fit) -> Fitted:
        (fitted,) = self.fit_many([fit])
        if isinstance(fitted, Exception):
            raise fitted
        return fitted

    def point(self, params: Params, width: int) -> Tensor:
        """w, with zeros for what is not there."""
        return torch.cat(
            [self.own(params, name, zeros) for name, zeros in cut(torch.zeros(width), self.blocks).items()]
        )

    def own(self, params: Params, name: str, zeros: Tensor) -> Tensor:
        """The numbers of one block, or of the head."""
        if name == HEAD or not (self.rank or self.size):
            return params.get(name, zeros)
        total = zeros
        if f"{name}.up.bias" in params:
            low = F.gelu(params[f"{name}.down.weight"][:, 0] + params[f"{name}.down.bias"])
            total = total + params[f"{name}.up.weight"] @ low + params[f"{name}.up.bias"]
        if f"{name}.E" in params:
            total = total + SCALE * (params[f"{name}.P"] * params[f"{name}.E"] @ params[f"{name}.Q"])[0]
        if f"{name}.A" in params:
            total = total + SCALE * (params[f"{name}.B"] @ params[f"{name}.A"])[0]
            echo = params.get(f"{name}.echo", torch.zeros(1))
            total = total + echo * SCALE * (params[f"{name}.B"].detach() @ params[f"{name}.A"].detach())[0]
        if f"delta.{name}.left" in params:
            total = total + (params[f"delta.{name}.left"] @ params[f"delta.{name}.right"])[0]
        return total + params.get(f"delta.{name}.dense", zeros[None])[0]

    def logits(self, params: Params | None, data: Points, rows: Sequence[int] | None = None) -> Tensor:
        x = torch.from_numpy(data.x if rows is None else data.x[list(rows)])
        return x * 0 if params is None else x * self.point(params, x.shape[1])

    def losses(
        self, params: Params, data: Points, rows: Sequence[int], also: tuple[Params, ...] = (), base: str = ""
    ) -> Tensor:
        w = sum(self.point(layer, data.x.shape[1]).double() for layer in (params, *also))
        return (0.5 * (w - torch.from_numpy(data.x[list(rows)])).square().sum(dim=1)).float()

    def score(self, params: Params, data: Points) -> dict[str, Tensor]:
        w = self.point(params, data.x.shape[1]).double()
        return {"loss": 0.5 * (w - torch.from_numpy(data.x)).square().sum(), "n": torch.tensor(len(data))}

    def hidden(self, params: Params | None, data: Points, rows: Sequence[int]) -> Tensor:
        """Block l gives x + l: the higher, the more alike the rows are."""
        x = torch.from_numpy(data.x[list(rows)]).float()
        return torch.stack([x + block for block in range(self.blocks)])[:, :, None, :]

    def hessian(
        self, params: Params, data: Points, rows: Sequence[int], names: Iterable[str] | None = None
    ) -> Callable[[Params], dict[str, Tensor]]:
        """Of 1/2 ||w - x||²: the identity."""
        over = set(params if names is None else names)
        return lambda vector: {name: vector[name].clone() for name in over}

    def fisher(
        self,
        params: Params,
        data: Points,
        rows: Sequence[int],
        token_norm: TokenNorm = "sqrt",
        also: tuple[Params, ...] = (),
    ) -> Fisher:
        """With e = w - x of a block: the gradients are 2 e A^T for B and 2 B^T e for A."""
        points = torch.from_numpy(data.x[list(rows)])
        means, trace, start = {}, torch.zeros(len(rows), dtype=torch.float64), 0
        for name, zeros in cut(torch.zeros(points.shape[1]), self.blocks).items():
            x, start = points[:, start : start + len(zeros)], start + len(zeros)
            if f"{name}.A" not in params:
                continue
            a, b = params[f"{name}.A"].double(), params[f"{name}.B"].double()
            e = sum(self.own(layer, name, zeros).double() for layer in (params, *also)) - x  # (rows, numbers)
            of_b = (SCALE * e @ a.T).square()  # (rows, rank)
            of_a = (SCALE * b[0][None, :, None] * e[:, None, :]).square()  # (rows, rank, numbers)
            trace += of_b.sum(dim=1) + of_a.sum(dim=(1, 2))
            means[f"{name}.B"] = of_b.mean(dim=1).mean(dim=0, keepdim=True).float()
            means[f"{name}.A"] = of_a.mean(dim=2).mean(dim=0).float()
        return Fisher(trace.float(), means)

    def fisher_many(self, probes: Sequence[FisherProbe]) -> list[Fisher | Exception]:
        self.probes.append(len(probes))
        return [self.fisher(p.params, p.data, p.rows, p.token_norm, p.also) for p in probes]

    def sensitivity(
        self, params: Params, data: Points, rows: Sequence[int], perturbation: Perturbation, size: float, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """Every block adds what comes in to the numbers of the row: the later it is, the less it changes."""
        sizes = torch.from_numpy(np.linalg.norm(data.x[list(rows)], axis=1)).float()
        layers = torch.arange(self.blocks + 1)[:, None]
        return size * sizes.expand(self.blocks + 1, -1), sizes * (1 + layers)

    def backward(self, stack: Stack, rows: Sequence[Sequence[int]], step: int) -> Tensor:
        """Mean losses and their gradients, client by client, so that company changes no bit."""
        self.dirt = stack
        losses = []
        for i, fit in enumerate(stack.fits):
            w = self.point(_own(stack, i), fit.data.x.shape[1])
            for layer in stack.also:
                w = w + self.point({name: t[i] for name, t in layer.items()}, fit.data.x.shape[1])
            x = torch.from_numpy(fit.data.x[list(rows[i])]).to(w)
            if fit.base in GRIDS:
                x = (x / GRIDS[fit.base]).round() * GRIDS[fit.base]
            if fit.dropout:
                x = x * torch.from_numpy(_noise(fit, step, rows[i], x.shape[1])).to(w)
            own = 0.5 * (w - x).square().sum(dim=1)
            if fit.soften is not None:
                hard, share = own.detach() > fit.soften.threshold, fit.soften.share
                own = torch.where(hard, (1 - share) * own + share * own.detach(), own)
            losses.append(own.mean())
        if any(leaf.requires_grad for leaf in stack.params.values()):
            torch.stack(losses).sum().backward()
        return torch.stack(losses).detach()


def _own(stack: Stack, client: int) -> dict[str, Tensor]:
    """One client's parameters without padding."""
    sizes = {name: own[client] for name, own in stack.sizes.items()}
    return {
        name: t[client][tuple(slice(n) for n in size)]
        for name, t in stack.params.items()
        if (size := sizes[name]) is not None
    }


def _noise(fit: Fit, step: int, rows: Sequence[int], width: int) -> np.ndarray:
    """0 or 1 / (1 - p) per number, from (seed, step, row)."""
    kept = [_uniform(fit.seed, step, row, width) for row in rows]
    return (np.array(kept) >= fit.dropout) / (1 - fit.dropout)


@functools.lru_cache(maxsize=2**12)
def _uniform(seed: int, step: int, row: int, width: int) -> np.ndarray:
    """(width,) of [0, 1), the same for the same place: runs that are compared draw it again and again."""
    return np.random.Generator(np.random.PCG64(key_for(seed, step, row))).random(width)


def federation(
    pooled: bool, clients: int = 4, width: int = 3, seed: int = 7, rows: int = 4
) -> dict[str, dict[str, Points]]:
    """Clients of `rows` to `rows + 3` rows around centres of their own; for a pooled method, one client with all."""
    data = {}
    for i in range(clients):
        rng = rng_for(seed, "toy", client=str(i))
        data[f"c{i}"] = Points(2 + rng.standard_normal(width) + 0.3 * rng.standard_normal((rows + i % 4, width)))
    if pooled:
        data = {"pooled": Points(np.concatenate([d.x for d in data.values()]))}
    return {client: {"train": d} for client, d in data.items()}


def run(
    method: Method, data: Mapping[str, Points], rounds: int = 1, start: Sequence[float] = (0.0, 0.0, 0.0), seed: int = 0
) -> tuple[list[Done], InProcess]:
    """The finished exchanges of a run from the given numbers, and the engine, which has the clients' memories."""
    model = ToyModel(start)
    engine = InProcess(lambda: method, model, {client: {"train": d} for client, d in data.items()}, seed)
    return list(federate(method, engine, model, rounds=rounds, seed=seed)), engine


def plain(data: Mapping[str, Mapping[str, Points]]) -> dict[str, dict[str, list[list[float]]]]:
    """A federation's data as JSON can carry it (floats survive JSON exactly)."""
    return {client: {name: split.x.tolist() for name, split in splits.items()} for client, splits in data.items()}


def splits(plain_splits: Mapping[str, list[list[float]]]) -> dict[str, Points]:
    """One client's data back from `plain`."""
    return {name: points(*rows) for name, rows in plain_splits.items()}
