"""Tiny random language models with their heads, and tokenizers that people have beside such models."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny
from fedpeft.core.adapter import Lora
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import LmHead, lm_head_of
from fedpeft.models.load import Base, freeze
from fedpeft.models.readouts import Readout

WORDS = ["once", "upon", "a", "time", "it", "was", "they", "are", "good", "bad", "odd", "film", ".", ",", "?"]
BYTES = ["Ġ", *(chr(c) for c in range(ord("!"), ord("~") + 1))]


def language_model(family: str, tied: bool = True) -> Any:
    """The language model of a family in float64, with weights large enough that every part of the head matters."""
    return _language_model(family, tied)


def base(family: str, tied: bool = True) -> Base:
    """The frozen transformer within it; one object for all tests."""
    return _base(family, tied)


def lm_head(family: str, tied: bool = True) -> LmHead:
    """Its head."""
    return lm_head_of(language_model(family, tied), base(family, tied))


@cache
def _language_model(family: str, tied: bool) -> Any:
    kind = transformers.AutoModelForMaskedLM if family in ("bert", "roberta", "electra") else None
    config = tiny.config("bert" if family == "electra" else family)
    if family == "electra":
        own = {key: getattr(config, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
        config = transformers.ElectraConfig(
            **own, embedding_size=16, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64
        )
    config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = (kind or transformers.AutoModelForCausalLM).from_config(config).double().eval()
        with torch.no_grad():
            for weight in made.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.2)
    return made


@cache
def _base(family: str, tied: bool) -> Base:
    return freeze(language_model(family, tied).base_model, None, f"tiny-{family}-lm-{tied}", tiny.CPU)


def model(family: str, readout: Readout, budget: int = 2048) -> HFModel:
    """LoRA of rank 4 on query and value over it, in a task format."""
    return HFModel(base(family), Lora(rank=4, alpha=6.0), readout.classes, budget, readout)


def word_tokenizer() -> Any:
    """A WordPiece tokenizer with BERT's frame; `goodish` has two tokens, unknown characters are [UNK]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##ish"]
    inner = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def byte_tokenizer(frame: str = "gpt2") -> Any:
    """A byte-level BPE whose merges make words with their blank; RoBERTa's frame has <s>, </s> and a greedy <mask>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<s>", "</s>", "<pad>", "<unk>"] if frame == "roberta" else ["<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *BYTES])}
    merges = []
    for word in [f"Ġ{w}" for w in WORDS if w.isalpha()]:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    if frame == "gpt2":
        return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    inner.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )  # fmt: skip


def save(family: str, tokenizer: Any, folder: Path, vocabulary: int, positions: int = 32, blocks: int = 2) -> Path:
    """A random language model of so many blocks with a tokenizer, in Hugging Face format."""
    sizes = {"hidden_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 2, "intermediate_size": 64}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": blocks, "n_head": 2, "n_inner": 64}
    where = "n_positions" if family == "gpt2" else "max_position_embeddings"
    config = transformers.AutoConfig.for_model(
        family, vocab_size=vocabulary, initializer_range=0.2, **{where: positions}, **sizes
    )
    masked = family in ("bert", "roberta")
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
