"""What training costs beside the passes through frozen blocks that `planner.cost.train_flops` counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedpeft.core.fit import Fit
from fedpeft.core.tree import block_of
from fedpeft.models.families import Slot


def of_factors(fit: Fit, lowest: int, tokens: int) -> int:
    """Multiply-adds of the matrices of adapters that every token goes through: factors, triplets, bottlenecks.

    Per number and token one forward and one for the gradient of the input, one more for its own where it trains, and
    one more with checkpointing; below the lowest block that trains the forward pass alone.

    Args:
        lowest: the lowest block that the backward pass enters.
        tokens: that go through the blocks.
    """
    trained, total = frozenset(fit.trained), 0
    for place, layer in enumerate((fit.params, *fit.also)):
        for name, value in layer.items():
            block = block_of(name)
            if block is None or value.dim() != 2:  # a head, a bias, a prefix (2, P, d)
                continue
            back = (1 + (place == 0 and name in trained) + fit.checkpointing) if block >= lowest else 0
            total += (1 + back) * value.numel()
    return total * tokens


def computed_again(places: Mapping[str, Slot], blocks: Collection[int], tokens: int, pairs: int) -> int:
    """Multiply-adds of a forward pass through these blocks: what checkpointing costs."""
    total = 0
    for slot in places.values():
        if block_of(slot.name) in blocks:
            total += slot.d_in * slot.d_out * tokens + _attention(slot, 2, pairs)
    return total


def saved(places: Mapping[str, Slot], kept: Collection[int], lowest: int, tokens: int, pairs: int) -> int:
    """Multiply-adds that frozen blocks would have cost which were left out of training.

    A block has one product per matrix, and two of attention; on the way back, above the lowest block that trains, one
    per matrix and four of attention.

    Args:
        places: every projection of the whole model.
        kept: blocks that were not left out.
        lowest: the lowest block that the backward pass enters.
        tokens, pairs: as in `Objective.cost`.
    """
    total = 0
    for slot in places.values():
        block = block_of(slot.name)
        if block is None or block in kept:
            continue
        back = block > lowest
        total += (1 + back) * slot.d_in * slot.d_out * tokens
        total += _attention(slot, 2 + 4 * back, pairs)
    return total


def _attention(slot: Slot, products: int, pairs: int) -> int:
    """Multiply-adds of so many products of attention, counted with the projection whose input attention gives."""
    return products * slot.d_in * pairs if slot.name.endswith(".output") else 0
