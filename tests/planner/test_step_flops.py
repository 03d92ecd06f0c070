"""Operations of one step: golden values, torch's own counter, and what must hold of any step."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

import small_models
from fedpeft.core.errors import ModelError
from fedpeft.planner.cost import Step, Weight, first_input, shape_of, step_flops, update_bytes, weights

# A Llama of two blocks, d 8, f 16, two heads, 32 tokens in its vocabulary; LoRA of rank 2 on query and value.
LLAMA = shape_of(
    {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16,
     "num_attention_heads": 2, "vocab_size": 32, "tie_word_embeddings": False}, lm_head=True
)  # fmt: skip
BOTH = {w.name: 2 for w in weights(LLAMA, ("query", "value"))}
UPPER = {name: r for name, r in BOTH.items() if name.startswith("block.1")}


def test_by_hand():
    """One row of 4 tokens. The matrices of a block have 4 * 8 * 8 + 3 * 8 * 16 = 640 numbers.

    Forward: 2 * 4 * 2 * 640 = 10,240; attention 4 * 4 * 4 * 8 * 2 = 1,024; head 2 * 4 * 32 * 8 = 2,048; four adapters
    of 2 * 4 * 2 * 16 = 256. Backward: head 2,048; block 1: 5,120 + 1,024 + 2 * 512; block 0: 5,120 less the 1,536 of
    query, key and value, 1,024, and 2 * (512 - 128).
    """
    step = Step(1, 4, BOTH)
    assert (step_flops(LLAMA, step).forward, step_flops(LLAMA, step).backward) == (14_336, 14_592)
    upper = step_flops(LLAMA, Step(1, 4, UPPER))
    assert (upper.forward, upper.backward, upper.total) == (13_824, 7_424, 21_248)
    again = step_flops(LLAMA, replace(step, checkpointing=True))
    assert again.backward == 14_592 + 14_336 - 2_048  # all but the head once more


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt", "opt, norms behind"])
@pytest.mark.parametrize("language_model", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equal_to_torch(family: str, language_model: bool, seed: int):
    case = small_models.draw(family, language_model, random.Random(f"{family}{language_model}{seed}"), eager=True)
    case.fit()  # what is made once
    with FlopCounterMode(display=False) as counter:
        case.fit()
    assert counter.get_total_flops() == step_flops(case.shape, case.step).total, case


def test_bounds_and_parts():
    step = Step(2, 8, UPPER, frozen=BOTH)
    flops = [step_flops(LLAMA, replace(step, depth=depth)).backward for depth in (0, 1)]
    assert flops[0] > flops[1] > step_flops(LLAMA, step).backward
    head = step_flops(LLAMA, Step(2, 8, {}, classes=3))
    assert head.backward == 2 * 2 * 8 * 3  # the gradient of its weights alone: nothing below is trained
    assert first_input(LLAMA, Step(1, 1, {"block.1.down": 4, "block.1.up": 1})) == (1, 2)
    assert first_input(LLAMA, Step(1, 1, {"block.1.down": 0})) == (2, -1)


def test_bytes_of_updates():
    """LLaMA2-7B, query and value at rank 8: 4,194,304 numbers; GPT-2's fused matrix at rank 4: 147,456."""
    shape = shape_of({"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008,
                      "num_attention_heads": 32, "vocab_size": 32000})  # fmt: skip
    adapted = weights(shape, ("query", "value"))
    assert update_bytes(adapted, {w.name: 8 for w in adapted}) == 4 * 4_194_304
    fused = [Weight(f"block.{b}.attention", b, "attention", 768, 3 * 768) for b in range(12)]
    assert update_bytes(fused, {w.name: 4 for w in fused}, head_numbers=10) == 4 * (147_456 + 10)
    assert update_bytes(adapted, {"block.3.query": 2}) == 4 * 2 * 8192


def test_names():
    assert [w.kind for w in weights(LLAMA, ("down", "query"))] == ["query", "down", "query", "down"]
    grouped = replace(LLAMA, kv_heads=1)
    assert {(w.kind, w.d_in, w.d_out) for w in weights(grouped, ("query", "key"))} == {("query", 8, 8), ("key", 8, 4)}
    gpt2 = shape_of({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 9})
    with pytest.raises(ModelError, match="no weights of kind 'gate'; it has query, key, value, output, up, down"):
        weights(gpt2, ("query", "gate"))
    for name in ("block.1.query", "block.0.gate", "head.weight"):
        with pytest.raises(ModelError, match=f"no weight {name!r}; it has block.0.query to block.0.down"):
            step_flops(gpt2, Step(1, 1, {name: 2}))
    with pytest.raises(ModelError, match="depth is 1, but a weight of block 0 is trained"):
        step_flops(LLAMA, Step(1, 1, BOTH, depth=1))
    with pytest.raises(ModelError, match="depth is 3; the model has blocks 0 to 1"):
        step_flops(LLAMA, Step(1, 1, UPPER, depth=3))
