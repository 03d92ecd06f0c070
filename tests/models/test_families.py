"""Projections by name, by pattern, and what is said where there are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import tiny
from fedpeft.core.adapter import Bottleneck, HeadOnly, LatePrompt, Lora, Prefix
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.fit import SGD, Fit
from fedpeft.models.depth import shortened
from fedpeft.models.families import FAMILIES, Slot, choose, is_decoder, linear_size, slots
from fedpeft.models.hf import HFModel
from fedpeft.planner import configuration

DATA = tiny.examples(tiny.place(), 2)


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
def test_every_linear_layer_of_the_blocks_has_a_name(family: str) -> None:
    base = tiny.base(family).module
    found = slots(base, family)
    kinds = tiny.everything(family)
    assert set(found) == {f"block.{i}.{kind}" for i in range(tiny.BLOCKS) for kind in kinds}
    linear = {path for path, module in base.named_modules() if linear_size(module) is not None}
    assert {slot.path for slot in found.values()} == linear
    for slot in found.values():
        assert linear_size(base.get_submodule(slot.path)) == (slot.d_in, slot.width)
        assert slot.offset + slot.d_out <= slot.width


def test_sizes_follow_the_family() -> None:
    llama, gpt2 = slots(tiny.base("llama").module, "llama"), slots(tiny.base("gpt2").module, "gpt2")
    assert llama["block.1.key"] == Slot("block.1.key", "layers.1.self_attn.k_proj", 32, 16, 0, 16)  # grouped queries
    assert llama["block.1.down"] == Slot("block.1.down", "layers.1.mlp.down_proj", 48, 32, 0, 32)
    assert [gpt2[f"block.0.{k}"].offset for k in ("query", "key", "value")] == [0, 32, 64]
    assert gpt2["block.0.value"] == Slot("block.0.value", "h.0.attn.c_attn", 32, 32, 64, 96)


@pytest.mark.parametrize(
    "refused",
    [
        lambda model: tiny.model("distilbert", Prefix()),
        lambda model: tiny.model("distilbert", LatePrompt()),
        lambda model: tiny.model("distilbert", Bottleneck()),
        lambda model: shortened(model.base.module, "distilbert", [0]),
        lambda model: model.hidden(None, DATA, [0]),
        lambda model: model.sensitivity(model.init(tiny.place()), DATA, [0], "l2", 0.01, tiny.place()),
        lambda model: model.fit(Fit(model.init(tiny.place()), DATA, [[0]], SGD(0.1), checkpointing=True)),
    ],
)
def test_a_family_that_is_not_known_is_refused_with_those_that_are(refused: Callable[[HFModel], object]) -> None:
    """OPT is among them: the tests of all these run on it."""
    model = HFModel(tiny.base("distilbert"), HeadOnly(), 3)
    with pytest.raises((ModelError, FitError), match="a BERT, RoBERTa, GPT-2, OPT or Llama model"):
        refused(model)


def test_the_planner_knows_the_same_families() -> None:
    assert FAMILIES.keys() == configuration.FAMILIES.keys()
    for name, (_, kinds) in FAMILIES.items():
        same = [other for other, family in configuration.FAMILIES.items() if family == configuration.FAMILIES[name]]
        assert all(FAMILIES[other][1] is kinds for other in same), "one place for the projections of a planner's family"


def test_decoders_are_known() -> None:
    decoders = {"gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma"}
    assert {family for family in FAMILIES if is_decoder(family)} == decoders
    assert not is_decoder("distilbert")
    assert tiny.model("gpt2").pooling == "last" and tiny.model("roberta").pooling == "mean"


def test_blocks_and_targets_choose() -> None:
    base = tiny.base("bert").module
    assert list(choose(base, "bert", ("value", "query"), (2, 0))) == [
        "block.0.query", "block.0.value", "block.2.query", "block.2.value"
    ]  # fmt: skip
    assert list(choose(base, "bert", ("up",), None)) == [f"block.{i}.up" for i in range(3)]


@pytest.mark.parametrize(
    ("targets", "blocks", "message"),
    [
        (("gate",), None, r"names 'gate', which the model does not have; it has query, key, value, output, up, down,"),
        (("qurey",), None, r"or give a pattern over its linear layers, such as '\*\.query'"),
        (("*.wq",), None, r"names '\*\.wq', which the model does not have"),
        (("query",), (0, 3), "names block 3; the model has blocks 0 to 2"),
        (("query",), (-1,), "names block -1"),
        (("query",), (), "selects no projection"),
        ((), None, "selects no projection"),
    ],
)
def test_wrong_targets_and_blocks_are_refused(
    targets: tuple[str, ...], blocks: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        tiny.model("bert", Lora(targets=targets, blocks=blocks))


@pytest.mark.parametrize(
    ("family", "pattern", "kind", "width"),
    [
        ("distilbert", "*.q_lin", "attention.q_lin", 32),
        ("gpt_neox", "*.query_key_value", "attention.query_key_value", 96),
        ("gpt_neox", "*.dense_h_to_4h", "mlp.dense_h_to_4h", 48),
    ],
)
def test_an_unknown_family_is_reached_by_pattern(family: str, pattern: str, kind: str, width: int) -> None:
    model = tiny.model(family, Lora(rank=2, targets=(pattern,), blocks=(0, 2)))
    assert list(model.slots) == [f"block.0.{kind}", f"block.2.{kind}"]
    assert {slot.width for slot in model.slots.values()} == {width}
    data = tiny.examples(tiny.place(), 8)
    fits = [Fit(tiny.params(model, tiny.place(i)), data, [[0, 1, i], [4]], SGD(0.1)) for i in (2, 3)]
    for fitted, fit in zip(model.fit_many(fits), fits, strict=True):
        assert not isinstance(fitted, Exception)
        alone = model.fit(fit)
        for name, t in fitted.params.items():
            assert torch.allclose(t, alone.params[name], atol=1e-9, rtol=0)
            assert not torch.equal(t, fit.params[name])
    with pytest.raises(ModelError, match=f"its family '{family}' is not known by name, or give a pattern"):
        tiny.model(family, Lora(targets=("query",)))
    with pytest.raises(ModelError, match="selects no projection"):
        tiny.model(family, Lora(targets=(pattern,), blocks=(9,)))


def test_a_pattern_on_a_known_family_takes_the_fused_module_whole() -> None:
    model = tiny.model("gpt2", Lora(rank=2, targets=("h.*.attn.c_attn",)))
    assert model.slots["block.1.attn.c_attn"] == Slot("block.1.attn.c_attn", "h.1.attn.c_attn", 32, 96, 0, 96)


def test_a_linear_layer_outside_the_blocks_keeps_its_path() -> None:
    tower = nn.ModuleDict({"front": nn.Linear(3, 4), "layers": nn.ModuleList([nn.ModuleDict({"wq": nn.Linear(4, 4)})])})
    found = choose(tower, "tower", ("*",), None)
    assert list(found) == ["module.front", "block.0.wq"]
    assert found["module.front"].path == "front"
    assert linear_size(tower) is None


@pytest.mark.parametrize(("family", "kinds"), [("gpt2", 6), ("llama", 7), ("bert", 6)])
def test_all_are_the_kinds_that_the_family_has(family: str, kinds: int) -> None:
    base = tiny.base(family).module
    found = choose(base, family, ["all"], None)
    assert found == choose(base, family, sorted({name.rsplit(".", 1)[1] for name in slots(base, family)}), None)
    assert len({name.rsplit(".", 1)[1] for name in found}) == kinds
    assert set(choose(base, family, ["all"], [1])) == {name for name in found if name.startswith("block.1.")}
