"""OPT's blocks keep rows and tokens apart, and compute what transformers' own compute."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers.models.opt.modeling_opt import OPTDecoderLayer

import tiny
from fedpeft.core.errors import ModelError
from fedpeft.models.load import freeze
from fedpeft.models.opt import keep_rows_apart, stock_blocks


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("padded", ["left", "right", None])
def test_states_are_those_of_transformers(before: bool, padded: str | None) -> None:
    """Both places of the norm (350m has it behind), any padding, in training mode too."""
    config = tiny.config("opt")
    config.do_layer_norm_before = before
    with torch.random.fork_rng():
        torch.manual_seed(1)
        stock = transformers.AutoModel.from_config(config).double().eval()
    ours = copy.deepcopy(stock)
    keep_rows_apart(ours)
    ids = torch.randint(5, tiny.VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, slice(0, 3) if padded == "left" else slice(4, 7)] = 0
    with torch.no_grad():
        for train in (False, True):
            expected = stock.train(train)(input_ids=ids, attention_mask=mask).last_hidden_state
            found = ours.train(train)(input_ids=ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-12)


def test_a_model_whose_states_are_projected_to_another_width_is_refused() -> None:
    """As opt-350m's are; the head would meet them with a matrix of another shape."""
    config = tiny.config("opt")
    config.word_embed_proj_dim, config.do_layer_norm_before = config.hidden_size // 2, False
    with pytest.raises(ModelError, match="two widths, such as opt-350m, cannot be used"):
        freeze(transformers.AutoModel.from_config(config), None, "own", tiny.CPU)


def test_dropout_is_that_of_transformers() -> None:
    config = tiny.config("opt")
    config.dropout = 0.4
    stock = transformers.AutoModel.from_config(config).double().train()
    ours = copy.deepcopy(stock)
    keep_rows_apart(ours)
    ids = torch.arange(5, 17).view(2, 6)
    states = []
    for module in (stock, ours):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            states.append(module(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-12)
    assert not torch.allclose(stock.eval()(input_ids=ids).last_hidden_state, states[0])


def test_modules_of_the_feed_forward_part_see_rows() -> None:
    module = freeze(tiny.module("opt"), None, "own", tiny.CPU).module
    shapes = {}
    for name in ("fc1", "fc2"):
        module.get_submodule(f"decoder.layers.1.{name}").register_forward_hook(
            lambda _, args, out, name=name: shapes.update({name: (tuple(args[0].shape), tuple(out.shape))})
        )
    module(input_ids=torch.arange(5, 17).view(2, 6))
    assert shapes == {"fc1": ((2, 6, 32), (2, 6, 48)), "fc2": ((2, 6, 48), (2, 6, 32))}


def test_a_copy_has_transformers_own_blocks_and_another_precision_has_ours() -> None:
    base = freeze(tiny.module("opt"), None, "own", tiny.CPU)
    copied = base.copy_module(torch.float32)
    assert {type(block) for block in copied.decoder.layers} == {OPTDecoderLayer}
    for of in (base, base.at("float32")):
        assert all(type(block) is not OPTDecoderLayer for block in of.module.decoder.layers)
    stock_blocks(base.module)
    assert {type(block) for block in base.module.decoder.layers} == {OPTDecoderLayer}
