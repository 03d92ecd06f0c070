"""How difficult a client's examples are, for curricula that start with the easy ones."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal, TypeAlias

from fedpeft.core.exchange import ClientEnv
from fedpeft.core.model import Fisher, FisherProbe, TokenNorm
from fedpeft.core.tree import Params

Difficulty: TypeAlias = Literal["fisher", "loss", "length", "random", "reverse"]


def difficulties(
    kind: Difficulty,
    params: Params,
    env: ClientEnv,
    token_norm: TokenNorm = "sqrt",
    also: tuple[Params, ...] = (),
    base: str = "",
) -> Generator[FisherProbe, Fisher, list[float]]:
    """Of every example of a client: the trace of its Fisher information at the params, or a control.

    A part of work, for `yield from`: clients that rank in the same exchange have it in the same passes.

    Args:
        also: further adapters or base deltas that act beside the params, as in a Fit.
        base: the base's precision, or its blocks, as in a Fit.
    """
    rows = range(len(env.data))
    if kind == "length":
        return [float(n) for n in env.data.lengths]
    if kind == "random":
        return [float(u) for u in env.rng("order").random(len(rows))]
    if kind == "loss":
        return [float(loss) for loss in env.model.losses(params, env.data, rows, also, base)]
    sign = -1.0 if kind == "reverse" else 1.0
    fisher = yield FisherProbe(params, env.data, rows, token_norm, also, base)
    return [sign * float(f) for f in fisher.trace]
