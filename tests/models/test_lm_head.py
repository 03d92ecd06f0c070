"""The language model's own head: what transformers' model gives, in every family, precision and for some words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tiny
import tiny_lm
from fedpeft.core.errors import ModelError
from fedpeft.models import lm_head, load
from fedpeft.models.lm_head import lm_head_of, load_lm_head
from fedpeft.models.load import load_base

FAMILIES = [("bert", True), ("bert", False), ("roberta", True), ("electra", True), ("gpt2", True), ("llama", False)]
FAMILIES += [("opt", True), ("opt", False)]


@pytest.fixture
def fresh() -> Any:
    """Nothing is kept of folders that end with the test."""
    yield
    load._load.cache_clear()
    lm_head._held.clear()


def states_and_logits(family: str, tied: bool) -> tuple[torch.Tensor, torch.Tensor]:
    full = tiny_lm.language_model(family, tied)
    ids = torch.randint(5, tiny.VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return full.base_model(input_ids=ids).last_hidden_state[0], full(input_ids=ids).logits[0]


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_logits_are_those_of_the_whole_model(family: str, tied: bool) -> None:
    states, logits = states_and_logits(family, tied)
    head = tiny_lm.lm_head(family, tied)
    torch.testing.assert_close(head.logits(states), logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head.some(states, [7, 3, 58]), logits[:, [7, 3, 58]], rtol=1e-12, atol=1e-12)
    assert head.vocabulary == tiny.VOCABULARY and head.tied == tied
    assert not any(t.requires_grad for t in (head.logits(states), head.some(states, [1])))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_precision_is_that_of_the_states(family: str) -> None:
    states, logits = states_and_logits(family, True)
    head = tiny_lm.lm_head(family, True)
    rough = head.logits(states.float())
    assert rough.dtype is torch.float32
    torch.testing.assert_close(rough.double(), logits, rtol=1e-4, atol=1e-4)
    assert head._in(torch.float32)[1] is tiny_lm.base(family).at("float32").module.get_input_embeddings().weight
    assert head.logits(states.bfloat16()).dtype is torch.bfloat16


def test_memory_beside_the_base_is_the_transform_and_the_bias() -> None:
    width, vocabulary = tiny.WIDTH, tiny.VOCABULARY
    transform = width * width + width + 2 * width
    assert tiny_lm.lm_head("bert", True).own_bytes == 8 * (transform + vocabulary)
    assert tiny_lm.lm_head("bert", False).own_bytes == 8 * (transform + vocabulary + vocabulary * width)
    assert tiny_lm.lm_head("gpt2", True).own_bytes == 0


def test_the_head_is_loaded_once_and_does_not_follow_the_file(tmp_path: Path, fresh: Any) -> None:
    tokenizer = tiny_lm.word_tokenizer()
    folder = tiny_lm.save("bert", tokenizer, tmp_path / "model", len(tokenizer))
    base = load_base(str(folder), device="cpu")
    head = load_lm_head("model", base)
    assert load_lm_head("other name", base) is head
    assert load_lm_head("model", load_base(str(folder), "bfloat16", "cpu")) is not head
    states = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    before = head.logits(states)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-4000, 2)
        file.write(b"\0" * 4000)
    assert torch.equal(head.logits(states), before)
    full = tiny_lm.language_model("bert")
    assert isinstance(lm_head_of(full, tiny_lm.base("bert")), lm_head.LmHead)


def test_a_checkpoint_without_a_head(tmp_path: Path, fresh: Any) -> None:
    tokenizer = tiny_lm.word_tokenizer()
    folder = tiny.saved("bert", tmp_path / "bare", "float32")
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"model bare has no language-model head; use task.format head, or a model wi"):
        load_lm_head("bare", load_base(str(folder), device="cpu"))
    untied = tiny.config("llama")
    untied.tie_word_embeddings = False
    transformers.AutoModel.from_config(untied).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    with pytest.raises(
        ModelError, match=r"model c has no language-model head; .* or a causal model saved with its head"
    ):
        load_lm_head("c", load_base(str(tmp_path / "causal"), device="cpu"))


def test_minilm_has_no_head() -> None:
    try:
        base = load_base("minilm", device="cpu")
    except ModelError:
        pytest.skip("MiniLM is not installed")
    with pytest.raises(
        ModelError, match=r"^model minilm has no language-model head; .*, or a model with one such as demo$"
    ):
        load_lm_head("minilm", base)


def test_a_head_of_another_form_is_refused() -> None:
    """A model that divides its logits by ten: its parts alone give other numbers."""
    full = tiny_lm.language_model("llama", False)

    class Scaled(nn.Module):
        base_model = full.base_model
        device = full.device

        def get_output_embeddings(self) -> nn.Module:
            found: nn.Module = full.get_output_embeddings()
            return found

        def get_input_embeddings(self) -> nn.Module:
            found: nn.Module = full.get_input_embeddings()
            return found

        def forward(self, input_ids: torch.Tensor) -> Any:
            out = full(input_ids=input_ids)
            out.logits = out.logits / 10
            return out

    with pytest.raises(ModelError, match=r"the language-model head of x has a form that is not known \(family llama\)"):
        lm_head_of(Scaled(), tiny_lm.base("llama", False), "x")
