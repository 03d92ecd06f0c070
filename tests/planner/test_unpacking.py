"""What of a quantised base is unpacked in a step: counted on a small model, and priced."""

from __future__ import annotations

import pytest
import torch

import small_models
from fedpeft.core.fit import AdamW, Fit
from fedpeft.core.packing import Format
from fedpeft.models import quantize
from fedpeft.planner.cost import shape_of, weights
from fedpeft.planner.device import Profile
from fedpeft.planner.memory import parameters
from fedpeft.planner.plan import Job
from fedpeft.planner.prices import Costs, Setting

LAYERS = 4
SHAPE = shape_of(small_models.config_of("bert", layers=LAYERS).to_dict())
EVERY = weights(SHAPE, ("query", "value"))
SPEED = 1e6


def costs_of(dtype: str = "float32") -> Costs:
    """On a machine that does everything else in no time."""
    job = Job(SHAPE, EVERY, {w.name: 1 / len(EVERY) for w in EVERY}, 8, 8.0, 3, dtype)
    return Costs(job, Profile(flops_per_s=1e30, dequant_bytes_per_s=SPEED), 10)


@pytest.mark.parametrize(("lowest", "checkpointing", "passes"), [
    (0, False, 8), (2, False, 6), (3, False, 5), (0, True, 12), (2, True, 8), (3, True, 6),
])  # fmt: skip
def test_a_step_unpacks_backward_only_the_blocks_that_it_enters(
    lowest: int, checkpointing: bool, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block: forward all of them, backward and forward again those from the lowest on, but for the lowest
    block's own query, key and value backward."""
    case = small_models.build("bert", {f"block.{lowest}.query": 2, f"block.{lowest}.value": 2}, layers=LAYERS)
    counted = 0
    unpack = quantize.unpack

    def counting(parts: quantize.Packed, shape: tuple[int, int], form: Format) -> torch.Tensor:
        nonlocal counted
        found = unpack(parts, shape, form)
        counted += found.numel() * found.element_size()
        return found

    case.model.base.at("int8")  # packed once
    monkeypatch.setattr(quantize, "unpack", counting)
    case.model.fit(Fit(case.params, case.data, [[0, 1]], AdamW(1e-3), base="int8", checkpointing=checkpointing))
    block = 4 * parameters(SHAPE).matrices // LAYERS
    assert counted == passes * block - 4 * 3 * SHAPE.hidden**2
    ranks = {w.name: 2 for w in EVERY if w.block == lowest}
    assert costs_of().seconds(Setting("int8", 2, 0, checkpointing), ranks) == pytest.approx(passes * block / SPEED)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_a_bound_it_ends_at_the_settings_depth(checkpointing: bool) -> None:
    costs, ranks = costs_of(), {w.name: 2 for w in EVERY if w.block == 3}
    for depth in range(LAYERS):
        setting = Setting("nf4", 2, depth, checkpointing)
        _, bound = costs.base(setting)
        lowest = {w.name: 2 for w in EVERY if w.block == depth}
        assert bound == pytest.approx(costs.seconds(setting, lowest))
        assert bound >= costs.seconds(setting, ranks) * (1 - 1e-12)


def test_it_is_unpacked_in_float32_whatever_the_products_compute_in() -> None:
    ranks = {EVERY[0].name: 2}
    own = [costs_of(dtype).seconds(Setting("int8", 2, 0, False), ranks) for dtype in ("float32", "bfloat16")]
    assert own[0] == pytest.approx(own[1], rel=1e-12)
