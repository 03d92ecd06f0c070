"""Offsite-tuning: clients tune a model's first and last blocks around an emulator of what lies between.

Xiao, Lin, Han: Offsite-Tuning: Transfer Learning without Full Model, 2023, arXiv 2302.04870, in a federation.

Paper to code

| paper | here |
|---|---|
| M = [A, E], the model as adapter and frozen component | `parts`: the first and last `blocks` blocks, and the others |
| E*, the emulator: layers of E dropped at even distances | `emulated`: every `every`-th of the others, `trains_on` |
| A, the trainable adapter, that is sandwiched around E* | `adapter`, `init` |
| A', the adapter tuned by the data owner in [A, E*] | `train` |
| M' = [A', E], the plug-in model | `result`; a forward pass of the whole base, which the server alone has |

Departures: many data owners instead of one, so a round's A' are averaged by examples (FedAvg) and sent again. The
emulator is not distilled; the paper does that for its smaller models. Of the middle the first of every k blocks
stays, in the paper the first and the last one of them. A task with labels has a trained head beside A. Rate and local
optimizer are ours, as in `full`. With `adapter.kind: lora` the blocks of A are tuned by LoRA instead of in all their
weights, as in the paper's combination of both.

Traffic per client and round: down = params; up = params

What a client must have before round 1, its part of the frozen model (A, E*, embeddings, norms), does not travel in the
run, as no method's base does; `choices` gives its bytes in float32 beside those of the whole model, both without an
untied head of a language model.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, Full, Lora
from fedpeft.core.averaging import Averaged, Tuning
from fedpeft.core.cohort import sample
from fedpeft.core.errors import ModelError
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Update, Weights
from fedpeft.core.fit import Fit, Fitted, base_of
from fedpeft.core.method import check_ranges, mean_loss, ordinary_fit
from fedpeft.core.tree import Params
from fedpeft.planner.cost import shape_of
from fedpeft.planner.memory import base_bytes


@dataclass(frozen=True)
class State(Averaged):
    """What the server knows."""

    layers: int = 0  # blocks of the whole model
    client_bytes: int = 0  # of what a client holds of it, float32
    whole_bytes: int = 0  # of all of it


@dataclass(frozen=True)
class Offsite(Tuning):
    """Offsite-tuning (Xiao et al. 2023): the first and last blocks train around a shortened middle."""

    lr: float = 1e-4  # local learning rate of AdamW
    blocks: int = 1  # n: blocks at either end that train; the paper has 2 in models of 24 and more
    every: int = 2  # k: the emulator has every k-th block of the middle, the first one included; 1: all of them

    state: ClassVar[type[State]] = State

    def __post_init__(self) -> None:
        check_ranges(self, at_least={"blocks": 1, "every": 1})

    def adapter(self) -> AdapterSpec:
        """All weights of the first and last n blocks."""
        return Full((*range(self.blocks), *range(-self.blocks, 0)))

    def accepts(self, spec: AdapterSpec) -> str | None:
        """The weights of its own blocks, or LoRA, of which those in its own blocks count."""
        if spec == self.adapter() or isinstance(spec, Lora):
            return None
        if isinstance(spec, Full):
            return "method offsite trains the blocks of method.blocks; leave adapter.blocks out"
        return f"method offsite trains whole weights or LoRA, not {spec.kind}; leave adapter.kind out, or use lora"

    def parts(self, layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A and E of a model of so many blocks: those at its ends, and those between.

        Raises:
            ModelError: the ends overlap.
        """
        if 2 * self.blocks > layers:
            raise ModelError(
                f"method.blocks is {self.blocks} at either end, and the model has {layers} blocks; lower method.blocks "
                f"to at most {layers // 2}"
            )
        middle = tuple(range(self.blocks, layers - self.blocks))
        return tuple(block for block in range(layers) if block not in middle), middle

    def emulated(self, layers: int) -> tuple[int, ...]:
        """[A, E*]: the blocks that a client has."""
        ends, middle = self.parts(layers)
        return tuple(sorted((*ends, *middle[:: self.every])))

    def trains_on(self, layers: int) -> str:
        """The base without the blocks that the emulator drops; "" where it drops none."""
        kept = self.emulated(layers)
        return base_of(kept) if len(kept) < layers else ""

    def init(self, env: ServerEnv) -> State:
        """A as it is pre-trained, or LoRA in its blocks."""
        layers, start = env.model.blocks, env.initial()
        ends, _ = self.parts(layers)
        params = tree.in_blocks(start, (None, *ends))
        if not tree.blocks_of(params):
            raise ModelError(
                f"adapter.blocks has none of the blocks {', '.join(map(str, ends))} that offsite trains; leave it out"
            )
        whole = shape_of(env.model.config)
        held = replace(whole, layers=len(self.emulated(layers)))
        return State(params, None, layers, *(base_bytes(shape, "float32", "float32") for shape in (held, whole)))

    def round(self) -> tuple[Exchange, ...]:
        """One round."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.train, self.average),)

    def send(self, state: State, client: ClientId) -> Weights:
        """A."""
        return Weights(state.params)

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """A' of the client's own rows, in [A, E*]."""
        fitted = yield ordinary_fit(self, down.params, env, base=self.trains_on(env.model.blocks))
        return Update(fitted.params, len(env.data), fitted.loss), memory

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """The mean of all A', weighted by examples."""
        mean = tree.mean((up.params, up.examples) for up in ups.values())
        return replace(state, params=mean, loss=mean_loss(ups.values()))

    def result(self, state: State) -> Params:
        """A', to be plugged into M."""
        return state.params

    def choices(self, state: State) -> Mapping[str, Any]:
        """The blocks of A and E*, and what a client must have of the model before round 1."""
        ends, middle = self.parts(state.layers)
        told = {
            "trained_blocks": list(ends),
            "emulator_blocks": list(middle[:: self.every]),
            "left_out_blocks": [block for block in middle if block not in self.emulated(state.layers)],
            "bytes_that_a_client_has_before_round_1": state.client_bytes,
            "bytes_of_the_whole_model": state.whole_bytes,
            "bytes_leave_out": "a language model's own head, where it is not the embeddings",
        }
        if not told["left_out_blocks"]:
            told["warning"] = (
                "the emulator leaves no block out, so every client has the whole model; raise method.every, lower "
                "method.blocks, or take a deeper model"
            )
        return told


METHOD = Offsite
