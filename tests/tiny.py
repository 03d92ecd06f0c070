"""Tiny random transformers of every family, their data, and adapters whose effect can be seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from fedpeft.core.adapter import AdapterSpec, Lora
from fedpeft.core.examples import Examples
from fedpeft.core.rng import Rng, rng_for
from fedpeft.models.families import KINDS
from fedpeft.models.hf import HFModel
from fedpeft.models.load import Base, freeze

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

FAMILIES = ("bert", "roberta", "gpt2", "llama")
VOCABULARY, WIDTH, BLOCKS = 60, 32, 3
CPU = torch.device("cpu")


def config(family: str) -> Any:
    """Three blocks of width 32; Llama with grouped queries."""
    own: dict[str, Any]
    if family in ("bert", "roberta"):
        own = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 48}
        own |= {"pad_token_id": 1, "type_vocab_size": 1} if family == "roberta" else {}
    elif family == "gpt2":
        own = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 4, "n_inner": 48, "bos_token_id": 1, "eos_token_id": 2}
    elif family == "llama":
        own = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2}
        own |= {"intermediate_size": 48}
    elif family == "opt":
        own = {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
        }
        own |= {"ffn_dim": 48, "dropout": 0.0, "pad_token_id": 1, "eos_token_id": 2, "activation_function": "gelu"}
    elif family == "distilbert":
        own = {"dim": WIDTH, "n_layers": BLOCKS, "n_heads": 4, "hidden_dim": 48}
    else:  # gpt_neox
        own = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 48}
    positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
    return transformers.AutoConfig.for_model(family, vocab_size=VOCABULARY, **{positions: 64}, **own)


def module(family: str, seed: int = 0) -> Any:
    """A random transformer in float64, with weights large enough that every projection matters."""
    extra = {"add_pooling_layer": False} if family in ("bert", "roberta") else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = transformers.AutoModel.from_config(config(family), **extra).double()
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if weight.dim() == 2 and "embed" not in name and "wpe" not in name and "wte" not in name:
                    weight.normal_(0, 0.2)
    return made


@cache
def base(family: str, dtype: str = "float64") -> Base:
    """The frozen transformer of a family, one object for all tests."""
    return freeze(module(family).to(getattr(torch, dtype)), None, f"tiny-{family}", CPU)


def model(
    family: str = "bert", spec: AdapterSpec | None = None, dtype: str = "float64", classes: int = 3, budget: int = 2048
) -> HFModel:
    """The model of a family; by default LoRA of rank 4 on query and value."""
    return HFModel(base(family, dtype), Lora(rank=4, alpha=6.0) if spec is None else spec, classes, budget)


def everything(family: str) -> tuple[str, ...]:
    """All projections of a family by name."""
    return tuple(kind for kind in KINDS if kind != "gate" or family == "llama")


def examples(rng: Rng, rows: int, classes: int = 3, longest: int = 12, segments: bool = False) -> Examples:
    """Random tokens of 1 to `longest` tokens a row."""
    lengths = rng.integers(1, longest + 1, size=rows)
    tokens = tuple(rng.integers(5, VOCABULARY, size=n).astype(np.int32) for n in lengths)
    types = tuple((np.arange(n) >= n // 2).astype(np.int32) for n in lengths) if segments else None
    return Examples(tokens, rng.integers(0, classes, size=rows), types)


def params(
    of: HFModel, rng: Rng, rank: int | None = None, classes: int | None = None, slots: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """An adapter and a head whose every number matters, in the dtype of the base."""
    drawn: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in of.slots if slots is None else slots:
        slot = of.places[name]
        r = rank if rank is not None else of.spec.rank
        shapes |= {f"{name}.A": (r, slot.d_in), f"{name}.B": (slot.d_out, r)}
    count = of.classes if classes is None else classes
    shapes |= {"head.weight": (count, of.width), "head.bias": (count,)}
    for name, shape in shapes.items():
        drawn[name] = torch.from_numpy(rng.normal(0, 0.2, size=shape)).to(of.base.dtype)
    return drawn


def place(seed: int = 0) -> Rng:
    """A generator for one test."""
    return rng_for(seed, "test")


def saved(family: str, folder: Path, dtype: str = "float64") -> Path:
    """The base of a family in Hugging Face format."""
    base(family, dtype).module.save_pretrained(folder)
    return folder


def token_classifier(folder: Path, classes: int, dtype: str = "float64") -> Any:
    """The same base as transformers loads it for token classification."""
    return transformers.AutoModelForTokenClassification.from_pretrained(
        folder, num_labels=classes, dtype=getattr(torch, dtype)
    ).eval()


def padded(data: Examples, pad: int) -> dict[str, Tensor]:
    """All rows as one batch, padded on the right, made the plain way."""
    longest = int(data.lengths.max())
    ids = torch.full((len(data), longest), pad)
    mask = torch.zeros(len(data), longest, dtype=torch.int64)
    types = torch.zeros(len(data), longest, dtype=torch.int64)
    for i, own in enumerate(data.tokens):
        ids[i, : len(own)] = torch.from_numpy(own)
        mask[i, : len(own)] = 1
        if data.segments is not None:
            types[i, : len(own)] = torch.from_numpy(data.segments[i])
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | {"token_type_ids": types} if data.segments is not None else batch


def pooled(logits: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Token logits (rows, tokens, classes) as logits of the rows, by a plain loop."""
    rows = []
    for own, real in zip(logits, mask, strict=True):
        kept = own[real.bool()]
        rows.append(kept[-1] if pooling == "last" else kept.mean(dim=0))
    return torch.stack(rows)


def plain_logits(classifier: Any, data: Examples, pooling: str, pad: int = 0) -> Tensor:
    """(rows, classes) of a token classifier of transformers or peft, pooled."""
    batch = padded(data, pad)
    return pooled(classifier(**batch).logits, batch["attention_mask"], pooling)


def saved_shapes(run: Callable[[], object]) -> list[tuple[int, ...]]:
    """Shapes of the tensors that autograd keeps."""
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        run()
    return kept
