"""The model card: its code runs, its text is safe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

import tiny
from exports import CARD, LABELS, lora_model
from fedpeft.core.adapter import Lora, Prompt
from fedpeft.core.examples import Examples
from fedpeft.models.export import export_adapter, export_merged
from fedpeft.models.hf import HFModel
from fedpeft.models.load import load_base

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call


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


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_code_of_a_prompts_card_leaves_its_tokens_out(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = word_tokenizer("<pad>" if family == "bert" else None)
    source = tiny.saved(family, tmp_path / "base", "float32")
    tokenizer.save_pretrained(source)
    model = HFModel(load_base(str(source), device="cpu"), Prompt(length=5), 3)
    rng = tiny.place()
    params = {n: t + torch.from_numpy(rng.normal(0, 1, t.shape)).float() for n, t in model.init(rng).items()}
    folder = export_adapter(model, params, tmp_path / "out", labels=LABELS, card={"max_length": 16})
    ids = [tokenizer(t)["input_ids"] for t in ("One text.", "Another text, a longer one.")]
    data = Examples(tuple(torch.tensor(i).int().numpy() for i in ids), torch.zeros(2).long().numpy())
    expected = [LABELS[i] for i in model.logits(params, data).argmax(dim=1)]
    card = (folder / "README.md").read_text()
    assert ".logits[:, 5:]  #" in card
    assert labels_of_code(card, folder, monkeypatch, capsys) == expected


@pytest.mark.parametrize("name", ["demo", pytest.param("minilm", marks=pytest.mark.slow)])
def test_a_model_that_comes_with_a_package_has_a_name_and_no_path_of_this_machine(name: str, tmp_path: Path) -> None:
    base = load_base(name, device="cpu")
    model = HFModel(base, Lora(rank=2), 3)
    params = model.init(tiny.place())
    title = {"demo": "the demo encoder that ships with fedpeft", "minilm": "sentence-transformers/all-MiniLM-L6-v2"}
    for write in (export_adapter, export_merged):
        facts = CARD | {"base_model": name}
        folder = write(model, params, tmp_path / write.__name__, labels=LABELS, card=facts)
        for path in (*folder.glob("*.json"), *folder.glob("*.md")):
            assert str(Path(base.source).parent) not in path.read_text(), path.name
        card = (folder / "README.md").read_text()
        assert f" {title[name]}\n" in card and f"| base model | {title[name]} |" in card
        front = yaml.safe_load(card.split("---\n", 2)[1])
        assert front.get("base_model") == (None if name == "demo" else title[name])
    config = json.loads((tmp_path / "export_adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (None if name == "demo" else title[name])


def test_the_code_of_the_demos_card_finds_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = HFModel(load_base("demo", device="cpu"), Lora(rank=2), 3)
    params = tiny.params(model, tiny.place())
    folder = export_adapter(model, params, tmp_path / "out", labels=LABELS, card={"max_length": 16})
    texts = ["One text.", "Another text, a longer one."]
    ids = [model.base.tokenizer(text)["input_ids"] for text in texts]
    data = Examples(tuple(torch.tensor(i).int().numpy() for i in ids), torch.zeros(2).long().numpy())
    expected = [LABELS[i] for i in model.logits(params, data).argmax(dim=1)]
    assert labels_of_code((folder / "README.md").read_text(), folder, monkeypatch, capsys) == expected


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
