"""The model over a transformer: one client's trouble is its own, the base stays as it is, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from cohorts import (
    _no_head,
    alone,
    assert_close,
    cohort,
    together,
)
from fedpeft.core import tree
from fedpeft.core.adapter import HeadOnly, Lora
from fedpeft.core.errors import ClientError, DivergedError, FitError, ModelError
from fedpeft.core.fit import SGD, AdamW, Fit, Fitted, Optimizer
from fedpeft.models.hf import HFModel
from fedpeft.models.readouts.text import classification_sums


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
    model.base.acting.outputs[query] = [lambda x, y: y * 100]
    assert torch.equal(model.logits(fits[0].params, data), logits)
    model.base.acting.outputs[query] = [lambda x, y: y * 100]
    for got, wanted in zip(together(model, fits), expected, strict=True):
        assert_same_bits(got, wanted)
    assert not model.base.acting.outputs


def broken_off(model: HFModel, fit: Fit) -> None:
    def breaks(module: Any, args: Any, output: Any) -> None:
        raise RuntimeError("in the middle")

    handle = model.base.module.get_submodule("encoder.layer.2").register_forward_hook(breaks)
    try:
        model.logits(fit.params, fit.data)
    finally:
        handle.remove()


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
    less = {name: t for name, t in trained.items() if not name.startswith("block.1.")}
    with pytest.raises(FitError, match="to start from are not those of this model's adapter: params differ in 4 names"):
        model.warm_start(less)


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
