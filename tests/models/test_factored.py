"""What was trained as one LoRA of a chosen rank: against numpy's decomposition and against plain peft."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from exports import CARD, LABELS, assert_equal_logits, deltas, lora_model, with_peft
from fedpeft.core.adapter import AdaLora, Lora, Prefix
from fedpeft.core.errors import ModelError
from fedpeft.models.export import export_adapter, import_adapter
from fedpeft.models.factored import Factored, factored

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call


def by_hand(params: dict[str, Tensor], slot: str, scale: float) -> np.ndarray:
    """The whole change of a projection, from the definitions."""
    own = {name: t.double().numpy() for name, t in params.items()}
    change = np.zeros(())
    if f"{slot}.A" in own:
        change = change + scale * own[f"{slot}.B"] @ own[f"{slot}.A"]
    if f"{slot}.E" in own:
        change = change + scale * own[f"{slot}.P"] @ np.diag(own[f"{slot}.E"]) @ own[f"{slot}.Q"]
    if f"delta.{slot}.left" in own:
        change = change + own[f"delta.{slot}.left"] @ own[f"delta.{slot}.right"]
    if f"delta.{slot}.dense" in own:
        change = change + own[f"delta.{slot}.dense"]
    return change


def product(found: Factored, slot: str) -> np.ndarray:
    b, a = (found.params[f"{slot}.{side}"].double().numpy() for side in "BA")
    return found.model.scale * b @ a


@pytest.mark.parametrize("rank", [1, 3, 5, 20])
def test_every_projection_keeps_its_largest_singular_values(rank: int) -> None:
    model = lora_model("bert")
    params = tiny.params(model, tiny.place()) | deltas(model)
    found = factored(model, params, rank)
    left = whole = 0.0
    for slot in ("block.0.query", "block.2.up", "block.1.value"):
        u, s, vt = np.linalg.svd(by_hand(params, slot, model.scale), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert np.abs(product(found, slot) - best).max() < 1e-5 * s[0]
        assert found.params[f"{slot}.A"].shape[0] == rank
    for slot in {n.removeprefix("delta.").rpartition(".")[0] for n in params if "block" in n}:
        s = np.linalg.svd(by_hand(params, slot, model.scale), compute_uv=False)
        left, whole = left + (s[rank:] ** 2).sum(), whole + (s**2).sum()
    assert found.left_out == pytest.approx(np.sqrt(left / whole), abs=2e-7)
    assert found.params.keys() & {n for n in params if n.startswith("delta.")} == set()
    assert torch.equal(found.params["head.weight"], params["head.weight"])


def test_adaloras_triplets_become_a_lora(tmp_path: Path) -> None:
    model = tiny.model("bert", AdaLora(rank=5, alpha=10.0), "float32")
    rng = tiny.place(3)
    params = {n: torch.from_numpy(rng.normal(0, 0.2, size=t.shape)).float() for n, t in model.init(rng).items()}
    found = factored(model, params, 5)
    for slot in model.slots:
        assert np.abs(product(found, slot) - by_hand(params, slot, model.scale)).max() < 1e-5
    assert found.left_out < 1e-6
    tiny.saved("bert", tmp_path / "base", "float32")
    export_adapter(model, params, tmp_path / "out", labels=LABELS, card=CARD, rank=5)
    assert_equal_logits(with_peft("bert", tmp_path / "base", tmp_path / "out"), model, params)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_change_of_the_base_is_loaded_by_plain_peft_and_goes_on_as_a_lora(family: str, tmp_path: Path) -> None:
    model = lora_model(family)
    tiny.saved(family, tmp_path / "base", "float32")
    base_change = {n: t for n, t in deltas(model).items() if "query" in n}
    params = tiny.params(model, tiny.place()) | base_change
    out = export_adapter(model, params, tmp_path / "out", labels=LABELS, card=CARD, rank=7)  # 4 of LoRA, 3 of the base
    assert_equal_logits(with_peft(family, tmp_path / "base", out), model, params)
    note = json.loads((out / "fedpeft.json").read_text())
    assert note["form"] == "adapter" and note["adapter"]["rank"] == 7 and note["adapter"]["alpha"] == 10.5
    assert note["factored"]["rank"] == 7 and note["factored"]["left_out"] < 1e-6
    assert "| factored.rank | 7 |" in (out / "README.md").read_text()
    assert (
        "| factored.scores | of what was trained, before it was cut to this rank |" in (out / "README.md").read_text()
    )

    other = factored(model, params, 7).model
    again = import_adapter(out, other)
    other.warm_start(again)  # every slot has the rank of the specification
    for name, t in again.items():
        if name.endswith(".A"):
            assert t.any(dim=1).all(), f"a component of {name} could never train"
    data = tiny.examples(tiny.place(1), 9, segments=family == "bert")
    assert (other.logits(again, data) - model.logits(params, data)).abs().max() < 1e-5


def test_every_projection_with_an_adapter_is_there_to_go_on_with() -> None:
    """A change of one projection alone, as a planned federation leaves it; the others get a fresh A and B = 0."""
    model = lora_model("bert", Lora(rank=4, alpha=6.0, dropout=0.1))
    whole = tiny.params(model, tiny.place()) | deltas(model)
    only = {n: t for n, t in whole.items() if n.startswith(("delta.block.0.query", "head."))}
    found = factored(model, only, 3)
    found.model.warm_start(found.params)
    assert found.model.spec == Lora(rank=3, alpha=4.5, dropout=0.1) and found.left_out < 1e-6
    for slot in model.slots:
        assert found.params[f"{slot}.A"].any(dim=1).all()
        assert found.params[f"{slot}.B"].any() == (slot == "block.0.query")
    nothing = factored(model, {n: t for n, t in whole.items() if n.startswith("head.")}, 3)
    assert nothing.left_out == 0 and not any(nothing.params[f"{slot}.B"].any() for slot in model.slots)


def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    model = lora_model("bert")
    params = tiny.params(model, tiny.place())
    for rank in (0, -1, 33):
        with pytest.raises(ModelError, match=rf"--rank {rank}: give a rank from 1 to 32"):
            export_adapter(model, params, tmp_path / "out", labels=LABELS, card={}, rank=rank)
    prefix = tiny.model("bert", Prefix(length=2), "float32")
    with pytest.raises(ModelError, match=r"kind 'prefix' is no change of projections.* without --rank"):
        factored(prefix, prefix.init(tiny.place()), 2)
    assert not list(tmp_path.iterdir())
