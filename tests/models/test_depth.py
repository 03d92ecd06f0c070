"""A base of some of its blocks: against transformers' own model of as many blocks, and what the two have in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tiny
import tiny_lm
from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, Full, Lora
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, AdamW, Fit, base_of, blocks_in
from fedpeft.models.families import FAMILIES
from fedpeft.models.hf import HFModel
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.planner.cost import shape_of, train_flops

KEPT = (0, 2)  # of three
FAMILIES_HERE = (*tiny.FAMILIES, "opt")


def without(module: Any, family: str, kept: Sequence[int]) -> Any:
    """A model that transformers makes with so many blocks, with the weights of those that are kept."""
    config = copy.deepcopy(module.config)
    config.num_hidden_layers = len(kept)
    config._attn_implementation = "sdpa"
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    made: Any = type(module)(config, **({"add_pooling_layer": False} if family in ("bert", "roberta") else {}))
    stem = FAMILIES[family][0]
    state = module.state_dict()
    own = {name: t for name, t in state.items() if not name.startswith(f"{stem}.")}
    for new, old in enumerate(kept):
        start = f"{stem}.{old}."
        own |= {f"{stem}.{new}.{name[len(start) :]}": t for name, t in state.items() if name.startswith(start)}
    made.to(next(module.parameters()).dtype).load_state_dict(own)
    return made.eval()


def states(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states; decoders keep no keys and values, as in training."""
    caches = {} if hasattr(module, "encoder") else {"use_cache": False}
    last: Tensor = module(**batch, **caches).last_hidden_state
    return last


# --- one pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES_HERE)
@pytest.mark.parametrize("kept", [(0, 2), (1,), (0, 1, 2)])
def test_it_is_the_model_that_transformers_makes_without_the_others(family: str, kept: tuple[int, ...]) -> None:
    base, batch = tiny.base(family), tiny.padded(tiny.examples(tiny.place(), 6), 1)
    short = base.at(base_of(kept))
    with torch.no_grad():
        ours = states(short.module, batch)
        theirs = states(without(base.module, family, kept), batch)
        whole = states(base.module, batch)
    real = batch["attention_mask"].bool()
    assert torch.allclose(ours[real], theirs[real], atol=1e-10)
    assert torch.equal(ours, whole) == (len(kept) == tiny.BLOCKS)


def test_each_block_keeps_its_own_kind_of_mask() -> None:
    """Qwen 2 with a window of three tokens in the block that stays second: attention there sees no further back."""
    config = transformers.Qwen2Config(
        vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, sliding_window=3, use_sliding_window=True,
        layer_types=["full_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        body = transformers.AutoModel.from_config(config).double().eval()
    base, ids = tiny.freeze(body, None, "tiny-qwen2", tiny.CPU), torch.arange(5, 17)[None]
    ends: dict[str, Tensor] = {}
    with torch.no_grad():
        ends["ours"] = states(base.at("blocks:0,2").module, {"input_ids": ids})
        ends["theirs"] = states(without(body, "qwen2", KEPT), {"input_ids": ids})
        ends["full"] = states(base.at("blocks:0,1").module, {"input_ids": ids})
    assert torch.allclose(ends["ours"], ends["theirs"], atol=1e-10)
    assert (ends["ours"] - ends["full"]).abs().max() > 1e-3
    assert base.module.config.layer_types[1:] == ["full_attention", "sliding_attention"]


def test_nothing_is_copied_and_both_stay_usable() -> None:
    base = tiny.base("gpt2")
    short = base.at("blocks:0,2")
    assert short is base.at("blocks:0,2") and short.acting is base.acting
    own, every = dict(short.module.named_parameters()), dict(base.module.named_parameters())
    assert own.keys() == {path for path in every if not path.startswith("h.1.")}
    assert all(weight is every[path] for path, weight in own.items())
    assert list(short.module.h)[1] is base.module.h[2], "block 2 has its own name in either"
    assert short.module.get_submodule("h.2") is base.module.get_submodule("h.2")
    assert (short.module.config.num_hidden_layers, base.module.config.num_hidden_layers) == (2, 3)


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_training_the_ends_equals_a_plain_loop_over_the_short_model(family: str) -> None:
    """Three steps of AdamW, float64: the two blocks and the head to 1e-9; the base keeps its bits."""
    model, data = tiny.model(family, Full((0, -1))), tiny.examples(tiny.place(1), 9)
    start = {name: t.double() for name, t in model.init(tiny.place()).items()}
    batches = [[0, 1, 2], [3, 4, 5, 6, 7], [8]]
    before = tree.sha256(model.base.module.state_dict())
    fitted = model.fit(Fit(start, data, batches, AdamW(1e-2, weight_decay=0.1, eps=1e-6), base=base_of(KEPT), clip=0.5))

    body, head = without(model.base.module, family, KEPT), nn.Linear(tiny.WIDTH, 3).double()
    head.load_state_dict({"weight": start["head.weight"], "bias": start["head.bias"]})
    stem = FAMILIES[family][0]
    places = {name: path.replace(f"{stem}.2.", f"{stem}.1.") for name, path in model.weights.items()}
    body.requires_grad_(False)
    with torch.no_grad():  # the start went through float32
        for name, path in places.items():
            body.get_parameter(path).copy_(start[name]).requires_grad_(True)
    every = [*(body.get_parameter(path).requires_grad_(True) for path in places.values()), *head.parameters()]
    theirs, losses = torch.optim.AdamW(every, lr=1e-2, weight_decay=0.1, eps=1e-6), []
    for rows in batches:
        theirs.zero_grad()
        batch = tiny.padded(data.take(rows), 1)
        last = states(body, batch)
        loss = F.cross_entropy(
            head(tiny.pooled(last, batch["attention_mask"], model.pooling)), torch.from_numpy(data.labels[rows])
        )
        loss.backward()
        nn.utils.clip_grad_norm_(every, 0.5)
        theirs.step()
        losses.append(loss.item())
    assert fitted.losses == pytest.approx(losses, abs=1e-9)
    found = {name: body.get_parameter(path) for name, path in places.items()}
    found |= {"head.weight": head.weight, "head.bias": head.bias}
    assert found.keys() == fitted.params.keys() and any(name.startswith("block.2.") for name in found)
    for name, t in found.items():
        slack = 1e-3 if name.endswith("k_proj.bias") or "key.bias" in name else 1e-9  # of a gradient that is rounding
        assert torch.allclose(fitted.params[name], t, atol=slack, rtol=0), name
    assert tree.sha256(model.base.module.state_dict()) == before


def test_all_blocks_named_is_the_whole_model_bit_for_bit() -> None:
    for spec in (Full((0, -1)), Lora(rank=4)):
        model, data = tiny.model("llama", spec, "float32"), tiny.examples(tiny.place(1), 6)
        params = model.init(tiny.place())
        ends = [
            model.fit(Fit(params, data, [[0, 1, 2], [3, 4, 5]], AdamW(1e-2), base=base))
            for base in ("", "blocks:0,1,2")
        ]
        assert tree.sha256(ends[0].params) == tree.sha256(ends[1].params)
        assert ends[0].losses == ends[1].losses and ends[0].products == ends[1].products


def test_lora_acts_in_the_short_model_for_clients_together_and_alone() -> None:
    """Two clients' factors in blocks 0 and 2, against the products folded into transformers' own short model."""
    model, data = tiny.model("gpt2"), tiny.examples(tiny.place(1), 5)
    slots = [name for name in model.slots if not name.startswith("block.1.")]
    clients = [tiny.params(model, tiny.place(seed), slots=slots) for seed in (2, 3)]
    base = base_of(KEPT)
    fits = [Fit(p, data, [[0, 1, 2, 3, 4]], SGD(0.1), base=base) for p in clients]
    losses = [fitted.loss for fitted in model.fit_many(fits) if not isinstance(fitted, Exception)]
    assert len(losses) == 2
    for fit, params, loss in zip(fits, clients, losses, strict=True):
        assert model.fit(fit).loss == pytest.approx(loss, abs=1e-12)
        body, batch = without(model.base.module, "gpt2", KEPT), tiny.padded(data, 1)
        with torch.no_grad():
            for name in slots:
                slot = model.slots[name]
                change = model.scale * params[f"{name}.B"] @ params[f"{name}.A"]
                block, inner = slot.path.split(".", 2)[1:]
                weight = body.get_submodule(f"h.{KEPT.index(int(block))}.{inner}").weight  # (d_in, width)
                weight[:, slot.offset : slot.offset + slot.d_out] += change.T
            states = body(**batch).last_hidden_state
            logits = (
                tiny.pooled(states, batch["attention_mask"], "last") @ params["head.weight"].T + params["head.bias"]
            )
        assert loss == pytest.approx(F.cross_entropy(logits, torch.from_numpy(data.labels)).item(), abs=1e-9)
        assert torch.allclose(model.on(base).logits(params, data), logits.float(), atol=1e-5)
    assert not model.base.acting.outputs


def test_a_language_models_head_stands_behind_the_short_model() -> None:
    """The loss of answers and of predictions by some blocks is that of transformers' model with these blocks."""
    base = tiny_lm.base("llama", False)
    model = HFModel(base, Full((0, -1)), 0, 2048, GenerateReadout(tiny_lm.lm_head("llama", False)))
    drawn = tiny.examples(tiny.place(1), 4, longest=9)
    rows = tuple(tiny.place(i).integers(5, 60, size=6 + i).astype("int32") for i in range(4))
    data = Examples(rows, drawn.labels, starts=drawn.lengths * 0 + 3)
    params = {name: t.double() for name, t in model.init(tiny.place()).items()}
    scored = model.on(base_of(KEPT)).score(params, data)
    full = tiny_lm.language_model("llama", False)
    short, total = without(full.base_model, "llama", KEPT), 0.0
    with torch.no_grad():
        for own in rows:
            ids = torch.from_numpy(own).long()[None]
            logits = full.lm_head(states(short, {"input_ids": ids}))[0]
            total += F.cross_entropy(logits[2:-1], ids[0, 3:], reduction="sum").item()
    assert float(scored["loss"]) == pytest.approx(total, rel=1e-6)
    fitted = model.fit(Fit(params, data, [[0, 1, 2, 3]], SGD(0.1), base=base_of(KEPT)))
    assert fitted.loss == pytest.approx(total / sum(len(own) - 3 for own in rows), rel=1e-6)


# --- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("spec", [Full((0, -1)), Full((1,)), Lora(rank=1, blocks=(1,)), Lora(rank=1, blocks=(0, 3))])
def test_blocks_that_are_left_out_are_not_counted(family: str, spec: AdapterSpec) -> None:
    """Against torch's own count, on a model of four blocks of which the third is left out, and perhaps the first."""
    config = tiny.config(family)
    config.num_hidden_layers = 4
    body = transformers.AutoModel.from_config(config, attn_implementation="eager")
    model = HFModel(tiny.freeze(body, None, "eager", tiny.CPU), spec, 3)
    tokens = tuple(row for row in tiny.place().integers(5, 60, size=(3, 24)).astype("int32"))
    data, params = Examples(tokens, tiny.place().integers(0, 3, size=3)), model.init(tiny.place())
    kept = (1, 3) if spec.blocks == (1,) else (0, 1, 3)
    with FlopCounterMode(display=False) as counter:
        fitted = model.fit(Fit(params, data, [[0, 1, 2]], SGD(0.1), base=base_of(kept)))
    counted = train_flops(shape_of(model.base.config), fitted.tokens, fitted.pairs, model.lowest_block(params))
    assert counted + 2 * fitted.products == pytest.approx(counter.get_total_flops(), rel=0.07)
    whole = model.fit(Fit(params, data, [[0, 1, 2]], SGD(0.1)))
    assert fitted.products < whole.products and counted + 2 * fitted.products < 0.85 * (counted + 2 * whole.products)


# --- names and errors -----------------------------------------------------------------------------------------------


def test_names_of_blocks() -> None:
    assert base_of((0, 3, 11)) == "blocks:0,3,11" and blocks_in("blocks:0,3,11") == (0, 3, 11)
    assert [blocks_in(name) for name in ("", "nf4", "blocks:", "blocks:0,", "blocks:-1", "xblocks:0")] == [None] * 6


def test_what_does_not_exist_is_refused() -> None:
    base = tiny.base("bert")
    for name in ("blocks:0,3", "blocks:2,0", "blocks:0,0"):
        with pytest.raises(ModelError, match=r"are not what the model has; give some of 0 to 2, ascending"):
            base.at(name)
    with pytest.raises(ModelError, match=r"those of the family 'distilbert' are not"):
        tiny.base("distilbert").at("blocks:0")
    model, data = tiny.model("bert"), tiny.examples(tiny.place(), 3)
    params = tiny.params(model, tiny.place())
    with pytest.raises(FitError, match=r"a Fit has 'block\.1\.query\.A', whose block its base 'blocks:0,2' leaves out"):
        model.check(Fit(params, data, [[0]], SGD(0.1), base="blocks:0,2"))
    with pytest.raises(FitError, match=r"Fit\.base: blocks 7 are not what the model has"):
        model.check(Fit(params, data, [[0]], SGD(0.1), base="blocks:7"))


def test_weights_of_some_blocks_are_the_only_parameters() -> None:
    model = tiny.model("bert", Full((-1, 0)), "float32")
    fresh = model.init(tiny.place())
    assert tree.blocks_of(fresh) == (0, 2) and tree.in_blocks(fresh, (None,)).keys() == {"head.weight", "head.bias"}
    layer = model.base.module.encoder.layer
    assert tree.count(tree.in_blocks(fresh, (2,))) == sum(p.numel() for p in layer[2].parameters())
    assert torch.equal(fresh["block.2.output.dense.weight"], layer[2].output.dense.weight)
    every = tiny.model("bert", Full(), "float32")
    data = tiny.examples(tiny.place(1), 4)
    assert torch.equal(model.logits(fresh, data), every.logits(every.init(tiny.place()) | fresh, data))
    for blocks, said in (((0, -3), "block 0"), ((3,), "block 3"), ((-4,), "block -4"), ((), "no block")):
        with pytest.raises(ModelError, match=rf"adapter\.blocks .* names {said}.* blocks 0 to 2"):
            tiny.model("bert", Full(blocks))
