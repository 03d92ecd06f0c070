"""Soft prompts: as PEFT has them, as plain arithmetic has them, and many clients at once."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor

import tiny
from cohorts import FEATURES, OPTIMIZERS, alone, assert_close, together
from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, HeadOnly, InstancePrompt, LatePrompt, Lora, Prompt
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.fit import SGD, AdamW, Fit
from fedpeft.core.train import stack_params
from fedpeft.models import virtual
from fedpeft.models.adapters import Rows
from fedpeft.models.adapters.kinds import build_adapter
from fedpeft.models.adapters.prompt import COMMON, ordinary, vocabulary
from fedpeft.models.hf import HFModel
from fedpeft.models.parts import collate
from prompts import drawn, fits, hidden, plain, row, tolerance

LENGTHS = (3, 1, 4, 0)  # of four clients; the last has no prompt


def clients(family: str, seed: int = 0) -> list[dict[str, Tensor]]:
    specs: list[AdapterSpec] = [Prompt(n) if n else HeadOnly() for n in LENGTHS]
    return [drawn(tiny.model(family, spec), tiny.place(seed + i)) for i, spec in enumerate(specs)]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_peft_computes_the_same(family: str) -> None:
    """Also for a row that is padded."""
    model = tiny.model(family, Prompt(3))
    params = drawn(model, tiny.place())
    data = tiny.examples(tiny.place(1), 4)
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, **_sizes(family))
    other = peft.get_peft_model(copy.deepcopy(tiny.module(family)), config).eval()
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.copy_(params["prompt.tokens"])
        batch = tiny.padded(data, 1)
        expected = other(**batch).last_hidden_state[:, 3:]
    assert not batch["attention_mask"].all()
    for (_, r), got in hidden(model, [params], data).items():
        assert torch.allclose(got, expected[r, : len(got)], atol=1e-6)  # PEFT holds prompts in float32


def _sizes(family: str) -> dict[str, Any]:
    return {"token_dim": tiny.WIDTH, "num_layers": tiny.BLOCKS, "num_attention_heads": 4} if family else {}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_row_has_its_own_clients_prompt(family: str) -> None:
    """Against one row at a time by plain arithmetic; prompts of unequal length, and none at all."""
    model = tiny.model(family, Prompt(3))
    data = tiny.examples(tiny.place(5), 6, segments=family == "bert")
    own = clients(family)
    for (c, r), got in hidden(model, own, data).items():
        expected = plain(model.base.module, *row(data, r), own[c].get("prompt.tokens"))
        assert torch.allclose(got, expected, atol=tolerance(family)), (c, r)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("features", "budget"), [((), 2048), (("clip", "mask", "prox"), 13)])
def test_fit_many_equals_fit(family: str, features: tuple[str, ...], budget: int) -> None:
    model = tiny.model(family, Prompt(3), budget=budget)
    for optimizer in OPTIMIZERS.values():
        made = fits(clients(family), optimizer, tiny.place(), family == "bert")
        for feature in features:
            made = FEATURES[feature](made, model, tiny.place())
        assert_close(together(model, made), alone(model, made), 1e-9)


def test_a_cohort_fits_where_each_client_fits() -> None:
    """The longest prompt and the longest text are not one row's: together they would exceed the 64 positions."""
    model = tiny.model("bert", Prompt(40))
    long, short = (drawn(tiny.model("bert", Prompt(n)), tiny.place()) for n in (60, 2))
    rng = tiny.place()
    data = replace(tiny.examples(rng, 2), tokens=(np.arange(5, 9, dtype=np.int32), np.arange(60, dtype=np.int32)))
    made = [Fit(long, data, [[0]], SGD(0.1)), Fit(short, data, [[1]], SGD(0.1))]
    assert_close([model.fit(fit) for fit in made], together(model, made), 1e-9)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_gradient_reaches_every_number(family: str) -> None:
    model = tiny.model(family, Prompt(3))
    params = drawn(model, tiny.place())
    data = tiny.examples(tiny.place(), 8)
    fitted = model.fit(Fit(params, data, [list(range(8))], SGD(0.1)))
    assert bool((fitted.params["prompt.tokens"] != params["prompt.tokens"]).all())


SPECS: list[AdapterSpec] = [Prompt(3), InstancePrompt(2, 4), LatePrompt(2, 4)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_ran_before_does_not_matter(family: str, spec: AdapterSpec) -> None:
    base = tiny.freeze(tiny.module(family), None, "own", tiny.CPU)
    model = HFModel(base, spec, 3)
    params = drawn(model, tiny.place())
    data = tiny.examples(tiny.place(1), 5)
    fit = Fit(params, data, [[0, 1], [2, 3]], AdamW(0.01))
    logits, expected = model.logits(params, data), model.fit(fit)
    lora = HFModel(base, Lora(rank=2, targets=tiny.everything(family)), 3)
    lora.fit(Fit(tiny.params(lora, tiny.place(3)), data, [[0, 1]], SGD(0.1)))
    _broken_off(model, params, data)
    assert base.acting.virtual is None and not base.acting.outputs
    base.acting.virtual = virtual.Virtual(1, lambda text: text.states[:, :1] * 100)
    assert torch.equal(model.logits(params, data), logits)
    assert tree.sha256(model.fit(fit).params) == tree.sha256(expected.params)
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in _blocks(model))


def _blocks(model: HFModel) -> list[Any]:
    return list(model.base.module.encoder.layer if model.base.family == "bert" else model.base.module.layers)


def _broken_off(model: HFModel, params: dict[str, Tensor], data: Any) -> None:
    def breaks(module: Any, args: Any, output: Any) -> None:
        raise RuntimeError("in the middle")

    handle = _blocks(model)[2].register_forward_hook(breaks)
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            model.logits(params, data)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_probes_leave_the_prompt_out(family: str) -> None:
    model = tiny.model(family, Prompt(3))
    data = tiny.examples(tiny.place(5), 3)
    params = drawn(model, tiny.place())
    found = model.hidden(params, data, [0, 1, 2])
    assert found.shape == (tiny.BLOCKS, 3, int(data.lengths.max()), tiny.WIDTH)
    if family == "bert":  # no norm after the last block
        for (_, r), state in hidden(model, [params], data).items():
            assert torch.allclose(found[-1, r, : len(state)], state.float(), atol=1e-6)


@pytest.mark.parametrize("spec", SPECS[1:], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_does_not_give_the_answer_away(family: str, spec: AdapterSpec) -> None:
    """Where the last tokens are an answer, the states before it are the same for every answer and for none."""
    model = tiny.model(family, spec)
    stack = stack_params([drawn(model, tiny.place())], tiny.CPU)

    def states(rows: list[list[int]], known: Tensor | None) -> Tensor:
        batch = collate([(np.array(own, dtype=np.int32), None) for own in rows], 0, tiny.CPU, False)
        model.base.acting.clear()
        model.adapter.bind(stack.params, stack.sizes, Rows(None), model.base)
        assert model.base.acting.virtual is not None
        return virtual.run(model.base, batch, batch.inputs, model.base.acting.virtual, known)

    answered = [[7, 8, 9, 10, 11, 12], [7, 8, 9, 10, 13, 14], [7, 8, 9, 15]]
    with torch.no_grad():
        first, second, third = states(answered, torch.tensor([4, 4, 3]))
        assert torch.allclose(first[:4], second[:4], atol=1e-12)
        assert torch.allclose(third[:3], states([answered[2][:3]], None)[0], atol=1e-9)
        first, second, _ = states(answered, None)
        assert not torch.allclose(first[:4], second[:4], atol=1e-6)
    model.base.acting.clear()


def test_the_start() -> None:
    """Distinct rows of the vocabulary, drawn by the generator; or small normal numbers."""
    model = tiny.model("bert", Prompt(20), dtype="float32")
    tokens = model.init(tiny.place())["prompt.tokens"]
    table = model.base.module.get_input_embeddings().weight
    found = [int((table == t).all(dim=1).nonzero().item()) for t in tokens]
    assert len(set(found)) == 20
    assert torch.equal(model.init(tiny.place())["prompt.tokens"], tokens)
    assert not torch.equal(model.init(tiny.place(1))["prompt.tokens"], tokens)
    normal = tiny.model("bert", Prompt(20, "normal")).init(tiny.place())["prompt.tokens"]
    assert normal.dtype == torch.float32
    assert float(normal.std()) == pytest.approx(0.02, rel=0.1)
    assert vocabulary(model.base, 100, tiny.place()).shape == (100, tiny.WIDTH)  # more than there are


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma"])
def test_a_prompt_of_words_is_those_words(family: str) -> None:
    """Rows of the vocabulary as a prompt give the states of these tokens, also where a family scales its embeddings."""
    if family == "gemma":
        config = transformers.GemmaConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, head_dim=8, max_position_embeddings=64,
        )  # fmt: skip
        module = transformers.AutoModel.from_config(config)
    else:
        module = tiny.module(family).float()
    model = HFModel(tiny.freeze(module, None, "own", tiny.CPU), Prompt(3), 2)
    table, tokens = module.get_input_embeddings().weight, model.init(tiny.place())["prompt.tokens"]
    scale = 32**0.5 if family == "gemma" else 1.0
    distances = (tokens[:, None] - table.detach() * scale).norm(dim=2)
    ids = distances.argmin(dim=1)
    assert float(distances.min(dim=1).values.max()) < 1e-4 and len(set(ids.tolist())) == 3


def test_special_and_unused_tokens_are_no_start() -> None:
    words = {
        "[PAD]": 0,
        "[unused3]": 1,
        "<|reserved_special_token_7|>": 2,
        "<extra>": 3,
        "the": 4,
        "unused": 5,
        "x": 99,
    }
    tokenizer = SimpleNamespace(
        all_special_ids=[0], added_tokens_decoder={3: SimpleNamespace(special=True)}, get_vocab=lambda: words
    )
    base = replace(tiny.base("bert"), tokenizer=tokenizer)
    assert ordinary(base).tolist() == [4, 5]  # 99 has no embedding
    assert COMMON == 5000


def test_costs_and_positions() -> None:
    model = tiny.model("bert", Prompt(3))
    params = drawn(model, tiny.place())
    data = tiny.examples(tiny.place(), 1)
    n = int(data.lengths[0])
    assert model.passes(params, data) == (n + 3, (n + 3) ** 2)
    assert model.passes(tree.select(params, lambda name: name.startswith("head")), data) == (n, n * n)
    assert [virtual.positions(spec) for spec in (Prompt(7), InstancePrompt(5), LatePrompt(9), Lora())] == [7, 5, 0, 0]
    assert model.lowest_block(params) == 0


def test_what_is_refused() -> None:
    with pytest.raises(ModelError, match=r"adapter\.length is 0; it must be at least 1"):
        build_adapter(Prompt(0), tiny.base("bert"))
    model = tiny.model("bert", Prompt(3))
    params = drawn(model, tiny.place())
    fit = Fit(params, tiny.examples(tiny.place(), 3), [[0, 1]], SGD(0.1))
    two = replace(fit, also=(tree.select(params, lambda name: name == "prompt.tokens"),))
    with pytest.raises(Exception, match="a forward pass has one prompt"):
        model.fit(two)
    with pytest.raises(FitError, match=r"'prompt\.tokens' has shape \(3, 31\); this model needs \('any', 32\)"):
        model.fit(replace(fit, params={**params, "prompt.tokens": torch.zeros(3, 31)}))
