"""What is read of a transformer's configuration: sizes under their several names, and what each family has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeft.core.errors import ModelError

FAMILIES = {  # by model_type: what it is built like
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "electra": "bert",
    "gpt2": "gpt2",
    "opt": "opt",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "gemma": "llama",
}
_UNFUSED = ("gelu_new", "gelu_fast", "gelu_python", "quick_gelu")  # written out in transformers, product by product


def family_of(config: Mapping[str, Any]) -> str:
    """What the model is built like: bert, roberta, gpt2, opt, llama, or generic where it is not known."""
    return FAMILIES.get(str(config.get("model_type")), "generic")


def most_tokens(config: Mapping[str, Any]) -> int | None:
    """How many tokens the model was made for, None where its positions have no end or its configuration is silent.

    RoBERTa counts positions from the padding's id on, so that many and one are no tokens'.
    """
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if positions is None or family_of(config) != "roberta":
        return positions
    padding = config.get("pad_token_id")
    return int(positions) - (1 if padding is None else int(padding)) - 1


def details(config: Mapping[str, Any], family: str, hidden: int, head_size: int) -> dict[str, Any]:
    """What a family has beside its matrices, as fields of `cost.Shape`.

    A family that is not known is taken to be built like BERT. Where a configuration leaves a key out, the
    defaults are those of transformers 5.23.
    """
    kind = str(config.get("model_type"))
    given = config.get("hidden_act") or config.get("activation_function") or config.get("hidden_activation")
    activation = str(given or {"gpt2": "gelu_new", "llama": "silu", "opt": "relu"}.get(family, "gelu"))
    copies = 4 if activation in _UNFUSED else 0 if activation == "relu" else 1
    tied = bool(config.get("tie_word_embeddings", kind in ("gemma",) or family != "llama"))
    found: dict[str, Any] = {"tied": tied, "activation_copies": copies}
    if family == "llama":
        biased: tuple[str, ...] = ("query", "key", "value") if config.get("attention_bias") or kind == "qwen2" else ()
        biased += ("output",) if biased and kind != "qwen2" else ()
        biased += ("gate", "up", "down") if config.get("mlp_bias") else ()
        norms = 2 * hidden + (2 * head_size if kind == "qwen3" else 0)  # Qwen 3 has norms of query and key
        return found | {"biased": biased, "block_norms": norms, "outer_norms": hidden, "pre_norm": True}
    plain = ("query", "key", "value", "output", "up", "down")
    if family == "gpt2":
        positions = size(config, "n_positions", "max_position_embeddings", default=1024)
        more = {"block_norms": 4 * hidden, "outer_norms": 2 * hidden, "pre_norm": True}
        return found | more | {"biased": plain, "positions": positions}
    if family == "opt":  # built like GPT-2, its matrices apart, and two positions more than texts have
        one_width(config, hidden)
        before = bool(config.get("do_layer_norm_before", True))
        places = size(config, "max_position_embeddings", default=2048) + 2
        more = {"block_norms": 4 * hidden, "outer_norms": 2 * hidden * before, "pre_norm": before}
        return found | more | {"biased": plain, "positions": places}
    embedding = size(config, "embedding_size", default=hidden) if kind == "electra" else hidden
    return found | {
        "biased": plain,
        "block_norms": 4 * hidden,
        "outer_norms": 2 * embedding,
        "positions": size(config, "max_position_embeddings", default=512),
        "token_types": size(config, "type_vocab_size", default=2) if family in ("bert", "roberta") else 0,
        "embedding": 0 if embedding == hidden else embedding,
    }


def one_width(config: Mapping[str, Any], hidden: int) -> None:
    """Raise ModelError where embeddings have another width than the blocks, and states are projected back to it."""
    width = config.get("word_embed_proj_dim") or hidden
    if width != hidden:
        raise ModelError(
            f"the model's embeddings have {width} numbers and its blocks {hidden} (word_embed_proj_dim, hidden_size); "
            "models of two widths, such as opt-350m, cannot be used: take another size, such as opt-125m or opt-1.3b"
        )


def size(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The size under the first of these names that is there.

    Raises:
        ModelError: it is not a positive whole number, or no name is there and no default was given.
    """
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
