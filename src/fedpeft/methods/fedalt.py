"""FedAlt and FedSim: partial personalisation. Upper blocks are the client's own, lower ones and the head everybody's.

Pillutla, Malik, Mohamed, Rabbat, Sanjabi, Xiao: Federated Learning with Partial Model Personalization, ICML 2022,
arXiv 2204.03809, over LoRA.

Paper to code

| paper | here |
|---|---|
| u, shared parameters; v_i, personal ones | `State.shared`; `Memory.local` |
| FedAlt: v_i first with u fixed, then u with v_i fixed | `train`, `updates: alternating` |
| FedSim: both at once | `train`, `updates: simultaneous` |
| mean of u | `average`, weighted by examples |

Departures: what is personal is ours: LoRA in the upper half of the blocks, and in the middle one where their number is
odd, unless `personal_from` names another one. The two halves of a turn train equally long (`epochs` or `steps` each);
the optimizer starts anew in each.

Traffic per client and round: down = params of the shared layers; up = params of the shared layers
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from fedpeft.core import tree
from fedpeft.core.averaging import Tuning
from fedpeft.core.cohort import sample
from fedpeft.core.errors import ConfigError
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, ServerEnv, Update, Weights
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import check_ranges, local_batches, mean_loss, ordinary_fit
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class State:
    """What the server knows."""

    start: Params  # P0, which is what the personal layers of a newcomer have
    shared: Params  # u: of the shared layers, and the head
    layers: tuple[int, ...]  # the shared ones
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Memory:
    """What a client keeps between its turns; nothing of it travels."""

    local: Params = field(default_factory=dict)  # v_i; empty before the first turn


@dataclass(frozen=True)
class FedAlt(Tuning):
    """FedAlt and FedSim (Pillutla et al. 2022): personal upper blocks."""

    updates: Literal["alternating", "simultaneous"] = "alternating"  # FedAlt: own layers, then shared ones; or FedSim
    personal_from: int | None = None  # the lowest personal block; null: the upper half is personal

    state: ClassVar[type[State]] = State
    memory: ClassVar[type[Memory]] = Memory

    def __post_init__(self) -> None:
        check_ranges(self, at_least={"personal_from": 0})

    def init(self, env: ServerEnv) -> State:
        """P0, cut into the shared and the personal layers.

        Raises:
            ConfigError: `personal_from` is above every block.
        """
        start = env.initial()
        blocks = tree.blocks_of(start)
        if self.personal_from is not None and blocks and self.personal_from > blocks[-1]:
            what = f"the highest block with an adapter is {blocks[-1]}, so nothing would be personal"
            raise ConfigError(
                [f"method.personal_from is {self.personal_from}; it must be at most {blocks[-1]}: {what}"]
            )
        first = blocks[len(blocks) // 2] if self.personal_from is None and blocks else self.personal_from or 0
        layers = tuple(block for block in blocks if block < first)
        return State(start, tree.in_blocks(start, (None, *layers)), layers)

    def init_client(self, env: ClientEnv) -> Memory:
        """Nothing of its own yet: P0 counts."""
        return Memory()

    def round(self) -> tuple[Exchange, ...]:
        """One round over the shared layers."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.train, self.average),)

    def send(self, state: State, client: ClientId) -> Weights:
        """u."""
        return Weights(state.shared)

    def train(self, down: Weights, memory: Memory, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Memory]]:
        """v_i with u fixed, then u with v_i fixed; or both at once."""
        start = tree.select(env.initial(), lambda name: name not in down.params)
        own = tree.overlay(start, memory.local)
        params = tree.overlay(own, down.params)
        if self.updates == "alternating" and own:
            batches = local_batches(self, env, "own batches")
            fitted = yield ordinary_fit(self, params, env, train=frozenset(own), batches=batches)
            params, names = fitted.params, frozenset(down.params)
        else:
            names = frozenset(params)
        fitted = yield ordinary_fit(self, params, env, train=names)
        shared = {name: fitted.params[name] for name in down.params}
        kept = {name: fitted.params[name] for name in own}
        return Update(shared, len(env.data), fitted.loss), Memory(kept)

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """The mean of u."""
        shared = tree.mean((up.params, up.examples) for up in ups.values())
        return replace(state, shared=shared, loss=mean_loss(ups.values()))

    def result(self, state: State) -> Params:
        """u beside the fresh personal layers, which change nothing."""
        return tree.overlay(state.start, state.shared)

    def personal(self, params: Params, memory: Memory) -> Params:
        """u beside the client's own v_i."""
        return tree.overlay(params, memory.local)

    def choices(self, state: State) -> dict[str, Any]:
        """The shared layers."""
        blocks = tree.blocks_of(state.start)
        return {"layers": list(state.layers), "of_layers": max(blocks, default=-1) + 1, "layers_by": "place"}


METHOD = FedAlt
