"""Trios of tiny random models that share a vocabulary: small GPT-2 and Llama, and a larger model of another family."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import black_boxes
import tiny
from fedpeft.core.adapter import AdapterSpec, Lora
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import lm_head_of
from fedpeft.models.load import freeze
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.models.sessions import Speaker
from fedpeft.proxy.decode import Trio

VOCABULARY, POSITIONS, END = 60, 64, 2
FAMILIES = ("gpt2", "llama")


@cache
def whole(family: str, seed: int, blocks: int = 2, vocabulary: int = VOCABULARY) -> Any:
    """A language model of transformers in float32, with weights large enough that every part matters."""
    sizes: dict[str, Any]
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": blocks, "n_head": 4, "n_inner": 48, "n_positions": POSITIONS}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 48, "max_position_embeddings": POSITIONS}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=vocabulary, bos_token_id=1, eos_token_id=END, pad_token_id=0, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for weight in made.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.15)
    return made


@cache
def model(
    family: str, seed: int, blocks: int = 2, vocabulary: int = VOCABULARY, spec: AdapterSpec | None = None
) -> HFModel:
    """It, frozen, with LoRA of rank 4 by default."""
    full = whole(family, seed, blocks, vocabulary)
    base = freeze(full.base_model, None, f"{family}-{seed}-{blocks}-{vocabulary}", tiny.CPU)
    return HFModel(base, spec or Lora(rank=4, alpha=6.0), 0, 2048, GenerateReadout(lm_head_of(full, base)))


def adapter(of: HFModel, seed: int = 0, scale: float = 0.3) -> dict[str, Tensor]:
    """Parameters that matter."""
    noise = torch.Generator().manual_seed(seed)
    fresh = of.init(tiny.place(seed)).items()
    return {name: t + scale * torch.randn(t.shape, generator=noise) for name, t in fresh}


def trio(family: str = "gpt2", scale: float = 0.3, tokenizer: Any = None, ends: frozenset[int] | None = None) -> Trio:
    """A small model with and without its adapter, and a larger one of the other family."""
    small = model(family, 1)
    large = model("llama" if family == "gpt2" else "gpt2", 2, 3)
    box = black_boxes.box(Speaker(large))
    tuned = Speaker(small, adapter(small, 3, scale))
    return Trio(box, tuned, Speaker(small), tokenizer, VOCABULARY, frozenset({END}) if ends is None else ends)


def prompts(seed: int, n: int, longest: int = 12) -> list[list[int]]:
    """Of unequal lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, size=int(k)).tolist() for k in rng.integers(1, longest + 1, size=n)]


def plain_logits(full: Any, ids: list[int]) -> Tensor:
    """(tokens, V) of a whole text alone, by transformers without a cache."""
    with torch.no_grad():
        logits: Tensor = full(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def byte_tokenizer(words: Sequence[str] = ()) -> Any:
    """Byte-level, so that a character may be several tokens; `<end>` is 0, byte b is 1 + its place, then words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet, *words])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
