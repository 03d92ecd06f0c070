"""What proxy-tuning costs: torch's own count of operations, tensors that are there, and sums that fit on paper."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import small_models
import tiny
from fedpeft.core import tree
from fedpeft.core.adapter import Lora
from fedpeft.core.errors import ModelError
from fedpeft.models.families import KINDS
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import lm_head_of
from fedpeft.models.load import freeze
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.models.sessions import Speaker
from fedpeft.planner.cost import Step, all_weights, shape_of, step_flops
from fedpeft.planner.proxy_costs import (
    Bill,
    Model,
    Texts,
    Work,
    bill_of_direct,
    bill_of_proxy,
    break_even_tokens,
)

FAMILIES = ("gpt2", "llama")


def spoken(family: str, tied: bool = True, **sizes: Any) -> Any:
    """A language model of transformers that attends by products which torch counts."""
    config = small_models.config_of(family, eager=True, **sizes)
    config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def planned(full: Any, rank: int = 0) -> Model:
    shape = shape_of(full.config.to_dict(), lm_head=True)
    return Model(shape, {w.name: rank for w in all_weights(shape)} if rank else {})


def tuned(full: Any, rank: int) -> HFModel:
    """The same model with LoRA on all of its matrices."""
    base = freeze(copy.deepcopy(full.base_model), None, "spoken", tiny.CPU)
    kinds = [kind for kind in KINDS if kind != "gate" or base.family == "llama"]
    return HFModel(base, Lora(rank=rank, targets=tuple(kinds)), 0, 2048, GenerateReadout(lm_head_of(full, base)))


# --- operations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prompt", "tokens"), [(7, 5), (1, 1), (1, 6)])
def test_an_answer_costs_what_torch_counts(family: str, prompt: int, tokens: int) -> None:
    full = spoken(family)
    ids, cache = torch.arange(5, 5 + prompt)[None], transformers.DynamicCache(config=full.config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        new = ids
        for _ in range(tokens):
            logits = full(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            new = logits[:, -1].argmax(dim=-1, keepdim=True)
    assert planned(full).answer(prompt, tokens) == counter.get_total_flops()
    read = prompt + tokens - 1
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert planned(full).cache_bytes(read) == held


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_in_use_is_counted(family: str) -> None:
    """By the speaker that decodes, with LoRA of rank 3 on every matrix."""
    full = spoken(family)
    model = tuned(full, 3)
    params = model.init(tiny.place())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        session = Speaker(model, params).open([[5, 6, 7, 8]])
        for token in (9, 10):
            session.logits([[token]])
        session.close()
    plan = planned(full, 3)
    assert plan.answer(4, 3, adapted=True) == counter.get_total_flops()
    assert plan.answer(4, 3, adapted=True) - plan.answer(4, 3) == 2 * 6 * tree.count(params)
    assert plan.adapter_numbers == tree.count(params)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_costs_what_torch_counts(family: str) -> None:
    full = spoken(family)
    ids = torch.arange(5, 5 + 24).view(2, 12)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        full(input_ids=ids, use_cache=False)
    assert planned(full).read(Texts(24, 2 * 144)) == counter.get_total_flops()
    some = planned(full).read(Texts(24, 2 * 144, share=0.25))
    assert planned(full).read(Texts(24, 2 * 144)) - some == 18 * 2 * 32 * 60, "a quarter of the tokens sees the head"
    more = planned(full, 2)
    assert more.read(Texts(24, 288), adapted=True) - more.read(Texts(24, 288)) == 2 * 24 * more.adapter_numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_planners_step_but_for_the_lowest_block(family: str) -> None:
    """`step_flops` equals torch's count; here rows may have any length, so the end of the backward pass is rounded."""
    plan = planned(spoken(family, layers=6), 4)
    rows, tokens = 3, 20
    exact = step_flops(plan.shape, Step(rows, tokens, plan.ranks)).total
    assert plan.train(Texts(rows * tokens, rows * tokens**2)) == pytest.approx(exact, rel=0.02)
    case = small_models.build(family, dict(plan.ranks), rows=rows, tokens=tokens, eager=True, layers=6)
    with FlopCounterMode(display=False) as counter:
        case.fit()
    assert plan.train(Texts(rows * tokens, rows * tokens**2)) == pytest.approx(counter.get_total_flops(), rel=0.1)


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_model_has_the_bytes_of_its_tensors(family: str, tied: bool) -> None:
    full = spoken(family, tied)
    assert planned(full).weight_bytes == sum(p.numel() * 4 for p in full.parameters())
    half = replace(planned(full), base="bfloat16", compute="bfloat16")
    assert half.weight_bytes == planned(full).weight_bytes // 2
    assert half.cache_bytes(10) == planned(full).cache_bytes(10) // 2


# --- bills ----------------------------------------------------------------------------------------------------------

SMALL, LARGE = planned(spoken("llama"), 2), planned(spoken("llama", d=64, layers=6, f=96), 2)
WORK = Work(3, 12, Texts(900, 27_000, 0.5), rows=4, longest=32, prompt=10, answer=6)


def test_both_bills_of_a_run_without_distillation() -> None:
    proxy, direct = bill_of_proxy(SMALL, LARGE, WORK, 1000), bill_of_direct(LARGE, WORK, 4000)
    assert (proxy.once_bytes, direct.once_bytes) == (SMALL.weight_bytes, LARGE.weight_bytes)
    assert (proxy.adapter_bytes, direct.adapter_bytes) == (1000, 4000)
    assert (proxy.client_flops, direct.client_flops) == (SMALL.train(WORK.trained), LARGE.train(WORK.trained))
    assert proxy.server_flops == direct.server_flops == 0 and proxy.client_memory_bytes < direct.client_memory_bytes
    assert direct.token_flops == LARGE.answer(10, 6) / 6
    own = SMALL.answer(10, 6, adapted=True) + SMALL.answer(10, 6)
    assert proxy.token_flops == (LARGE.answer(10, 6) + own) / 6
    held = LARGE.weight_bytes + LARGE.cache_bytes(15)
    assert direct.serving_bytes == held
    added = SMALL.weight_bytes + 4 * SMALL.adapter_numbers + 2 * SMALL.cache_bytes(15)
    assert proxy.serving_bytes == held + added


def test_the_server_pays_for_alpha_and_distillation() -> None:
    """L reads each text once whatever the rounds; T and B read validation texts at each choice, and public ones."""
    seen, public = Texts(50, 500, 0.2), Texts(80, 1600, 0.3)
    work = replace(WORK, validation=seen, choices=3)
    chosen = LARGE.read(seen) + 3 * (SMALL.read(seen) + SMALL.read(seen, adapted=True))
    assert bill_of_proxy(SMALL, LARGE, work, 0).server_flops == chosen
    work = replace(work, public=public, distilled=2, distil_epochs=5)
    round_ = SMALL.read(public) + SMALL.read(public, adapted=True) + 5 * SMALL.train(public)
    expected = chosen + LARGE.read(public) + 2 * round_
    found = bill_of_proxy(SMALL, LARGE, work, 0)
    assert found.server_flops == expected and found.training_flops == expected + found.client_flops
    assert bill_of_proxy(SMALL, LARGE, replace(work, choices=0, distilled=0), 0).server_flops == 0


def test_break_even_by_hand() -> None:
    """Training saves 1000 - (300 + 100) = 600 operations, a token costs 23 instead of 20: spent after 200 tokens."""
    proxy, direct = Bill(0, 0, 0, 300, 100, 23.0, 0), Bill(0, 0, 0, 1000, 0, 20.0, 0)
    assert break_even_tokens(proxy, direct) == 200
    assert break_even_tokens(replace(proxy, server_flops=700), direct) is None, "nothing was saved"


def test_examples_of_the_specification() -> None:
    """Section 8: decoding 13B + 7B 2.04 times L, 13B + 1.1B 1.17; 7B in 2 bytes 13.5 GB, 13B 26.0 GB."""

    def llama(layers: int, hidden: int, inner: int, heads: int, kv: int) -> Model:
        config = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden,
                  "num_attention_heads": heads, "num_key_value_heads": kv,
                  "intermediate_size": inner, "vocab_size": 32000}  # fmt: skip
        return Model(shape_of(config, lm_head=True), {}, "bfloat16", "bfloat16")

    one, seven, thirteen = (
        llama(22, 2048, 5632, 32, 4), llama(32, 4096, 11008, 32, 32), llama(40, 5120, 13824, 40, 40)
    )  # fmt: skip
    for small, ratio in ((seven, 2.04), (one, 1.17)):
        proxy, direct = bill_of_proxy(small, thirteen, WORK, 0), bill_of_direct(thirteen, WORK, 0)
        assert proxy.token_flops / direct.token_flops == pytest.approx(ratio, abs=0.02)
    assert (seven.weight_bytes / 1e9, thirteen.weight_bytes / 1e9) == pytest.approx((13.5, 26.0), abs=0.05)


def test_an_answer_needs_tokens() -> None:
    for prompt, tokens in ((0, 3), (3, 0)):
        with pytest.raises(ModelError, match=f"an answer of {tokens} tokens to a prompt of {prompt}"):
            SMALL.answer(prompt, tokens)
