"""What a Fit counts, against the planner's own count of one step, which torch's FlopCounterMode was checked against."""

from __future__ import annotations

import numpy as np
import pytest
from tests import small_models, tiny

from fedpeft.core.adapter import Lora
from fedpeft.core.client import Metered
from fedpeft.core.examples import Examples
from fedpeft.core.exchange import Meter
from fedpeft.core.fit import SGD, Fit
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import select
from fedpeft.planner.cost import Step, shape_of, step_flops
from fedpeft.runs.clock import Clock

RANK, ROWS, TOKENS = 3, 4, 6
KINDS = ("query", "key", "value", "output")


def rows() -> Examples:
    return Examples(tuple(np.arange(5, 5 + TOKENS, dtype=np.int32) for _ in range(ROWS)), np.arange(ROWS) % 3)


def counted(model, fit) -> int:
    """Operations that the clock gives to the fit."""
    meter = Meter()
    meter.add(fit, model.fit(fit), model.lowest_block(fit.trained))
    return Clock(shape_of(model.base.config), {}).flops(meter)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_step_of_lora_costs_what_the_planner_says(family, checkpointing):
    """All adapters train, from block 0's query on: equal but for the head and the gradient of the first inputs."""
    model = tiny.model(family, Lora(RANK, 6.0, KINDS), classes=3)
    params = model.init(rng_for(0, "adapter"))
    data = rows()
    fit = Fit(params, data, [range(ROWS)], SGD(0.0), checkpointing=checkpointing)
    shape = shape_of(model.base.config)
    ranks = {name.removesuffix(".A"): RANK for name in params if name.endswith(".A")}
    step = Step(ROWS, TOKENS, ranks, classes=3, checkpointing=checkpointing)
    first = sum(2 * ROWS * TOKENS * RANK * shape.hidden for kind in KINDS[:3])  # nobody asks for the input's gradient
    scores, pooling = 2 * ROWS * shape.hidden * 3, 2 * ROWS * TOKENS * shape.hidden * (family == "bert")
    head = 2 * (scores + pooling) + scores  # forward, back to its input, its own
    assert counted(model, fit) == step_flops(shape, step).total + first - head


def test_frozen_factors_cost_a_product_less_and_none_on_the_way_back_below_the_first_that_trains():
    model = tiny.model("bert", Lora(RANK, 6.0, KINDS), classes=3)
    params = model.init(rng_for(0, "adapter"))
    data = rows()
    top = model.blocks - 1
    upper = select(params, lambda name: name.startswith((f"block.{top}.", "head.")))
    beside = select(params, lambda name: name.startswith("block."))
    size = sum(t.numel() for name, t in upper.items() if name.startswith("block."))

    def products(**fields) -> int:
        return model.cost(Fit(upper, data, [range(ROWS)], SGD(0.0), **fields))[2]

    tokens = ROWS * TOKENS
    assert products() == 3 * size * tokens
    assert products(train=frozenset(["head.weight"])) == size * tokens  # no backward pass enters the block
    alone = frozenset([f"block.{top}.query.A"])
    assert products(train=alone) == (2 * size + params[f"block.{top}.query.A"].numel()) * tokens
    others = sum(t.numel() for t in beside.values())
    assert products(also=(beside,)) - products() == (2 * size + (others - size)) * tokens


def test_a_probe_is_counted_as_a_pass_of_training_whatever_predictions_cost():
    """Where a label is predicted by the likelihood of each label's words, a prediction takes a pass per label."""
    model = small_models.build("gpt2", {"block.0.query": 2}, rows=2, tokens=9, language_model=True)
    work = Metered(model.model, meter := Meter())
    fit = Fit(model.params, model.data, [range(2)], SGD(0.0))
    tokens, pairs, products = model.model.cost(fit)
    work.fisher(model.params, model.data, range(2))
    assert (meter.trained, meter.products) == ({0: (tokens, pairs)}, products) and tokens == 18 and products > 0
    work.losses(model.params, model.data, range(2))
    assert (meter.forward_tokens, meter.forward_pairs, meter.products) == (tokens, pairs, products + products // 3)
