"""Instance-dependent prompts: the sentence vector of the bare base, the network, and many clients at once."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from cohorts import FEATURES, OPTIMIZERS, alone, assert_close, together
from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, HeadOnly, InstancePrompt
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, Fit
from fedpeft.core.tree import Params
from fedpeft.models.adapters.kinds import build_adapter
from fedpeft.models.hf import HFModel
from prompts import drawn, fits, hidden, plain, row, tolerance

SIZES = ((3, 4), (1, 6), (4, 2), (0, 0))  # P and m of four clients; the last has no prompt


def clients(family: str) -> list[dict[str, Tensor]]:
    specs: list[AdapterSpec] = [InstancePrompt(p, m) if p else HeadOnly() for p, m in SIZES]
    return [drawn(tiny.model(family, spec), tiny.place(i)) for i, spec in enumerate(specs)]


def generated(model: HFModel, params: Params, data: Examples, index: int) -> Tensor | None:
    """(P, d) the prompt of one row."""
    if "prompt.up.weight" not in params:
        return None
    sentence = plain(model.base.module, *row(data, index), None).mean(dim=0)
    low = F.gelu(params["prompt.down.weight"] @ sentence + params["prompt.down.bias"])
    return (params["prompt.up.weight"] @ low + params["prompt.up.bias"]).view(-1, tiny.WIDTH)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_arithmetic_gives_the_same(family: str) -> None:
    model = tiny.model(family, InstancePrompt(3, 4))
    data = tiny.examples(tiny.place(5), 6, segments=family == "bert")
    own = clients(family)
    for (c, r), got in hidden(model, own, data).items():
        expected = plain(model.base.module, *row(data, r), generated(model, own[c], data, r))
        assert torch.allclose(got, expected, atol=10 * tolerance(family)), (c, r)


def test_the_sentence_vector_is_that_of_the_bare_base() -> None:
    """A change of the base acts in the pass with the prompt and not in the one before it; afterwards it acts again."""
    model = tiny.model("bert", InstancePrompt(3, 4))
    params = clients("bert")[0]
    change = torch.from_numpy(tiny.place().normal(0, 0.3, size=(tiny.WIDTH, tiny.WIDTH)))
    data = tiny.examples(tiny.place(5), 4)
    changed = copy.deepcopy(model.base.module)
    changed.encoder.layer[1].attention.self.query.weight.data += change
    for (_, r), got in hidden(model, [{**params, "delta.block.1.query.dense": change}], data).items():
        expected = plain(changed, *row(data, r), generated(model, params, data, r))
        assert torch.allclose(got, expected, atol=1e-9)


def test_the_sentence_vector_is_not_differentiated() -> None:
    model = tiny.model("bert", InstancePrompt(3, 4))
    inputs: list[bool] = []
    handle = model.base.module.encoder.layer[2].register_forward_pre_hook(
        lambda m, args: inputs.append(args[0].requires_grad)
    )
    try:
        model.fit(Fit(clients("bert")[0], tiny.examples(tiny.place(), 3), [[0, 1, 2]], SGD(0.1)))
    finally:
        handle.remove()
    passes = len(inputs) // 2
    assert inputs == [False, True] * passes and passes > 0
    assert model.base.acting.virtual is None


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("features", "budget"), [((), 2048), (("clip", "mask", "prox"), 13)])
def test_fit_many_equals_fit(family: str, features: tuple[str, ...], budget: int) -> None:
    model = HFModel(tiny.base(family), InstancePrompt(3, 4), 3, budget)
    for optimizer in OPTIMIZERS.values():
        made = fits(clients(family), optimizer, tiny.place(), family == "bert")
        for feature in features:
            made = FEATURES[feature](made, model, tiny.place())
        assert_close(together(model, made), alone(model, made), 1e-9)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_gradient_reaches_every_number(family: str) -> None:
    model = tiny.model(family, InstancePrompt(3, 4))
    params = drawn(model, tiny.place())
    fitted = model.fit(Fit(params, tiny.examples(tiny.place(), 8), [list(range(8))], SGD(0.1)))
    for name, t in params.items():
        assert bool((fitted.params[name] != t).all()), name


def test_start_and_costs() -> None:
    model = tiny.model("bert", InstancePrompt(3, 4))
    params = model.init(tiny.place())
    assert params["prompt.up.weight"].shape == (3 * tiny.WIDTH, 4)
    assert float(params["prompt.up.weight"].std()) == pytest.approx(0.02, rel=0.1)
    assert not params["prompt.down.bias"].any() and not params["prompt.up.bias"].any()
    assert model.adapter.context(params) == (3.0, 0.0)
    assert model.adapter.context({}) == (0.0, 0.0)
    assert model.lowest_block(params) == 0


def test_what_is_refused() -> None:
    for spec, name in ((InstancePrompt(0), "length"), (InstancePrompt(5, 0), "size")):
        with pytest.raises(ModelError, match=rf"adapter\.{name} is 0; it must be at least 1"):
            build_adapter(spec, tiny.base("bert"))
    model = tiny.model("bert", InstancePrompt(3, 4))
    params = drawn(model, tiny.place())
    fit = Fit(params, tiny.examples(tiny.place(), 3), [[0, 1]], SGD(0.1))
    odd = {"prompt.up.weight": torch.zeros(33, 4).double(), "prompt.up.bias": torch.zeros(33).double()}
    with pytest.raises(Exception, match="33 numbers, which are no whole embeddings of 32 each"):
        model.fit(replace(fit, params={**params, **odd}))
    with pytest.raises(Exception, match="do not fit together"):
        model.fit(replace(fit, params={**params, "prompt.up.weight": torch.zeros(96, 5).double()}))
    with pytest.raises(FitError, match="without its partner"):
        model.fit(replace(fit, params=tree.select(params, lambda name: name != "prompt.up.bias")))
