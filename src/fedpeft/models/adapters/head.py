"""The classification head with a client axis: one linear layer on the pooled last hidden state.

Parameters: `head.weight` (classes, d), `head.bias` (classes,). Encoders are pooled by the mean over real tokens,
decoders by the last real token. Both are linear in the token's state, so the head is also a token classifier of
transformers whose logits are pooled afterwards: that is how it is exported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.core.rng import Rng
from fedpeft.models.adapters import Layer, Rows

WEIGHT, BIAS = "head.weight", "head.bias"


def init(classes: int, width: int, rng: Rng) -> dict[str, Tensor]:
    """Weights N(0, 0.02²) as in BERT, bias zero."""
    weight = rng.normal(0, 0.02, size=(classes, width)).astype(np.float32)
    return {WEIGHT: torch.from_numpy(weight), BIAS: torch.zeros(classes)}


def pool(hidden: Tensor, mask: Tensor, lengths: Tensor, last: bool) -> Tensor:
    """(rows, d) from the last hidden state (rows, tokens, d), in float32 or wider: 1 / length needs the digits."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if last:
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    weights = mask.to(hidden.dtype) / lengths[:, None].to(hidden.dtype)
    return torch.bmm(weights[:, None], hidden).squeeze(1)


def apply(layer: Layer, pooled: Tensor, rows: Rows, classes: Sequence[int]) -> Tensor:
    """(rows, classes) logits; a client with fewer classes than another in the same pass has minus infinity there.

    Args:
        layer: `head.weight` (clients, classes, d) and `head.bias` (clients, classes).
        pooled: (rows, d)
        classes: number of classes of each client.
    """
    weight, bias = rows.pick(layer[WEIGHT]), rows.pick(layer[BIAS])
    pooled = pooled.to(weight.dtype)
    if rows.client is None:
        own = classes[rows.only]
        return F.linear(pooled, weight[:own], bias[:own])
    logits = torch.baddbmm(bias[:, :, None], weight, pooled[:, :, None]).squeeze(2)
    if min(classes) < weight.shape[1]:
        most = torch.tensor(classes, device=logits.device)[rows.client]
        beyond = torch.arange(weight.shape[1], device=logits.device) >= most[:, None]
        logits = logits.masked_fill(beyond, -math.inf)
    return logits
