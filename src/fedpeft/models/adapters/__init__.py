"""Adapters with a client axis: each keeps its parameters as (clients, ...) and picks, per row, its client's.

An `Adapter` is one kind of trainable parameters over one base. It holds no parameters itself; in a forward pass it
puts those of all clients in place, by what it adds to the base's `Acting`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor, nn

from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params

if TYPE_CHECKING:
    from fedpeft.models.families import Slot
    from fedpeft.models.load import Base

Applied = Callable[[Tensor, Tensor], Tensor]  # (input, output) of a module -> its new output
Layer = Mapping[str, Tensor]  # parameters of one adapter layer, (clients, ...)
Shape: TypeAlias = tuple[int | None, ...]  # None: a size that may differ between clients
Sizes: TypeAlias = Mapping[str, tuple[tuple[int, ...] | None, ...]]  # each client's own shape under a name; None: lacks
Partner: TypeAlias = tuple[str, int, int]  # the other side of a pair, and the two dimensions that must agree
Network: TypeAlias = tuple[tuple[str, ...], str, str]  # all names of a network, and the two layers that meet inside


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


@dataclass(frozen=True)
class Prefixed:
    """Keys and values before those of a layer's own tokens; every token sees them.

    Attributes:
        key, value: (rows, key/value heads, P, head size); rows is 1 where all rows share them.
        seen: (rows, P) False where a client's prefix is shorter than the longest; None: all are seen.
    """

    key: Tensor
    value: Tensor
    seen: Tensor | None = None


@dataclass(frozen=True)
class Text:
    """The text of a forward pass, as a prompt that is made of it sees it.

    Attributes:
        states: (rows, tokens, d) embeddings of the tokens, or for a late prompt the states that enter its block.
        mask: (rows, tokens) True at real tokens before an answer; they come first.
        sentence: gives (rows, d), the frozen base's own mean state of each row, without any adapter.
    """

    states: Tensor
    mask: Tensor
    sentence: Callable[[], Tensor]


@dataclass(frozen=True)
class Virtual:
    """Tokens put before those of the text.

    Attributes:
        count: P, how many.
        make: gives (rows, P, d) from the text.
        seen: (rows, P) False where a client has fewer; None: all are seen.
        block: the block whose input they are put before; None: the embeddings, and positions count them.
    """

    count: int
    make: Callable[[Text], Tensor]
    seen: Tensor | None = None
    block: int | None = None


@dataclass
class Acting:
    """What adapters do in the forward pass that is going on; empty between passes.

    Attributes:
        outputs: what changes a module's output, in this order.
        prefixes: keys and values of attention modules.
        virtual: tokens before the text; at most one adapter brings some.
        weights: by path, what takes the place of the base's own weight; of one client, as a pass has one set of them.
    """

    outputs: dict[nn.Module, list[Applied]] = field(default_factory=dict)
    prefixes: dict[nn.Module, Prefixed] = field(default_factory=dict)
    virtual: Virtual | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Nothing acts."""
        self.outputs.clear()
        self.prefixes.clear()
        self.virtual = None
        self.weights.clear()


class Adapter(Protocol):
    """One kind of adapter over one base; immutable."""

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The projections that the specification names, where the kind acts on projections."""
        ...

    @property
    def partners(self) -> Mapping[str, Partner]:
        """By last part of a name: the side without which it means nothing."""
        ...

    @property
    def networks(self) -> Sequence[Network]:
        """Networks of two layers: all of one's names or none, and the inner sizes of its two layers are one."""
        ...

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Fresh parameters, float32."""
        ...

    def shapes(self) -> Mapping[str, Shape]:
        """Every parameter that the kind can have on this base, whatever the specification chose."""
        ...

    def bind(self, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> None:
        """Put the parameters in place for one pass, by what is added to `base.acting`.

        Args:
            layer: stacked parameters; names of other kinds may be among them, and any may be absent.
            sizes: each client's own shapes.
            base: in the precision of this pass; its modules have the paths of the base that the adapter was made on.
        """
        ...

    def context(self, params: Params) -> tuple[float, float]:
        """What the adapter adds to the work of every row, for counted costs.

        Returns:
            further tokens of a row, and further keys that its tokens attend to, as a mean over the blocks.
        """
        ...
