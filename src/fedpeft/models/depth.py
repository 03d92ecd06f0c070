"""A transformer that passes through some of its blocks alone, and is otherwise the very same.

It is made of shallow copies of the modules that lead to the blocks. The blocks, with their weights and hooks, and all
other parts are the same objects in both, and have the same paths: block 5 stays block 5 where 4 is left out.

Reference: layer drop as compression, Xiao et al. 2023, arXiv 2302.04870.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from fedpeft.core.errors import ModelError
from fedpeft.models.families import FAMILIES, KNOWN_MODELS, block_paths


def shortened(module: Any, model_type: str, blocks: Sequence[int]) -> Any:
    """The transformer with these blocks alone.

    Raises:
        ModelError: a family whose blocks are not known; blocks that it does not have, or not in ascending order.
    """
    paths = block_paths(module, model_type)
    if not paths:
        raise ModelError(
            f"blocks can be left out where they are known, and those of the family {model_type!r} are not; "
            f"use {KNOWN_MODELS}"
        )
    if list(blocks) != sorted(set(blocks)) or blocks[-1] >= len(paths):
        raise ModelError(
            f"blocks {', '.join(map(str, blocks))} are not what the model has; give some of 0 to {len(paths) - 1}, "
            "ascending"
        )
    config = copy.deepcopy(module.config)
    config.num_hidden_layers = len(blocks)
    if getattr(config, "layer_types", None):  # which mask each block gets, in the order of the pass
        config.layer_types = [config.layer_types[i] for i in blocks]
    whole = short = _shallow(module, config)
    for part in FAMILIES[model_type][0].split("."):
        inner = _shallow(short._modules[part], config)
        short._modules[part] = inner
        short = inner
    short._modules = {name: block for name, block in short._modules.items() if int(name) in blocks}
    return whole


def _shallow(module: Any, config: Any) -> Any:
    """A module of its own with the same children, weights and hooks."""
    made: nn.Module = copy.copy(module)
    made._modules = dict(module._modules)
    if hasattr(made, "config"):
        made.config = config
    return made
