"""OPT's blocks with rows and tokens apart.

transformers lays all tokens of all rows behind each other before an OPT block's feed-forward part, (rows * tokens, d).
What acts there by row (a client's adapter, its dropout, a gradient per row) then cannot tell whose a token is. Here
the block computes the same and keeps (rows, tokens, d), as every other family does.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from fedpeft.core.errors import ModelError


def keep_rows_apart(module: Any) -> None:
    """Let the blocks of an OPT model of transformers keep their rows; its weights and numbers stay what they are.

    Raises:
        ModelError: its embeddings, and so its last states, have another width than its blocks, as in opt-350m.
    """
    width, hidden = module.config.word_embed_proj_dim, module.config.hidden_size
    if width != hidden:
        raise ModelError(
            f"the model's embeddings have {width} numbers and its blocks {hidden} (word_embed_proj_dim, hidden_size); "
            "models of two widths, such as opt-350m, cannot be used: take another size, such as opt-125m or opt-1.3b"
        )
    for block in module.decoder.layers:
        block.__class__ = _block_class()


def stock_blocks(module: Any) -> None:
    """Back to transformers' own blocks."""
    for block in module.decoder.layers:
        block.__class__ = _block_class().__bases__[0]


@cache
def _block_class() -> Any:
    from transformers.models.opt.modeling_opt import OPTDecoderLayer

    class Block(OPTDecoderLayer):  # type: ignore[no-untyped-call]
        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            past_key_values: Any = None,
            use_cache: bool | None = False,
            position_ids: Any = None,
            **kwargs: Any,
        ) -> Tensor:
            given = {"attention_mask": attention_mask, "past_key_values": past_key_values, "position_ids": position_ids}
            before = self.do_layer_norm_before  # all sizes but 350m

            x = self.self_attn_layer_norm(hidden_states) if before else hidden_states
            x, _ = self.self_attn(hidden_states=x, **given, **kwargs)
            x = hidden_states + F.dropout(x, self.dropout, self.training)
            x = x if before else self.self_attn_layer_norm(x)

            y = self.final_layer_norm(x) if before else x
            y = self.fc2(self.activation_fn(self.fc1(y)))
            x = x + F.dropout(y, self.dropout, self.training)
            return cast(Tensor, x if before else self.final_layer_norm(x))

    return Block
