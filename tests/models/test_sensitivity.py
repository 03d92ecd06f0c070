"""How blocks answer a perturbation of the embeddings, against transformers' own states and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import tiny
from fedpeft.core.adapter import HeadOnly, Lora, Prompt
from fedpeft.core.errors import ModelError
from fedpeft.core.examples import Examples
from fedpeft.models.hf import HFModel
from fedpeft.models.sensitivity import perturbed


def test_the_three_perturbations() -> None:
    """Golden: ∇ = (3, 4) and gamma m = .5 give (.3, .4); a padded token gets nothing and counts for nothing."""
    e = torch.tensor([[[0.0, 1.0], [9.0, 9.0]]])
    gradient, mask = torch.tensor([[[3.0, -4.0], [7.0, 7.0]]]), torch.tensor([[[True], [False]]])
    got = perturbed(e, gradient, mask, "l2", 0.5, None)
    assert got.flatten().tolist() == pytest.approx([0.3, -0.4, 0, 0])
    signs = perturbed(e, gradient, mask, "inf", 0.5, None)
    assert signs[0, 0].tolist() == pytest.approx([0.5 / 2**0.5, -0.5 / 2**0.5]) and not signs[0, 1].any()
    noise = torch.tensor([[[0.0, 2.0], [1.0, 1.0]]])
    assert perturbed(e, gradient, mask, "random", 0.5, noise)[0].tolist() == [[0.0, 0.5], [0.0, 0.0]]
    assert not perturbed(e, gradient * 0, mask, "l2", 0.5, None).any()


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
@pytest.mark.parametrize("kind", ["l2", "inf"])
def test_changes_are_those_of_transformers_own_states(family: str, kind: Any) -> None:
    """Row by row, with embeddings given to the transformer and the gradient of the head's loss by autograd."""
    model = tiny.model(family, HeadOnly())
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 5)
    got = model.sensitivity(params, data, [4, 0, 2], kind, 0.02, tiny.place())
    for column, row in enumerate([4, 0, 2]):
        changes, sizes = by_hand(model, params, data, row, kind)
        torch.testing.assert_close(got[0][:, column], changes, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got[1][:, column], sizes, rtol=1e-5, atol=1e-6)
    assert got[0].shape == (tiny.BLOCKS + 1, 3)


def by_hand(model: HFModel, params: dict[str, Tensor], data: Examples, row: int, kind: str) -> tuple[Tensor, Tensor]:
    body = model.base.module
    e = body.get_input_embeddings()(torch.from_numpy(data.tokens[row]).long()[None]).detach().requires_grad_()
    out = body(inputs_embeds=e, output_hidden_states=True)
    pooled = out.last_hidden_state[0, -1] if model.pooling == "last" else out.last_hidden_state[0].mean(dim=0)
    logits = params["head.weight"] @ pooled + params["head.bias"]
    (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits[None], torch.tensor([data.labels[row]])), e)
    length = 0.02 * e[0].norm(dim=1).mean()
    change = length * (g / g.norm() if kind == "l2" else g.sign() / e.numel() ** 0.5)
    states = []
    for inputs in (e.detach(), e.detach() + change):
        found: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda m, a, o, found=found: found.append(o[0] if isinstance(o, tuple) else o))
            for block in blocks_of(body)
        ]
        with torch.no_grad():
            first = body(inputs_embeds=inputs, output_hidden_states=True).hidden_states[0]
        for hook in hooks:
            hook.remove()
        states.append([first, *found])
    changes = torch.stack([(new - old).norm() for old, new in zip(*states, strict=True)])
    return changes.float(), torch.stack([old.norm() for old in states[0]]).float()


def blocks_of(body: Any) -> Any:
    if hasattr(body, "decoder"):
        return body.decoder.layers
    return body.encoder.layer if hasattr(body, "encoder") else body.h if hasattr(body, "h") else body.layers


@pytest.mark.parametrize("spec", [Lora(rank=2), Prompt(length=3)])
@pytest.mark.parametrize("kind", ["l2", "random"])
def test_company_and_padding_change_nothing(spec: Any, kind: Any) -> None:
    model, tight = (tiny.model("bert", spec, budget=budget) for budget in (2048, 20))
    params, data = model.init(tiny.place()), tiny.examples(tiny.place(1), 6)
    params = {name: t.double() for name, t in params.items()}
    whole = model.sensitivity(params, data, range(6), kind, 1e-2, tiny.place(3))
    cut = tight.sensitivity(params, data, range(6), kind, 1e-2, tiny.place(3))
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_an_unknown_family_is_refused() -> None:
    model = HFModel(tiny.freeze(tiny.module("distilbert"), None, "own", tiny.CPU), HeadOnly(), 3)
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(), 2)
    with pytest.raises(ModelError, match="family 'distilbert' are not known"):
        model.sensitivity(params, data, [0], "l2", 0.01, tiny.place())


@pytest.mark.parametrize("planted", [1, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_layer_is_found(planted: int, seed: int) -> None:
    """Value, attention output and feed-forward weights of one block of six times 6.

    Its own amplification is the largest by far; the plain change rises there and in all later blocks.
    """
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    body = transformers.AutoModel.from_config(config, add_pooling_layer=False)
    draw = np.random.default_rng(seed)
    data = Examples(tuple(draw.integers(5, 100, 16).astype(np.int32) for _ in range(16)), draw.integers(0, 3, 16))
    scores = []
    for planting in (False, True):
        if planting:
            layer = body.encoder.layer[planted]
            with torch.no_grad():
                for part in (layer.attention.self.value, layer.attention.output.dense, layer.intermediate.dense):
                    part.weight *= 6
                layer.output.dense.weight *= 6
        model = HFModel(tiny.freeze(body, None, "planted", tiny.CPU), HeadOnly(), 3)
        changes, sizes = model.sensitivity(model.init(tiny.place()), data, range(16), "l2", 1e-2, tiny.place())
        scores.append(((changes / sizes)[1:].mean(dim=1), (changes[1:] / changes[:-1]).mean(dim=1)))
    (plain, _), (output, amplification) = scores
    assert int(amplification.argmax()) == planted
    rest = torch.cat([amplification[:planted], amplification[planted + 1 :]])
    assert float(amplification[planted]) > 1.1 > 1.05 > float(rest.max())
    assert bool((output[planted:] > 1.05 * plain[planted:]).all())
    torch.testing.assert_close(output[:planted], plain[:planted], rtol=0.05, atol=0)
