"""Softened targets of hard rows (`Fit.soften`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpeft.core.fit import Fit, Soften
from fedpeft.models.readouts import Item


def softened(losses: Tensor, items: Sequence[Item], fits: Sequence[Fit]) -> Tensor:
    """The losses, with smaller gradients where a client's Fit says so.

    A mix of the label and the model's own distribution, held fixed, makes the gradient (1 - share) times as large.

    Args:
        losses: (items,)
        fits: by client.
    """
    if not any(fit.soften for fit in fits):
        return losses
    soft = [fits[item.client].soften or Soften(float("inf"), 0.0) for item in items]
    bounds, shares = (losses.new_tensor(v) for v in ([s.threshold for s in soft], [s.share for s in soft]))
    fixed = losses.detach()
    return torch.where(fixed > bounds, (1 - shares) * losses + shares * fixed, losses)
