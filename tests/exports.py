"""What the tests of exports share: labels, facts, and peft as users call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import tiny
from fedpeft.core.adapter import Lora
from fedpeft.core.examples import Examples
from fedpeft.models.hf import HFModel

LABELS = ["no", "yes", "per|haps"]
CARD = {"task": "trec <b>", "method": "fedavg", "rounds": 3, "metrics": {"test": {"accuracy": 0.87654}}, "empty": None}


def lora_model(family: str, spec: Lora | None = None) -> HFModel:
    return tiny.model(family, spec or Lora(rank=4, alpha=6.0), dtype="float32")


def data_for(model: HFModel) -> Examples:
    return tiny.examples(tiny.place(1), 9, segments=model.base.family == "bert")


def with_peft(family: str, base: Path, adapter: Path) -> Any:
    """The adapter as a user of peft loads it."""
    return peft.PeftModel.from_pretrained(tiny.token_classifier(base, 3, "float32"), str(adapter)).eval()


def assert_equal_logits(classifier: Any, model: HFModel, params: dict[str, Tensor]) -> None:
    data = data_for(model)
    with torch.no_grad():
        got = tiny.plain_logits(classifier, data, model.pooling, pad=1)
    expected = model.logits(params, data)
    assert (got - expected).abs().max() < 1e-5
    head_alone = {n: t for n, t in params.items() if n.startswith("head.")}
    assert (model.logits(head_alone, data) - expected).abs().max() > 0.03, "the adapter must matter"


def deltas(model: HFModel) -> dict[str, Tensor]:
    rng = tiny.place(5)
    query, up = model.places["block.0.query"], model.places["block.2.up"]
    shapes = {
        "delta.block.0.query.left": (query.d_out, 3),
        "delta.block.0.query.right": (3, query.d_in),
        "delta.block.2.up.dense": (up.d_out, up.d_in),
    }
    return {n: torch.from_numpy(rng.normal(0, 0.1, size=s)).float() for n, s in shapes.items()}
