"""Merged models: plain transformers, equal logits, an untouched base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import tiny
from exports import CARD, LABELS, assert_equal_logits, data_for, deltas, lora_model
from fedpeft.core import tree
from fedpeft.core.adapter import Lora
from fedpeft.core.errors import ModelError
from fedpeft.models.export import export_adapter, export_merged, merge
from fedpeft.models.hf import HFModel


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_merged_model_is_plain_and_has_equal_logits(family: str, tmp_path: Path) -> None:
    model = lora_model(family, Lora(rank=4, alpha=6.0, targets=tiny.everything(family)))
    params = tiny.params(model, tiny.place()) | deltas(model)
    before = tree.sha256(model.base.module.state_dict())
    model.logits(params, data_for(model))  # so that the base has hooks, which must not come along
    merged = merge(model, params, LABELS)
    assert tree.sha256(model.base.module.state_dict()) == before
    assert_equal_logits(merged, model, params)
    assert all(w.dtype is torch.float32 and w.device.type == "cpu" for w in merged.parameters())
    assert not any(m._forward_hooks for m in merged.modules())

    folder = export_merged(model, params, tmp_path / "out", labels=LABELS, card=CARD)
    loaded, info = transformers.AutoModelForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal_logits(loaded.eval(), model, params)
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert {type(m) for m in loaded.modules()} == {type(m) for m in tiny.token_classifier(
        tiny.saved(family, tmp_path / "base", "float32"), 3, "float32").modules()}  # fmt: skip
    plain = transformers.AutoModel.from_config(tiny.config(family)).num_parameters()
    assert loaded.num_parameters() <= plain + 3 * 33, "as many numbers as the base and the head: the base's speed"


def test_a_merged_bfloat16_base_is_float32() -> None:
    model = tiny.model("llama", Lora(rank=4, alpha=6.0), dtype="bfloat16")
    params = {n: t.float() for n, t in tiny.params(model, tiny.place()).items()}
    merged = merge(model, params)
    assert {w.dtype for w in merged.parameters()} == {torch.float32}
    weight = merged.model.layers[0].self_attn.q_proj.weight
    rounded = model.base.module.layers[0].self_attn.q_proj.weight.double()
    change = 1.5 * params["block.0.query.B"].double() @ params["block.0.query.A"].double()
    assert torch.equal(weight, (rounded + change).float())


def test_a_family_without_a_token_classifier_is_refused(tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=32
    )
    base = tiny.freeze(transformers.OPTModel(config), None, "opt", tiny.CPU)
    model = HFModel(base, Lora(rank=2, targets=("*.q_proj",)), 3)
    params = tiny.params(model, tiny.place())
    assert model.logits(params, tiny.examples(tiny.place(), 3)).shape == (3, 3)
    for write in (export_adapter, export_merged):
        with pytest.raises(ModelError, match="no token classifier for the family 'opt'"):
            write(model, params, tmp_path / "out", labels=LABELS, card={})
