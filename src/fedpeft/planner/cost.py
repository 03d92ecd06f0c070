"""What a transformer costs in floating point operations, from its configuration alone.

Counted are the matrix products of the blocks, two operations per multiply-add. Embeddings, norms, activations, biases,
the classification head and the adapters are neglected: at rank 8 LoRA on query and value adds 3 r / 2 d of the blocks'
forward products (about 0.3 % for d = 4096 and 3 % for d = 384). Per token a block has four attention projections and
two or three of the feed-forward part; per pair of tokens that see each other there are two products of the heads'
total width (scores, and their mix of values). Causal models are counted over the full square, as kernels compute it.

Where a base's own weights train, each matrix costs a product more, which `Fitted.products` counts (see
`models/adapters/full.py`); it is the same for every family, two operations per number and token.

A language model's head is counted for the share of the tokens whose states enter it (a mask, an answer), without what a
masked model does to a state before the projection. A forward pass alone counts the whole vocabulary too, although a
cloze prediction computes the label words' columns only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft.core.errors import ModelError

FAMILIES = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "electra": "bert",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "gemma": "llama",
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer that decide what it costs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int  # fewer than heads where keys and values are shared (grouped queries)
    intermediate: int  # width inside the feed-forward part
    vocab: int
    family: str  # bert, roberta, gpt2, llama or generic
    head_size: int
    mlp_matrices: int = 2  # 3 where the feed-forward part is gated
    lm_head: bool = False  # whether tokens also go through the output projection onto the vocabulary
    lm_share: float = 1.0  # share of the tokens that do: those at a mask or in an answer, say

    @property
    def lower_flops(self) -> int:
        """Per token: the products of one block that read its input, query, key and value."""
        return 2 * self.hidden * self.head_size * (self.heads + 2 * self.kv_heads)

    @property
    def upper_flops(self) -> int:
        """Per token: the products of one block after attention, output projection and feed-forward part."""
        return 2 * self.hidden * (self.heads * self.head_size + self.mlp_matrices * self.intermediate)

    @property
    def pair_flops(self) -> int:
        """Per pair of tokens: scores and mix of values in one block."""
        return 4 * self.heads * self.head_size

    @property
    def head_flops(self) -> int:
        """Per token: the output projection onto the vocabulary, as a mean over all tokens."""
        return round(2 * self.hidden * self.vocab * self.lm_share) if self.lm_head else 0


def shape_of(config: Mapping[str, Any], lm_head: bool = False) -> Shape:
    """The shape that a model's configuration describes (`config.json`, or `config.to_dict()` of transformers).

    Args:
        config: keys as BERT, GPT-2 and Llama name them; another model type is read with the same names ("generic").
        lm_head: whether the model predicts tokens; a classifier has no projection onto the vocabulary.

    Raises:
        ModelError: a size is missing or not a positive whole number.
    """
    layers = _size(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    hidden = _size(config, "hidden_size", "n_embd", "d_model", "dim")
    heads = _size(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    gated = _is_gated(config)
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", default=heads),
        intermediate=_size(config, "intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "d_ff", default=4 * hidden),
        vocab=_size(config, "vocab_size"),
        family=FAMILIES.get(str(config.get("model_type")), "generic"),
        head_size=_size(config, "head_dim", default=hidden // heads),
        mlp_matrices=3 if gated else 2,
        lm_head=lm_head,
    )


def _is_gated(config: Mapping[str, Any]) -> bool:
    family = FAMILIES.get(str(config.get("model_type")), "generic")
    return family == "llama" or (family == "generic" and config.get("hidden_act") in ("silu", "swiglu"))


def _size(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"the model's configuration says {name}: {value!r}; it must be a positive whole number")
        return value
    if default is None:
        raise ModelError(f"the model's configuration has none of {', '.join(names)}; its cost cannot be counted")
    return default


def forward_flops(shape: Shape, tokens: int, pairs: int) -> int:
    """Operations of a forward pass over rows of `tokens` in total, whose squared lengths sum to `pairs`."""
    per_token = shape.layers * (shape.lower_flops + shape.upper_flops) + shape.head_flops
    return per_token * tokens + shape.layers * shape.pair_flops * pairs


def train_flops(shape: Shape, tokens: int, pairs: int, lowest_block: int = 0) -> int:
    """Operations of a forward pass and of the gradients that adapters in a frozen base need.

    A frozen matrix has no gradient of its own, so the backward pass costs one product per matrix, not two, and
    attention four products where the forward pass has two. It ends in the lowest adapted block, below whose query, key
    and value nothing asks for a gradient. What a kernel computes again to save memory is not counted.

    Args:
        tokens: real tokens trained on, repeats counted.
        pairs: sum of the squared lengths of the same rows.
        lowest_block: the lowest block that holds an adapter; `shape.layers` means that only the head is trained.
    """
    if not 0 <= lowest_block <= shape.layers:
        raise ModelError(f"block {lowest_block} does not exist; the model has blocks 0 to {shape.layers - 1}")
    whole = shape.layers - lowest_block  # blocks that the gradient enters
    passed = max(whole - 1, 0)  # blocks that it leaves again at the bottom
    per_token = whole * shape.upper_flops + passed * shape.lower_flops
    per_token += shape.head_flops if whole else 0
    return forward_flops(shape, tokens, pairs) + per_token * tokens + 2 * whole * shape.pair_flops * pairs
