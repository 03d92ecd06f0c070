"""The memory that training needs, of a whole machine that runs everybody, and of one client's own device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedpeft.core import pairs, tree
from fedpeft.core.examples import Examples
from fedpeft.core.exchange import ClientId, ServerEnv
from fedpeft.core.ranks import Ranked, client_ranks
from fedpeft.core.tree import Params
from fedpeft.planner.cost import Shape, Step, all_weights
from fedpeft.planner.memory import peak_memory

if TYPE_CHECKING:
    from fedpeft.app.federation import Federation

FLAT_COPIES = 7  # values, gradients, two moments, and the results with theirs


def row_lengths(fed: Federation, data: Examples | None = None) -> NDArray[np.int64]:
    """(rows,) tokens that go through the model for each training row, an answer included; None: of everybody's rows."""
    readout, train = fed.model.readout, fed.whole("train") if data is None else data
    return np.array([readout.length(readout.training(0, train, row)) for row in range(len(train))], dtype=np.int64)


def memory_bytes(fed: Federation, together: int) -> int:
    """The base, the trained parameters of `together` clients with their optimizers, and one part of a step."""
    longest = int(row_lengths(fed).max())
    rows = together * int(getattr(fed.method, "batch_size", 1))
    lm = getattr(fed.model.readout, "lm", None)
    return _needed(fed, fed.initial, rows, longest, together) + (lm.own_bytes if lm else 0)


def _needed(fed: Federation, params: Params, rows: int, longest: int, together: int = 1) -> int:
    own = tree.count(params) * 4 * FLAT_COPIES
    rows = max(1, min(rows, fed.config.run.token_budget // longest))
    found = peak_memory(fed.shape, step_of(fed, params, rows, longest))
    inputs = 0
    if fed.model.weights:
        blocks = fed.shape.layers - fed.model.lowest_block(params)
        inputs = fed.base.dtype.itemsize * rows * longest * weight_inputs(fed.shape, blocks)
    return fed.base.weight_bytes + own * together + found.activations + inputs + found.loss


def weight_inputs(shape: Shape, blocks: int) -> int:
    """Numbers per token that matrices keep which train themselves: their inputs, one for query, key and value."""
    return blocks * (3 * shape.hidden + shape.intermediate)


def step_of(fed: Federation, params: Params, rows: int, tokens: int) -> Step:
    """A pass of so many rows through the model as the planner describes it; what is no LoRA counts by its depth."""
    known = {w.name for w in all_weights(fed.shape)}
    factors = {name.removesuffix(".A"): t.shape[0] for name, t in params.items() if name.endswith(".A")}
    dtype = str(fed.base.dtype).removeprefix("torch.")
    return Step(
        rows, tokens, {name: rank for name, rank in factors.items() if name in known},
        base=dtype, compute=dtype, classes=None if fed.shape.lm_head else fed.model.classes,
        depth=fed.model.lowest_block(params),
    )  # fmt: skip


# --- one client's device ------------------------------------------------------------------------------------------


def too_small(fed: Federation) -> Mapping[ClientId, tuple[int, int]]:
    """Clients whose device has no room for a step of the method: (bytes it needs there, bytes that are usable).

    A step of the method's `batch_size` with the client's own longest rows, the adapter that the run starts from, cut to
    the client's rank where ranks differ. What a method does besides training, and adapters that grow, do not count.
    """
    ranks: Mapping[ClientId, int] = {}
    if isinstance(fed.method, Ranked):
        everybody = ServerEnv(
            fed.model, fed.clients, fed.config.run.seed, fed.config.run.rounds, resources=fed.resources
        )
        ranks = client_ranks(fed.method, everybody)
    found = {}
    for client in fed.clients:
        own, device = fed.data[client]["train"], fed.resources[client]
        if not len(own):
            continue
        params = pairs.cut(fed.initial, ranks[client]) if client in ranks else fed.initial
        rows = min(len(own), int(getattr(fed.method, "batch_size", 1)))
        needed = _needed(fed, params, rows, int(row_lengths(fed, own).max())) * device.peak_ratio + device.context_bytes
        if needed > device.memory_bytes:
            found[client] = round(needed), device.memory_bytes
    return found
