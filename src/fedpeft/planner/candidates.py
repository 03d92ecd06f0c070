"""What a planner is asked where parameters say what may train; the rest of the room does without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeft.core import pairs, tree
from fedpeft.core.tree import Params, block_of
from fedpeft.planner.cost import Weight, shape_of
from fedpeft.planner.plan import Choices, Job


def job_of(config: Mapping[str, Any], params: Params, choices: Choices) -> Job:
    """What is planned where these parameters train: LoRA's factors on the candidates, beside a head or none.

    It has no scores yet, and knows no rows.

    Args:
        config: of the model.
        params: A (r_max, d_in) and B (d_out, r_max) of every candidate; without a head a language model's own is used.
    """
    sizes, head = pairs.widths(params), pairs.others(params)
    return Job(
        shape_of(config, lm_head=not head),
        tuple(
            Weight(stem, block_of(stem) or 0, stem.split(".", 2)[-1], d_in, d_out)
            for stem, (d_out, d_in) in sizes.items()
        ),
        {},
        longest=1,
        mean=1.0,
        classes=max((len(t) for t in head.values()), default=None),
        dtype="bfloat16" if config.get("dtype") == "bfloat16" else "float32",
        head_bytes=4 * tree.count(head),
        choices=choices,
    )
