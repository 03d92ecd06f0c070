"""Late prompts: the generator, where they are put in, what masks become, and that nothing below is differentiated."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import tiny
from cohorts import FEATURES, OPTIMIZERS, alone, assert_close, together
from fedpeft.core import tree
from fedpeft.core.adapter import HeadOnly, LatePrompt
from fedpeft.core.errors import ModelError
from fedpeft.core.fit import SGD, Fit
from fedpeft.core.tree import Params
from fedpeft.models.adapters.kinds import build_adapter
from fedpeft.models.adapters.late import stretches
from fedpeft.models.hf import HFModel
from fedpeft.models.load import Base
from prompts import drawn, fits, hidden, plain, row, tolerance

SIZES = (4, 2, 7, 0)  # m of four clients; the last has no prompt


def clients(family: str, block: int = 1) -> list[dict[str, Tensor]]:
    models = [tiny.model(family, LatePrompt(3, m, block) if m else HeadOnly()) for m in SIZES]
    return [drawn(model, tiny.place(i)) for i, model in enumerate(models)]


def generated(params: Params, block: int, count: int, states: Tensor) -> Tensor:
    """(P, d) of one row's states (tokens, d): down, torch's own pooling, relu, up."""
    w = {name.removeprefix(f"late.{block}."): t for name, t in params.items()}
    low = F.linear(states, w["down.weight"], w["down.bias"])
    pooled = F.adaptive_avg_pool1d(low.T[None], count)[0].T
    return F.linear(pooled.relu(), w["up.weight"], w["up.bias"])


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
@pytest.mark.parametrize("block", range(tiny.BLOCKS))
def test_plain_arithmetic_gives_the_same(family: str, block: int) -> None:
    """Rows of 1 to 12 tokens pooled to 3; clients of unequal size, and one without a prompt."""
    model = tiny.model(family, LatePrompt(3, 4, block))
    data = tiny.examples(tiny.place(5), 6, segments=family == "bert")
    own = clients(family, block)
    for (c, r), got in hidden(model, own, data).items():
        late = (block, partial(generated, own[c], block, 3)) if SIZES[c] else None
        expected = plain(model.base.module, *row(data, r), None, late)
        assert torch.allclose(got, expected, atol=tolerance(family)), (c, r)


def test_the_mask_may_hold_addends() -> None:
    """Eager attention adds its masks; the result is the same."""
    for family in ("bert", "gpt2", "llama"):
        module = tiny.module(family)
        module.set_attn_implementation("eager")
        eager = HFModel(tiny.freeze(module, None, "eager", tiny.CPU), LatePrompt(3, 4, 1), 3)
        data = tiny.examples(tiny.place(5), 6)
        own = clients(family)
        expected = hidden(tiny.model(family, LatePrompt(3, 4, 1)), own, data)
        for place, got in hidden(eager, own, data).items():
            assert torch.allclose(got, expected[place], atol=tolerance(family))  # Llama's eager softmax is in float32


def test_a_window_of_attention_stays_among_the_text() -> None:
    """A token of a Mistral with a window of 4 sees the last 4 of the text, and the whole prompt."""
    config = transformers.MistralConfig(
        **{k: v for k, v in tiny.config("llama").to_dict().items() if k in _SHARED}, sliding_window=4, head_dim=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.MistralModel(config).double()
    base = tiny.freeze(module, None, "window", tiny.CPU)
    model = HFModel(base, LatePrompt(3, 4, 2), 3)
    params = drawn(model, tiny.place(), 1.0)
    tokens = torch.arange(5, 15)
    with torch.no_grad():
        states = module(input_ids=tokens[None], output_hidden_states=True).hidden_states[2]
        prompt = generated(params, 2, 3, states[0])[None]
        text = torch.ones(10, 10).tril().bool() & ~torch.ones(10, 10).tril(-4).bool()
        mask = torch.ones(13, 13).tril().bool()
        mask[3:, 3:] = text
        places = torch.tensor([[0, 0, 0, *range(10)]])
        rotary = module.rotary_emb(states, places)
        whole = module.layers[2](
            torch.cat([prompt, states], 1), attention_mask=mask[None, None], position_embeddings=rotary
        )
        expected = module.norm(whole)[0, 3:]
    data = replace(tiny.examples(tiny.place(), 1), tokens=(tokens.int().numpy(),))
    assert torch.allclose(hidden(model, [params], data)[0, 0], expected, atol=1e-9)


_SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
@pytest.mark.parametrize(("features", "budget"), [((), 2048), (("clip", "mask", "prox"), 13)])
def test_fit_many_equals_fit(family: str, features: tuple[str, ...], budget: int) -> None:
    model = HFModel(tiny.base(family), LatePrompt(3, 4, 1), 3, budget)
    for optimizer in OPTIMIZERS.values():
        made = fits(clients(family), optimizer, tiny.place(), family == "bert")
        for feature in features:
            made = FEATURES[feature](made, model, tiny.place())
        assert_close(together(model, made), alone(model, made), 1e-9)


def test_clients_with_prompts_at_different_blocks_train_one_by_one() -> None:
    model = tiny.model("bert", LatePrompt(3, 4, 1))
    own = [clients("bert", 1)[0], clients("bert", 2)[1]]
    made = [
        replace(fit, params=p) for fit, p in zip(fits(clients("bert"), SGD(0.1), tiny.place(), True), own, strict=False)
    ]
    assert_close(together(model, made), alone(model, made), 1e-9)


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
def test_the_gradient_reaches_every_number(family: str) -> None:
    model = tiny.model(family, LatePrompt(3, 4, 1))
    params = drawn(model, tiny.place())
    params["late.1.down.bias"] += 2.0  # no unit is off in every row
    fitted = model.fit(Fit(params, tiny.examples(tiny.place(), 8), [list(range(8))], SGD(0.1)))
    for name, t in params.items():
        assert bool((fitted.params[name] != t).all()), name


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
@pytest.mark.parametrize("block", [1, 2])
def test_no_backward_pass_below_the_block(family: str, block: int) -> None:
    model = tiny.model(family, LatePrompt(3, 4, block))
    seen: dict[int, bool] = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__(i, args[0].requires_grad))
        for i, layer in enumerate(_layers(model.base))
    ]
    try:
        model.fit(Fit(drawn(model, tiny.place()), tiny.examples(tiny.place(), 4), [[0, 1, 2, 3]], SGD(0.1)))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {i: i > block for i in range(tiny.BLOCKS)}
    assert model.lowest_block(drawn(model, tiny.place())) == block


def _layers(base: Base) -> Any:
    module = base.module
    own = {"gpt2": lambda: module.h, "llama": lambda: module.layers, "opt": lambda: module.decoder.layers}
    return own.get(base.family, lambda: module.encoder.layer)()


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
def test_probes_see_the_text_alone(family: str) -> None:
    """Below the block they are the frozen base's own states."""
    model = tiny.model(family, LatePrompt(3, 4, 1))
    data = tiny.examples(tiny.place(5), 4)
    params = drawn(model, tiny.place())
    found, bare = (model.hidden(p, data, range(4)) for p in (params, {}))
    assert torch.equal(found[0], bare[0])
    assert not torch.allclose(found[1], bare[1], atol=1e-3)
    if family == "bert":
        for (_, r), state in hidden(model, [params], data).items():
            assert torch.allclose(found[-1, r, : len(state)], state.float(), atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_stretches_are_torchs_adaptive_pooling(count: int) -> None:
    lengths = torch.arange(1, 12)
    mask = torch.arange(11) < lengths[:, None]
    weights = stretches(mask, count, torch.float64)
    for row_weights, n in zip(weights, lengths.tolist(), strict=True):
        expected = F.adaptive_avg_pool1d(torch.eye(n, dtype=torch.float64)[None], count)[0].T
        assert torch.allclose(row_weights[:, :n], expected, atol=1e-15)
        assert not row_weights[:, n:].any()


def test_start_and_costs() -> None:
    """By default the middle block; 3 of 3 blocks carry the prompt at block 0, 1 of 3 at block 2."""
    model = tiny.model("bert", LatePrompt(3, 4))
    params = model.init(tiny.place())
    assert set(params) - {"head.weight", "head.bias"} == {
        f"late.1.{name}" for name in ("down.weight", "down.bias", "up.weight", "up.bias")
    }
    assert params["late.1.up.weight"].shape == (tiny.WIDTH, 4)
    assert float(params["late.1.up.weight"].abs().max()) == pytest.approx(0.5, rel=0.1)  # 1 / sqrt(4)
    for block, tokens in ((0, 3.0), (1, 2.0), (2, 1.0)):
        spec = LatePrompt(3, 4, block)
        assert build_adapter(spec, tiny.base("bert")).context(drawn(tiny.model("bert", spec), tiny.place())) == (
            pytest.approx(tokens),
            0.0,
        )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LatePrompt(0), r"adapter\.length is 0"),
        (LatePrompt(size=0), r"adapter\.size is 0"),
        (LatePrompt(block=3), r"adapter\.block is 3; the model has blocks 0 to 2"),
        (LatePrompt(block=-1), r"adapter\.block is -1"),
    ],
)
def test_what_is_refused(spec: LatePrompt, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_adapter(spec, tiny.base("bert"))


def test_incomplete_networks_are_refused() -> None:
    model = tiny.model("bert", LatePrompt(3, 4, 1))
    params = drawn(model, tiny.place())
    fit = Fit(params, tiny.examples(tiny.place(), 3), [[0, 1]], SGD(0.1))
    less = tree.select(params, lambda name: ".up." not in name)
    with pytest.raises(Exception, match=r"came without 'late\.1\.up\.weight'"):
        model.fit(replace(fit, params=less))
    with pytest.raises(Exception, match="do not fit together"):
        model.fit(replace(fit, params={**params, "late.1.up.weight": torch.zeros(tiny.WIDTH, 5).double()}))
    with pytest.raises(ModelError, match="are not known"):
        build_adapter(LatePrompt(), tiny.base("distilbert"))
