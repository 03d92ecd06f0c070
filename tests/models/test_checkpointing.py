"""Gradient checkpointing: the same bits, fewer tensors kept, in every family and with every way adapters act."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
import toy
from fedpeft.core.adapter import AdapterSpec, Bottleneck, LatePrompt, Lora, Prefix, Prompt
from fedpeft.core.errors import FitError
from fedpeft.core.fit import SGD, AdamW, Fit, Fitted
from fedpeft.core.train import stack_params
from fedpeft.models.hf import HFModel

SPECS: dict[str, AdapterSpec] = {
    "lora": Lora(4, 6.0, targets=("query", "value", "down")),
    "prefix": Prefix(length=3),
    "prompt": Prompt(length=3),
    "late": LatePrompt(),
    "bottleneck": Bottleneck(size=4),
}


def model_of(family: str, kind: str, dtype: str = "float64") -> HFModel:
    return HFModel(tiny.base(family, dtype), SPECS[kind], 3)


def fits_of(model: HFModel, dropout: float = 0.0) -> list[Fit]:
    """Three clients with starts, rows and numbers of steps of their own."""
    fits = []
    for i in range(3):
        start = {name: t.to(model.base.dtype) + 0.01 for name, t in model.init(tiny.place(i)).items()}
        batches = [[0, 1, 2], [3, 4], [5, 6, 7]][: 3 - i]
        data = tiny.examples(tiny.place(10 + i), 8)
        fits.append(Fit(start, data, batches, SGD(0.1), seed=i, dropout=dropout))
    return fits


def trained(model: HFModel, fits: list[Fit]) -> list[Fitted]:
    found = model.fit_many(fits)
    assert all(isinstance(result, Fitted) for result in found), found
    return [result for result in found if isinstance(result, Fitted)]


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt"])
def test_training_gives_the_same_bits(family, kind):
    """Alone and together, with dropout noise that the second pass through a block must find again."""
    model = model_of(family, kind)
    fits = fits_of(model, dropout=0.2)
    plain = trained(model, fits)
    again = trained(model, [replace(fit, checkpointing=True) for fit in fits])
    for ours, theirs in zip(again, plain, strict=True):
        assert ours.losses == theirs.losses
        assert all(torch.equal(ours.params[name], t) for name, t in theirs.params.items())
    assert any(not torch.equal(plain[0].params[n], fits[0].params[n]) for n in plain[0].params), "nothing was trained"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_and_packed_bases_give_the_same_bits(dtype):
    model = model_of("llama", "lora", dtype)
    for base in ("", "nf4"):
        fits = [
            replace(fit, base=base, params={name: t.float() for name, t in fit.params.items()})
            for fit in fits_of(model)
        ]
        plain = trained(model, fits)
        again = trained(model, [replace(fit, checkpointing=True) for fit in fits])
        for ours, theirs in zip(again, plain, strict=True):
            assert all(torch.equal(ours.params[name], t) for name, t in theirs.params.items())


def kept_bytes(model: HFModel, fit: Fit) -> tuple[int, int]:
    """(bytes that autograd keeps between forward and backward, calls of the first block) in one step."""
    storages: dict[int, int] = {}
    frozen = {p.untyped_storage().data_ptr() for p in model.base.module.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in frozen:
            storages[place] = t.untyped_storage().nbytes()
        return t

    stack = stack_params([fit.params], model.device)
    leaves = {name: t.clone().requires_grad_() for name, t in stack.params.items()}
    calls = []
    attention = model.base.module.get_submodule("encoder.layer.0.attention")
    handle = attention.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            for _, terms in model.loss_terms(replace(stack, fits=(fit,), params=leaves), [[0, 1, 2, 3]], 0):
                total = sum(storages.values())  # before the backward pass
                terms.sum().backward()
    finally:
        handle.remove()
    assert all(leaf.grad is not None for leaf in leaves.values())
    return total, len(calls)


def test_less_is_kept_and_blocks_are_computed_twice():
    """Of a block its input is kept, and what all blocks share."""
    model = model_of("bert", "lora")
    data = tiny.examples(tiny.place(), 4, longest=12)
    fit = Fit(
        tiny.params(model, tiny.place(), slots=["block.0.query", "block.2.value"]), data, [[0, 1, 2, 3]], SGD(0.1)
    )
    plain, once = kept_bytes(model, fit)
    less, twice = kept_bytes(model, replace(fit, checkpointing=True))
    assert (once, twice) == (1, 2)
    assert less < 0.4 * plain


def test_blocks_are_as_they_were_after_a_pass_and_after_a_failure():
    model = model_of("bert", "lora")
    (fit, *_) = fits_of(model)
    blocks = list(model.base.module.encoder.layer)
    model.fit(replace(fit, checkpointing=True))
    assert not any("forward" in vars(block) for block in blocks)

    def fail(module: Any, args: Any) -> None:
        raise MemoryError("no more")

    handle = blocks[1].register_forward_pre_hook(fail)
    try:
        assert isinstance(model.fit_many([replace(fit, checkpointing=True)])[0], Exception)
    finally:
        handle.remove()
    assert not any("forward" in vars(block) for block in blocks)


def test_fits_with_and_without_train_in_sweeps_of_their_own(monkeypatch):
    model, sizes = model_of("bert", "lora"), []
    fits = fits_of(model)
    backward = model.backward
    monkeypatch.setattr(
        model, "backward", lambda stack, *rest: (sizes.append(len(stack.fits)), backward(stack, *rest))[1]
    )
    trained(model, [fits[0], replace(fits[0], checkpointing=True), fits[0]])
    assert sorted(set(sizes)) == [1, 2]


def test_a_family_whose_blocks_are_not_known_is_refused():
    from fedpeft.models.load import freeze

    base = freeze(tiny.module("gpt_neox"), None, "tiny", tiny.CPU)
    model = HFModel(base, Lora(4, 6.0, targets=("*.query_key_value",)), 3)
    fit = Fit(model.init(tiny.place()), tiny.examples(tiny.place(), 2), [[0]], SGD(0.1), checkpointing=True)
    with pytest.raises(FitError, match=r"Fit.checkpointing needs to know the blocks, .*'gpt_neox'"):
        model.check(fit)


def test_the_toy_takes_both_fields():
    """Its points are rounded in a coarser base; checkpointing changes nothing."""
    model = toy.ToyModel()
    fit = Fit(toy.params(0.0, 0.0, 0.0), toy.points([1.03, 2.0, -3.0]), [[0]], AdamW(0.1))
    plain = model.fit(fit)
    assert toy.vector(model.fit(replace(fit, checkpointing=True)).params) == toy.vector(plain.params)
    assert model.fit(replace(fit, base="nf4")).losses[0] == 0.5 * (1 + 4 + 9) != plain.losses[0]
    with pytest.raises(FitError, match="the toy's base has no precision 'nf9'"):
        model.fit(replace(fit, base="nf9"))
