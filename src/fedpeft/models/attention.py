"""One attention function for every family: the stock one of transformers, with a layer's prefix where it has one.

Keys and values of a prefix come before a layer's own, after rotary encoding and before heads are repeated for grouped
queries; every token sees them. The positions of the text stay what they are, and a key/value cache never holds the
prefix. The function is registered under its own name, so no model is changed: a forward pass is given `prefixes`, which
transformers hands down to the attention function as it is. Where a layer has no prefix, the stock function gets the
very arguments that it would have got.

The mask function must be registered under the same name, or encoders see padding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fedpeft.models.adapters import Prefixed

NAME = "fedpeft"  # what the configuration of a model says in memory; transformers never writes it to a file
STOCK = "sdpa"

Attention: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]


def with_prefixes(stock: Attention) -> Attention:
    """An attention function of transformers that knows the keyword `prefixes`: attention module -> Prefixed."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        prefixes: Mapping[nn.Module, Prefixed] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        prefix = prefixes.get(module) if prefixes else None
        if prefix is not None:
            given = kwargs.get("is_causal")
            causal = bool(getattr(module, "is_causal", True) if given is None else given)
            key, value, attention_mask = extend(query.shape[2], key, value, attention_mask, prefix, causal)
        return stock(module, query, key, value, attention_mask, **kwargs)

    return attend


def extend(
    tokens: int, key: Tensor, value: Tensor, mask: Tensor | None, prefix: Prefixed, causal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask with the prefix to the left.

    Args:
        tokens: number of queries.
        key, value: (rows, key/value heads, keys, head size)
        mask: (rows or 1, 1 or heads, tokens or 1, keys), False or minus infinity where a key is hidden; None: none is,
            but those to the right of a token where `causal`.
        causal: whether the stock function hides what is to the right where it gets no mask. It aligns its own mask
            to the upper left, which is wrong for more keys than queries, so the mask is built here.

    Returns:
        key and value (rows, key/value heads, P + keys, head size); mask (.., P + keys), None where nothing is hidden.
    """
    if mask is None and causal and tokens > 1:
        key, value = key[:, :, :tokens], value[:, :, :tokens]  # what the stock function does: a static cache is longer
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=key.device).tril()
    if mask is not None or prefix.seen is not None:
        mask = _widen(mask, prefix, key)
    shape = (len(key), *prefix.key.shape[1:])
    key = torch.cat([prefix.key.to(key.dtype).expand(shape), key], dim=2)
    value = torch.cat([prefix.value.to(value.dtype).expand(shape), value], dim=2)
    return key, value, mask


def _widen(mask: Tensor | None, prefix: Prefixed, key: Tensor) -> Tensor:
    """The mask with P columns more on the left, hidden where the prefix is not `seen`."""
    if mask is None:
        mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    shown, hidden = (1, 0) if mask.dtype is torch.bool else (0, -math.inf)
    left = mask.new_full((*mask.shape[:3], prefix.key.shape[2]), shown)
    if prefix.seen is not None:
        left = left.masked_fill(~prefix.seen[:, None, None, :], hidden)
    return torch.cat([left, mask.expand(len(left), -1, -1, -1)], dim=3)


# --- models ---


def install(module: Any) -> bool:
    """Let a transformer of transformers take prefixes, where it attends by the stock function; says whether it does.

    Its configuration is copied first: another model may have been made from the same object.
    """
    if getattr(module, "_supports_attention_backend", False) and _name(module) == STOCK:
        _register()
        seen: dict[int, Any] = {}  # one copy of each configuration, whoever holds it
        for inner in module.modules():
            if hasattr(inner, "config"):
                inner.config = copy.deepcopy(inner.config, seen)
        _rename(module, STOCK, NAME)
    return installed(module)


def installed(module: Any) -> bool:
    """Whether prefixes reach the transformer's attention."""
    return _name(module) == NAME


def uninstall(module: Any) -> None:
    """Back to the stock function, so that a model works where fedpeft is not."""
    _rename(module, NAME, STOCK)


def _name(module: Any) -> str | None:
    name: str | None = getattr(module.config, "_attn_implementation", None)
    return name


def _rename(module: Any, old: str, new: str) -> None:
    for inner in module.modules():
        if hasattr(inner, "config") and _name(inner) == old:
            inner.config._attn_implementation = new


@cache
def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, with_prefixes(ALL_ATTENTION_FUNCTIONS[STOCK]))
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[STOCK])
