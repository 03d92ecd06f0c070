"""LoRA with a client axis against peft, for every family."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor

import tiny
from fedpeft.core.adapter import Lora
from fedpeft.core.fit import AdamW, Fit
from fedpeft.models.adapters import Rows, lora
from fedpeft.models.families import Slot
from fedpeft.models.hf import HFModel

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call


def with_peft(classifier: Any, model: HFModel, params: dict[str, Tensor]) -> Any:
    """The classifier with the adapter as peft's own LoRA and the same head."""
    paths: dict[str, list[Slot]] = {}
    for slot in model.slots.values():
        paths.setdefault(slot.path, []).append(slot)
    inner = classifier.base_model_prefix
    ranks = {f"{inner}.{path}": sum(len(params[f"{s.name}.A"]) for s in own) for path, own in paths.items()}
    config = peft.LoraConfig(
        task_type="TOKEN_CLS",
        target_modules=list(ranks),
        r=1,
        rank_pattern=ranks,
        alpha_pattern={path: model.scale * rank for path, rank in ranks.items()},
        fan_in_fan_out=model.base.family == "gpt2",
    )
    wrapped = peft.get_peft_model(classifier, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for path, own in paths.items():
            layer = wrapped.base_model.model.get_submodule(f"{inner}.{path}")
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            b.zero_()
            row = 0
            for slot in own:
                low, high = params[f"{slot.name}.A"], params[f"{slot.name}.B"]
                a[row : row + len(low)] = low
                b[slot.offset : slot.offset + slot.d_out, row : row + len(low)] = high
                row += len(low)
        head = next(m for n, m in wrapped.base_model.model.named_children() if n in ("classifier", "score"))
        head.modules_to_save["default"].weight.copy_(params["head.weight"])
        head.modules_to_save["default"].bias.copy_(params["head.bias"])
    return wrapped.eval()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("targets", ["usual", "all"])
def test_logits_equal_pefts(family: str, targets: str, tmp_path: Path) -> None:
    spec = Lora(rank=3, alpha=5.0, targets=("query", "value") if targets == "usual" else tiny.everything(family))
    model = tiny.model(family, spec)
    params = tiny.params(model, tiny.place())
    data = tiny.examples(tiny.place(1), 9, segments=family == "bert")
    reference = with_peft(tiny.token_classifier(tiny.saved(family, tmp_path), 3), model, params)
    with torch.no_grad():
        expected = tiny.plain_logits(reference, data, model.pooling, pad=1)
    got = model.logits(params, data)
    assert (got - expected).abs().max() < 1e-6  # logits are float32; the base is float64
    without = model.logits({n: t for n, t in params.items() if "head" in n}, data)
    assert (got - without).abs().max() > 0.05, "the adapter must matter, or this test shows nothing"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_and_training_equal_a_plain_loop_over_pefts_model(family: str, tmp_path: Path) -> None:
    """Four steps of AdamW with weight decay and clip_grad_norm_, in float64."""
    fused = family == "gpt2"  # its key shares a module: peft would also train the zeros around our block
    targets = ("output", "up") if fused else ("key", "output", "up")
    model = tiny.model(family, Lora(rank=3, alpha=5.0, targets=targets))
    params = tiny.params(model, tiny.place())
    data = tiny.examples(tiny.place(1), 9)
    batches = [[0, 1, 2], [3, 4, 5, 6, 7], [8], [2, 4, 6]]
    fitted = model.fit(Fit(params, data, batches, AdamW(0.01, weight_decay=0.1), clip=0.5))

    reference = with_peft(tiny.token_classifier(tiny.saved(family, tmp_path), 3), model, params)
    weights = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1)
    losses = []
    for rows in batches:
        optimizer.zero_grad()
        logits = tiny.plain_logits(reference, data.take(rows), model.pooling, pad=1)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(data.labels[rows]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert fitted.losses == pytest.approx(losses, abs=1e-9)
    inner = reference.base_model.model
    for slot in model.slots.values():
        layer = inner.get_submodule(f"{inner.base_model_prefix}.{slot.path}")
        assert torch.allclose(fitted.params[f"{slot.name}.A"], layer.lora_A["default"].weight, atol=1e-9, rtol=0)
        assert torch.allclose(fitted.params[f"{slot.name}.B"], layer.lora_B["default"].weight, atol=1e-9, rtol=0)


def test_fresh_factors_leave_the_base_alone_and_have_pefts_distribution() -> None:
    model = tiny.model("bert", Lora(rank=200, targets=("query", "up")))
    params = model.init(tiny.place())
    for name, slot in model.slots.items():
        a, b = params[f"{name}.A"], params[f"{name}.B"]
        assert a.shape == (200, slot.d_in) and b.shape == (slot.d_out, 200) and a.dtype == torch.float32
        assert not b.any()
        bound = 1 / math.sqrt(slot.d_in)
        assert a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.04)  # of a uniform distribution
        assert abs(a.mean().item()) < 4 * bound / math.sqrt(3 * a.numel())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fresh_factors_change_no_bit_of_the_outputs(family: str, dtype: str) -> None:
    model = tiny.model(family, Lora(rank=4, targets=tiny.everything(family)), dtype=dtype)
    params, data = model.init(tiny.place()), tiny.examples(tiny.place(1), 5)
    head = {name: t for name, t in params.items() if name.startswith("head.")}
    assert len(head) < len(params) and torch.equal(model.logits(params, data), model.logits(head, data))


def test_every_row_gets_its_own_clients_factors() -> None:
    rng = np.random.default_rng(0)
    a, b = torch.from_numpy(rng.normal(size=(3, 2, 5))), torch.from_numpy(rng.normal(size=(3, 4, 2)))
    x, y = torch.from_numpy(rng.normal(size=(4, 6, 5))), torch.from_numpy(rng.normal(size=(4, 6, 9)))
    slot = Slot("s", "s", 5, 4, 3, 9)  # outputs 3 to 6 of 9
    whose = [2, 0, 2, 1]
    got = lora.apply(a, b, 0.7, slot, Rows(torch.tensor(whose)))(x, y)
    for row, client in enumerate(whose):
        expected = y[row].clone()
        expected[:, 3:7] += 0.7 * x[row] @ a[client].T @ b[client].T
        assert torch.allclose(got[row], expected, atol=1e-12)
        alone = lora.apply(a, b, 0.7, slot, Rows(None, client))(x[row : row + 1], y[row : row + 1])
        assert torch.allclose(alone[0], expected, atol=1e-12)
