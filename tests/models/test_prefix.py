"""Prefixes: against PEFT's own keys and values, as a cohort, below the lowest of them, and twice differentiated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from cohorts import FEATURES, OPTIMIZERS, alone, assert_close, cohort, together
from fedpeft.core import tree
from fedpeft.core.adapter import Prefix
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, AdamW, Fit
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models import attention
from fedpeft.models.adapters import Prefixed, Rows
from fedpeft.models.adapters.prefix import PrefixAdapter, gather, join
from fedpeft.models.families import attention_paths, block_paths, key_value_size
from fedpeft.models.hf import HFModel
from fedpeft.models.load import freeze
from fedpeft.models.noise import keep, row_keys

LENGTH = 5
EVERY = range(tiny.BLOCKS)


def model_of(family: str, dtype: str = "float64", budget: int = 2048) -> HFModel:
    return tiny.model(family, Prefix(length=LENGTH), dtype, budget=budget)


def prefixes(model: HFModel, rng: Rng, length: int = LENGTH, blocks: Sequence[int] = EVERY) -> dict[str, Tensor]:
    """Prefixes that matter, in the dtype of the base."""
    shape = (2, length, *key_value_size(model.base.module.config))
    return {f"prefix.{b}": torch.from_numpy(rng.normal(size=shape)).to(model.base.dtype) for b in blocks}


def params_of(model: HFModel, rng: Rng, length: int = LENGTH, blocks: Sequence[int] = EVERY) -> dict[str, Tensor]:
    return prefixes(model, rng, length, blocks) | tiny.params(model, rng)  # of the second: the head


def as_given(module: nn.Module, family: str, params: Params) -> dict[nn.Module, Prefixed]:
    """What a forward pass is given for prefixes that all rows share."""
    paths = attention_paths(module, family)
    own = {int(name.removeprefix("prefix.")): t.transpose(1, 2) for name, t in params.items() if "prefix" in name}
    return {module.get_submodule(paths[block]): Prefixed(key[None], value[None]) for block, (key, value) in own.items()}


# --- parity ---


def with_peft(family: str, params: Params, implementation: str) -> Any:
    """The base in PEFT's prefix tuning with the same keys and values: weight.view(P, blocks, 2, heads, size)."""
    module = tiny.module(family).float()
    module.set_attn_implementation(implementation)
    config = peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type="FEATURE_EXTRACTION")
    wrapped = peft.get_peft_model(module, config).eval()
    weight = torch.stack([params[f"prefix.{b}"] for b in EVERY]).permute(2, 0, 1, 3, 4).reshape(LENGTH, -1)
    wrapped.prompt_encoder["default"].embedding.weight.data = weight.clone()
    return wrapped


def unshifted(family: str, module: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with PEFT's mask and the text's own positions."""
    ids = batch["input_ids"]
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    if family == "roberta":
        positions = module.embeddings.create_position_ids_from_input_ids(ids, module.config.pad_token_id)
    mask = torch.cat([torch.ones(len(ids), LENGTH, dtype=torch.int64), batch["attention_mask"]], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def own_eager(module: nn.Module, *given: Any, **more: Any) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the module's own family."""
    found: tuple[Tensor, Tensor | None] = sys.modules[type(module).__module__].eager_attention_forward(
        module, *given, **more
    )
    return found


def batch_of(family: str) -> dict[str, Tensor]:
    """Three rows, one of them padded."""
    rng = tiny.place(1)
    tokens = tuple(rng.integers(5, tiny.VOCABULARY, size=n).astype("int32") for n in (9, 6, 9))
    return tiny.padded(Examples(tokens, rng.integers(0, 3, size=3)), 1)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_parity_with_pefts_keys_and_values(family: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {n: t.float() for n, t in prefixes(model_of(family), tiny.place()).items()}
    batch = batch_of(family)
    reference = with_peft(family, params, implementation)
    module = freeze(tiny.module(family).float(), None, "own", tiny.CPU).module
    if implementation == "eager":
        own = attention.with_prefixes(own_eager)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "own-eager", own)
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "own-eager", eager_mask)
        module.config._attn_implementation = "own-eager"
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        bare = reference.get_base_model()
        cache = reference.get_prompt(batch_size=3)
        expected = bare(**unshifted(family, bare, batch), past_key_values=cache).last_hidden_state[real]
        got = module(**batch, prefixes=as_given(module, family, params)).last_hidden_state[real]
        assert (got - expected).abs().max() <= (0 if implementation == "eager" else 1e-6)
        as_it_is = reference(**batch).last_hidden_state[real]
        assert (got - as_it_is).abs().max() > 1e-3, "PEFT shifts positions"
        without = bare(**batch).last_hidden_state[real]
        assert (got - without).abs().max() > 0.1, "the prefix must matter"
        assert torch.equal(module(**batch).last_hidden_state[real], without), "no layer selected"


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
def test_logits_are_those_of_the_base_given_the_prefix(family: str) -> None:
    model = model_of(family, "float32")
    params = params_of(model, tiny.place(), blocks=(0, 2))
    data = tiny.examples(tiny.place(1), 7)
    batch = tiny.padded(data, 1)
    module = model.base.module
    for given in (params, {n: t for n, t in params.items() if "head" in n}):
        with torch.no_grad():
            hidden = module(**batch, prefixes=as_given(module, family, given)).last_hidden_state
            tokens = hidden @ params["head.weight"].T + params["head.bias"]
        expected = tiny.pooled(tokens, batch["attention_mask"], model.pooling)
        assert (model.logits(given, data) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cached_generation_equals_uncached(family: str) -> None:
    """After the text token by token, in pieces of several, and from its first token; the cache holds the text alone."""
    model = model_of(family)
    shell: Any = transformers.AutoModelForCausalLM.from_config(tiny.config(family)).double().eval()
    setattr(shell, shell.base_model_prefix, model.base.module)
    given = as_given(model.base.module, family, prefixes(model, tiny.place(), blocks=(0, 2)))
    ids = torch.arange(12).view(2, 6) + 7
    with torch.no_grad():
        uncached = ids
        for _ in range(5):
            logits = shell(uncached, use_cache=False, prefixes=given).logits
            uncached = torch.cat([uncached, logits[:, -1:].argmax(-1)], dim=1)
        whole = shell(uncached, use_cache=False, prefixes=given).logits
        assert (whole - shell(uncached, use_cache=False).logits).abs().max() > 0.05
        for pieces in ((6, 1, 1, 1, 1, 1), (2, 3, 6), (1, 1, 9)):
            cache, found = transformers.DynamicCache(), []
            for piece in uncached.split(pieces, dim=1):
                found.append(shell(piece, past_key_values=cache, use_cache=True, prefixes=given).logits)
            assert torch.allclose(torch.cat(found, dim=1), whole, atol=1e-12, rtol=0)
            assert cache.get_seq_length() == 11


# --- training ---


def uneven(model: HFModel, optimizer: Any, features: Sequence[str] = ()) -> list[Fit]:
    """Four clients with prefixes of unequal length in unequal blocks; the last has none at all in block 0."""
    rng = tiny.place()
    kinds = ((5, EVERY), (2, (0, 2)), (7, (1,)), (5, (1, 2)))
    fits = [
        replace(fit, params=fit.params | prefixes(model, rng, length, blocks))
        for fit, (length, blocks) in zip(cohort(model, optimizer, rng), kinds, strict=True)
    ]
    for feature in features:
        fits = FEATURES[feature](fits, model, rng)
    return fits


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("features", [(), ("dropout",), ("dropout", "mask", "drift", "clip"), ("prox", "settings")])
def test_a_cohort_equals_each_client_alone(family: str, optimizer: str, features: tuple[str, ...]) -> None:
    model = model_of(family)
    fits = uneven(model, OPTIMIZERS[optimizer], features)
    assert_close(together(model, fits), alone(model, fits), 1e-9)


@pytest.mark.parametrize("budget", [1, 13, 40])
def test_the_token_budget_does_not_matter(budget: int) -> None:
    fits = uneven(model_of("bert"), OPTIMIZERS["adamw"], ("dropout",))
    assert_close(together(model_of("bert", budget=budget), fits), together(model_of("bert"), fits), 1e-9)


def test_frozen_prefixes_beside_trained_ones() -> None:
    """Some names train; further prefixes, shared by two clients, come after them and are the same as longer ones."""
    model, rng = model_of("llama"), tiny.place(3)
    shared, other = prefixes(model, rng, 3), prefixes(model, rng, 2, (1,))
    fits = uneven(model, OPTIMIZERS["adamw"], ("dropout",))
    fits = [
        replace(fit, train=frozenset(sorted(fit.params)[1:]), also=also)
        for fit, also in zip(fits, ((shared,), (), (shared,), (other,)), strict=True)
    ]
    expected = alone(model, fits)
    assert_close(together(model, fits), expected, 1e-9)
    everybody = [replace(fit, also=(shared,)) for fit in fits]
    assert_close(together(model, everybody), alone(model, everybody), 1e-9)
    own = fits[0].params
    longer = {n: torch.cat([t, shared[n]], dim=1) if n in shared else t for n, t in own.items()}
    with_also = model.fit(replace(fits[0], dropout=0.0, optimizer=SGD(0.0)))
    joined = model.fit(replace(fits[0], dropout=0.0, optimizer=SGD(0.0), params=longer, also=()))
    assert with_also.losses == pytest.approx(joined.losses, abs=1e-12)


def test_prefixes_join_row_by_row() -> None:
    def made(rows: int, count: int, seen: Tensor | None) -> Prefixed:
        key = torch.from_numpy(tiny.place(count).normal(size=(rows, 2, count, 4)))
        return Prefixed(key, key + 1, seen)

    shown = torch.tensor([[True, False], [True, True], [False, False]])
    whole = join(made(1, 3, None), made(3, 2, shown))
    assert whole.key.shape == whole.value.shape == (3, 2, 5, 4)
    assert torch.equal(whole.seen, torch.cat([torch.ones(3, 3, dtype=torch.bool), shown], 1))  # type: ignore[arg-type]
    assert join(made(1, 3, None), made(1, 2, None)).seen is None


def test_every_row_gets_its_own_prefix_and_one_client_costs_no_copy() -> None:
    stacked = torch.from_numpy(tiny.place().normal(size=(3, 2, 4, 1, 2)))
    sizes = ((2, 4, 1, 2), (2, 1, 1, 2), None)
    alone = gather("prefix.0", stacked, sizes, Rows(None, 1))
    assert alone is not None and alone.seen is None
    assert alone.key.shape == (1, 1, 1, 2) and alone.key.data_ptr() == stacked[1].data_ptr()
    assert gather("prefix.0", stacked, sizes, Rows(None, 2)) is None
    mixed = gather("prefix.0", stacked, sizes, Rows(torch.tensor([2, 0, 1, 0])))
    assert mixed is not None and mixed.seen is not None
    assert mixed.seen.tolist() == [[False] * 4, [True] * 4, [True, False, False, False], [True] * 4]
    assert torch.equal(mixed.value[3], stacked[0, 1].transpose(0, 1))
    shared = gather("prefix.0", stacked[:1].expand(3, -1, -1, -1, -1), (sizes[0],) * 3, Rows(torch.tensor([2, 0])))
    assert shared is not None and shared.key.shape[0] == 1 and shared.seen is None


def test_dropout_scales_what_it_keeps_and_takes_its_noise_from_the_place() -> None:
    """The loss of one row is that of a prefix multiplied by the noise of that row, block by block."""
    model = model_of("bert")
    params, data = params_of(model, tiny.place()), tiny.examples(tiny.place(1), 4)
    dropped = model.fit(Fit(params, data, [[2], [3]], SGD(0.0), dropout=0.4, seed=11)).losses
    for step, row in enumerate((2, 3)):
        noisy = dict(params)
        for block in EVERY:
            name = f"prefix.{block}"
            keys = row_keys([11], step, [row], tiny.CPU)
            noise = keep(keys, name, (LENGTH, 2 * 4 * 8), torch.tensor([0.4])).view(LENGTH, 2, 4, 8).transpose(0, 1)
            assert noise.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
            noisy[name] = params[name] * noise
        assert dropped[step] == pytest.approx(model.fit(Fit(noisy, data, [[row]], SGD(0.0))).losses[0], abs=1e-9)


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
def test_nothing_below_the_lowest_prefix_is_differentiated(family: str) -> None:
    model = model_of(family)
    params = params_of(model, tiny.place(), blocks=(1, 2))
    wants: dict[int, bool] = {}

    def watch(block: int) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            state = output[0] if isinstance(output, tuple) else output
            assert isinstance(state, Tensor)
            wants[block] = state.requires_grad

        return hook

    paths = block_paths(model.base.module, family)
    handles = [model.base.module.get_submodule(p).register_forward_hook(watch(i)) for i, p in enumerate(paths)]
    try:
        fitted = model.fit(Fit(params, tiny.examples(tiny.place(1), 4), [[0, 1, 2]], SGD(0.1)))
    finally:
        for handle in handles:
            handle.remove()
    assert wants == {0: False, 1: True, 2: True}
    assert model.lowest_block(params) == 1
    for name, t in params.items():
        assert not torch.equal(fitted.params[name], t), f"{name} trains"


@pytest.mark.parametrize("family", (*tiny.FAMILIES, "opt"))
def test_a_bfloat16_base(family: str) -> None:
    exact, half = model_of(family, "float32"), model_of(family, "bfloat16")
    params = params_of(exact, tiny.place())
    data = tiny.examples(tiny.place(1), 6)
    fit = Fit(params, data, [[0, 1, 2], [3, 4, 5]], AdamW(0.01), dropout=0.2, seed=1)
    expected = exact.fit(fit)
    for got in (half.fit(fit), exact.fit(replace(fit, base="bfloat16"))):
        assert got.losses == pytest.approx(expected.losses, rel=0.05)
        for name, t in got.params.items():
            assert t.dtype == torch.float32 and not torch.equal(t, params[name])
    assert (half.logits(params, data) - exact.logits(params, data)).abs().max() < 0.1


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_products_with_the_hessian_equal_finite_differences(family: str) -> None:
    """Of gradients from one step of SGD, which goes through the usual attention.

    The step is long since Llama's norms compute in float32, whose rounding a short step would enlarge.
    """
    model, rows = model_of(family), [0, 1, 2, 3]
    params, data = params_of(model, tiny.place()), tiny.examples(tiny.place(1), 4)
    drawn = {n: torch.from_numpy(tiny.place(5).normal(size=t.shape)) for n, t in params.items() if "prefix" in n}
    vector = tree.scale(drawn, 1 / tree.norm(drawn))

    def gradient(step: float) -> dict[str, Tensor]:
        moved = {n: t + step * vector[n] if n in vector else t for n, t in params.items()}
        fitted = model.fit(Fit(moved, data, [rows], SGD(1.0)))
        return {n: moved[n] - fitted.params[n] for n in vector}

    step = 1e-2
    expected = tree.scale(tree.sub(gradient(step), gradient(-step)), 1 / (2 * step))
    product = model.hessian(params, data, rows, vector)(vector)
    assert tree.norm(expected) > 1e-2
    assert tree.norm(tree.sub(product, expected)) < 1e-3 * tree.norm(expected)


# --- specification ---


def test_fresh_prefixes_are_drawn_block_by_block() -> None:
    base = tiny.base("llama")
    every = PrefixAdapter(Prefix(length=400, deviation=0.05), base).init(tiny.place())
    assert list(every) == ["prefix.0", "prefix.1", "prefix.2"]
    rng = tiny.place()
    for t in every.values():
        assert t.shape == (2, 400, 2, 8) and t.dtype == torch.float32  # two key/value heads for four queries
        assert torch.equal(t, torch.from_numpy(rng.normal(0, 0.05, size=t.shape)).float())
        assert t.std().item() == pytest.approx(0.05, rel=0.03) and abs(t.mean().item()) < 0.003
    some = PrefixAdapter(Prefix(length=400, blocks=(2, 1), deviation=0.05), base)
    assert list(some.init(tiny.place())) == ["prefix.1", "prefix.2"]
    assert list(some.shapes()) == list(every) and some.shapes()["prefix.0"] == (2, None, 2, 8)
    assert tiny.model("llama", some.spec).init(tiny.place()).keys() == {
        "prefix.1", "prefix.2", "head.weight", "head.bias"
    }  # fmt: skip


def test_keys_are_counted_as_a_mean_over_the_blocks() -> None:
    model = model_of("bert")
    params, data = params_of(model, tiny.place(), 4, (0, 2)), tiny.examples(tiny.place(1), 3)
    assert model.adapter.context(params) == (0.0, 8 / 3)
    lengths = [int(n) for n in data.lengths]
    fitted = model.fit(Fit(params, data, [[0, 1, 2]], SGD(0.1)))
    assert fitted.tokens == sum(lengths)
    assert fitted.pairs == round(sum(n * (n + 8 / 3) for n in lengths))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Prefix(length=0), "adapter.length is 0; it must be at least 1"),
        (Prefix(deviation=-0.1), "adapter.deviation is -0.1; it must not be negative"),
        (Prefix(blocks=()), "selects no block; the model has blocks 0 to 2, or use adapter.kind 'head'"),
        (Prefix(blocks=(1, 3)), "names block 3; the model has blocks 0 to 2"),
        (Prefix(blocks=(-1,)), "names block -1; the model has blocks 0 to 2"),
        (Prefix(blocks=(0, 1, 2, 0)), "names a block twice"),
    ],
)
def test_specifications_that_do_not_fit(spec: Prefix, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        tiny.model("bert", spec)


def test_bases_that_take_no_prefix() -> None:
    with pytest.raises(
        ModelError, match=r"family 'distilbert' is not known; use a BERT, .* or method fedavg with .* 'lora'"
    ):
        tiny.model("distilbert", Prefix())
    eager: Any = transformers.AutoModel.from_config(tiny.config("bert"), attn_implementation="eager")
    with pytest.raises(ModelError, match=r"this one has 'eager'. Load it with attn_implementation='sdpa'"):
        HFModel(freeze(eager, None, "own", tiny.CPU), Prefix(), 3)


def test_parameters_of_another_shape_are_refused() -> None:
    model = model_of("llama")
    params = params_of(model, tiny.place())
    model.check_params(params | {"prefix.0": params["prefix.0"][:, :2]})
    with pytest.raises(FitError, match=r"'prefix.0' has shape \(2, 5, 4, 8\); this model needs \(2, 'any', 2, 8\)"):
        model.check_params(params | {"prefix.0": torch.zeros(2, 5, 4, 8)})
    with pytest.raises(FitError, match=r"'prefix\.3' does not exist"):
        model.check_params({"prefix.3": params["prefix.0"]})
