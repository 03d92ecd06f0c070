"""LoRA's pairs of factors: cutting them, drawing them, and what an answer must look like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.core import pairs
from fedpeft.core.errors import RecordError

HEAD = {"head.weight": torch.zeros(2, 3)}
PARAMS = {
    "block.0.query.A": torch.arange(12.0).view(3, 4),
    "block.0.query.B": torch.arange(15.0).view(5, 3),
    "block.1.query.A": torch.ones(1, 4),
    "block.1.query.B": torch.ones(5, 1),
    **HEAD,
}


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_first_components_and_the_rest_are_the_whole(rank: int) -> None:
    own, rest = pairs.cut_each(PARAMS, {"block.0.query": rank}), pairs.rest_of(PARAMS, {"block.0.query": rank})
    assert own["block.0.query.A"].shape == (rank, 4) and torch.equal(own["block.1.query.A"], torch.ones(1, 4))
    assert rest.keys() & own.keys() == rest.keys() and not any(name.startswith("head") for name in rest)
    assert ("block.0.query.A" in rest) is (rank < 3), "a slot without further components is not there"
    b, a = pairs.pair(PARAMS, "block.0.query")
    parts = [pairs.pair(part, "block.0.query") for part in (own, rest) if "block.0.query.A" in part]
    assert torch.equal(sum((left @ right for left, right in parts), torch.zeros(5, 4)), b @ a)
    assert torch.equal(rest["block.1.query.B"], torch.ones(5, 1)), "a slot without a rank is wholly the rest"


def test_answers_have_the_slots_shapes_and_dtypes_that_were_asked_for() -> None:
    train = {"block.0.query": (3, 5, 4), "block.1.query": (1, 5, 4)}
    pairs.check(PARAMS, train, HEAD)
    pairs.check({name: t for name, t in PARAMS.items() if name not in HEAD}, train, {})
    changes: list[tuple[dict[str, Any], str]] = [
        ({"block.0.query.A": torch.ones(2, 4)}, r"'block.0.query.A' should be \(3, 4\)"),
        ({"block.2.query.A": torch.ones(1, 4)}, "'block.2.query.A' should be None"),
        ({"block.0.query.B": torch.ones(5, 3).double()}, "'block.0.query.B' is torch.float64"),
        ({"block.1.query.B": torch.ones(5, 1, dtype=torch.int64)}, "'block.1.query.B' is torch.int64"),
        ({"head.weight": torch.zeros(2, 3).half()}, "'head.weight' is torch.float16"),
    ]
    for change, words in changes:
        with pytest.raises(RecordError, match=words):
            pairs.check({**PARAMS, **change}, train, HEAD)
    whole = {name: t.to(torch.int32) for name, t in PARAMS.items() if name not in HEAD}
    with pytest.raises(RecordError, match="floating"):
        pairs.check(whole, train, {})


def test_fresh_factors_change_nothing_and_are_drawn_as_lora_draws_them() -> None:
    made = pairs.fresh_b(pairs.fresh_a(PARAMS, np.random.default_rng(0)))
    assert not pairs.learnt(made) and pairs.learnt(PARAMS) and made["head.weight"] is HEAD["head.weight"]
    again = pairs.fresh_a(PARAMS, np.random.default_rng(0))
    assert all(torch.equal(made[f"{stem}.A"], again[f"{stem}.A"]) for stem in pairs.stems(PARAMS))
    drawn = pairs.drawn_a(np.random.default_rng(1), torch.zeros(200, 16))
    bound = 1 / math.sqrt(16)
    assert 0.99 * bound < float(drawn.abs().max()) <= bound
    assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
