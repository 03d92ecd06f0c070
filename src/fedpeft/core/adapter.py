"""Which parameters are trainable, as data. The tensors are made by `models/adapters`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W x + (alpha / rank) B A x.

    The factor alpha / rank is the same for every client, also where ranks differ.
    """

    kind: ClassVar[str] = "lora"
    rank: int = 8  # rows of A, columns of B
    alpha: float = 16.0  # numerator of the scale alpha / rank
    targets: tuple[str, ...] = ("query", "value")  # projections by name, or a pattern with * over module paths
    blocks: tuple[int, ...] | None = None  # transformer blocks that get an adapter; None: all
    dropout: float = 0.0  # on the input of A, in training


@dataclass(frozen=True)
class HeadOnly:
    """No adapter in the base: only the classification head trains (a linear probe)."""

    kind: ClassVar[str] = "head"


AdapterSpec: TypeAlias = Lora | HeadOnly

ADAPTERS: dict[str, type[AdapterSpec]] = {spec.kind: spec for spec in (Lora, HeadOnly)}
