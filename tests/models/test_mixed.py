"""Mixtures of prompts: the attention over sources, where they come from, and many clients at once."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import tiny
from cohorts import FEATURES, OPTIMIZERS, alone, assert_close, together
from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, HeadOnly, MixedPrompt
from fedpeft.core.errors import ModelError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, Fit
from fedpeft.core.tree import Params
from fedpeft.models.adapters.kinds import build_adapter
from fedpeft.models.adapters.mixed import MixedPromptAdapter
from fedpeft.models.hf import HFModel
from prompts import drawn, fits, hidden, plain, row, tolerance

SIZES = (4, 2, 7, 0)  # r of four clients; the last has no prompt


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, ...]:
    """Two runs: one as this package names its prompt, in the folder `adapter`; one as PEFT does."""
    first, second = (torch.from_numpy(tiny.place(i).normal(0, 2.0, size=(3, tiny.WIDTH))).float() for i in (7, 8))
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    save_file({"prompt.tokens": first}, tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    (tmp_path / "peft").mkdir()
    save_file({"prompt_embeddings": second}, tmp_path / "peft" / "adapter_model.safetensors")
    return str(tmp_path / "run"), str(tmp_path / "peft")


def clients(family: str, sources: tuple[str, ...]) -> list[dict[str, Tensor]]:
    specs: list[AdapterSpec] = [MixedPrompt(3, r, sources) if r else HeadOnly() for r in SIZES]
    return [drawn(tiny.model(family, spec), tiny.place(i), 1.0) for i, spec in enumerate(specs)]


def mixed(model: HFModel, params: Params, data: Examples, index: int) -> Tensor | None:
    """(P, d) the prompt of one row."""
    if "prompt.down" not in params:
        return None
    assert isinstance(model.adapter, MixedPromptAdapter)
    target = params["prompt.tokens"]
    every = [*model.adapter.sources.double(), target]
    words = model.base.module.get_input_embeddings().weight[torch.from_numpy(data.tokens[index]).long()]
    x = words.max(dim=0).values
    norm = torch.nn.LayerNorm(tiny.WIDTH, dtype=torch.float64)
    norm.load_state_dict({"weight": params["prompt.norm.weight"], "bias": params["prompt.norm.bias"]})
    h = norm(params["prompt.up"] @ F.silu(params["prompt.down"] @ x))
    scores = torch.stack([p.max(dim=0).values @ h for p in every]) / (tiny.WIDTH * math.e)
    shares = scores.exp() / scores.exp().sum()
    return target + sum(share * p for share, p in zip(shares, every, strict=True))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_arithmetic_gives_the_same(family: str, sources: tuple[str, ...]) -> None:
    model = tiny.model(family, MixedPrompt(3, 4, sources))
    data = tiny.examples(tiny.place(5), 6, segments=family == "bert")
    own = clients(family, sources)
    with torch.no_grad():
        for (c, r), got in hidden(model, own, data).items():
            expected = plain(model.base.module, *row(data, r), mixed(model, own[c], data, r))
            assert torch.allclose(got, expected, atol=tolerance(family)), (c, r)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("features", "budget"), [((), 2048), (("clip", "mask", "prox"), 13)])
def test_fit_many_equals_fit(family: str, features: tuple[str, ...], budget: int, sources: tuple[str, ...]) -> None:
    model = HFModel(tiny.base(family), MixedPrompt(3, 4, sources), 3, budget)
    for optimizer in OPTIMIZERS.values():
        made = fits(clients(family, sources), optimizer, tiny.place(), family == "bert")
        for feature in features:
            made = FEATURES[feature](made, model, tiny.place())
        assert_close(together(model, made), alone(model, made), 1e-9)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_gradient_reaches_every_number(family: str, sources: tuple[str, ...]) -> None:
    """And no source changes."""
    model = tiny.model(family, MixedPrompt(3, 4, sources))
    assert isinstance(model.adapter, MixedPromptAdapter)
    before = model.adapter.sources.clone()
    params = drawn(model, tiny.place(), 1.0)
    fitted = model.fit(Fit(params, tiny.examples(tiny.place(), 8), [list(range(8))], SGD(0.1)))
    for name, t in params.items():
        assert bool((fitted.params[name] != t).all()), name
    assert torch.equal(model.adapter.sources, before)


def test_what_ran_before_does_not_matter(sources: tuple[str, ...]) -> None:
    model = tiny.model("bert", MixedPrompt(3, 4, sources))
    own = clients("bert", sources)
    data = tiny.examples(tiny.place(1), 5)
    fit = Fit(own[0], data, [[0, 1], [2, 3]], SGD(0.1))
    expected = tree.sha256(model.fit(fit).params)
    model.logits(own[1], data)
    assert tree.sha256(model.fit(fit).params) == expected
    assert model.base.acting.virtual is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
def test_a_prompt_that_peft_saved_is_a_source(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    other = peft.get_peft_model(copy.deepcopy(tiny.module("gpt2")), config)
    other.save_pretrained(tmp_path)
    adapter = build_adapter(MixedPrompt(3, 4, (str(tmp_path),)), tiny.base("gpt2"))
    assert isinstance(adapter, MixedPromptAdapter)
    assert torch.equal(adapter.sources[0], other.prompt_encoder["default"].embedding.weight.detach().float())


def test_start_and_costs(sources: tuple[str, ...]) -> None:
    model = tiny.model("bert", MixedPrompt(3, 4, sources), dtype="float32")
    params = model.init(tiny.place())
    table = model.base.module.get_input_embeddings().weight
    assert all(bool((table == t).all(dim=1).any()) for t in params["prompt.tokens"])
    assert params["prompt.up"].shape == (tiny.WIDTH, 4) and params["prompt.down"].shape == (4, tiny.WIDTH)
    assert bool((params["prompt.norm.weight"] == 1).all()) and not params["prompt.norm.bias"].any()
    assert model.adapter.context(params) == (3.0, 0.0)
    assert model.adapter.context({}) == (0.0, 0.0)


def test_what_is_refused(sources: tuple[str, ...], tmp_path: Path) -> None:
    base = tiny.base("bert")
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file({"block.0.query.A": torch.zeros(2, 2)}, lora / "adapter_model.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    prefix = tmp_path / "prefix"
    prefix.mkdir()
    shutil.copy(next(Path(sources[0]).rglob("adapter_model.safetensors")), prefix)
    (prefix / "fedpeft.json").write_text('{"adapter": {"kind": "prefix"}}')
    for spec, message in (
        (MixedPrompt(3, 4, (str(prefix),)), r"is no prompt but an adapter of kind prefix; give the folder of a run"),
        (MixedPrompt(3, 4), r"name the run folders in method\.sources or adapter\.sources"),
        (MixedPrompt(3, 4, ("/nowhere",)), r"source '/nowhere' has no adapter_model\.safetensors"),
        (MixedPrompt(3, 4, (str(lora),)), "holds no prompt"),
        (MixedPrompt(3, 4, (str(broken),)), "cannot be read"),
        (MixedPrompt(5, 4, sources), r"shape \(3, 32\); \(5, 32\) is needed: set adapter\.length"),
        (MixedPrompt(0, 4, sources), r"adapter\.length is 0"),
        (MixedPrompt(3, 0, sources), r"adapter\.size is 0"),
    ):
        with pytest.raises(ModelError, match=message):
            build_adapter(spec, base)
    model = tiny.model("bert", MixedPrompt(3, 4, sources))
    params = drawn(model, tiny.place())
    fit = Fit(params, tiny.examples(tiny.place(), 3), [[0, 1]], SGD(0.1))
    with pytest.raises(Exception, match=r"came without 'prompt\.tokens'"):
        model.fit(replace(fit, params=tree.select(params, lambda name: name != "prompt.tokens")))
