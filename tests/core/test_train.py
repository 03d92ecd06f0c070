"""The training loop on three numbers: against torch's own optimizers, by hand, and one client beside others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import toy
from fedpeft.core import tree
from fedpeft.core.errors import ClientError, DivergedError, FitError
from fedpeft.core.fit import SGD, AdamW, Fit, Fitted, Moments, Optimizer, Prox
from fedpeft.core.train import Stack
from fedpeft.core.tree import Params

DATA = toy.points([1.0, 2.0, 3.0], [-1.0, 0.5, 0.0], [4.0, -2.0, 1.0], [0.0, 0.0, 2.0])
BATCHES = [[0, 1], [2], [3, 0, 1], [1], [2, 3]]
START = toy.params(0.3, -0.7, 1.1)


def fit(optimizer: Optimizer, **changes: Any) -> Fit:
    return replace(Fit(START, DATA, BATCHES, optimizer), **changes)


def plain_loop(start: Params, own: Fit, optimizer: torch.optim.Optimizer | None, weights: Params) -> list[float]:
    """The same training as anyone would write it in PyTorch, with autograd for every term of the loss."""
    assert optimizer is not None
    losses = []
    for rows in own.batches:
        optimizer.zero_grad()
        w = torch.cat([weights[toy.BODY], weights[toy.HEAD]])
        loss = 0.5 * (w - torch.from_numpy(own.data.x[list(rows)])).square().sum(dim=1).mean()
        total = loss
        if own.prox is not None:
            center = own.prox.center or start
            total = total + own.prox.mu / 2 * sum((weights[n] - center[n]).square().sum() for n in weights)
        if own.penalty is not None:
            total = total + own.penalty({n: t[None] for n, t in weights.items()}).sum()
        total.backward()
        if own.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(weights.values()), own.clip)
        for name, drift in (own.drift or {}).items():
            weights[name].grad += drift  # type: ignore[operator]
        optimizer.step()
        losses.append(loss.item())
    return losses


def torchs(optimizer: Optimizer, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    assert isinstance(optimizer.lr, float)
    if isinstance(optimizer, SGD):
        return torch.optim.SGD(weights, optimizer.lr, optimizer.momentum, weight_decay=optimizer.weight_decay)
    return torch.optim.AdamW(weights, optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay)


def cube(stacked: Mapping[str, Tensor]) -> Tensor:
    """0.1 ||w||^3 per client."""
    return 0.1 * torch.as_tensor(sum(t.square().sum(dim=1) for t in stacked.values())).pow(1.5)


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(0.1),
        SGD(0.1, weight_decay=0.2),
        SGD(0.05, momentum=0.9),
        SGD(0.05, momentum=0.5, weight_decay=0.1),
        AdamW(0.1),
        AdamW(0.1, weight_decay=0.3),
        AdamW(0.05, betas=(0.5, 0.7), eps=1e-3),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip": 0.8},
        {"prox": Prox(0.7)},
        {"prox": Prox(0.7, toy.params(1.0, 1.0, -1.0))},
        {"penalty": cube},
        {"drift": toy.params(0.2, -0.1, 0.4), "clip": 0.5},
        {"penalty": cube, "prox": Prox(2.0), "clip": 1.0, "drift": toy.params(0.0, 0.3, 0.0)},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_training_is_torchs_own(optimizer: Optimizer, changes: dict[str, Any]) -> None:
    own = fit(optimizer, **changes)
    weights = {name: t.clone().requires_grad_() for name, t in START.items()}
    losses = plain_loop(START, own, torchs(optimizer, list(weights.values())), weights)
    fitted = toy.ToyModel().fit(own)
    assert fitted.losses == pytest.approx(losses, abs=1e-12)
    assert fitted.loss == pytest.approx(sum(losses) / 5)
    assert toy.vector(fitted.params) == pytest.approx(
        toy.vector({n: w.detach() for n, w in weights.items()}), abs=1e-12
    )
    assert (fitted.steps, fitted.examples, fitted.tokens, fitted.pairs) == (5, 9, 27, 81)


def test_a_schedule_is_torchs_rate_set_before_each_step() -> None:
    rates = (0.1, 0.0, 0.05, 0.2, 0.01)
    for optimizer in (SGD(rates, momentum=0.9), AdamW(rates, weight_decay=0.1)):
        weights = {name: t.clone().requires_grad_() for name, t in START.items()}
        theirs = torchs(replace(optimizer, lr=0.1), list(weights.values()))
        for step, lr in enumerate(rates):
            theirs.param_groups[0]["lr"] = lr
            plain_loop(START, fit(optimizer, batches=BATCHES[step : step + 1]), theirs, weights)
        fitted = toy.ToyModel().fit(fit(optimizer))
        assert toy.vector(fitted.params) == pytest.approx(toy.vector({n: w.detach() for n, w in weights.items()}))


def test_rates_by_prefix_are_torchs_parameter_groups() -> None:
    """The longest prefix wins; with a schedule the named rates follow its shape."""
    for optimizer in (SGD(0.1, momentum=0.5), AdamW(0.1, weight_decay=0.2)):
        weights = {name: t.clone().requires_grad_() for name, t in START.items()}
        groups: Any = [{"params": [weights[toy.BODY]], "lr": 0.02}, {"params": [weights[toy.HEAD]], "lr": 0.3}]
        plain_loop(START, fit(optimizer), torchs(optimizer, groups), weights)
        own = fit(optimizer, rates={"block.": 0.02, "head.": 0.7, toy.HEAD: 0.3})
        fitted = toy.ToyModel().fit(own)
        assert toy.vector(fitted.params) == pytest.approx(toy.vector({n: w.detach() for n, w in weights.items()}))
    falling = fit(SGD((0.4, 0.2, 0.1, 0.0, 0.0)), rates={"head.": 0.1})
    by_hand = 1.1
    for lr, mean_ in zip((0.1, 0.05, 0.025), (1.5, 1.0, 5 / 3), strict=True):
        by_hand += lr * (mean_ - by_hand)
    assert toy.ToyModel().fit(falling).params[toy.HEAD].item() == pytest.approx(by_hand)


def test_drift_comes_after_clip() -> None:
    """One step of SGD with lr 1: w - (g / ||g|| * clip) - drift; g = w - mean(x) = (0, 3, 4) has norm 5."""
    data = toy.points([0.3, -3.7, -2.9])
    own = Fit(START, data, [[0]], SGD(1.0), clip=0.5, drift=toy.params(10.0, 0.0, 0.0))
    assert toy.vector(toy.ToyModel().fit(own).params) == pytest.approx([0.3 - 10, -0.7 - 0.3, 1.1 - 0.4], abs=1e-6)


def test_prox_by_hand() -> None:
    """One step of SGD with lr 0.1 from w = 0 at x = 1, centre 2, mu 3: w = 0 + 0.1 (1 + 3 * 2) = 0.7 per number."""
    zero = toy.params(0.0, 0.0, 0.0)
    center = toy.params(2.0, 2.0, 2.0)
    own = Fit(zero, toy.points([1.0, 1.0, 1.0]), [[0]], SGD(0.1), prox=Prox(3.0, center))
    fitted = toy.ToyModel().fit(own)
    assert toy.vector(fitted.params) == pytest.approx([0.7] * 3)
    assert fitted.losses == (1.5,), "the task's loss, without the pull"


@pytest.mark.parametrize("optimizer", [SGD(0.1, 0.9, 0.3), AdamW(0.1, weight_decay=0.3)])
def test_masked_numbers_keep_their_bits_and_the_others_train_as_if_alone(optimizer: Optimizer) -> None:
    mask = toy.params(1.0, 0.0, 1.0)
    carried = toy.ToyModel().fit(fit(optimizer)).moments  # whose moments would move the masked number
    pulled = fit(optimizer, mask=mask, drift=toy.params(0.0, 5.0, 0.0), prox=Prox(1.0), moments=carried)
    fitted = toy.ToyModel().fit(pulled)
    assert fitted.params[toy.BODY][1].item() == START[toy.BODY][1].item()
    free = toy.ToyModel().fit(replace(pulled, mask=None, drift=None))
    assert toy.vector(fitted.params)[::2] == pytest.approx(toy.vector(free.params)[::2])


def test_the_mask_comes_before_the_norm_of_the_clip() -> None:
    """g = (0, 3, 4); without the second number its norm is 4, so clip 2 halves the third."""
    own = Fit(START, toy.points([0.3, -3.7, -2.9]), [[0]], SGD(1.0), clip=2.0, mask=toy.params(1.0, 0.0, 1.0))
    assert toy.vector(toy.ToyModel().fit(own).params) == pytest.approx([0.3, -0.7, 1.1 - 2.0], abs=1e-6)


def test_only_named_parameters_train() -> None:
    fitted = toy.ToyModel().fit(fit(AdamW(0.1, weight_decay=0.5), train=frozenset({toy.HEAD})))
    assert torch.equal(fitted.params[toy.BODY], START[toy.BODY])
    assert fitted.params[toy.BODY] is not START[toy.BODY]
    assert not torch.equal(fitted.params[toy.HEAD], START[toy.HEAD])
    assert fitted.moments.first.keys() == fitted.moments.second.keys() == {toy.HEAD}
    nothing = toy.ToyModel().fit(fit(SGD(0.1), train=frozenset()))
    assert tree.sha256(nothing.params) == tree.sha256(START)
    assert len(nothing.losses) == 5


def test_moments_are_torchs_state() -> None:
    optimizer = AdamW(0.1)
    weights = {name: t.clone().requires_grad_() for name, t in START.items()}
    theirs = torchs(optimizer, list(weights.values()))
    plain_loop(START, fit(optimizer), theirs, weights)
    moments = toy.ToyModel().fit(fit(optimizer)).moments
    assert moments.step == 5
    for name, weight in weights.items():
        state = theirs.state[weight]
        assert torch.allclose(moments.first[name], state["exp_avg"], atol=1e-12)
        assert torch.allclose(moments.second[name], state["exp_avg_sq"], atol=1e-12)


@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.05, momentum=0.9), AdamW(0.1)])
def test_two_fits_with_carried_moments_are_one(optimizer: Optimizer) -> None:
    whole = toy.ToyModel().fit(fit(optimizer))
    first = toy.ToyModel().fit(fit(optimizer, batches=BATCHES[:2]))
    second = toy.ToyModel().fit(fit(optimizer, batches=BATCHES[2:], params=first.params, moments=first.moments))
    assert toy.vector(second.params) == pytest.approx(toy.vector(whole.params), abs=1e-12)
    assert second.moments.step == 5
    assert toy.vector(second.moments.first) == pytest.approx(toy.vector(whole.moments.first), abs=1e-12)


def test_no_step_changes_nothing() -> None:
    carried = Moments(3, toy.params(1.0, 2.0, 3.0))
    for optimizer in (SGD(0.1), SGD((), momentum=0.9), AdamW(())):
        fitted = toy.ToyModel().fit(fit(optimizer, batches=[], moments=carried, rates={"head.": 0.5}))
        assert tree.sha256(fitted.params) == tree.sha256(START)
        assert (fitted.losses, fitted.loss, fitted.steps, fitted.examples) == ((), 0.0, 0, 0)
        assert fitted.moments.step == 3
        assert toy.vector(fitted.moments.first) == [1.0, 2.0, 3.0]


def test_each_parameter_keeps_its_dtype_and_the_given_tensors_their_numbers() -> None:
    mixed = {toy.BODY: START[toy.BODY].float(), toy.HEAD: START[toy.HEAD]}
    before = tree.sha256(mixed)
    fitted = toy.ToyModel().fit(fit(SGD(0.1), params=mixed))
    assert {name: t.dtype for name, t in fitted.params.items()} == {name: t.dtype for name, t in mixed.items()}
    assert tree.sha256(mixed) == before
    exact = toy.ToyModel().fit(fit(SGD(0.1), params={name: t.double() for name, t in mixed.items()}))
    assert torch.equal(fitted.params[toy.HEAD], exact.params[toy.HEAD])
    assert torch.equal(fitted.params[toy.BODY], exact.params[toy.BODY].float()), "rounded once, at the end"


# --- beside others ----------------------------------------------------------------------------------------------------


def group() -> list[Fit]:
    """Fits that share a sweep where they can: ragged steps, other settings, one of another optimizer."""
    return [
        fit(SGD(0.1, momentum=0.9), clip=0.5),
        fit(SGD((0.1, 0.2), weight_decay=0.3, momentum=0.5), batches=BATCHES[:2], mask=toy.params(0.0, 1.0, 1.0)),
        fit(SGD(0.2), batches=BATCHES[2:], drift=toy.params(0.1, 0.0, 0.0), rates={"head.": 0.05}),
        fit(AdamW(0.1), batches=BATCHES[:4], prox=Prox(0.3), dropout=0.4, seed=5),
        fit(AdamW(0.02, eps=1e-3), batches=[], penalty=cube),
        fit(AdamW(0.02, betas=(0.8, 0.9), weight_decay=0.1), train=frozenset({toy.BODY})),
    ]


def test_a_cohort_is_each_fit_alone_in_the_order_given() -> None:
    fits = group()
    for order in (range(6), (5, 3, 1, 0, 2, 4)):
        got = toy.ToyModel().fit_many([fits[i] for i in order])
        for result, i in zip(got, order, strict=True):
            alone = toy.ToyModel().fit(fits[i])
            assert isinstance(result, Fitted)
            assert result.losses == alone.losses
            assert tree.sha256(result.params) == tree.sha256(alone.params)
            for mine, theirs in (
                (result.moments.first, alone.moments.first), (result.moments.second, alone.moments.second)
            ):  # fmt: skip
                assert tree.sha256(mine) == tree.sha256(theirs)
    assert toy.ToyModel().fit_many([]) == []


def test_a_client_that_diverges_leaves_the_others_bits_alone() -> None:
    healthy = toy.ToyModel().fit_many(group())
    for rate in (1e200, 1e300):
        sick = group()
        sick[0] = replace(sick[0], optimizer=SGD(rate, momentum=0.9), clip=None)
        got = toy.ToyModel().fit_many(sick)
        assert isinstance(got[0], DivergedError)
        assert "lower method.lr or set method.clip" in str(got[0])
        for result, expected in zip(got[1:], healthy[1:], strict=True):
            assert isinstance(result, Fitted) and isinstance(expected, Fitted)
            assert tree.sha256(result.params) == tree.sha256(expected.params)
    with pytest.raises(DivergedError, match=r"training of 5 steps diverged: the loss is inf at step 2; lower"):
        toy.ToyModel().fit(fit(SGD(1e200)))
    with pytest.raises(DivergedError, match="of 1 steps diverged: the parameters are not finite; lower"):
        toy.ToyModel().fit(fit(SGD(1e308), batches=BATCHES[:1]))


def test_an_invalid_fit_fails_alone() -> None:
    fits = group()
    fits[2] = replace(fits[2], batches=[[9]])
    fits[3] = replace(fits[3], params={"other": torch.zeros(1)}, train=None)
    got = toy.ToyModel().fit_many(fits)
    assert [type(g) for g in got] == [Fitted, Fitted, FitError, FitError, Fitted, Fitted]


class Breaks(toy.ToyModel):
    """A pass that holds the sick client raises, as one does that runs out of memory."""

    def backward(self, stack: Stack, rows: Sequence[Sequence[int]], step: int) -> Tensor:
        if step == 1 and any(own.seed == 13 for own in stack.fits):
            raise RuntimeError("out of\n  memory")
        return super().backward(stack, rows, step)


def test_an_exception_in_a_pass_loses_its_own_client_alone() -> None:
    fits = group()
    fits[0] = replace(fits[0], seed=13)
    got = Breaks().fit_many(fits)
    assert isinstance(got[0], ClientError)
    assert str(got[0]) == "local training failed: RuntimeError: out of memory"
    assert isinstance(got[0].__cause__, RuntimeError)
    for result, own in zip(got[1:], fits[1:], strict=True):
        assert isinstance(result, Fitted)
        assert tree.sha256(result.params) == tree.sha256(toy.ToyModel().fit(own).params)


def test_a_penalty_that_fails_is_its_own_clients() -> None:
    def breaks(stacked: Mapping[str, Tensor]) -> Tensor:
        raise ValueError("no such layer")

    got = toy.ToyModel().fit_many([fit(SGD(0.1)), fit(SGD(0.1), penalty=breaks)])
    assert isinstance(got[0], Fitted)
    assert "ValueError: no such layer" in str(got[1])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": {}}, "its params are empty"),
        ({"train": frozenset({"w"})}, "Fit.train names 'w'"),
        ({"batches": [[0], []]}, "a batch of a Fit has no rows"),
        ({"batches": [[0, 4]]}, "a batch names row 4; the data has rows 0 to 3"),
        ({"batches": [[-1]]}, "a batch names row -1"),
        ({"optimizer": SGD((0.1,))}, "1 rates for 5 steps"),
        ({"optimizer": SGD(-0.1)}, "a learning rate is -0.1"),
        ({"optimizer": AdamW(math.nan)}, "a learning rate is nan"),
        ({"rates": {"head.": math.inf}}, "a learning rate is inf"),
        ({"optimizer": SGD(0.0), "rates": {"head.": 0.1}}, "needs an optimizer whose own rate is above 0"),
        ({"optimizer": SGD((0.0,) * 5), "rates": {"head.": 0.1}}, "needs an optimizer whose own rate is above 0"),
        ({"mask": {"w": torch.ones(1)}}, "Fit.mask names 'w'"),
        ({"drift": {toy.HEAD: torch.ones(2)}}, r"Fit.drift: 'head.w' has shape \(2,\)"),
        ({"prox": Prox(1.0, {toy.HEAD: torch.ones(2), toy.BODY: torch.ones(2)})}, "Fit.prox.center: 'head.w'"),
        ({"prox": Prox(1.0, {toy.HEAD: torch.ones(1)})}, "Fit.prox.center lacks 'block.0.w'"),
        ({"moments": Moments(1, {"w": torch.ones(1)})}, "Fit.moments.first names 'w'"),
        ({"moments": Moments(1, {}, {"w": torch.ones(1)})}, "Fit.moments.second names 'w'"),
        ({"clip": 0.0}, "Fit.clip is 0.0; it must be positive"),
        ({"dropout": 1.0}, r"Fit.dropout is 1.0; it must lie in \[0, 1\)"),
        ({"params": toy.params(math.nan, 0.0, 0.0)}, "'block.0.w' is not finite where training would start"),
    ],
)
def test_inconsistent_fits_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        toy.ToyModel().fit(fit(SGD(0.1), **changes) if "optimizer" not in changes else fit(**changes))
