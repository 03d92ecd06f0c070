"""Adapters of every kind as folders: back bit for bit, and as PEFT holds them where it can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import tiny
import tiny_lm
from fedpeft.core import tree
from fedpeft.core.adapter import (
    AdapterSpec,
    Bottleneck,
    Full,
    InstancePrompt,
    LatePrompt,
    Lora,
    MixedPrompt,
    Prefix,
    Prompt,
)
from fedpeft.core.errors import ModelError
from fedpeft.core.examples import Examples
from fedpeft.models.export import export_adapter, export_merged, import_adapter
from fedpeft.models.families import key_value_size
from fedpeft.models.hf import HFModel
from fedpeft.models.merge import merge
from fedpeft.models.readouts.cloze import ClozeReadout

LABELS = ("a", "b", "c")
P = 4
KINDS: dict[str, AdapterSpec] = {
    "prefix": Prefix(length=P),
    "some layers": Prefix(length=P, blocks=(0, 2)),
    "prompt": Prompt(length=P),
    "bottleneck": Bottleneck(size=3),
    "idpg": InstancePrompt(length=P, size=3),
    "lpt": LatePrompt(length=P, size=3),
    "lora": Lora(rank=2),
    "full": Full(),
}
PEFT = {"prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING", "lora": "LORA"}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's own


def drawn(model: HFModel, seed: int = 0) -> dict[str, Tensor]:
    """Parameters whose every number matters."""
    rng = tiny.place(seed)
    return {n: t + torch.from_numpy(rng.normal(0, 0.2, size=t.shape)).float() for n, t in model.init(rng).items()}


def exported(model: HFModel, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    params = drawn(model)
    export_adapter(model, params, folder, labels=LABELS, card={"task": "t"})
    return params, json.loads((folder / "fedpeft.json").read_text())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_bit_for_bit(kind: str, family: str, tmp_path: Path) -> None:
    model = tiny.model(family, KINDS[kind], dtype="float32")
    params, note = exported(model, tmp_path / "adapter")
    again = import_adapter(tmp_path / "adapter", model)
    assert tree.sha256(again) == tree.sha256(params)
    assert note["form"] == ("adapter" if kind in PEFT else "own") and note["adapter"]["kind"] == model.spec.kind
    config = tmp_path / "adapter" / "adapter_config.json"
    assert config.is_file() == (kind in PEFT)
    if kind in PEFT:
        assert json.loads(config.read_text())["peft_type"] == PEFT[kind]
    else:
        assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == params.keys()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert ("PeftModel" in card) == (kind in ("lora", "prompt"))


def test_clients_of_unequal_prefixes_need_our_own_form(tmp_path: Path) -> None:
    model = tiny.model("bert", Prefix(length=P), dtype="float32")
    params = drawn(model) | {"prefix.1": torch.ones(2, P + 1, 4, 8)}
    export_adapter(model, params, tmp_path / "a", labels=LABELS, card={})
    assert json.loads((tmp_path / "a" / "fedpeft.json").read_text())["form"] == "own"
    assert tree.sha256(import_adapter(tmp_path / "a", model)) == tree.sha256(params)


def in_peft(family: str, place: Path) -> Any:
    """PEFT's own model with the adapter of that folder."""
    classifier = tiny.token_classifier(tiny.saved(family, place / "base", "float32"), 3, "float32")
    return peft.PeftModel.from_pretrained(classifier, place / "adapter").eval()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_prompt_gives_equal_logits_in_peft(family: str, tmp_path: Path) -> None:
    """PEFT's logits of the text's own tokens, pooled, are ours."""
    model = tiny.model(family, Prompt(length=P), dtype="float32")
    params, _ = exported(model, tmp_path / "adapter")
    data = tiny.examples(tiny.place(1), 6)
    wrapped = in_peft(family, tmp_path)
    batch = tiny.padded(data, 1)
    with torch.no_grad():
        logits = wrapped(**batch).logits[:, -batch["input_ids"].shape[1] :]
    assert torch.allclose(
        model.logits(params, data), tiny.pooled(logits, batch["attention_mask"], model.pooling), atol=1e-5
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_prefix_has_pefts_layout(family: str, tmp_path: Path) -> None:
    """weight.view(P, layers, 2, heads, size), and PEFT loads it with its head."""
    model = tiny.model(family, Prefix(length=P), dtype="float32")
    params, _ = exported(model, tmp_path / "adapter")
    wrapped = in_peft(family, tmp_path)
    heads, size = key_value_size(model.base.module.config)
    weight = wrapped.prompt_encoder["default"].embedding.weight.detach().view(P, tiny.BLOCKS, 2, heads, size)
    for block in range(tiny.BLOCKS):
        assert torch.equal(weight[:, block].transpose(0, 1), params[f"prefix.{block}"])
    head = next(m for n, m in wrapped.base_model.named_children() if n in ("classifier", "score"))
    assert torch.equal(head.modules_to_save["default"].weight, params["head.weight"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # encoders of transformers take no cache
def test_a_prefix_gives_equal_logits_in_peft_at_the_texts_own_positions(family: str, tmp_path: Path) -> None:
    """Through PEFT's own cache; and other logits where PEFT counts the positions, as the card says."""
    model = tiny.model(family, Prefix(length=P), dtype="float32")
    params, _ = exported(model, tmp_path / "adapter")
    data = tiny.examples(tiny.place(1), 6)
    wrapped = in_peft(family, tmp_path)
    batch = tiny.padded(data, 1)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    seen = torch.cat([mask.new_ones(len(ids), P), mask], dim=1)
    with torch.no_grad():
        found = wrapped.base_model(
            input_ids=ids, attention_mask=seen, past_key_values=wrapped.get_prompt(len(ids)),
            position_ids=torch.arange(ids.shape[1]).expand_as(ids),
        ).logits  # fmt: skip
        moved = wrapped(**batch).logits
    ours = model.logits(params, data)
    assert torch.allclose(ours, tiny.pooled(found, mask, model.pooling), atol=1e-5)
    assert (ours - tiny.pooled(moved, mask, model.pooling)).abs().max() > 0.02
    head_alone = {name: own for name, own in params.items() if name.startswith("head.")}
    assert (ours - model.logits(head_alone, data)).abs().max() > 0.02, "the prefix must matter"
    assert "moves the text's positions" in (tmp_path / "adapter" / "README.md").read_text()


def test_an_exported_prompt_is_a_source_of_a_mixture(tmp_path: Path) -> None:
    model = tiny.model("bert", Prompt(length=P), dtype="float32")
    params, _ = exported(model, tmp_path / "run" / "adapter")
    mixed = tiny.model("bert", MixedPrompt(length=P, size=3, sources=(str(tmp_path / "run"),)), dtype="float32")
    sources = [t for t in vars(mixed.adapter).values() if isinstance(t, Tensor)]
    assert any(torch.equal(t.view(-1, P, tiny.WIDTH)[0], params["prompt.tokens"]) for t in sources)
    own, _ = exported(mixed, tmp_path / "mixed")
    assert tree.sha256(import_adapter(tmp_path / "mixed", mixed)) == tree.sha256(own)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("lora", "full")])
def test_what_is_no_change_of_weights_cannot_be_merged(kind: str, tmp_path: Path) -> None:
    model = tiny.model("bert", KINDS[kind], dtype="float32")
    with pytest.raises(ModelError, match="cannot be folded into the weights; export it without --merge"):
        export_merged(model, drawn(model), tmp_path / "m", labels=LABELS, card={})


def test_a_merged_model_is_of_stock_attention() -> None:
    model = tiny.model("bert", Lora(rank=2), dtype="float32")
    assert merge(model, drawn(model)).config._attn_implementation == "sdpa"


def test_a_prefix_of_another_model_is_refused(tmp_path: Path) -> None:
    exported(tiny.model("llama", Prefix(length=P), dtype="float32"), tmp_path / "adapter")
    with pytest.raises(ModelError, match="a row of its prefix has 96 numbers, this model needs 3 x 2 x 4 x 8"):
        import_adapter(tmp_path / "adapter", tiny.model("bert", Prefix(length=P), dtype="float32"))


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (Bottleneck(size=3, activation="relu"), Bottleneck(size=3), "adapter.activation 'relu', .* has 'gelu'; set"),
        (LatePrompt(length=4, size=3), LatePrompt(length=5, size=3), "adapter.length 4, this model has 5; set adapter"),
        (Bottleneck(size=3), Lora(rank=2), "holds an adapter of kind 'bottleneck', this model's is 'lora'; set"),
    ],
)
def test_what_would_give_other_outputs_is_refused(
    ours: AdapterSpec, theirs: AdapterSpec, message: str, tmp_path: Path
) -> None:
    """No shape of a parameter shows these settings."""
    exported(tiny.model("bert", ours, dtype="float32"), tmp_path / "a")
    with pytest.raises(ModelError, match=message):
        import_adapter(tmp_path / "a", tiny.model("bert", theirs, dtype="float32"))


def test_a_mixture_of_other_sources_is_refused(tmp_path: Path) -> None:
    """Wherever the sources are and in whatever order: their numbers count."""
    prompts = tiny.model("bert", Prompt(length=P), dtype="float32")
    for folder, seed in (("a", 1), ("b", 2), ("c", 3), ("copy of b", 2)):
        export_adapter(prompts, drawn(prompts, seed), tmp_path / folder, labels=LABELS, card={})

    def mixed(*names: str) -> HFModel:
        spec = MixedPrompt(length=P, size=3, sources=tuple(str(tmp_path / name) for name in names))
        return tiny.model("bert", spec, dtype="float32")

    model, again = mixed("a", "b"), mixed("copy of b", "a")
    params, note = exported(model, tmp_path / "mixed")
    assert len(note["sources_sha256"]) == 2
    assert tree.sha256(import_adapter(tmp_path / "mixed", again)) == tree.sha256(params)
    data = tiny.examples(tiny.place(1), 4)
    assert torch.allclose(again.logits(params, data), model.logits(params, data), atol=1e-5)
    for others in (("a", "c"), ("a",)):
        with pytest.raises(ModelError, match="with other sources than this model's; name the same runs"):
            import_adapter(tmp_path / "mixed", mixed(*others))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 2}, "its format is 2, not 1"), ({"adapter": 3}, "is damaged"), ({"adapter": {}}, "is damaged")],
)
def test_notes_of_another_kind_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny.model("bert", Bottleneck(size=3), dtype="float32")
    _, note = exported(model, tmp_path / "a")
    assert note["base"] == "tiny-bert" and note["family"] == "bert" and note["labels"] == list(LABELS)
    (tmp_path / "a" / "fedpeft.json").write_text(json.dumps(note | change))
    with pytest.raises(ModelError, match=message):
        import_adapter(tmp_path / "a", model)


def headless(family: str, spec: AdapterSpec) -> HFModel:
    """A model of the format cloze, which trains no head."""
    return HFModel(tiny_lm.base(family), spec, 3, 2048, ClozeReadout(tiny_lm.lm_head(family), (11, 31, 7)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_without_a_head_comes_back(kind: str, tmp_path: Path) -> None:
    model = headless("bert", KINDS[kind])
    params, note = exported(model, tmp_path / "a")
    assert not any(name.startswith("head.") for name in params)
    assert tree.sha256(import_adapter(tmp_path / "a", model)) == tree.sha256(params)
    assert note["form"] == ("adapter" if kind == "lora" else "own") and note["labels"] == list(LABELS)
    assert "without a head" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(ModelError, match="cloze and verbalizer train none; export the adapter without --merge"):
        export_merged(model, params, tmp_path / "m", labels=LABELS, card={})


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_lora_without_a_head_acts_in_pefts_masked_model(family: str, tmp_path: Path) -> None:
    model = headless(family, Lora(rank=2))
    params, _ = exported(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] is None and config["modules_to_save"] is None
    tiny_lm.language_model(family).save_pretrained(tmp_path / "base")
    full = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    wrapped = peft.PeftModel.from_pretrained(full, tmp_path / "adapter").eval()
    data = tiny.examples(tiny.place(1), 5)
    data = Examples(data.tokens, data.labels, None, data.lengths - 1)
    for row, tokens in enumerate(data.tokens):
        with torch.no_grad():
            logits = wrapped(input_ids=torch.from_numpy(tokens).long()[None]).logits[0, -1, [11, 31, 7]]
        assert torch.allclose(model.logits(params, data, [row])[0], logits.float(), atol=1e-5)
    assert (model.logits(params, data) - model.logits(None, data)).abs().max() > 0.03, "the adapter must matter"
