"""The attention function with a prefix: against a plain loop, against the stock one, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tiny
from fedpeft.core.adapter import HeadOnly
from fedpeft.models import attention
from fedpeft.models.adapters import Prefixed
from fedpeft.models.families import FAMILIES, attention_paths, is_decoder, key_value_size, slots
from fedpeft.models.hf import HFModel
from fedpeft.models.load import freeze
from fedpeft.models.merge import merge

ATTEND = attention.with_prefixes(sdpa_attention_forward)
ROWS, KEY_HEADS, SIZE = 3, 2, 4


class Layer(nn.Module):
    """What the stock function reads of an attention module."""

    def __init__(self, causal: bool, groups: int) -> None:
        super().__init__()
        self.is_causal = causal
        self.num_key_value_groups = groups


def by_hand(query: Tensor, key: Tensor, value: Tensor, visible: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(rows, tokens, heads, size) softmax attention, one query at a time; visible is (rows, tokens, keys)."""
    q, k, v = query.numpy(), key.numpy(), value.numpy()
    rows, heads, tokens, size = q.shape
    found = np.zeros((rows, tokens, heads, size))
    for r, h, t in np.ndindex(rows, heads, tokens):
        own = h // (heads // k.shape[1])  # query heads of a group lie side by side
        keys = np.flatnonzero(visible[r, t])
        scores = k[r, own, keys] @ q[r, h, t] / math.sqrt(size)
        weights = np.exp(scores - scores.max())
        found[r, t, h] = weights @ v[r, own, keys] / weights.sum()
    return found


@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 5),
    cached=st.integers(0, 3),
    count=st.integers(1, 4),
    groups=st.sampled_from([1, 2]),
    causal=st.booleans(),
    mask=st.sampled_from(["none", "bool", "float"]),
    hidden=st.booleans(),
    shared=st.booleans(),
)
def test_a_prefix_equals_a_plain_loop(
    seed: int, tokens: int, cached: int, count: int, groups: int, causal: bool, mask: str, hidden: bool, shared: bool
) -> None:
    """Queries are the last `tokens` of all keys, the others are in a cache."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape))

    if mask == "none" and causal and tokens > 1:
        cached = 0  # otherwise transformers gives a mask
    keys = cached + tokens
    query, key, value = draw(ROWS, KEY_HEADS * groups, tokens, SIZE), *(draw(ROWS, KEY_HEADS, keys, SIZE) for _ in "kv")
    own = 1 if shared else ROWS
    seen = torch.from_numpy(rng.random((own, count)) < 0.5) if hidden else None
    prefix = Prefixed(draw(own, KEY_HEADS, count, SIZE), draw(own, KEY_HEADS, count, SIZE), seen)

    visible = np.ones((ROWS, tokens, keys), dtype=bool)
    if causal:
        visible &= np.arange(keys) <= np.arange(tokens)[:, None] + cached
    if mask != "none":  # padding to the right; the first key is always there
        visible &= (np.arange(keys) < rng.integers(1, keys + 1, size=(ROWS, 1)))[:, None]
    given_mask = torch.from_numpy(visible[:, None]) if mask != "none" else None
    if given_mask is not None and mask == "float":
        given_mask = torch.zeros(given_mask.shape, dtype=torch.float64).masked_fill(~given_mask, -math.inf)

    layer = Layer(causal, groups)
    got, _ = ATTEND(layer, query, key, value, given_mask, prefixes={layer: prefix}, dropout=0.0, scaling=SIZE**-0.5)
    shown = np.ones((ROWS, tokens, count), dtype=bool) if seen is None else np.broadcast_to(
        seen.numpy()[:, None], (ROWS, tokens, count)
    )  # fmt: skip
    whole = [torch.cat([p.expand(ROWS, -1, -1, -1), t], 2) for p, t in ((prefix.key, key), (prefix.value, value))]
    expected = by_hand(query, *whole, np.concatenate([shown, visible], axis=2))
    assert np.allclose(got.numpy(), expected, atol=1e-12)


def test_a_prefix_of_no_module_here_changes_nothing() -> None:
    layer, other = Layer(True, 1), Layer(True, 1)
    query, key, value = (torch.from_numpy(tiny.place(i).normal(size=(2, 2, 3, 4))) for i in range(3))
    prefix = Prefixed(key[:1, :, :1], value[:1, :, :1])
    expected, _ = sdpa_attention_forward(layer, query, key, value, None)
    assert torch.equal(ATTEND(layer, query, key, value, None, prefixes={other: prefix})[0], expected)
    assert not torch.equal(ATTEND(layer, query, key, value, None, prefixes={layer: prefix})[0], expected)

    def record(*positional: Any, **named: Any) -> tuple[Tensor, None]:
        assert all(a is b for a, b in zip(positional, (layer, query, key, value, None), strict=True))
        assert named == {"scaling": 0.5}, "nothing that the stock function does not know"
        return query, None

    recorded = attention.with_prefixes(record)
    for prefixes in (None, {}, {other: prefix}):
        assert recorded(layer, query, key, value, None, prefixes=prefixes, scaling=0.5)[0] is query


def test_keys_of_an_empty_static_cache_are_not_seen() -> None:
    """The stock function cuts keys beyond the queries where it hides what is to the right by itself."""
    layer = Layer(True, 1)
    query, key, value = (torch.from_numpy(tiny.place(i).normal(size=(2, 2, n, 4))) for i, n in enumerate((3, 5, 5)))
    prefix = {layer: Prefixed(key[:1, :, 4:], value[:1, :, 4:])}
    got, _ = ATTEND(layer, query, key, value, None, prefixes=prefix)
    assert torch.equal(got, ATTEND(layer, query, key[:, :, :3], value[:, :, :3], None, prefixes=prefix)[0])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_a_prefix_the_bits_are_those_of_the_stock_function(family: str, dtype: str) -> None:
    stock = tiny.module(family).to(getattr(torch, dtype)).eval()
    ours = freeze(copy.deepcopy(stock), None, "own", tiny.CPU).module
    assert (attention.installed(ours), attention.installed(stock)) == (True, False)
    data = tiny.examples(tiny.place(), 5)
    whole = {"input_ids": torch.arange(24).view(2, 12) + 5}
    with torch.no_grad():
        for batch in (tiny.padded(data, 1), whole, whole | {"attention_mask": torch.ones(2, 12, dtype=torch.int64)}):
            expected = stock(**batch).last_hidden_state
            assert torch.equal(ours(**batch).last_hidden_state, expected)
            assert torch.equal(ours(**batch, prefixes={}).last_hidden_state, expected)


def small(family: str) -> Any:
    """A transformer of two blocks; heads of their own size where the family has such."""
    own: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    if family == "gpt2":
        own = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60}
    elif family == "opt":
        own |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    elif is_decoder(family):
        own |= {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}
        own |= {"head_dim": 16} if family in ("gemma", "qwen3", "mistral") else {}
        own |= {"sliding_window": 3} if family == "mistral" else {}
    else:
        own |= {"intermediate_size": 48, "embedding_size": 32} if family == "electra" else {"intermediate_size": 48}
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **own)).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_known_family_takes_a_prefix(family: str) -> None:
    """Its size is that of the projections, every token of every row sees it, and none sees what is hidden."""
    module = freeze(small(family), None, "own", tiny.CPU).module
    heads, size = key_value_size(module.config)
    paths = attention_paths(module, family)
    projections = slots(module, family)
    assert [projections[f"block.{i}.key"].d_out for i in range(2)] == [heads * size] * 2
    batch = {"input_ids": torch.arange(14).view(2, 7) + 5, "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    batch["attention_mask"][1, 5:] = 0
    own = torch.from_numpy(tiny.place().normal(size=(2, 1, heads, 3, size)))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        before = module(**batch).last_hidden_state[real]
        for path in paths:
            where = module.get_submodule(path)
            moved = module(**batch, prefixes={where: Prefixed(own[0], own[1])}).last_hidden_state[real] - before
            assert (moved.abs().amax(dim=1) > 1e-6).all(), "also beyond a sliding window of three"
            unseen = Prefixed(own[0], own[1], torch.zeros(1, 3, dtype=torch.bool))
            same = module(**batch, prefixes={where: unseen}).last_hidden_state[real]
            assert torch.allclose(same, before, atol=1e-12, rtol=0)


def test_two_models_of_one_configuration_do_not_meet() -> None:
    config = tiny.config("llama")
    first, second = transformers.LlamaModel(config), transformers.LlamaModel(config)
    base = freeze(first, None, "own", tiny.CPU)
    assert attention.installed(first) and not attention.installed(second)
    assert config._attn_implementation == "sdpa"
    held = {id(inner.config) for inner in base.module.modules() if hasattr(inner, "config")}
    assert held == {id(base.module.config)}, "one configuration, whoever holds it"
    kept = base.module.config
    assert freeze(first, None, "own", tiny.CPU).module.config is kept, "a second time changes nothing"


def test_what_is_not_known_is_left_alone() -> None:
    for module in (tiny.module("distilbert"), tiny.module("gpt_neox")):
        before = module.config
        assert freeze(module, None, "own", tiny.CPU).module.config is before
        assert before._attn_implementation == "sdpa"
    eager: Any = transformers.AutoModel.from_config(tiny.config("bert"), attn_implementation="eager")
    assert not attention.installed(freeze(eager, None, "own", tiny.CPU).module)
    assert eager.config._attn_implementation == "eager"


def test_copies_in_another_precision_take_prefixes_and_copies_for_others_are_plain() -> None:
    base = tiny.base("bert")
    copied = base.at("float32").module
    assert attention.installed(copied) and copied.config is not base.module.config
    plain = base.copy_module(torch.float32)
    assert plain.config._attn_implementation == "sdpa"
    assert all(inner.config is plain.config for inner in plain.modules() if hasattr(inner, "config"))
    assert attention.installed(base.module)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_file_names_our_attention(family: str, tmp_path: Path) -> None:
    model = HFModel(tiny.base(family), HeadOnly(), 3)
    params = model.init(tiny.place())
    model.base.module.save_pretrained(tmp_path / "base")
    merged = merge(model, params)
    merged.save_pretrained(tmp_path / "merged")
    for name in ("base", "merged"):
        text = (tmp_path / name / "config.json").read_text()
        assert attention.NAME not in text and "attn_implementation" not in text
        assert json.loads(text)["model_type"] == family
    assert attention.NAME not in json.dumps(model.base.config, default=str)
    assert getattr(merged, merged.base_model_prefix).config._attn_implementation == "sdpa"
    loaded: Any = transformers.AutoModel.from_pretrained(tmp_path / "base")
    assert loaded.config._attn_implementation == "sdpa"
