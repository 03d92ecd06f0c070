"""The warm-up: most bits, few groups, and no longer than there is time for."""

from __future__ import annotations

import dataclasses

import pytest

from fedpeft.planner.cost import Step, shape_of, step_flops, weights
from fedpeft.planner.device import DEFAULT, Profile
from fedpeft.planner.memory import peak_memory
from fedpeft.planner.plan import Job
from fedpeft.planner.prices import Costs, Setting
from fedpeft.planner.warmup import FEWEST, WarmUp, messages, warm_up_room

SHAPE = shape_of(
    {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
     "num_key_value_heads": 2, "intermediate_size": 176, "vocab_size": 512}
)  # fmt: skip
EVERY = weights(SHAPE, ("query", "key", "value", "output"))  # eight
JOB = Job(SHAPE, EVERY, {w.name: 1 / 8 for w in EVERY}, longest=32, mean=24.0)
LARGE = dataclasses.replace(DEFAULT, flops_per_s=1e9, latency_s=0.0)


def room(machine: Profile, steps: int = 40, seconds: float | None = None, examples: int = 50) -> WarmUp | None:
    """Of a first warm-up, beside which nothing is frozen."""
    return warm_up_room(Costs(JOB, machine, examples, {}), 4, 8, steps, seconds)


def holding(setting: Setting, count: int, **changes: float) -> Profile:
    """A machine that has room for so many candidates in a setting, and not for a byte more."""
    need = Costs(JOB, LARGE, 50, {}).bytes(setting, {w.name: 4 for w in EVERY[:: 8 // count]})
    return dataclasses.replace(LARGE, memory_bytes=-(-need * 10 // 9), **changes)


def test_a_large_machine_does_everything_at_once() -> None:
    assert room(LARGE) == WarmUp("full", 8, 1, 40)
    assert room(LARGE, examples=3) == WarmUp("full", 3, 1, 40)


def test_a_smaller_one_has_fewer_bits_and_then_groups() -> None:
    assert room(holding(Setting("int8", 8, 0, False), 8)) == WarmUp("int8", 8, 1, 40)
    assert room(holding(Setting("nf4dq", 1, 0, False), 8)) == WarmUp("nf4dq", 1, 1, 40)
    assert room(holding(Setting("nf4dq", 1, 0, False), 2)) == WarmUp("nf4dq", 1, 4, 40)
    assert room(holding(Setting("nf4dq", 1, 0, False), 1)) == WarmUp("nf4dq", 1, 8, 40)


def test_a_machine_without_room_or_rows_is_not_asked() -> None:
    small = holding(Setting("nf4dq", 1, 0, False), 1)
    assert room(dataclasses.replace(small, memory_bytes=small.memory_bytes - 10)) is None
    assert room(LARGE, examples=0) is None


@pytest.mark.parametrize("groups", [1, 4])
def test_time_cuts_the_steps_of_every_group(groups: int) -> None:
    """12.5 steps' time gives 12 steps; with half of that there are less than FEWEST, and nothing is measured."""
    machine = LARGE if groups == 1 else holding(Setting("nf4dq", 1, 0, False), 2)
    whole = room(machine)
    assert whole is not None and whole.groups == groups
    costs = Costs(JOB, machine, 50, {})
    step = costs.seconds(Setting(whole.bits, whole.batch, 0, False), {w.name: 4 for w in EVERY})
    seconds = messages(costs) + 12.5 * groups * step
    assert room(machine, seconds=seconds) == dataclasses.replace(whole, steps=12)
    assert room(machine, seconds=messages(costs) + (FEWEST - 0.5) * groups * step) is None
    assert room(machine, steps=6, seconds=messages(costs) + 6.5 * groups * step) == dataclasses.replace(whole, steps=6)
    assert room(machine, steps=6, seconds=messages(costs) + 5.5 * groups * step) is None


@pytest.mark.parametrize(
    ("frozen", "down"), [({}, 0), ({EVERY[0].name: 16, EVERY[1].name: 2}, 4 * (16 * 128 + 2 * 96))]
)
def test_what_is_sent_and_applied_is_what_was_learnt_before(frozen: dict[str, int], down: int) -> None:
    """Up go 8 scores in float32, 8 flags and a number of 8 bytes; the first time nothing comes down."""
    machine = dataclasses.replace(LARGE, latency_s=0.5, up_bytes_per_s=100.0, down_bytes_per_s=1000.0)
    costs, everything = Costs(JOB, machine, 50, frozen), {w.name: 4 for w in EVERY}
    assert messages(costs) == pytest.approx(0.5 + down / 1000 + 48 / 100)
    step = Step(8, 24, everything, frozen, depth=0)
    setting = Setting("full", 8, 0, False)
    assert costs.seconds(setting, everything) == pytest.approx(step_flops(SHAPE, step).total / 1e9, rel=1e-12)
    longest = dataclasses.replace(step, tokens=32)
    assert costs.bytes(setting, everything) == peak_memory(SHAPE, longest).peak
