"""Gradient checkpointing of a base's blocks: the backward pass computes a block again instead of keeping its inside.

A block's own hooks (late prompts) stay outside of what is computed again; the hooks of the modules inside it, through
which adapters act, are called again, so adapters must stay in place until the backward pass has ended. Nothing in a
pass draws from a running generator, so the same numbers come out.

Reference: Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import checkpoint

from fedpeft.models.families import block_paths
from fedpeft.models.load import Base


@contextmanager
def checkpointed(base: Base) -> Iterator[None]:
    """Passes through the blocks keep only what enters each of them, as long as the context lasts."""
    blocks = [base.module.get_submodule(path) for path in block_paths(base.module, base.family)]
    for block in blocks:
        block.__dict__["forward"] = _again(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)  # what it takes is looked up by others
    def passed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return passed
