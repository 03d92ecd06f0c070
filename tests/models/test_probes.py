"""Hidden states against transformers' own, Hessian-vector products against differences of gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from fedpeft.core.adapter import HeadOnly, Lora
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.fit import SGD, Fit
from fedpeft.core.tree import Params
from fedpeft.models.hf import HFModel


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
@pytest.mark.parametrize("budget", [2048, 20])
def test_hidden_states_are_those_of_the_blocks(family: str, budget: int) -> None:
    model = tiny.model(family, budget=budget)
    data = tiny.examples(tiny.place(1), 7, segments=family == "bert")
    rows = [5, 0, 3, 3]
    got = model.hidden(None, data, rows)
    batch = tiny.padded(data.take(rows), 1)
    with torch.no_grad():
        every = model.base.module(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"][:, :, None]
    assert got.shape == (tiny.BLOCKS, 4, batch["input_ids"].shape[1], tiny.WIDTH)
    for block in range(tiny.BLOCKS - 1):
        assert torch.allclose(got[block], (every[block + 1] * mask).float(), atol=1e-6)
    norm = {"gpt2": "ln_f", "llama": "norm", "opt": "decoder.final_layer_norm"}.get(family)
    last = got[-1].double()
    with torch.no_grad():  # transformers gives the last state after the final norm, where there is one
        last = model.base.module.get_submodule(norm)(last) if norm else last
    assert torch.allclose(last * mask, every[-1] * mask, atol=1e-5)
    assert not got[:, batch["attention_mask"] == 0].any()


def test_an_adapter_changes_the_states_above_it() -> None:
    model = tiny.model("bert", Lora(rank=4, alpha=6.0, blocks=(1,)))
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 3)
    base, adapted = model.hidden(None, data, [0, 1]), model.hidden(params, data, [0, 1])
    assert torch.equal(base[0], adapted[0]) and not torch.allclose(base[1], adapted[1], atol=1e-3)


def test_states_of_an_unknown_family_are_refused() -> None:
    base = tiny.freeze(tiny.module("distilbert"), None, "own", tiny.CPU)
    model, data = HFModel(base, HeadOnly(), 3), tiny.examples(tiny.place(), 2)
    with pytest.raises(ModelError, match="family 'distilbert' are not known"):
        model.hidden(None, data, [0])


def gradient(model: HFModel, params: Params, data: object, rows: list[int]) -> dict[str, Tensor]:
    """By one step of SGD at rate 1."""
    fitted = model.fit(Fit(params, data, [rows], SGD(1.0)))  # type: ignore[arg-type]
    return {name: params[name] - fitted.params[name] for name in params}


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
def test_products_are_differences_of_gradients(family: str) -> None:
    """H v = (g(w + h v) - g(w - h v)) / 2 h in float64, rows of many lengths in several parts."""
    model = tiny.model(family, budget=30)
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 9)
    rows, step = [0, 2, 3, 5, 8], 2e-4 if family == "llama" else 1e-5  # its norms compute in float32
    rng = tiny.place(2)
    product = model.hessian(params, data, rows)
    for _ in range(2):
        v = {name: torch.from_numpy(rng.normal(size=t.shape)) for name, t in params.items()}
        up, down = (gradient(model, {n: t + s * step * v[n] for n, t in params.items()}, data, rows) for s in (1, -1))
        got = product(v)
        for name in params:
            expected = (up[name] - down[name]) / (2 * step)
            assert (got[name] - expected).norm() <= 1e-3 * expected.norm() + 1e-9
        assert max(float(t.abs().max()) for t in got.values()) > 1e-3


def test_a_product_over_some_parameters_is_a_block_of_the_whole() -> None:
    model = tiny.model("bert")
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 5)
    some = [name for name in params if name.startswith("block.1.")]
    v = {name: torch.from_numpy(tiny.place(3).normal(size=params[name].shape)) for name in some}
    whole = model.hessian(params, data, [0, 1, 2])(
        v | {n: torch.zeros_like(t) for n, t in params.items() if n not in v}
    )
    part = model.hessian(params, data, [0, 1, 2], some)(v)
    assert part.keys() == set(some)
    assert all(torch.allclose(part[name], whole[name], atol=1e-12) for name in some)


def test_a_hessian_over_what_is_not_there_is_refused() -> None:
    model = tiny.model("bert")
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 5)
    with pytest.raises(FitError, match="was asked, which is not among the parameters"):
        model.hessian(params, data, [0], ["prefix.9"])
    with pytest.raises(FitError, match="row 7"):
        model.hessian(params, data, [7])
    assert np.isfinite(float(model.hessian(params, data, [0])(params)["head.bias"].sum()))


def test_probes_take_a_narrow_base_in_float32() -> None:
    """States and products of a bfloat16 base are those of the same weights in float32."""
    narrow = tiny.model("bert", dtype="bfloat16")
    exact = HFModel(tiny.freeze(narrow.base.copy_module(torch.float32), None, "exact", tiny.CPU), narrow.spec, 3)
    params, data = tiny.params(exact, tiny.place()), tiny.examples(tiny.place(1), 5)
    params = {name: t.float() for name, t in params.items()}
    assert torch.equal(narrow.hidden(params, data, [0, 2]), exact.hidden(params, data, [0, 2]))
    ones = {name: torch.ones_like(t) for name, t in params.items()}
    got, wanted = (model.hessian(params, data, [0, 2])(ones) for model in (narrow, exact))
    assert all(torch.equal(got[name], t) for name, t in wanted.items())
