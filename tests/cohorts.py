"""Four clients with everything that a Fit can say, and what they train to alone and together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from fedpeft.core import fit, tree
from fedpeft.core.adapter import HeadOnly
from fedpeft.core.fit import SGD, AdamW, Fit, Fitted, Optimizer, Prox
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.hf import HFModel

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": SGD(0.1, weight_decay=0.01),
    "momentum": SGD(0.05, momentum=0.9),
    "adamw": AdamW(0.01, weight_decay=0.1),
}
CLIENTS = 4
STEPS = (3, 1, 4, 2)  # ragged
BATCHES = (2, 5, 3, 1)


def penalty(stacked: Mapping[str, Tensor]) -> Tensor:
    """0.05 ||w||^3 per client."""
    squares = sum(t.flatten(1).square().sum(dim=1) for t in stacked.values())
    return 0.05 * torch.as_tensor(squares).pow(1.5)


def with_mask(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    def mask(fit: Fit) -> dict[str, Tensor]:
        return {n: torch.from_numpy(rng.integers(0, 2, size=tuple(t.shape))).to(t) for n, t in fit.params.items()}

    return [replace(fit, mask=mask(fit)) if i != 1 else fit for i, fit in enumerate(fits)]


def with_drift(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    return [replace(fit, drift=_like(fit.params, rng, 0.1)) if i != 2 else fit for i, fit in enumerate(fits)]


def with_prox(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    proxes = (Prox(0.5), None, Prox(0.3, _like(fits[2].params, rng, 0.2)), Prox(2.0))
    return [replace(fit, prox=prox) for fit, prox in zip(fits, proxes, strict=True)]


def with_penalty(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    return [replace(fit, penalty=penalty) for fit in fits]


def with_clip(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    return [replace(fit, clip=clip) for fit, clip in zip(fits, (0.1, None, 1e3, 0.5), strict=True)]


def with_rates(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    rates = ({"head.": 0.03}, {}, {"block.1": 0.002, "head.": 0.0}, {"head.": 0.03})
    return [replace(fit, rates=own) for fit, own in zip(fits, rates, strict=True)]


def with_schedule(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    def schedule(fit: Fit) -> tuple[float, ...]:
        return tuple(float(lr) for lr in rng.uniform(0.001, 0.05, size=fit.steps))

    return [replace(fit, optimizer=replace(fit.optimizer, lr=schedule(fit))) for fit in fits]


def with_settings(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    """Other optimizer settings at every client."""
    changes: list[dict[str, Any]] = [{"lr": 0.02}, {"weight_decay": 0.3}, {}, {"lr": 0.003, "weight_decay": 0.0}]
    if isinstance(fits[0].optimizer, AdamW):
        changes[2] = {"betas": (0.8, 0.95), "eps": 1e-4}
    return [replace(fit, optimizer=replace(fit.optimizer, **own)) for fit, own in zip(fits, changes, strict=True)]


def with_dropout(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    return [
        replace(fit, dropout=p, seed=i + 7) for i, (fit, p) in enumerate(zip(fits, (0.3, 0, 0.5, 0.3), strict=True))
    ]


def with_ranks(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    return [replace(fit, params=tiny.params(model, rng, rank=r)) for fit, r in zip(fits, (2, 7, 4, 1), strict=True)]


def with_heads(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    return [replace(fit, params=tiny.params(model, rng, classes=c)) for fit, c in zip(fits, (3, 5, 4, 6), strict=True)]


def with_subset(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    """Only some names train, other ones at each client; the last client has no adapter in block 0 at all."""
    names = [[n for i, n in enumerate(sorted(fit.params)) if (i + j) % 3] for j, fit in enumerate(fits)]
    some = [replace(fit, train=frozenset(own)) for fit, own in zip(fits, names, strict=True)]
    less = tree.select(some[3].params, lambda n: not n.startswith("block.0"))
    return [*some[:3], replace(some[3], params=less, train=frozenset(n for n in names[3] if n in less))]


def with_also(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    """Further frozen adapters: shared by two clients, two of another's own, none at the last."""
    if isinstance(model.spec, HeadOnly):
        return [replace(fit, also=(_deltas(model, rng),)) for fit in fits]
    first, second, third = (tree.select(tiny.params(model, rng, rank=r), _no_head) for r in (2, 2, 3))
    return [replace(fit, also=also) for fit, also in zip(fits, ((first,), (first,), (second, third), ()), strict=True)]


def with_factors(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    """A base delta as frozen factors: one that three clients share, and another one."""
    shared, other = _deltas(model, rng), _deltas(model, rng, factors=3)
    return [replace(fit, also=(other if i == 2 else shared,)) for i, fit in enumerate(fits)]


def with_dense(fits: list[Fit], model: HFModel, rng: Rng) -> list[Fit]:
    """A dense base delta that trains at one client and is frozen elsewhere, beside one in factors."""
    own = [_deltas(model, rng, factors=2 if i == 1 else 0) for i in range(len(fits))]
    made = [replace(fit, params={**fit.params, **delta}) for fit, delta in zip(fits, own, strict=True)]
    return [replace(f, train=frozenset(f.params) - (own[i].keys() if i else set())) for i, f in enumerate(made)]


def _no_head(name: str) -> bool:
    return not name.startswith("head.")


def _like(params: Params, rng: Rng, scale: float) -> dict[str, Tensor]:
    return {n: torch.from_numpy(rng.normal(0, scale, size=tuple(t.shape))).to(t) for n, t in params.items()}


def _deltas(model: HFModel, rng: Rng, factors: int = 2) -> dict[str, Tensor]:
    """A change of the query of block 1 and the value of block 2; dense where factors is 0."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("block.1.query", "block.2.value"):
        slot = model.places[name]
        if factors:
            shapes |= {f"delta.{name}.left": (slot.d_out, factors), f"delta.{name}.right": (factors, slot.d_in)}
        else:
            shapes |= {f"delta.{name}.dense": (slot.d_out, slot.d_in)}
    return {n: torch.from_numpy(rng.normal(0, 0.1, size=s)).to(model.base.dtype) for n, s in shapes.items()}


FEATURES = {
    name.removeprefix("with_"): make for name, make in list(globals().items()) if name.startswith("with_")
}  # every function above
FIRST = ("ranks", "heads", "dense", "subset")  # they change the layout that the others are made to
EXCLUSIVE = [{"ranks", "heads"}, {"also", "factors"}, {"subset", "dense"}, {"schedule", "settings"}]


def cohort(model: HFModel, optimizer: Optimizer, rng: Rng, features: tuple[str, ...] = ()) -> list[Fit]:
    """Four clients with ragged numbers of steps and batch sizes, changed by the features."""
    fits = []
    for steps, batch in zip(STEPS, BATCHES, strict=True):
        data = tiny.examples(rng, 9, segments=model.base.family == "bert")
        batches = [rng.choice(9, size=batch, replace=False).tolist() for _ in range(steps)]
        fits.append(Fit(tiny.params(model, rng), data, batches, optimizer))
    for feature in (*(f for f in FIRST if f in features), *sorted(set(features) - set(FIRST))):
        fits = FEATURES[feature](fits, model, rng)
    return fits


def alone(model: HFModel, fits: list[Fit]) -> list[Fitted]:
    return [model.fit(fit) for fit in fits]


def together(model: HFModel, fits: list[Fit]) -> list[Fitted]:
    return [fit.alone([fitted]) for fitted in model.fit_many(fits)]


def assert_close(a: list[Fitted], b: list[Fitted], tolerance: float) -> None:
    for one, other in zip(a, b, strict=True):
        assert (one.steps, one.examples, one.tokens, one.pairs) == (
            other.steps, other.examples, other.tokens, other.pairs
        )  # fmt: skip
        assert one.losses == pytest.approx(other.losses, abs=tolerance, rel=tolerance)
        assert one.moments.step == other.moments.step
        pairs = [(one.params, other.params), (one.moments.first, other.moments.first)]
        for got, expected in [*pairs, (one.moments.second, other.moments.second)]:
            tree.same_layout(got, expected)
            for name, t in got.items():
                assert t.dtype == expected[name].dtype
                assert torch.allclose(t, expected[name], atol=tolerance, rtol=tolerance), name
