"""The embedded pair: one tokenizer, and a large model that is better than the small one on text new to both."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from fedpeft.core.adapter import Lora
from fedpeft.data.library import read_library
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import load_lm_head
from fedpeft.models.load import load_base, locate
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.models.sessions import Speaker

PARAMETERS = {"demo-small": 85_680, "demo-large": 742_784}
WINDOW = 128


@cache
def model(name: str) -> HFModel:
    base = load_base(name, device="cpu")
    return HFModel(base, Lora(8, 16.0, ("all",)), 0, 2048, GenerateReadout(load_lm_head(name, base)))


@cache
def held_out(kind: str) -> list[list[int]]:
    """The first window of every test file that is long enough: of its code, or of its docstrings and comments."""
    tokenizer = model("demo-small").base.tokenizer
    texts = [file.code if kind == "code" else "</s>".join(file.prose) for file in read_library(None, "test")]
    windows = [tokenizer(text[: 8 * WINDOW])["input_ids"][: WINDOW + 1] for text in texts if len(text) > 3000]
    return [own for own in windows if len(own) == WINDOW + 1]


def loss(name: str, windows: list[list[int]]) -> float:
    """Nats per token."""
    logits = torch.cat(Speaker(model(name)).scores([own[:-1] for own in windows]))
    return float(F.cross_entropy(logits, torch.tensor([token for own in windows for token in own[1:]])))


@pytest.mark.parametrize("kind", ["code", "prose"])
def test_the_large_one_is_better_on_text_that_neither_has_seen(kind: str) -> None:
    windows = held_out(kind)
    assert len(windows) >= 20
    assert loss("demo-large", windows) < loss("demo-small", windows) - 0.1


@pytest.mark.slow
def test_held_out_prose_is_not_in_the_text_of_the_pre_training() -> None:
    """Long passages of test files; a few short ones (`# ----`) are everywhere."""
    seen = {passage for file in read_library(None, "train") for passage in file.prose}
    passages = [passage for file in read_library(None, "test") for passage in file.prose if len(passage) > 120]
    assert sum(passage in seen for passage in passages) < 0.03 * len(passages)


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_and_end(name: str) -> None:
    with safe_open(f"{locate(name)}/model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) == PARAMETERS[name]  # noqa: SIM118
    of = model(name)
    assert of.lm is not None and of.lm.tied and of.lm.vocabulary == 1024 == len(of.base.tokenizer)
    assert (of.base.family, of.base.tokenizer.eos_token_id, of.base.module.config.eos_token_id) == ("opt", 1, 1)
    assert Speaker(of).positions == WINDOW == of.base.tokenizer.model_max_length


def test_one_tokenizer_that_writes_everything() -> None:
    small, large = (model(name).base.tokenizer for name in PARAMETERS)
    assert small.backend_tokenizer.to_str() == large.backend_tokenizer.to_str()
    for text in ("def f(x):\n    return x  # Ä 漢 \t\x00", " two  blanks", "", "\n"):
        assert small.decode(small(text)["input_ids"]) == text
