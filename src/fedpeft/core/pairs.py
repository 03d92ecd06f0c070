"""LoRA parameters as pairs of factors: `s.B` (d_out, r) and `s.A` (r, d_in) of every slot s, beside a head.

The methods of the LoRA family differ in what they train, send and combine of the pairs; how is told with these words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, Lora
from fedpeft.core.errors import RecordError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params

Pair: TypeAlias = tuple[Tensor, Tensor]  # (B, A)
Combine: TypeAlias = Callable[[Sequence[Pair], Pair], Pair]  # a slot's pairs, and the server's own -> a new one


def stems(params: Params) -> tuple[str, ...]:
    """The slots that have both factors, sorted."""
    return tuple(sorted(n.removesuffix(".A") for n in params if n.endswith(".A") and f"{n[:-1]}B" in params))


def is_factor(name: str, sides: str = "AB") -> bool:
    """Whether the name is that of a factor A or B of a block, on one of the sides."""
    stem, _, side = name.rpartition(".")
    return len(side) == 1 and side in sides and tree.block_of(name) is not None and bool(stem)


def factors(params: Params, sides: str = "AB") -> dict[str, Tensor]:
    """The factors of these sides alone."""
    return tree.select(params, lambda name: is_factor(name, sides))


def others(params: Params, sides: str = "AB") -> dict[str, Tensor]:
    """Everything but the factors of these sides: the head, and the factors of the other side."""
    return tree.select(params, lambda name: not is_factor(name, sides))


def pair(params: Params, stem: str) -> Pair:
    """(B, A) of a slot."""
    return params[f"{stem}.B"], params[f"{stem}.A"]


def widths(params: Params) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every slot."""
    return {stem: (len(b), a.shape[1]) for stem in stems(params) for b, a in (pair(params, stem),)}


def learnt(params: Params) -> bool:
    """Whether the adapter changes anything: a fresh one has B = 0."""
    return any(bool(t.any()) for t in factors(params, "B").values())


def ranks(params: Params) -> dict[str, int]:
    """The rank of every slot."""
    return {stem: int(params[f"{stem}.A"].shape[0]) for stem in stems(params)}


def of(params: Params, slots: Collection[str]) -> dict[str, Tensor]:
    """The factors of these slots, and everything that is no factor."""
    return tree.select(params, lambda name: not is_factor(name) or name.rpartition(".")[0] in slots)


def cut(params: Params, rank: int) -> dict[str, Tensor]:
    """The first `rank` rows of every A and columns of every B; slots of less rank and the head stay as they are."""
    return cut_each(params, dict.fromkeys(stems(params), rank))


def cut_each(params: Params, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """The first components of every slot, as many as its rank; what has no rank stays as it is."""
    own = dict(params)
    for stem in stems(params):
        if stem in ranks:
            own[f"{stem}.B"] = params[f"{stem}.B"][:, : ranks[stem]].clone()
            own[f"{stem}.A"] = params[f"{stem}.A"][: ranks[stem]].clone()
    return own


def rest_of(params: Params, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """What `cut_each` leaves: the further components of the slots that have a rank, and the slots that have none."""
    rest: dict[str, Tensor] = {}
    for stem in stems(params):
        b, a = pair(params, stem)
        if (first := ranks.get(stem, 0)) < len(a):
            rest |= {f"{stem}.B": b[:, first:].clone(), f"{stem}.A": a[first:].clone()}
    return rest


def check(params: Params, train: Mapping[str, tuple[int, int, int]], head: Params) -> None:
    """Raise RecordError unless params are the factors of these slots and a head like this one.

    The factors are of one floating dtype, which is the head's where there is a head.

    Args:
        train: rank, d_out and d_in of every slot.
        head: everything else that must be there; names, shapes and dtypes count.
    """
    want = {f"{stem}.A": (rank, d_in) for stem, (rank, _, d_in) in train.items()}
    want |= {f"{stem}.B": (d_out, rank) for stem, (rank, d_out, _) in train.items()}
    shapes: dict[str, tuple[int, ...]] = {**want, **{name: tuple(t.shape) for name, t in head.items()}}
    got = {name: tuple(t.shape) for name, t in params.items()}
    if got != shapes:
        name = min(shapes.items() ^ got.items())[0]
        raise RecordError(f"parameter {name!r} should be {shapes.get(name)} and is {got.get(name)}")
    tree.same_dtypes(head, others(params))
    first = min(head or params, default="")
    usual = (head or params)[first].dtype if first else torch.float32
    for name, t in factors(params).items():
        if t.dtype != usual or not t.is_floating_point():
            raise RecordError(f"parameter {name!r} is {t.dtype}, and should be of the floating dtype of all others")


def combined(parts: Sequence[Params], how: Combine, before: Params) -> dict[str, Tensor]:
    """Slot by slot, one pair from everybody's, in the dtype that they came in.

    Args:
        parts: params that have the same slots, perhaps of unequal rank.
        how: gives (B, A) from the slot's pairs, in the order of the parts, and the one that the server has.
        before: the server's pairs.
    """
    made: dict[str, Tensor] = {}
    for stem in stems(before):
        b, a = how([pair(part, stem) for part in parts], pair(before, stem))
        dtype = before[f"{stem}.A"].dtype
        made |= {f"{stem}.B": b.to(dtype), f"{stem}.A": a.to(dtype)}
    return made


def scale_of(spec: AdapterSpec) -> float:
    """c = alpha / rank, which is the same for every client, also where ranks differ."""
    return spec.alpha / spec.rank if isinstance(spec, Lora) else 1.0


def drawn_a(rng: Rng, like: Tensor) -> Tensor:
    """A fresh A of a shape and dtype, U(-1, 1) / sqrt(d_in), as LoRA starts with it."""
    values = rng.uniform(-1, 1, size=tuple(like.shape))
    return torch.from_numpy(values / math.sqrt(like.shape[1])).to(like.dtype)


def fresh_a(params: Params, rng: Rng) -> dict[str, Tensor]:
    """The params with every A drawn anew, in the order of the slots."""
    return {**params, **{f"{stem}.A": drawn_a(rng, params[f"{stem}.A"]) for stem in stems(params)}}


def fresh_b(params: Params) -> dict[str, Tensor]:
    """The params with every B at zero, so that the adapter changes nothing."""
    return {name: torch.zeros_like(t) if is_factor(name, "B") else t for name, t in params.items()}
