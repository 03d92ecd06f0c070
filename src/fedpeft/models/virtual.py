"""Forward passes with tokens before those of the text: soft prompts, and prompts that are made of the text.

At the embeddings, prompt tokens take the first positions and move the text's (as in PEFT's prompt tuning); the text's
token types stay, those of a prompt are 0. The states that come back are the text's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fedpeft.core.errors import ModelError
from fedpeft.models.adapters import Text, Virtual
from fedpeft.models.load import Base
from fedpeft.models.parts import Batch


def run(base: Base, batch: Batch, inputs: Mapping[str, Any], virtual: Virtual) -> Tensor:
    """(rows, tokens, d) last hidden states of the text's own tokens.

    Args:
        inputs: what the base takes without the prompt.
    """
    if virtual.block is not None:
        raise ModelError("a late prompt is not built yet")
    embedded = base.module.get_input_embeddings()(inputs["input_ids"])
    prompt = virtual.make(Text(embedded, batch.mask, lambda: _sentence(base, batch, inputs)))
    seen = virtual.seen
    if seen is None:
        seen = torch.ones(len(embedded), virtual.count, dtype=torch.bool, device=embedded.device)
    given = {k: v for k, v in inputs.items() if k != "input_ids"}
    given["inputs_embeds"] = torch.cat([prompt.to(embedded.dtype), embedded], dim=1)
    given["attention_mask"] = torch.cat([seen, batch.mask], dim=1).to(torch.int64)
    if "token_type_ids" in given:
        types = given["token_type_ids"]
        given["token_type_ids"] = torch.cat([types.new_zeros(len(types), virtual.count), types], dim=1)
    return cast(Tensor, base.module(**given).last_hidden_state)[:, virtual.count :]


def _sentence(base: Base, batch: Batch, inputs: Mapping[str, Any]) -> Tensor:
    """(rows, d) mean state of each row's own tokens in the frozen base, without any adapter."""
    raise ModelError("sentence vectors are not built yet")
