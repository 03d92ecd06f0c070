"""A cohort in one pass against each client alone, for everything that a Fit can say.

Tolerances: float64 1e-9; float32 1e-5 for SGD and for AdamW with eps 1e-6, otherwise 1e-3 in relative norm (with B = 0,
A's first gradients are rounding noise and Adam divides by eps).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from cohorts import (
    CLIENTS,
    EXCLUSIVE,
    FEATURES,
    OPTIMIZERS,
    alone,
    assert_close,
    cohort,
    together,
)
from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, HeadOnly, Lora
from fedpeft.core.fit import SGD, AdamW, Optimizer

KINDS: dict[str, AdapterSpec] = {"lora": Lora(rank=4, alpha=6.0), "head": HeadOnly()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("feature", ["", *FEATURES])
def test_fit_many_equals_fit(kind: str, optimizer: str, feature: str) -> None:
    model = tiny.model("bert", KINDS[kind])
    fits = cohort(model, OPTIMIZERS[optimizer], tiny.place(), (feature,) if feature else ())
    plain = alone(model, cohort(model, OPTIMIZERS[optimizer], tiny.place()))
    expected = alone(model, fits)
    assert_close(together(model, fits), expected, 1e-9)
    does_nothing = {("head", "ranks"), ("head", "dropout")}
    if feature and (kind, feature) not in does_nothing:
        same = [tree.sha256(a.params) == tree.sha256(b.params) for a, b in zip(expected, plain, strict=True)]
        assert not all(same), "the feature must matter"


def mixtures() -> list[tuple[str, ...]]:
    """Twelve random sets of features that go together."""
    rng = np.random.default_rng(1)
    found: list[tuple[str, ...]] = []
    while len(found) < 12:
        some = {f for f in FEATURES if rng.random() < 0.5}
        for rivals in EXCLUSIVE:
            if rivals <= some:
                some.remove(str(rng.choice(sorted(rivals))))
        found.append(tuple(sorted(some)))
    return found


@pytest.mark.parametrize("features", mixtures(), ids="+".join)
def test_features_go_together(features: tuple[str, ...]) -> None:
    for optimizer, budget in zip(OPTIMIZERS.values(), (2048, 11, 40), strict=True):
        model = tiny.model("bert", KINDS["lora"], budget=budget)
        fits = cohort(model, optimizer, tiny.place(len(features)), features)
        assert_close(together(model, fits), alone(tiny.model("bert", KINDS["lora"]), fits), 1e-9)


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
def test_every_family_trains_as_a_cohort(family: str) -> None:
    model = tiny.model(family, Lora(rank=4, targets=tiny.everything(family)))
    fits = cohort(model, OPTIMIZERS["adamw"], tiny.place(), ("clip", "dropout", "factors", "mask", "ranks"))
    assert_close(together(model, fits), alone(model, fits), 1e-9)


@pytest.mark.parametrize("features", [("ranks", "dropout"), ("heads", "clip", "mask"), ("also", "subset")])
@pytest.mark.parametrize("budget", [1, 7, 13, 40])
def test_the_token_budget_does_not_matter(budget: int, features: tuple[str, ...]) -> None:
    fits = cohort(tiny.model(), OPTIMIZERS["adamw"], tiny.place(), features)
    assert_close(together(tiny.model(budget=budget), fits), together(tiny.model(), fits), 1e-9)


def test_the_order_of_fits_and_rows_does_not_matter() -> None:
    model = tiny.model()
    fits = cohort(model, OPTIMIZERS["adamw"], tiny.place(), ("clip", "dropout", "prox", "ranks"))
    expected = together(model, fits)
    for order in itertools.islice(itertools.permutations(range(CLIENTS)), 1, None, 7):
        shuffled = together(model, [fits[i] for i in order])
        assert_close([shuffled[order.index(i)] for i in range(CLIENTS)], expected, 1e-9)
    turned = [replace(fit, batches=[batch[::-1] for batch in fit.batches]) for fit in fits]
    assert_close(together(model, turned), expected, 1e-9)


def test_moments_carry_over_two_fits() -> None:
    """Two fits of two steps with moments are one fit of four."""
    model = tiny.model()
    for optimizer in OPTIMIZERS.values():
        fits = [
            replace(fit, batches=[[0, 1], [2], [3, 4, 5], [6, 7]]) for fit in cohort(model, optimizer, tiny.place())
        ]
        whole = together(model, fits)
        first = together(model, [replace(fit, batches=fit.batches[:2]) for fit in fits])
        second = together(
            model,
            [
                replace(fit, batches=fit.batches[2:], params=half.params, moments=half.moments)
                for fit, half in zip(fits, first, strict=True)
            ],
        )
        for a, b, c in zip(whole, first, second, strict=True):
            assert a.losses == pytest.approx((*b.losses, *c.losses), abs=1e-9)
            assert a.moments.step == c.moments.step == 4
            for name, t in a.params.items():
                assert torch.allclose(t, c.params[name], atol=1e-9, rtol=0)
        uneven = [
            replace(f, moments=h.moments) if i % 2 else f for i, (f, h) in enumerate(zip(fits, first, strict=True))
        ]
        assert_close(together(model, uneven), alone(model, uneven), 1e-9)


@pytest.mark.parametrize(
    ("optimizer", "tolerance"),
    [(SGD(0.1), 1e-5), (SGD(0.05, 0.9), 1e-5), (AdamW(0.01, eps=1e-6), 1e-5), (AdamW(0.01), None)],
)
@pytest.mark.parametrize("feature", ["", "clip", "dropout", "ranks", "dense"])
def test_float32(optimizer: Optimizer, tolerance: float | None, feature: str) -> None:
    model = tiny.model(dtype="float32")
    fits = cohort(model, optimizer, tiny.place(), (feature,) if feature else ())
    if tolerance is None:  # B = 0: the hard case
        zero = [{n: t * 0 if n.endswith(".B") else t for n, t in fit.params.items()} for fit in fits]
        fits = [replace(fit, params=params) for fit, params in zip(fits, zero, strict=True)]
    expected = alone(model, fits)
    got = together(model, fits)
    if tolerance is not None:
        assert_close(got, expected, tolerance)
    for a, b, fit in zip(got, expected, fits, strict=True):
        moved = tree.norm(tree.sub(b.params, fit.params))
        assert tree.norm(tree.sub(a.params, b.params)) < 1e-3 * moved
