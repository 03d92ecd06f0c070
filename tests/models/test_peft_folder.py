"""Adapters that plain peft wrote, and folders that cannot be taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from exports import LABELS, assert_equal_logits, lora_model, with_peft
from fedpeft.core import tree
from fedpeft.core.adapter import HeadOnly, Lora
from fedpeft.core.errors import ModelError
from fedpeft.models.export import export_adapter, export_merged, import_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gpt_neox"])
def test_an_adapter_of_plain_peft_comes_in(family: str, tmp_path: Path) -> None:
    """Made, trained and saved by peft alone; GPT-2's fused module comes in as query, key and value."""
    targets = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "up_proj"], "gpt_neox": ["query_key_value"]}
    tiny.saved(family, tmp_path / "base", "float32")
    config = peft.LoraConfig(
        task_type="TOKEN_CLS", r=4, lora_alpha=6, target_modules=targets.get(family, ["query", "value"]),
        fan_in_fan_out=family == "gpt2", init_lora_weights=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = peft.get_peft_model(tiny.token_classifier(tmp_path / "base", 3, "float32"), config).eval()
        with torch.no_grad():
            for name, weight in theirs.named_parameters():
                if "lora_" in name:
                    weight.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    spec = Lora(rank=4, alpha=6.0, targets=("*.query_key_value",) if family == "gpt_neox" else ("query", "value"))
    model = lora_model(family, spec)
    params = import_adapter(tmp_path / "theirs", model)
    assert params["head.weight"].shape == (3, 32)
    assert_equal_logits(theirs, model, params)
    if family == "gpt2":
        assert torch.equal(params["block.1.query.A"], params["block.1.key.A"])
    again = export_adapter(model, params, tmp_path / "out", labels=LABELS, card={})
    assert_equal_logits(with_peft(family, tmp_path / "base", again), model, params)


def test_an_adapter_without_a_head_comes_in_without_one(tmp_path: Path) -> None:
    model = lora_model("llama")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"])
    tiny.saved("llama", tmp_path / "base", "float32")
    causal = transformers.AutoModelForCausalLM.from_config(tiny.config("llama"))
    peft.get_peft_model(causal, config).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    params = import_adapter(tmp_path / "theirs", model)
    assert sorted(params) == sorted(f"block.{i}.query.{side}" for i in range(3) for side in "AB")


def test_a_sequence_classifiers_head_comes_in_where_it_sees_the_last_token(tmp_path: Path) -> None:
    """`score` of a decoder is linear on the last token and has no bias; BERT's reads a pooler that is not ours."""
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["q_proj"])
    own = tiny.config("llama")
    own.num_labels, own.pad_token_id = 3, 0
    classifier = transformers.AutoModelForSequenceClassification.from_config(own)
    theirs = peft.get_peft_model(classifier, config)
    theirs.save_pretrained(tmp_path / "decoder")
    params = import_adapter(tmp_path / "decoder", lora_model("llama"))
    assert not params["head.bias"].any()
    assert torch.equal(params["head.weight"], theirs.base_model.model.score.modules_to_save["default"].weight)

    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query"])
    classifier = transformers.AutoModelForSequenceClassification.from_config(tiny.config("bert"))
    peft.get_peft_model(classifier, config).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ModelError, match=r"its head .*SEQ_CLS.* is not linear on the pooled last hidden state"):
        import_adapter(tmp_path / "encoder", lora_model("bert"))


def change(folder: Path, key: str, value: Any) -> None:
    """One key of an adapter's configuration, as if peft had written the folder."""
    (folder / "fedpeft.json").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "IA3", "holds a IA3 adapter of PEFT; give a LORA"),
        ("rank_pattern", {"query": 3}, "uses rank_pattern"),
        ("alpha_pattern", {"query": 3}, "uses alpha_pattern"),
        ("use_dora", True, "uses use_dora"),
        ("bias", "all", "uses bias"),
        ("lora_alpha", 12, "scaled by 3, this model's by 1.5; set adapter.rank to 4 and adapter.alpha to 12"),
        ("use_rslora", True, r"scaled by 3, this model's by 1.5; set adapter.rank to 4 and adapter.alpha to 12"),
    ],
)
def test_adapters_that_cannot_be_applied_are_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    model = lora_model("bert")
    folder = export_adapter(model, tiny.params(model, tiny.place()), tmp_path / "out", labels=LABELS, card={})
    change(folder, key, value)
    with pytest.raises(ModelError, match=message):
        import_adapter(folder, model)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.bert.encoder.layer.7.attention.self.query.lora_A.weight", "has no lora_A.weight and lora_B"),
        ("base_model.model.bert.embeddings.word_embeddings.lora_embedding_A", "has no lora_A.weight and lora_B"),
        ("base_model.model.bert.encoder.layer.0.output.dense.bias", "which this model has no place for"),
    ],
)
def test_unknown_tensors_are_refused(key: str, message: str, tmp_path: Path) -> None:
    model = lora_model("bert")
    folder = export_adapter(model, tiny.params(model, tiny.place()), tmp_path / "out", labels=LABELS, card={})
    (folder / "fedpeft.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {key: torch.zeros(2, 32)}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=message):
        import_adapter(folder, model)


def test_a_module_that_is_no_projection_is_refused(tmp_path: Path) -> None:
    other = lora_model("llama")
    folder = export_adapter(other, tiny.params(other, tiny.place()), tmp_path / "out", labels=LABELS, card={})
    with pytest.raises(ModelError, match=r"acts on 'block.0.query', which this model does not have"):
        import_adapter(folder, lora_model("bert"))
    (folder / "fedpeft.json").unlink()
    with pytest.raises(ModelError, match=r"changes the module 'model.layers.0.self_attn.q_proj', which is no proj"):
        import_adapter(folder, lora_model("bert"))


def test_an_export_for_another_adapter_is_refused(tmp_path: Path) -> None:
    model = lora_model("bert")
    folder = export_adapter(model, tiny.params(model, tiny.place()), tmp_path / "out", labels=LABELS, card={})
    with pytest.raises(ModelError, match=r"scaled by 1.5, this model's by 2; set adapter.rank to 4 and .*alpha to 6"):
        import_adapter(folder, lora_model("bert", Lora(rank=4, alpha=8.0)))
    with pytest.raises(ModelError, match=r"'block.0.query.A' does not exist in this model with adapter 'head'"):
        import_adapter(folder, tiny.model("bert", HeadOnly(), "float32"))
    assert len(import_adapter(folder, lora_model("bert", Lora(rank=2, alpha=3.0)))) == 14  # another rank, same scale


@pytest.mark.parametrize("broken", ["fedpeft.json", "adapter_config.json", "adapter_model.safetensors"])
def test_damaged_folders_are_refused(broken: str, tmp_path: Path) -> None:
    model = lora_model("bert")
    folder = export_adapter(model, tiny.params(model, tiny.place()), tmp_path / "out", labels=LABELS, card={})
    spec = b'"adapter": {"rank": 4, "alpha": 6}'
    for content in (b"{", b"[1]", b'{"modules": 3, %b}' % spec, b'{"format": 1, "modules": 3, %b}' % spec, b""):
        (folder / broken).write_bytes(content)
        with pytest.raises(ModelError, match=r"cannot be read|holds no object|is damaged|holds a None adapter"):
            import_adapter(folder, model)
    with pytest.raises(ModelError, match="cannot be read"):
        import_adapter(tmp_path / "nowhere", model)


def test_a_head_alone_is_merged_and_comes_back(tmp_path: Path) -> None:
    model = tiny.model("bert", HeadOnly(), "float32")
    params = tiny.params(model, tiny.place())
    folder = export_merged(model, params, tmp_path / "head", labels=LABELS, card={})
    assert tree.sha256(import_adapter(folder, model)) == tree.sha256(params)
    lora = lora_model("bert")
    folder = export_merged(lora, tiny.params(lora, tiny.place()), tmp_path / "lora", labels=LABELS, card={})
    with pytest.raises(ModelError, match="holds a merged model, whose adapter cannot be told from its base"):
        import_adapter(folder, lora)
