"""Ranks, sizes and rates at which a formula of the LoRA family degenerates, and methods must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import toy
from fedpeft import methods
from fedpeft.core import pairs
from fedpeft.core.exchange import ClientEnv, ServerEnv, Update
from fedpeft.maths import lowrank
from fedpeft.methods.flexlora import FlexLora
from fedpeft.methods.slora import SLora, State, numbers, scattered, under_mask
from turns import served


@pytest.mark.parametrize("size", [560, 880, 1120, 1600])
def test_the_numbers_under_a_mask_are_counted_once(size: int) -> None:
    """.01 of 560 x 560 is 3136, however the factors are multiplied."""
    shape = (size, size)
    values = SLora().empty({"s": shape})["values.s"]
    places = under_mask(0, "s", shape, 0.01)
    assert len(values) == len(places) == numbers(shape, 0.01) == size * size // 100
    assert scattered(values, places, shape).shape == shape
    assert numbers((2, 2), 1e-12) == 1


def test_stage_two_trains_every_component_of_a_change_of_lower_rank() -> None:
    """A change of rank 1 at rank 3: two components start from the fresh A with B = 0, though no singular value is 0."""
    model = toy.ToyModel(rank=3, width=9, dtype="float32")
    model.init = lambda rng: {  # type: ignore[method-assign]
        "block.0.w.A": torch.arange(24.0).view(3, 8) + 1,
        "block.0.w.B": torch.zeros(6, 3),
        toy.HEAD: torch.zeros(1),
    }
    env = ServerEnv(model, ("a",), 0, 4, round=2)
    state = SLora(density=1.0).init(env)
    draw = np.random.default_rng(0)
    change = torch.from_numpy(np.outer(draw.normal(size=6), draw.normal(size=8))).float()
    moved = SLora(density=1.0).decompose(
        State(state.params, {"values.block.0.w": change.flatten()}, state.widths, state.seed), env
    )
    b, a = pairs.pair(moved.params, "block.0.w")
    assert torch.linalg.svdvals(change.double())[1] > 0
    np.testing.assert_allclose(toy.SCALE * b @ a, change, atol=1e-5)
    assert bool(b[:, 0].any()) and not b[:, 1:].any()
    assert torch.equal(a[1:], model.init(env.rng("any"))["block.0.w.A"][1:])


def test_a_mean_of_lower_rank_leaves_no_component_dead() -> None:
    """One client of rank 1 answers a server of rank 3: the other components keep their rows of A."""
    draw = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 4))).float()
    model = toy.ToyModel(rank=3, width=5, dtype="float32")
    env = ServerEnv(model, ("a",), 0, 4)
    method = FlexLora(ranks=(1,))
    state = method.init(env)
    state = type(state)({**state.params, "block.0.w.A": draw, "block.0.w.B": torch.ones(1, 3)}, {"a": 1})
    answer = pairs.cut(state.params, 1)
    after = method.average(state, {"a": Update(answer, 3, 0.0)}, env)
    b, a = pairs.pair(after.params, "block.0.w")
    np.testing.assert_allclose(b @ a, answer["block.0.w.B"] @ answer["block.0.w.A"], rtol=1e-5)
    assert torch.equal(a[1:], draw[1:]) and not b[:, 1:].any() and bool(a[0].any())


def test_rounding_is_no_component() -> None:
    """Twice the same pair: the second singular value is rounding, and gives zeros, not a direction of chance."""
    draw = np.random.default_rng(2)
    b, a = (torch.from_numpy(draw.normal(size=size)).float() for size in ((5, 1), (1, 4)))
    whole = lowrank.stack([(b, a), (b * 3, a * (1 + 1e-7))], (0.5, 0.5))
    left, right = lowrank.truncate(whole, 2)
    assert not left[:, 1].any() and not right[1].any()
    again = lowrank.revived((left, right), torch.ones(2, 4))
    assert torch.equal(again[1][0], right[0]) and again[1][1].tolist() == [1, 1, 1, 1] and not again[0][:, 1].any()


@pytest.mark.parametrize("start_steps", [0, 2])
def test_delta_lora_has_no_dropout_at_any_step(start_steps: int) -> None:
    method: Any = methods.build("deltalora", {"start_steps": start_steps, "batch_size": 2})
    model = toy.ToyModel(rank=2, dropout=0.3)
    here = ClientEnv("a", model, {"train": toy.points(*np.ones((8, 3)))}, 0, 3, 1, "train")
    down = method.send(method.init(ServerEnv(model, ("a",), 0, 3)), "a")
    fits, _ = served(method.train(down, method.init_client(here), here), model)
    assert [fit.dropout for fit in fits] == [0.0] * (2 if start_steps else 1)


FAMILY = "fedavg ffa_lora fedsa_lora rolora flora flexlora hetlora fedex_lora lora_fair slora"


@pytest.mark.parametrize("name", FAMILY.split())
def test_the_head_has_the_rate_of_the_adapter_in_the_lora_family(name: str) -> None:
    assert {f.name: f.default for f in methods.describe(methods.load(name))}["head_lr"] is None
