"""Exports are read by plain peft and plain transformers, and come back bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import tiny
from fedpeft.core import tree
from fedpeft.core.adapter import HeadOnly, Lora
from fedpeft.core.errors import ModelError, RequestError, StoreError
from fedpeft.core.examples import Examples
from fedpeft.models import export
from fedpeft.models.export import export_adapter, export_merged, import_adapter, merge
from fedpeft.models.hf import HFModel
from fedpeft.models.load import load_base

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
LABELS = ["no", "yes", "per|haps"]
CARD = {"task": "trec <b>", "method": "fedavg", "rounds": 3, "metrics": {"test": {"accuracy": 0.87654}}, "empty": None}


def lora_model(family: str, spec: Lora | None = None) -> HFModel:
    return tiny.model(family, spec or Lora(rank=4, alpha=6.0), dtype="float32")


def data_for(model: HFModel) -> Examples:
    return tiny.examples(tiny.place(1), 9, segments=model.base.family == "bert")


def with_peft(family: str, base: Path, adapter: Path) -> Any:
    """The adapter as a user of peft loads it."""
    return peft.PeftModel.from_pretrained(tiny.token_classifier(base, 3, "float32"), str(adapter)).eval()


def assert_equal_logits(classifier: Any, model: HFModel, params: dict[str, Tensor]) -> None:
    data = data_for(model)
    with torch.no_grad():
        got = tiny.plain_logits(classifier, data, model.pooling, pad=1)
    expected = model.logits(params, data)
    assert (got - expected).abs().max() < 1e-5
    head_alone = {n: t for n, t in params.items() if n.startswith("head.")}
    assert (model.logits(head_alone, data) - expected).abs().max() > 0.03, "the adapter must matter"


def deltas(model: HFModel) -> dict[str, Tensor]:
    rng = tiny.place(5)
    query, up = model.places["block.0.query"], model.places["block.2.up"]
    shapes = {
        "delta.block.0.query.left": (query.d_out, 3),
        "delta.block.0.query.right": (3, query.d_in),
        "delta.block.2.up.dense": (up.d_out, up.d_in),
    }
    return {n: torch.from_numpy(rng.normal(0, 0.1, size=s)).float() for n, s in shapes.items()}


# --- peft ------------------------------------------------------------------------------------------------------------


SPECS = {
    "usual": Lora(rank=4, alpha=6.0),
    "odd scale": Lora(rank=49, alpha=1.0),
    "a block": Lora(rank=3, blocks=(1,)),
    "one kind": Lora(rank=3, targets=("value",)),
    "attention output": Lora(rank=3, targets=("output",)),  # shares its last path component with another
    "all": Lora(rank=2, alpha=5.0, targets=("*",)),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("case", SPECS)
def test_peft_loads_an_adapter_with_equal_logits_and_it_comes_back(family: str, case: str, tmp_path: Path) -> None:
    spec = SPECS[case]
    if spec.targets == ("*",):
        spec = replace(spec, targets=tiny.everything(family))
    model = lora_model(family, spec)
    params = tiny.params(model, tiny.place())
    folder = export_adapter(model, params, tmp_path / "out", labels=LABELS, card=CARD)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "fedpeft.json"
    ]  # fmt: skip
    assert_equal_logits(with_peft(family, tiny.saved(family, tmp_path / "base", "float32"), folder), model, params)
    back = import_adapter(folder, model)
    assert tree.sha256(back) == tree.sha256(params)
    assert {n: t.dtype for n, t in back.items()} == {n: t.dtype for n, t in params.items()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_unequal_ranks_keep_the_scale(family: str, tmp_path: Path) -> None:
    """Every module has its own rank, one has none; alpha / rank of the spec applies to all."""
    model = lora_model(family, Lora(rank=4, alpha=6.0, targets=("query", "value", "down")))
    params = tiny.params(model, tiny.place())
    for i, (name, slot) in enumerate(model.slots.items()):
        rank = (4, 0, 7, 1, 4)[i % 5]
        own = tiny.params(model, tiny.place(i), rank=rank, slots=[slot.name])
        params |= {n: t for n, t in own.items() if n.startswith(name)}
    folder = export_adapter(model, params, tmp_path / "out", labels=LABELS, card={})
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert {config["alpha_pattern"][path] / rank for path, rank in config["rank_pattern"].items()} == {1.5}
    assert_equal_logits(with_peft(family, tiny.saved(family, tmp_path / "base", "float32"), folder), model, params)
    assert tree.sha256(import_adapter(folder, model)) == tree.sha256(params)


def test_what_is_written_is_what_peft_writes(tmp_path: Path) -> None:
    """The same keys and shapes as peft's own save, and no key in its configuration that peft does not know."""
    model = lora_model("bert")
    params = tiny.params(model, tiny.place())
    ours = export_adapter(model, params, tmp_path / "out", labels=LABELS, card={})
    loaded = with_peft("bert", tiny.saved("bert", tmp_path / "base", "float32"), ours)
    loaded.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)  # which would look at the hub
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert tree.sha256(theirs) == tree.sha256(load_file(ours / "adapter_model.safetensors"))
    config, known = (json.loads((f / "adapter_config.json").read_text()) for f in (ours, tmp_path / "theirs"))
    assert config.keys() <= known.keys()
    for key in config.keys() - {"target_modules", "modules_to_save", "base_model_name_or_path"}:
        assert config[key] == known[key], key
    assert config["target_modules"] == sorted(known["target_modules"]) == ["query", "value"]
    assert set(config["modules_to_save"]) == set(known["modules_to_save"])


def test_writing_needs_no_peft(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})
import tiny
from fedpeft.models.export import export_adapter, export_merged, import_adapter
model = tiny.model("gpt2", dtype="float32")
params = tiny.params(model, tiny.place())
import_adapter(export_adapter(model, params, {str(tmp_path / "a")!r}, labels=list("abc"), card={{}}), model)
export_merged(model, params, {str(tmp_path / "m")!r}, labels=list("abc"), card={{}})
assert "peft" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    for content in (b"{", b"[1]", b'{"modules": 3, "adapter": {"rank": 4, "alpha": 6}}', b""):
        (folder / broken).write_bytes(content)
        with pytest.raises(ModelError, match=r"cannot be read|holds no object|is damaged|holds a None adapter"):
            import_adapter(folder, model)
    with pytest.raises(ModelError, match="cannot be read"):
        import_adapter(tmp_path / "nowhere", model)


def test_what_peft_cannot_hold_is_refused_and_the_message_names_merge(tmp_path: Path) -> None:
    model = lora_model("bert")
    params = tiny.params(model, tiny.place())
    cases = [
        (model, params | deltas(model), r"cannot hold a change of the base \(delta.block.0.query.left\).*--merge"),
        (tiny.model("bert", HeadOnly(), "float32"), {n: t for n, t in params.items() if "head" in n}, "--merge"),
    ]
    for own, given, message in cases:
        with pytest.raises(ModelError, match=message):
            export_adapter(own, given, tmp_path / "out", labels=LABELS, card={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [export_adapter, export_merged])
def test_wrong_requests_are_refused(write: Any, tmp_path: Path) -> None:
    model = lora_model("bert")
    params = tiny.params(model, tiny.place())
    headless = {n: t for n, t in params.items() if "head" not in n}
    for given, labels, message in [
        (params, ["a", "b"], "2 different labels for a head of 3 classes"),
        (params, ["a", "b", "a"], "2 different labels for a head of 3 classes"),
        (headless, LABELS, "no 'head.weight'"),
        (params | {"block.9.query.A": torch.zeros(1, 32)}, LABELS, "does not exist"),
    ]:
        with pytest.raises(ModelError, match=message):
            write(model, given, tmp_path / "out", labels=labels, card={})
    assert not list(tmp_path.iterdir())


# --- merged ----------------------------------------------------------------------------------------------------------


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


def test_a_head_alone_is_merged_and_comes_back(tmp_path: Path) -> None:
    model = tiny.model("bert", HeadOnly(), "float32")
    params = tiny.params(model, tiny.place())
    folder = export_merged(model, params, tmp_path / "head", labels=LABELS, card={})
    assert tree.sha256(import_adapter(folder, model)) == tree.sha256(params)
    lora = lora_model("bert")
    folder = export_merged(lora, tiny.params(lora, tiny.place()), tmp_path / "lora", labels=LABELS, card={})
    with pytest.raises(ModelError, match="holds a merged model, whose adapter cannot be told from its base"):
        import_adapter(folder, lora)


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


# --- the folder ------------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("write", [export_adapter, export_merged])
def test_only_an_earlier_export_is_replaced(write: Any, tmp_path: Path) -> None:
    model = lora_model("bert")
    one, two = tiny.params(model, tiny.place()), tiny.params(model, tiny.place(2))
    out = tmp_path / "deep" / "out"
    write(model, one, out, labels=LABELS, card={})
    first = snapshot(out)
    assert write(model, two, out, labels=LABELS, card={}) == out
    assert snapshot(out) != first
    with pytest.raises(RequestError, match="something else than an earlier export; choose a new folder"):
        write(model, one, out, labels=LABELS, card={}, replace=False)
    (out / "notes.txt").write_text("mine")
    kept = snapshot(out)
    with pytest.raises(RequestError, match="something else"):
        write(model, one, out, labels=LABELS, card={})
    assert snapshot(out) == kept
    other = tmp_path / "other"
    other.mkdir()
    write(model, one, other, labels=LABELS, card={})  # an empty folder will do
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(RequestError, match="something else"):
        write(model, one, file, labels=LABELS, card={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "file", "other"]
    assert [p.name for p in out.parent.iterdir()] == ["out"], "no drafts are left"


def test_a_failure_half_way_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model("bert")
    params = tiny.params(model, tiny.place())
    out = export_adapter(model, params, tmp_path / "out", labels=LABELS, card={})
    before = snapshot(out)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "model_card", full)
    with pytest.raises(StoreError, match=r"cannot write .*No space left on device"):
        export_adapter(model, params, out, labels=LABELS, card={})
    monkeypatch.undo()
    monkeypatch.setattr(export.os, "rename", broken_rename := RenameOnce())
    with pytest.raises(StoreError, match="cannot write"):
        export_adapter(model, params, out, labels=LABELS, card={})
    monkeypatch.undo()
    assert broken_rename.calls == 3
    assert snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class RenameOnce:
    """`os.rename` whose second call fails: the one that puts the draft in place."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, source: Path, target: Path) -> None:
        self.calls += 1
        if self.calls == 2:
            raise OSError(5, "Input/output error")
        os.replace(source, target)


# --- the card --------------------------------------------------------------------------------------------------------


def word_tokenizer(pad: str | None) -> Any:
    """Whole words, the way each family's tokenizer is saved and loaded."""
    words = ["<unk>", "<pad>", "<eos>", "one", "text", "another", "a", "longer", ".", ",", "One", "Another"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token=pad, eos_token="<eos>", model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def labels_of_code(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Sequence[str]:
    """Run the card's code where the card is, as a reader would."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code_of(card), {})
    return json.loads(capsys.readouterr().out.strip().replace("'", '"'))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("write", [export_adapter, export_merged])
def test_the_cards_code_runs_and_says_what_the_model_says(
    family: str, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = word_tokenizer("<pad>" if family == "bert" else None)
    source = tiny.saved(family, tmp_path / "base", "float32")
    tokenizer.save_pretrained(source)
    base = load_base(str(source), device="cpu")
    model = HFModel(base, Lora(rank=4, alpha=6.0), 3)
    params = tiny.params(model, tiny.place())
    folder = write(model, params, tmp_path / "out", labels=LABELS, card=CARD | {"max_length": 16})
    ids = [tokenizer(t)["input_ids"] for t in ("One text.", "Another text, a longer one.")]
    data = Examples(tuple(torch.tensor(i).int().numpy() for i in ids), torch.zeros(2).long().numpy())
    expected = [LABELS[i] for i in model.logits(params, data).argmax(dim=1)]
    card = (folder / "README.md").read_text()
    assert labels_of_code(card, folder, monkeypatch, capsys) == expected


def test_the_cards_text(tmp_path: Path) -> None:
    model = lora_model("bert")
    params = tiny.params(model, tiny.place())
    card = (
        export_adapter(model, params, tmp_path / "out", labels=LABELS, card=CARD | {"base_model": "hub/name"})
        / "README.md"
    ).read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "base_model": "hub/name",
        "tags": ["text-classification", "federated-learning", "fedpeft"],
        "labels": LABELS,
    }
    assert "| task | trec &lt;b> |" in body
    assert "| metrics.test.accuracy | 0.8765 |" in body
    assert "empty" not in body
    assert 'from_pretrained("tiny-bert", num_labels=3)' in body
    merged = (export_merged(model, params, tmp_path / "merged", labels=LABELS, card={}) / "README.md").read_text()
    assert yaml.safe_load(merged.split("---\n", 2)[1])["library_name"] == "transformers"
    assert "peft" not in code_of(merged)
