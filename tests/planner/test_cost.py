"""Counted operations against torch's own counter on real models, and against sums made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedpeft.core.errors import ModelError
from fedpeft.planner.configuration import most_tokens
from fedpeft.planner.cost import forward_flops, shape_of, train_flops

ROWS, LENGTH = 3, 24


def build(name):
    import transformers as t

    if name == "bert":
        config = t.BertConfig(
            vocab_size=50, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=160,
            attn_implementation="eager",
        )  # fmt: skip
        model = t.BertModel(config, add_pooling_layer=False)
        return model, [(b.attention.self.query.bias, b.attention.self.value.bias) for b in model.encoder.layer]
    if name == "gpt2":
        config = t.GPT2Config(vocab_size=50, n_embd=48, n_layer=4, n_head=4, attn_implementation="eager")
        model = t.GPT2Model(config)
        return model, [(b.attn.c_attn.bias,) for b in model.h]
    config = t.LlamaConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, intermediate_size=160, attention_bias=True, attn_implementation="eager",
    )  # fmt: skip
    if name == "llama-lm":
        model = t.LlamaForCausalLM(config)
        return model, [(b.self_attn.q_proj.bias, b.self_attn.v_proj.bias) for b in model.model.layers]
    model = t.LlamaModel(config)
    return model, [(b.self_attn.q_proj.bias, b.self_attn.v_proj.bias) for b in model.layers]


def measured(model, train):
    """Operations that torch counts; the loss weighs all outputs, so that every position has a gradient."""
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 50
    with FlopCounterMode(display=False) as counter:
        outputs = model(input_ids=ids)
        outputs = outputs.logits if "logits" in outputs else outputs.last_hidden_state
        if train:
            outputs.square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "llama-lm"])
@pytest.mark.parametrize("lowest", [0, 2, 3])
def test_within_five_percent_of_torch(name, lowest):
    model, biases = build(name)
    model.requires_grad_(False)
    for block in biases[lowest:]:  # an adapter on query and value that costs nothing itself
        for bias in block:
            bias.requires_grad_(True)
    shape = shape_of(model.config.to_dict(), lm_head=name == "llama-lm")
    tokens, pairs = ROWS * LENGTH, ROWS * LENGTH**2
    assert forward_flops(shape, tokens, pairs) == pytest.approx(measured(model, train=False), rel=0.05)
    assert train_flops(shape, tokens, pairs, lowest) == pytest.approx(measured(model, train=True), rel=0.05)


def test_by_hand():
    """One block of width 4, two heads, feed-forward width 6, not gated; 5 tokens in rows of 2 and 3: 13 pairs.

    Query, key, value: 3 * 2*4*4 = 96 a token. Output projection: 32; feed-forward 2 * 2*4*6 = 96; together 128.
    Attention: two products of width 4 a pair, 2*2*4 = 16. Forward: 5 * 224 + 13 * 16 = 1328.
    Backward in the only block: 5 * 128 + 13 * 32 = 1056, since nothing below query, key and value asks for it.
    With two blocks and the upper one adapted: forward 2656, backward 1056; the lower one adapted: twice 1056, and
    5 * 96 for leaving the upper block.
    """
    config = {"hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 6, "vocab_size": 9}
    one, two = (shape_of(config | {"num_hidden_layers": n}) for n in (1, 2))
    assert forward_flops(one, 5, 13) == 1328
    assert train_flops(one, 5, 13) == 1328 + 1056
    assert train_flops(two, 5, 13, lowest_block=1) == 2656 + 1056
    assert train_flops(two, 5, 13, lowest_block=0) == 2656 + 2 * 1056 + 480
    assert train_flops(two, 5, 13, lowest_block=2) == 2656  # only the classification head is trained


def test_shapes_of_families():
    llama = shape_of(
        {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8,
         "num_key_value_heads": 2, "intermediate_size": 100, "vocab_size": 10}
    )  # fmt: skip
    assert (llama.family, llama.kv_heads, llama.head_size, llama.mlp_matrices) == ("llama", 2, 8, 3)
    gpt2 = shape_of({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 8, "n_inner": None, "vocab_size": 10})
    assert (gpt2.family, gpt2.intermediate, gpt2.mlp_matrices) == ("gpt2", 256, 2)
    distil = shape_of({"model_type": "distilbert", "n_layers": 2, "dim": 64, "n_heads": 8, "hidden_dim": 99,
                       "vocab_size": 10})  # fmt: skip
    assert (distil.family, distil.hidden, distil.intermediate) == ("generic", 64, 99)


def test_how_many_tokens_a_model_was_made_for():
    """RoBERTa counts positions from the one behind the padding's."""
    assert most_tokens({"model_type": "bert", "max_position_embeddings": 512}) == 512
    assert most_tokens({"model_type": "gpt2", "n_positions": 1024}) == 1024
    assert most_tokens({"model_type": "camembert", "max_position_embeddings": 514}) == 512
    assert most_tokens({"model_type": "roberta", "max_position_embeddings": 40, "pad_token_id": 3}) == 36
    assert most_tokens({"model_type": "t5"}) is None


def test_what_cannot_be_counted_says_why():
    with pytest.raises(ModelError, match="none of num_hidden_layers, n_layer"):
        shape_of({"hidden_size": 4})
    with pytest.raises(ModelError, match="hidden_size: 0; it must be a positive whole number"):
        shape_of({"num_hidden_layers": 1, "hidden_size": 0})
    shape = shape_of({"num_hidden_layers": 2, "hidden_size": 4, "num_attention_heads": 2, "vocab_size": 9})
    with pytest.raises(ModelError, match="block 3 does not exist"):
        train_flops(shape, 1, 1, lowest_block=3)


def test_head_of_the_language_model_counts_for_the_tokens_that_enter_it():
    """2 rows of 10 tokens with one mask each: two products of the projection forward, two backward."""
    config = {"num_hidden_layers": 2, "hidden_size": 4, "num_attention_heads": 2, "vocab_size": 50}
    bare, whole = shape_of(config), shape_of(config, lm_head=True)
    masked = replace(whole, lm_share=1 / 10)
    for count, passes in ((forward_flops, 1), (train_flops, 2)):
        assert count(masked, 20, 200) - count(bare, 20, 200) == passes * 2 * (2 * 4 * 50)
        assert count(whole, 20, 200) - count(bare, 20, 200) == passes * 20 * (2 * 4 * 50)
    assert train_flops(masked, 20, 200, 2) - train_flops(bare, 20, 200, 2) == 2 * (2 * 4 * 50)  # nothing goes back
