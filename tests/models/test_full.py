"""All weights as parameters: against plain training of transformers' own model, and the base that keeps its bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tiny
import tiny_lm
from cohorts import OPTIMIZERS, alone, cohort, together
from fedpeft.core import tree
from fedpeft.core.adapter import Full, HeadOnly
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, AdamW, Fit
from fedpeft.models.export import export_adapter, export_merged, import_adapter
from fedpeft.models.hf import HFModel
from fedpeft.models.merge import merge
from fedpeft.models.readouts.cloze import ClozeReadout
from fedpeft.models.readouts.verbalizer import VerbalizerReadout
from fedpeft.planner.cost import shape_of, train_flops

BATCHES = [[0, 1, 2], [3, 4, 5, 6, 7], [8], [2, 4, 6]]


def weights(model: HFModel, seed: int = 0, noise: float = 0.05) -> dict[str, Tensor]:
    """The base's weights and a head, moved by noise of which every number matters."""
    rng = tiny.place(seed)
    fresh = model.init(rng)
    moved = {name: t + torch.from_numpy(rng.normal(0, noise, size=t.shape)) for name, t in fresh.items()}
    return {name: t.to(model.base.dtype) for name, t in moved.items()}


def twin(model: HFModel, params: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the base that holds the weights itself, every one of which is trained."""
    body: nn.Module = copy.deepcopy(tiny.module(model.base.family))
    with torch.no_grad():
        for name, path in model.weights.items():
            body.get_parameter(path).copy_(params[name])
    return body.requires_grad_(True).eval()


# --- one client -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "distilbert", "gpt_neox"])
def test_training_equals_a_plain_loop_over_transformers_model(family: str) -> None:
    """One step of SGD, and three of AdamW with decay and clip_grad_norm_: float64, every weight to 1e-9."""
    model = tiny.model(family, Full())
    params, data = weights(model), tiny.examples(tiny.place(1), 9)
    before = tree.sha256(model.base.module.state_dict())
    for optimizer, batches in ((SGD(0.1), BATCHES[:1]), (AdamW(1e-2, weight_decay=0.1, eps=1e-6), BATCHES[1:])):
        body, head = twin(model, params), nn.Linear(tiny.WIDTH, 3).double()
        head.load_state_dict({"weight": params["head.weight"], "bias": params["head.bias"]})
        every = [*body.parameters(), *head.parameters()]
        theirs: Any = torch.optim.SGD(every, 0.1)
        if isinstance(optimizer, AdamW):
            theirs = torch.optim.AdamW(every, lr=1e-2, weight_decay=0.1, eps=1e-6)
        losses = []
        for rows in batches:
            theirs.zero_grad()
            batch = tiny.padded(data.take(rows), 1)
            states = body(**batch).last_hidden_state
            logits = head(tiny.pooled(states, batch["attention_mask"], model.pooling))
            loss = F.cross_entropy(logits, torch.from_numpy(data.labels[rows]))
            loss.backward()
            nn.utils.clip_grad_norm_(every, 0.5)
            theirs.step()
            losses.append(loss.item())
        fitted = model.fit(Fit(params, data, batches, optimizer, clip=0.5))
        assert fitted.losses == pytest.approx(losses, abs=1e-9)
        found = {name: body.get_parameter(path) for name, path in model.weights.items()}
        found |= {"head.weight": head.weight, "head.bias": head.bias}
        assert found.keys() == fitted.params.keys()
        for name, t in found.items():
            assert torch.allclose(fitted.params[name], t, atol=1e-9, rtol=0), name
    assert tree.sha256(model.base.module.state_dict()) == before, "the base keeps its bits"
    assert not any(p.requires_grad for p in model.base.module.parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fresh_weights_are_copies_of_the_bases_own(family: str) -> None:
    model = tiny.model(family, Full(), "float32")
    fresh, data = model.init(tiny.place()), tiny.examples(tiny.place(1), 5)
    alone = tiny.model(family, HeadOnly(), "float32")
    head = alone.init(tiny.place())
    assert torch.equal(model.logits(fresh, data), alone.logits(head, data))
    assert tree.count(fresh) == sum(p.numel() for p in model.base.module.parameters()) + tree.count(head)
    for name, path in model.weights.items():
        own = model.base.module.get_parameter(path)
        assert torch.equal(fresh[name], own) and fresh[name].data_ptr() != own.data_ptr()
    assert fresh.keys() == model.weights.keys() | head.keys()


def test_a_client_that_lacks_a_weight_has_the_bases() -> None:
    model = tiny.model("bert", Full())
    params, data = weights(model), tiny.examples(tiny.place(1), 5)
    upper = {name: t for name, t in params.items() if name.startswith(("block.2.", "head."))}
    rest = {name: t.double() for name, t in model.init(tiny.place()).items() if name not in upper}
    assert torch.allclose(model.logits(upper, data), model.logits({**rest, **upper}, data), atol=1e-6)
    fitted = model.fit(Fit(upper, data, [[0, 1]], SGD(0.1)))
    still = {name for name, t in fitted.params.items() if torch.equal(t, upper[name])}
    assert still <= {"block.2.attention.self.key.bias"}, "which moves no softmax"


def test_some_weights_train_and_the_others_are_applied() -> None:
    """Only names of `Fit.train` change; the others act as the client has them."""
    model = tiny.model("bert", Full())
    params, data = weights(model), tiny.examples(tiny.place(1), 5)
    some = frozenset({"block.1.attention.self.query.weight", "head.bias"})
    whole, part = (model.fit(Fit(params, data, [[0, 1, 2]], SGD(0.1), train=names)) for names in (None, some))
    assert part.losses == whole.losses
    for name, t in part.params.items():
        assert torch.equal(t, whole.params[name] if name in some else params[name]), name


def test_another_precision_of_the_base() -> None:
    model = tiny.model("bert", Full())
    params, data = weights(model), tiny.examples(tiny.place(1), 5)
    exact, rough = (model.fit(Fit(params, data, [[0, 1, 2]], SGD(0.1), base=base)) for base in ("", "float32"))
    assert rough.loss == pytest.approx(exact.loss, rel=1e-4) and rough.loss != exact.loss
    assert rough.params["block.0.output.dense.weight"].dtype == torch.float64


# --- many clients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_cohort_is_its_clients_one_by_one_to_the_bit(family: str, optimizer: str) -> None:
    model = tiny.model(family, Full(), budget=20)
    plain = cohort(tiny.model(family), OPTIMIZERS[optimizer], tiny.place())
    fits = [replace(fit, params=weights(model, i), clip=1.0) for i, fit in enumerate(plain)]
    for one, other in zip(together(model, fits), alone(model, fits), strict=True):
        assert one.losses == other.losses and tree.sha256(one.params) == tree.sha256(other.params)


def test_one_client_that_breaks_leaves_the_others_and_the_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("bert", Full())
    data, before = tiny.examples(tiny.place(1), 5), tree.sha256(model.base.module.state_dict())
    fits = [Fit(weights(model, i), data, [[0, 1]], SGD(0.1)) for i in range(3)]
    healthy = [model.fit(fit) for fit in fits]
    sick = replace(fits[1], optimizer=SGD(1e300), batches=[[0, 1], [0, 1]])
    stock, calls = model.base.module.encoder.layer[2].forward, []

    def breaks(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return stock(*args, **kwargs)

    found = model.fit_many([fits[0], sick, fits[2]])
    assert isinstance(found[1], Exception)
    monkeypatch.setattr(model.base.module.encoder.layer[2], "forward", breaks)
    broken = model.fit_many(fits)
    assert isinstance(broken[2], Exception) and "out of memory" in str(broken[2])
    for got in (found[0], found[2], *broken[:2]):
        assert not isinstance(got, Exception)
        assert tree.sha256(got.params) in {tree.sha256(own.params) for own in healthy}
    assert tree.sha256(model.base.module.state_dict()) == before and not model.base.acting.weights


def test_a_change_of_the_base_comes_on_top() -> None:
    """A base delta is added to what the projection gives, whosever weights it has."""
    model = tiny.model("bert", Full())
    params, data = weights(model), tiny.examples(tiny.place(1), 5)
    name = "block.1.attention.self.query"
    dense = torch.from_numpy(tiny.place(2).normal(0, 0.3, size=(tiny.WIDTH, tiny.WIDTH)))
    moved = params | {f"{name}.weight": params[f"{name}.weight"] + dense}
    got = model.logits(params | {"delta.block.1.query.dense": dense}, data)
    assert torch.allclose(got, model.logits(moved, data), atol=1e-6)
    assert (got - model.logits(params, data)).abs().max() > 1e-3


# --- formats with the language model's head -------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", ["cloze", "verbalizer"])
def test_a_tied_head_trains_with_the_embeddings(format: str, tied: bool) -> None:
    """One step of SGD is that of transformers' own language model, whose head stays where it is not tied."""
    family = "bert" if format == "cloze" else "gpt2"
    data = tiny.examples(tiny.place(1), 5)
    lm = tiny_lm.lm_head(family, tied)
    readout: Any = VerbalizerReadout(lm, ([9], [10], [11]))
    if format == "cloze":
        data = Examples(data.tokens, data.labels, None, data.lengths - 1)
        readout = ClozeReadout(lm, (9, 10, 11))
    model = HFModel(tiny_lm.base(family, tied), Full(), 3, 2048, readout)
    params = {name: t.double() for name, t in model.init(tiny.place()).items()}
    fitted = model.fit(Fit(params, data, [list(range(5))], SGD(0.5)))

    full = copy.deepcopy(tiny_lm.language_model(family, tied)).requires_grad_(True)
    full.base_model.config._attn_implementation = full.config._attn_implementation = "eager"
    losses = []
    for own, label in zip(data.tokens, data.labels, strict=True):
        target, ids = 9 + int(label), torch.from_numpy(own).long()[None]
        logits = full(input_ids=ids).logits[0, -1]
        losses.append(F.cross_entropy(logits, torch.tensor(target)))
    torch.stack(losses).mean().backward()
    assert fitted.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    for name, path in model.weights.items():
        weight = full.base_model.get_parameter(path)
        slope = torch.zeros_like(weight) if weight.grad is None else weight.grad
        expected = params[name] - 0.5 * slope
        assert torch.allclose(fitted.params[name], expected, atol=1e-6), name


# --- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("lowest", [None, 0, 2])
def test_operations_are_those_that_torch_counts(family: str, lowest: int | None) -> None:
    """Of all weights, and of those from a block on; rows of one length, attention whose products torch counts."""
    body = transformers.AutoModel.from_config(tiny.config(family), attn_implementation="eager")
    model = HFModel(tiny.freeze(body, None, "eager", tiny.CPU), Full(), 3)
    tokens = tuple(row for row in tiny.place().integers(5, 60, size=(3, 24)).astype("int32"))
    data = Examples(tokens, tiny.place().integers(0, 3, size=3))
    params = model.init(tiny.place())
    blocks = tuple(f"block.{block}." for block in range(lowest or 0, tiny.BLOCKS))
    names = None if lowest is None else frozenset(name for name in params if name.startswith((*blocks, "head.")))
    with FlopCounterMode(display=False) as counter:
        fitted = model.fit(Fit(params, data, [[0, 1, 2]], SGD(0.1), train=names))
    lowest_block = model.lowest_block(params if names is None else names)
    assert lowest_block == (lowest or 0)
    counted = train_flops(shape_of(model.base.config), fitted.tokens, fitted.pairs, lowest_block)
    assert counted + 2 * fitted.products == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert fitted.products > 0.5 * 72 * (tiny.BLOCKS - (lowest or 0)) * 4 * tiny.WIDTH**2


def test_products_by_hand() -> None:
    """A projection of 32 to 48 over 9 tokens; embeddings, which ask for block 0's query, key and value, and a head."""
    adapter: Any = tiny.model("bert", Full()).adapter
    assert adapter.products(["block.1.intermediate.dense.weight", "block.0.output.dense.bias"], 9, 0) == 9 * 32 * 48
    assert adapter.products(["module.embeddings.word_embeddings.weight"], 9, 2) == 9 * 3 * 32**2 + 2 * 60 * 32
    assert adapter.products(["head.weight", "head.bias"], 9, 2) == 0


def test_the_last_norm_is_above_all_blocks() -> None:
    for family, name in (("gpt2", "module.ln_f.weight"), ("llama", "module.norm.weight")):
        model = tiny.model(family, Full())
        assert model.lowest_block([name, "head.weight"]) == tiny.BLOCKS
        assert model.lowest_block([name, "block.1.input_layernorm.weight"]) == 1
    assert tiny.model("bert", Full()).lowest_block(["module.embeddings.LayerNorm.weight"]) == 0


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_merged_model_predicts_in_plain_transformers(family: str, tmp_path: Path) -> None:
    model = tiny.model(family, Full(), "float32")
    params, data = weights(model), tiny.examples(tiny.place(1), 7)
    before = tree.sha256(model.base.module.state_dict())
    export_merged(model, params, tmp_path / "merged", labels=list("abc"), card={})
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        logits = tiny.plain_logits(loaded, data, model.pooling, pad=1)
    assert torch.allclose(model.logits(params, data), logits, atol=1e-5)
    assert (model.logits(model.init(tiny.place()), data) - logits).abs().max() > 0.01
    assert tree.sha256(model.base.module.state_dict()) == before
    assert all(w.dtype is torch.float32 for w in merge(model, params).parameters())


def test_our_own_folder_comes_back_and_says_what_it_is(tmp_path: Path) -> None:
    model = tiny.model("bert", Full(), "float32")
    params = weights(model)
    folder = export_adapter(model, params, tmp_path / "own", labels=list("abc"), card={})
    assert tree.sha256(import_adapter(folder, model)) == tree.sha256(params)
    card = (folder / "README.md").read_text()
    assert "The weights of a model that were fine-tuned" in card and "--merge" in card and "PeftModel" not in card
    with pytest.raises(ModelError, match=r"holds an adapter of kind 'full', this model's is 'head'"):
        import_adapter(folder, tiny.model("bert", HeadOnly(), "float32"))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    model = tiny.model("bert", Full())
    params, data = weights(model), tiny.examples(tiny.place(1), 3)
    odd = params | {"block.0.output.dense.weight": torch.zeros(3, 3).double()}
    with pytest.raises(
        FitError, match=r"'block.0.output.dense.weight' has shape \(3, 3\); this model needs \(32, 48\)"
    ):
        model.check(Fit(odd, data, [[0]], SGD(0.1)))
    lacking = {name: t for name, t in params.items() if name != "head.bias"}
    with pytest.raises(FitError, match=r"'head.weight' came without its partner head\.bias"):
        model.check(Fit(lacking, data, [[0]], SGD(0.1)))
    body = {name: t for name, t in params.items() if not name.startswith("head")}
    with pytest.raises(Exception, match=r"a forward pass has one set of weights; .* nothing in Fit\.also"):
        model.fit(Fit(params, data, [[0]], SGD(0.1), also=(body,)))
    assert not model.base.acting.weights


def test_a_quantised_base_is_refused() -> None:
    body = tiny.module("bert")
    dense = body.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)
    message = r"this base is quantised \(encoder\.layer\.1\.output\.dense\.weight is torch\.int8\); set model\.quantize"
    with pytest.raises(ModelError, match=message):
        HFModel(tiny.freeze(body, None, "packed", tiny.CPU), Full(), 3)
