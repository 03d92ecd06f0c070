"""What a plan costs on one machine: memory, time and messages, exactly and as bounds that are linear in the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.planner.activations import DTYPE_BYTES
from fedpeft.planner.cost import Shape, Step, step_flops
from fedpeft.planner.device import FORMATS, Profile
from fedpeft.planner.memory import WEIGHT_ERROR, parameters, peak_memory
from fedpeft.planner.plan import Excluded, Job

BYTES_PER_NUMBER = 4  # float32 on the wire
UNPACKED_BYTES = 4  # of a weight of a quantised base, float32 whatever the products compute in

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """Everything of a plan but the ranks."""

    bits: str
    batch: int
    depth: int
    checkpointing: bool
    used: float = 1.0  # nu


def unpacked_bytes(shape: Shape, lowest: int = 0, checkpointing: bool = False) -> int:
    """Bytes that a step unpacks of a quantised base's blocks, in every pass anew.

    The forward pass goes through all blocks, the backward pass, and with checkpointing a second pass forward, through
    those from the lowest one on. The lowest block's first matrices are not needed backward, which is not subtracted.
    """
    passes = shape.layers + (1 + checkpointing) * (shape.layers - lowest)  # of blocks, which are all alike
    return UNPACKED_BYTES * parameters(shape).matrices // shape.layers * passes


class Costs:
    """Prices of one job on one machine.

    Args:
        frozen: rank by name of what is applied and not trained, whatever trains; None: what a plan leaves of the
            largest rank.
    """

    def __init__(self, job: Job, machine: Profile, examples: int, frozen: Mapping[str, int] | None = None) -> None:
        self.job, self.machine, self.examples = job, machine, examples
        self.usable = ((1 - job.choices.headroom) * machine.memory_bytes - machine.context_bytes) / machine.peak_ratio
        self.room = (1 - job.choices.headroom) * machine.memory_bytes  # with context and the machine's ratio
        self.frozen = frozen
        self._most = {w.name: job.ranks[-1] for w in job.weights} if job.choices.applied else {}
        self._bases: dict[tuple[str, int, int, bool], tuple[float, float]] = {}
        self.ranks = np.array([0, *job.ranks], dtype=np.float64)

    def missing(self, no: Excluded) -> float:
        """Bytes of memory that the machine lacks for the cheapest configuration, with its ratio and the headroom."""
        short = max(0.0, no.least_bytes - self.usable)
        return short * self.machine.peak_ratio / (1 - self.job.choices.headroom)

    @property
    def formats(self) -> list[str]:
        """What the base can be kept in on this machine, among those wanted, most bits first."""
        wanted = FORMATS if self.job.choices.bits != "full" else ("full",)
        return [f for f in wanted if f in self.machine.formats]

    @property
    def batches(self) -> list[int]:
        """Those that the machine has the examples for, largest first; the smallest where it has them for none."""
        every = sorted(set(self.job.choices.batches), reverse=True)
        return [b for b in every if b <= max(1, self.examples)] or every[-1:]

    @property
    def wanted(self) -> int:
        """E n: examples of a full turn."""
        return self.job.choices.epochs * self.examples

    def steps(self, batch: int, used: float = 1.0) -> int:
        """Steps that use this share of the examples."""
        return max(1, math.ceil(used * self.wanted / batch - 1e-9))

    def step(self, setting: Setting, ranks: Mapping[str, int], tokens: float) -> Step:
        """What one step does when these ranks train and everything else is applied."""
        rest = {name: top - ranks.get(name, 0) for name, top in self._most.items() if top > ranks.get(name, 0)}
        return Step(
            rows=setting.batch,
            tokens=max(1, math.ceil(tokens)),
            trained=dict(ranks),
            frozen=rest if self.frozen is None else dict(self.frozen),
            base=self.job.loaded(setting.bits),
            compute=self.job.dtype,
            classes=self.job.classes,
            depth=self._lowest(setting, ranks),
            checkpointing=setting.checkpointing,
        )

    def _lowest(self, setting: Setting, ranks: Mapping[str, int]) -> int:
        """The block that the backward pass ends in; without ranks, in a bound, the setting's depth."""
        trained = [w.block for w in self.job.weights if w.name in ranks]
        return min(trained, default=self.job.shape.layers if ranks else setting.depth)

    def bytes(self, setting: Setting, ranks: Mapping[str, int]) -> int:
        """Peak memory, before the machine's own ratio and context."""

        def price() -> int:
            return peak_memory(self.job.shape, self.step(setting, ranks, self.job.longest)).peak

        return self._priced("bytes", setting, ranks, price)

    def seconds(self, setting: Setting, ranks: Mapping[str, int]) -> float:
        """Of one step."""

        def price() -> int:
            return step_flops(self.job.shape, self.step(setting, ranks, self.job.mean)).total

        flops = self._priced("flops", setting, ranks, price)
        unpacking = self.unpacking(setting.bits, self._lowest(setting, ranks), setting.checkpointing)
        return self.machine.step_overhead_s + flops / self.machine.flops_per_s + unpacking

    def _priced(self, what: str, setting: Setting, ranks: Mapping[str, int], price: Callable[[], int]) -> int:
        """A price that does not depend on the machine, computed once per job."""
        beside = None if self.frozen is None else frozenset(self.frozen.items())
        key = what, replace(setting, used=1.0), frozenset(ranks.items()), beside
        if key not in self.job.prices:
            self.job.prices[key] = price()
        return int(self.job.prices[key])

    def unpacking(self, bits: str, lowest: int, checkpointing: bool) -> float:
        """Seconds of a step in which the blocks' matrices of a quantised base are unpacked; see `unpacked_bytes`."""
        if bits == "full" or not self.machine.dequant_bytes_per_s:
            return 0.0
        return unpacked_bytes(self.job.shape, lowest, checkpointing) / self.machine.dequant_bytes_per_s

    def base(self, setting: Setting) -> tuple[float, float]:
        """(bytes, seconds of a step) of a setting in which no weight trains, bounds from above."""
        key = setting.bits, setting.batch, setting.depth, setting.checkpointing
        if key not in self._bases:
            own = float(self.bytes(setting, {})) + (self._one_block(setting) if setting.checkpointing else 0.0)
            self._bases[key] = own, self.seconds(setting, {})
        return self._bases[key]

    def _one_block(self, setting: Setting) -> float:
        """Bytes of the adapters' inputs in one block: with checkpointing no more are kept at a time."""
        width: dict[int, int] = {}
        for w in self.job.weights:
            width[w.block] = width.get(w.block, 0) + w.d_in + self.job.ranks[-1]
        return float(DTYPE_BYTES[self.job.dtype] * setting.batch * self.job.longest * max(width.values(), default=0))

    def items(self, setting: Setting) -> tuple[Floats, Floats]:
        """(weights, 1 + ranks) bytes, and seconds of a whole turn, that a rank adds; infinite below the depth."""
        job, tokens = self.job, setting.batch * self.job.longest
        numbers = job.sizes[:, None] * self.ranks[None, :]
        memory = (32.0 + 2.0 * (job.dtype != "float32")) * numbers  # as received, in flat buffers, as a result; copies
        if not setting.checkpointing:
            inputs = np.array([w.d_in for w in job.weights])[:, None] + self.ranks[None, :]
            memory = memory + DTYPE_BYTES[job.dtype] * tokens * inputs * (self.ranks > 0)
        passes = 2.0 if job.choices.applied else 6.0 + 2.0 * setting.checkpointing  # a frozen adapter has the rest
        flops = passes * setting.batch * math.ceil(job.mean) * numbers
        seconds = self.steps(setting.batch, setting.used) * flops / self.machine.flops_per_s
        seconds = seconds + BYTES_PER_NUMBER * numbers / self.machine.up_bytes_per_s
        below = np.array([w.block < setting.depth for w in job.weights])
        memory[below, 1:] = seconds[below, 1:] = np.inf
        return memory, seconds

    def bound(self, setting: Setting, ranks: Mapping[str, int]) -> tuple[float, float]:
        """(bytes, seconds of a round) that these ranks are counted with in a setting: bounds from above."""
        places = [self.job.ranks.index(ranks[w.name]) + 1 if w.name in ranks else 0 for w in self.job.weights]
        (own_bytes, own_s), (memory, seconds) = self.base(setting), self.items(setting)
        turn = self.messages({}) + self.steps(setting.batch, setting.used) * own_s
        every = range(len(places))
        more = sum(float(memory[m, places[m]]) for m in every)
        return own_bytes + more, turn + sum(float(seconds[m, places[m]]) for m in every)

    def penalty(self, bits: str) -> float:
        """What a quantised base costs in the objective, where bits are searched for."""
        counts = self.job.choices.bits == "search" and bits != "full"
        return self.job.choices.penalty * WEIGHT_ERROR[bits] if counts else 0.0

    def down_bytes(self) -> int:
        """Everything that may be sent to the machine: all candidates at the largest rank, and the head."""
        top = self.job.ranks[-1]
        return int(BYTES_PER_NUMBER * top * self.job.sizes.sum()) + self.job.head_bytes

    def up_bytes(self, ranks: Mapping[str, int]) -> int:
        """What it sends: the components that it trains, and the head."""
        sizes = {w.name: w.d_in + w.d_out for w in self.job.weights}
        return BYTES_PER_NUMBER * sum(r * sizes[name] for name, r in ranks.items()) + self.job.head_bytes

    def messages(self, ranks: Mapping[str, int]) -> float:
        """Seconds that the messages of a round take."""
        up = self.up_bytes(ranks) / self.machine.up_bytes_per_s
        return self.machine.latency_s + self.down_bytes() / self.machine.down_bytes_per_s + up
