"""Adapters with a client axis: each keeps its parameters as (clients, ...) and picks, per row, its client's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Applied = Callable[[Tensor, Tensor], Tensor]  # (input, output) of a module -> its new output


@dataclass(frozen=True)
class Rows:
    """Whose rows are in a forward pass.

    Attributes:
        client: (rows,) index on the client axis; None where all rows are of the one client `only`.
        only: that client.
        keys: (rows,) keys of the dropout noise; None: no dropout.
        drop: (rows,) probability of dropping.
    """

    client: Tensor | None
    only: int = 0
    keys: Tensor | None = None
    drop: Tensor | None = None

    def pick(self, stacked: Tensor) -> Tensor:
        """(rows, ...) each row's own tensor; (...) where there is one client."""
        if self.client is None:
            return stacked[self.only] if stacked.shape[0] > 1 else stacked.view(stacked.shape[1:])
        return stacked.index_select(0, self.client)


Layer = Mapping[str, Tensor]  # parameters of one adapter layer, (clients, ...)
