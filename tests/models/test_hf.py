"""A cohort in one pass against each client alone, for everything that a Fit can say; and the base that stays as it is.

Tolerances: float64 1e-9; float32 1e-5 for SGD and for AdamW with eps 1e-6, otherwise 1e-3 in relative norm (with B = 0,
A's first gradients are rounding noise and Adam divides by eps).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, HeadOnly, Lora
from fedpeft.core.errors import ClientError, DivergedError, FitError, ModelError
from fedpeft.core.fit import SGD, AdamW, Fit, Fitted, Optimizer, Prox
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.hf import HFModel, classification_sums

KINDS: dict[str, AdapterSpec] = {"lora": Lora(rank=4, alpha=6.0), "head": HeadOnly()}
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


# --- what a Fit can say: each takes the plain fits and gives others ---------------------------------------------------


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
    fitted = model.fit_many(fits)
    for each in fitted:
        if isinstance(each, Exception):
            raise each
    return [each for each in fitted if isinstance(each, Fitted)]


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


# --- a cohort is each client alone ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("family", tiny.FAMILIES)
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


# --- one client's trouble is its own ----------------------------------------------------------------------------------


def assert_same_bits(a: Fitted | Exception, b: Fitted | Exception) -> None:
    assert isinstance(a, Fitted) and isinstance(b, Fitted)
    assert tree.sha256(a.params) == tree.sha256(b.params)
    assert a.losses == b.losses


@pytest.mark.parametrize("optimizer", [SGD(0.1), AdamW(0.01)])
def test_a_diverged_client_changes_no_bit_of_the_others(optimizer: Optimizer) -> None:
    model = tiny.model()
    fits = cohort(model, optimizer, tiny.place())
    wild = replace(fits[2].optimizer, lr=1e300)
    broken = [*fits[:2], replace(fits[2], optimizer=wild), fits[3]]
    healthy = model.fit_many([*fits[:2], replace(fits[2], optimizer=replace(wild, lr=0.01)), fits[3]])
    got = model.fit_many(broken)
    assert isinstance(got[2], DivergedError)
    assert "lower method.lr" in str(got[2])
    for i in (0, 1, 3):
        assert_same_bits(got[i], healthy[i])
    with pytest.raises(DivergedError):
        model.fit(broken[2])


def test_an_invalid_fit_fails_alone() -> None:
    model = tiny.model()
    fits = cohort(model, SGD(0.1), tiny.place())
    bad = replace(fits[1], batches=[[0, 99]])
    got = model.fit_many([fits[0], bad, fits[2], fits[3]])
    assert isinstance(got[1], FitError)
    for result, expected in zip((got[0], got[2], got[3]), model.fit_many([fits[0], *fits[2:]]), strict=True):
        assert_same_bits(result, expected)


def test_an_exception_in_a_pass_falls_back_to_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that cannot hold the data of one client loses that client alone."""
    model = tiny.model()
    fits = cohort(model, SGD(0.1), tiny.place())
    expected = alone(model, fits)
    original = HFModel.backward

    def backward(self: HFModel, stack: Any, rows: Any, step: int) -> Tensor:
        if any(fit is fits[2] for fit in stack.fits) and step == 1:
            raise RuntimeError("out of\n memory")
        return original(self, stack, rows, step)

    monkeypatch.setattr(HFModel, "backward", backward)
    got = model.fit_many(fits)
    assert isinstance(got[2], ClientError)
    assert str(got[2]) == "local training failed: RuntimeError: out of memory"
    for i in (0, 1, 3):
        assert_same_bits(got[i], expected[i])


def test_what_ran_before_does_not_matter() -> None:
    """Neither other adapters, nor a pass that broke off, nor something left in place by somebody else."""
    model = HFModel(tiny.freeze(tiny.module("bert"), None, "own", tiny.CPU), Lora(rank=4, alpha=6.0), 3)
    fits = cohort(model, AdamW(0.01), tiny.place(), ("dropout",))
    data = fits[0].data
    expected, logits = together(model, fits), model.logits(fits[0].params, data)
    other = HFModel(model.base, Lora(rank=2, targets=tiny.everything("bert")), 5)
    other.fit(Fit(tiny.params(other, tiny.place(3)), data, [[0, 1]], SGD(0.1)))
    query = model.base.module.get_submodule(model.slots["block.0.query"].path)
    with pytest.raises(RuntimeError, match="in the middle"):
        broken_off(model, fits[0])
    model.base.active[query] = [lambda x, y: y * 100]
    assert torch.equal(model.logits(fits[0].params, data), logits)
    model.base.active[query] = [lambda x, y: y * 100]
    for got, wanted in zip(together(model, fits), expected, strict=True):
        assert_same_bits(got, wanted)
    assert not model.base.active


def broken_off(model: HFModel, fit: Fit) -> None:
    def breaks(module: Any, args: Any, output: Any) -> None:
        raise RuntimeError("in the middle")

    handle = model.base.module.get_submodule("encoder.layer.2").register_forward_hook(breaks)
    try:
        model.logits(fit.params, fit.data)
    finally:
        handle.remove()


# --- the base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_base_never_changes_and_nothing_of_it_is_differentiated(family: str) -> None:
    model = tiny.model(family)
    before = tree.sha256(model.base.module.state_dict())
    fits = cohort(model, AdamW(0.05), tiny.place(), ("factors", "clip"))
    together(model, fits)
    model.score(fits[0].params, fits[0].data)
    assert tree.sha256(model.base.module.state_dict()) == before
    for name, weight in model.base.module.named_parameters():
        assert not weight.requires_grad and weight.grad is None, name


@pytest.mark.parametrize(("blocks", "lowest"), [((2,), 2), ((1, 2), 1), (None, 0)])
def test_no_backward_pass_below_the_lowest_adapted_block(blocks: tuple[int, ...] | None, lowest: int) -> None:
    model = tiny.model("bert", Lora(rank=4, blocks=blocks))
    seen: dict[int, bool] = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__(i, args[0].requires_grad))
        for i, layer in enumerate(model.base.module.encoder.layer)
    ]
    try:
        together(model, cohort(model, SGD(0.1), tiny.place()))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {i: i > lowest for i in range(tiny.BLOCKS)}
    assert model.lowest_block(tiny.params(model, tiny.place())) == lowest


def test_a_head_alone_needs_no_backward_pass_through_the_base() -> None:
    model = tiny.model("bert", HeadOnly())
    outputs: list[bool] = []
    handle = model.base.module.register_forward_hook(
        lambda m, args, out: outputs.append(out.last_hidden_state.requires_grad)
    )
    try:
        together(model, cohort(model, SGD(0.1), tiny.place()))
    finally:
        handle.remove()
    assert outputs and not any(outputs)
    assert model.lowest_block({"head.weight": torch.zeros(3, 32)}) == tiny.BLOCKS


def test_two_models_on_one_base_do_not_act_twice() -> None:
    base = tiny.freeze(tiny.module("bert"), None, "own", tiny.CPU)
    one = HFModel(base, Lora(rank=4, alpha=6.0), 3)
    params, data = tiny.params(one, tiny.place()), tiny.examples(tiny.place(1), 5)
    expected = one.logits(params, data)
    two = HFModel(base, Lora(rank=4, alpha=6.0), 3)
    assert torch.equal(two.logits(params, data), expected)
    assert torch.equal(one.logits(params, data), expected)


def test_another_precision_is_a_copy_that_is_made_once() -> None:
    base = tiny.freeze(tiny.module("bert"), None, "own", tiny.CPU)
    model = HFModel(base, Lora(rank=4, alpha=6.0), 3)
    fit = cohort(model, SGD(0.1), tiny.place())[0]
    exact = model.fit(fit)
    rough = model.fit(replace(fit, base="bfloat16"))
    assert base.at("bfloat16") is base.at("bfloat16")
    assert base.at("float64") is base and base.at("") is base
    assert base.dtype is torch.float64 and rough.params["head.weight"].dtype is torch.float64
    assert rough.losses != exact.losses
    assert rough.losses == pytest.approx(exact.losses, rel=0.05)
    assert not any(len(m._forward_hooks) for m in base.copy_module(torch.float32).modules())
    fits = [fit, replace(fit, base="bfloat16")]
    assert_close(together(model, fits), [exact, rough], 1e-9)  # each precision is a group of its own


def test_a_bfloat16_base_learns() -> None:
    model = tiny.model("llama", Lora(rank=4, alpha=6.0), dtype="bfloat16")
    data = tiny.examples(tiny.place(), 24)
    params = {n: t.float() for n, t in model.init(tiny.place()).items()}
    fitted = model.fit(Fit(params, data, data.epochs(30, 8, tiny.place()), AdamW(0.01)))
    assert all(bool(t.isfinite().all()) and t.dtype is torch.float32 for t in fitted.params.values())
    assert np.mean(fitted.losses[-3:]) < 0.7 * np.mean(fitted.losses[:3])
    assert bool(model.logits(fitted.params, data).isfinite().all())


# --- what a model refuses ---------------------------------------------------------------------------------------------


def wrong(model: HFModel, fit: Fit, name: str) -> Fit:
    p, query = dict(fit.params), "block.0.query"
    changes: dict[str, Any] = {
        "unknown": {"params": {**p, "block.7.query.A": p[f"{query}.A"]}},
        "shape": {"params": {**p, f"{query}.A": p[f"{query}.A"][:, :5]}},
        "dims": {"params": {**p, "head.bias": p["head.bias"][None]}},
        "no B": {"params": tree.select(p, lambda n: n != f"{query}.B")},
        "no A": {"params": tree.select(p, lambda n: n != f"{query}.A")},
        "ranks": {"params": {**p, f"{query}.B": p[f"{query}.B"][:, :2]}},
        "no head": {"params": tree.select(p, _no_head)},
        "no bias": {"params": tree.select(p, lambda n: n != "head.bias")},
        "factor": {"params": {**p, f"delta.{query}.left": torch.zeros(32, 2)}},
        "label": {"data": replace(fit.data, labels=fit.data.labels + 3)},
        "negative": {"data": replace(fit.data, labels=fit.data.labels * 0 - 100)},
        "two heads": {"also": (p,)},
        "also": {"also": ({"block.0.query.A": torch.zeros(1, 5)},)},
        "precision": {"base": "float8"},
        "data": {"data": [0] * 9},
    }
    return replace(fit, **changes[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "'block.7.query.A' does not exist in this model with adapter 'lora'"),
        ("shape", r"'block.0.query.A' has shape \(4, 5\); this model needs \('any', 32\)"),
        ("dims", r"'head.bias' has shape \(1, 3\)"),
        ("no B", r"'block.0.query.A' came without its partner block.0.query.B"),
        ("no A", r"'block.0.query.B' came without its partner block.0.query.A"),
        ("ranks", r"do not fit together: \(4, 32\) and \(32, 2\)"),
        ("no head", "no 'head.weight'; send the head"),
        ("no bias", "'head.weight' came without its partner head.bias"),
        ("factor", r"'delta.block.0.query.left' came without its partner delta.block.0.query.right"),
        ("label", "a label is 5; the head has classes 0 to 2"),
        ("negative", "a label is -100; the head has classes 0 to 2"),
        ("two heads", "Fit.also holds 'head.weight'"),
        ("also", "'block.0.query.A' has shape"),
        ("precision", "precision 'float8' is not known"),
        ("data", "a Fit's data is a list; this model needs tokenised Examples"),
    ],
)
def test_a_wrong_fit_is_refused(name: str, message: str) -> None:
    model = tiny.model()
    fit = cohort(model, SGD(0.1), tiny.place())[0]
    with pytest.raises((FitError, ModelError), match=message):
        model.fit(wrong(model, fit, name))


def test_an_empty_row_is_refused() -> None:
    model = tiny.model()
    fit = cohort(model, SGD(0.1), tiny.place())[0]
    tokens = (np.zeros(0, dtype=np.int32), *fit.data.tokens[1:])
    with pytest.raises(ClientError, match="a row has no tokens; drop empty texts"):
        model.fit(replace(fit, data=replace(fit.data, tokens=tokens), batches=[[0, 1]]))


def test_wrong_models_are_refused() -> None:
    with pytest.raises(ModelError, match=r"adapter.rank is 0; it must be at least 1"):
        tiny.model(spec=Lora(rank=0))
    with pytest.raises(ModelError, match=r"run.token_budget is 0"):
        tiny.model(budget=0)
    model = tiny.model()
    with pytest.raises(ModelError, match="need a head"):
        model.logits(None, tiny.examples(tiny.place(), 3))


def test_a_warm_start_is_checked_and_is_what_init_gives() -> None:
    model = tiny.model()
    assert not torch.equal(*(model.init(tiny.place(i))["block.0.query.A"] for i in (0, 1)))
    trained = {n: t.float() for n, t in tiny.params(model, tiny.place()).items()}
    model.warm_start(trained)
    given = model.init(tiny.place(1))
    assert tree.sha256(given) == tree.sha256(trained)
    assert all(given[name] is not t for name, t in trained.items())
    with pytest.raises(Exception, match="differ"):
        tiny.model(spec=HeadOnly()).warm_start({"head.weight": torch.zeros(3, 32)} | {"head.bias": torch.zeros(3)} |
                                               {"delta.block.0.query.dense": torch.zeros(32, 32)})  # fmt: skip


# --- predictions ------------------------------------------------------------------------------------------------------


def test_logits_of_some_rows_in_any_order_and_none() -> None:
    model = tiny.model(budget=20)
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 9)
    every = model.logits(params, data)
    assert every.dtype is torch.float32 and not every.requires_grad
    assert torch.allclose(model.logits(params, data, [5, 2, 5]), every[[5, 2, 5]], atol=1e-6)
    assert model.logits(params, data, []).shape == (0, 3)


def test_scores_are_sums_that_add_up() -> None:
    model = tiny.model()
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 20)
    sums = model.score(params, data)
    logits = model.logits(params, data).double()
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    loss = 0.0
    for row, label in zip(logits, data.labels, strict=True):
        confusion[label, int(row.argmax())] += 1
        loss += math.log(sum(math.exp(x) for x in row.tolist())) - float(row[label])
    assert torch.equal(sums["confusion"], confusion)
    assert float(sums["loss"]) == pytest.approx(loss)
    assert int(sums["n"]) == 20
    halves = [model.score(params, data.take(range(i, i + 10))) for i in (0, 10)]
    assert torch.equal(halves[0]["confusion"] + halves[1]["confusion"], confusion)
    none = classification_sums(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert (float(none["loss"]), int(none["n"]), int(none["confusion"].sum())) == (0.0, 0, 0)
