"""The format generate: transformers' own causal loss with labels -100, its own greedy decoding, cohorts, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor

import tiny
import tiny_lm
from cohorts import alone, assert_close, together
from fedpeft.core.adapter import AdapterSpec, InstancePrompt, LatePrompt, Lora, Prefix, Prompt
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.examples import Choices, Examples
from fedpeft.core.fit import SGD, AdamW, Fit
from fedpeft.models.export import export_adapter, export_merged, import_adapter
from fedpeft.models.generation import generate
from fedpeft.models.hf import HFModel
from fedpeft.models.merge import merge
from fedpeft.models.readouts import Item
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.runs.metrics import metrics_of

FAMILIES = ("gpt2", "llama", "opt")
END = 2


def model(family: str, budget: int = 2048, spec: AdapterSpec | None = None) -> HFModel:
    readout = GenerateReadout(tiny_lm.lm_head(family))
    return HFModel(tiny_lm.base(family), spec or Lora(rank=4, alpha=6.0), 0, budget, readout)


def adapter(of: HFModel, seed: int = 0) -> dict[str, Tensor]:
    """Parameters that matter, in the base's precision."""
    noise = torch.Generator().manual_seed(seed)
    fresh = of.init(tiny.place(seed)).items()
    return {name: t.double() + 0.3 * torch.randn(t.shape, generator=noise, dtype=torch.float64) for name, t in fresh}


def rows(seed: int, n: int) -> Examples:
    """Rows of 3 to 14 tokens whose answers begin at every possible place."""
    rng = tiny.place(seed)
    tokens = tuple(rng.integers(3, tiny.VOCABULARY, size=int(k)).astype(np.int32) for k in rng.integers(3, 15, size=n))
    starts = np.array([rng.integers(1, len(t)) for t in tokens], np.int64)
    return Examples(tokens, np.zeros(n, np.int64), starts=starts)


def plain(family: str, data: Examples, batch: list[int]) -> float:
    """transformers' loss of a right-padded batch, labels -100 before the answers and at padding."""
    longest = max(len(data.tokens[i]) for i in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    assert data.starts is not None
    for k, i in enumerate(batch):
        own = torch.from_numpy(data.tokens[i].astype(np.int64))
        ids[k, : len(own)], mask[k, : len(own)] = own, 1
        labels[k, data.starts[i] : len(own)] = own[data.starts[i] :]
    with torch.no_grad():
        out = tiny_lm.language_model(family)(input_ids=ids, attention_mask=mask, labels=labels)
    return float(out.loss)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [2048, 20])
def test_the_loss_of_a_step_is_that_of_transformers_over_the_answers_alone(family: str, budget: int) -> None:
    """Parts of a step (budget 20 cuts it into many) and unequal answers change nothing: tokens weigh alike."""
    of, data = model(family, budget), rows(1, 8)
    nothing = {name: torch.zeros_like(t) for name, t in adapter(of).items()}
    batches = [[0], [1, 2], list(range(8))]
    fitted = of.fit(Fit(nothing, data, batches, SGD(0.0)))
    expected = [plain(family, data, batch) for batch in batches]  # transformers computes its loss in float32
    assert fitted.losses == pytest.approx(expected, rel=1e-5)
    alone = [plain(family, data, [i]) for i in range(8)]
    assert of.losses(nothing, data, range(8)).tolist() == pytest.approx(alone, rel=1e-5)


def test_two_rows_by_hand() -> None:
    """A row of one answer token with loss a and one of three with mean loss b: (a + 3 b) / 4, as gradient too."""
    of = model("gpt2")
    tokens = (np.array([5, 9, 11], np.int32), np.array([7, 8, 12, 4], np.int32))
    data = Examples(tokens, np.zeros(2, np.int64), starts=np.array([2, 1]))
    params = adapter(of, 3)
    a, b = of.fit(Fit(params, data, [[0], [1]], SGD(0.0))).losses
    assert of.fit(Fit(params, data, [[0, 1]], SGD(0.0))).loss == pytest.approx((a + 3 * b) / 4, rel=1e-12)
    one, other, both = (of.fit(Fit(params, data, [batch], SGD(1.0))).params for batch in ([0], [1], [0, 1]))
    for name, start in params.items():
        step = ((start - one[name]) + 3 * (start - other[name])) / 4
        torch.testing.assert_close(start - both[name], step, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [2048, 24])
def test_a_cohort_is_its_clients_one_by_one(family: str, budget: int) -> None:
    of = model(family, budget)
    fits = []
    for client in range(4):
        data = rows(client, 5 + client)
        fits.append(Fit(adapter(of, client), data, data.epochs(2, 3, tiny.place(9 + client)), AdamW(1e-2, eps=1e-6)))
    assert_close(together(of, fits), alone(model(family), fits), 1e-9)


def test_bits_per_byte_do_not_depend_on_how_text_is_cut_into_tokens() -> None:
    """By hand: every token is as many bytes as its id; the bits of all answers over the bytes of all."""
    head = tiny_lm.lm_head("llama")
    data, params = rows(2, 6), adapter(model("llama"))
    of = tiny_lm.model("llama", GenerateReadout(head, lambda tokens: int(tokens.sum())))
    assert data.starts is not None
    answers = [own[start:] for own, start in zip(data.tokens, data.starts, strict=True)]
    nats = of.losses(params, data, range(6)).double().numpy() @ np.array([len(own) for own in answers])
    score = of.score(params, data)
    assert int(score["bytes"]) == sum(int(own.sum()) for own in answers)
    wanted = nats / np.log(2) / float(score["bytes"])
    assert metrics_of(score, "perplexity")["bits_per_byte"] == pytest.approx(wanted, rel=1e-6)
    assert "bits_per_byte" not in metrics_of(model("llama").score(params, data), "perplexity"), "bytes are not known"


def test_scores_pool_tokens_and_choices() -> None:
    """Perplexity is exp(all losses / all tokens); the choice of least mean loss is taken; sums add up."""
    of, data, params = model("llama"), rows(2, 6), adapter(model("llama"))
    assert data.starts is not None
    tokens = data.lengths - data.starts
    losses = of.losses(params, data, range(6)).double().numpy()
    options = (np.array([9, END], np.int32), np.array([4, 6, 7, END], np.int32))
    mean = []
    for option in options:
        whole = np.concatenate([data.tokens[3][: data.starts[3]], option])
        single = Examples((whole,), np.zeros(1, np.int64), starts=data.starts[3:4])
        mean.append(float(of.losses(params, single, [0])))
    choices = tuple(Choices(options, int(np.argmin(mean))) if i == 3 else None for i in range(6))
    full = Examples(data.tokens, data.labels, starts=data.starts, choices=choices)
    score = of.score(params, full)
    assert (int(score["tokens"]), int(score["n"]), int(score["choices"]), int(score["hits"])) == (tokens.sum(), 6, 1, 1)
    found = metrics_of(score, "perplexity")
    assert found["perplexity"] == pytest.approx(np.exp((losses * tokens).sum() / tokens.sum()), rel=1e-6)
    assert found["choice_accuracy"] == 1
    parts = [of.score(params, full.take(own)) for own in ([0, 3], [1, 2, 4, 5])]
    for name, value in score.items():
        assert float(parts[0][name] + parts[1][name]) == pytest.approx(float(value), rel=1e-6)
    assert len(of.readout.predicting(0, full, 3)) == 3 and of.readout.length(Item(0, full, 3, 2)) == data.starts[3] + 4


def test_perplexity_by_hand() -> None:
    """A loss of 2 over one token and of 4 over three: e^(6/4)."""
    sums = {"loss": torch.tensor(6.0), "tokens": torch.tensor(4), "n": torch.tensor(2)}
    assert metrics_of(sums, "perplexity") == {"perplexity": pytest.approx(np.exp(1.5)), "loss": 1.5}
    assert metrics_of({**sums, "loss": torch.tensor(9e9)}, "perplexity")["perplexity"] == np.inf


def test_fisher_by_one_pass_each() -> None:
    """The trace of a row is the squared gradient of its mean loss, times its answer tokens with `sqrt`."""
    of, data = model("gpt2"), rows(4, 3)
    params = adapter(of, 1)
    assert data.starts is not None
    counts = (data.lengths - data.starts).tolist()
    for norm, power in (("mean", 0), ("sqrt", 1), ("sum", 2)):
        found = of.fisher(params, data, [0, 1, 2], norm)  # type: ignore[arg-type]
        for row in range(3):
            after = of.fit(Fit(params, data, [[row]], SGD(1.0))).params
            squares = sum(float((params[n] - after[n]).square().sum()) for n in params)
            assert float(found.trace[row]) == pytest.approx(squares * counts[row] ** power, rel=1e-4)


def test_rows_without_answers_are_refused_and_there_are_no_classes() -> None:
    of, data = model("gpt2"), rows(0, 2)
    bare = Examples(data.tokens, data.labels)
    with pytest.raises(FitError, match="no answers"):
        of.fit(Fit(adapter(of), bare, [[0]], SGD(0.0)))
    with pytest.raises(FitError, match="no token of an answer"):
        of.fit(Fit(adapter(of), Examples(data.tokens, data.labels, starts=data.lengths), [[0]], SGD(0.0)))
    with pytest.raises(ModelError, match="class scores"):
        of.logits(adapter(of), data)


def test_cut_rows_keep_half_for_the_answer() -> None:
    """10 tokens, answer from 6 on: of 6 tokens, the last 3 before and the first 3 of the answer stay; of 4, 2 and 2."""
    data = Examples((np.arange(10, dtype=np.int32),), np.zeros(1, np.int64), starts=np.array([6]))
    for tokens, kept, start in ((6, [3, 4, 5, 6, 7, 8], 3), (4, [4, 5, 6, 7], 2), (10, list(range(10)), 6)):
        cut = data.truncated(tokens)
        assert cut.tokens[0].tolist() == kept and cut.starts is not None and cut.starts.tolist() == [start]
    whole = Examples(data.tokens, data.labels, starts=np.array([1])).truncated(4)  # plain text: from its beginning
    assert whole.tokens[0].tolist() == [0, 1, 2, 3]
    both = Examples.joined([data, Examples((), np.zeros(0, np.int64)), data])
    assert len(both) == 2 and both.starts is not None and both.starts.tolist() == [6, 6]


# --- generation -------------------------------------------------------------------------------------------------


def greedy(full: Any, prompt: np.ndarray[Any, Any], room: int) -> list[int]:
    """transformers' own greedy answer to a prompt alone."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    out = full.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False, eos_token_id=END,
        pad_token_id=END,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return out[: out.index(END)] if END in out else out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [2048, 40])
def test_greedy_tokens_are_those_of_transformers_on_the_merged_model(family: str, budget: int) -> None:
    of, params = model(family, budget), {k: t.float() for k, t in adapter(model(family), 2).items()}
    prompts = [data for data in rows(7, 6).tokens]
    found = generate(of, params, prompts, 10, END)
    assert found == [greedy(merge(of, params, ()), prompt, 10) for prompt in prompts]
    assert len({len(prompt) for prompt in prompts}) > 1 and any(found)
    assert generate(of, {}, prompts, 10, END) == [greedy(merge(of, {}, ()), prompt, 10) for prompt in prompts]
    assert generate(of, params, [], 10, END) == [] and generate(of, params, prompts, 10, END, 3)[0] == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "spec",
    [Prefix(length=3), Prompt(length=3), InstancePrompt(length=3), LatePrompt(length=3, block=1)],
    ids=lambda spec: spec.kind,
)
def test_decoding_with_virtual_tokens_follows_the_likeliest_token(family: str, spec: AdapterSpec) -> None:
    """With a cache (prefix) or without (prompt): each token is the argmax of the whole sequence computed anew."""
    of = model(family, spec=spec)
    params = {name: 3 * t for name, t in adapter(of).items()}
    prompts = list(rows(3, 3).tokens)
    for prompt, said in zip(prompts, generate(of, params, prompts, 5, END), strict=True):
        costs = []
        for token in (*said, *([END] if len(said) < 5 else [])):
            stem = np.concatenate([prompt, np.asarray(said[: len(costs)], np.int32)])
            tokens = tuple(np.append(stem, np.int32(k)) for k in range(tiny.VOCABULARY))
            starts = np.full(len(tokens), len(prompt))  # one answer that grows, so that a prompt's place stays
            data = Examples(tokens, np.zeros(len(tokens), np.int64), starts=starts)
            losses = of.losses(params, data, range(len(tokens)))
            assert int(losses.argmin()) == token
            costs.append(token)
        assert said == generate(of, params, [prompt], 5, END)[0]
    assert generate(of, params, prompts, 5, END) != generate(of, {}, prompts, 5, END)


# --- exports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", [Lora(rank=4, alpha=6.0), Prompt(length=3)], ids=lambda spec: spec.kind)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
def test_peft_loads_the_adapter_of_a_causal_model(family: str, spec: AdapterSpec, tmp_path: Path) -> None:
    of = model(family, spec=spec)
    params = {k: t.float() for k, t in adapter(of, 4).items()}
    folder = export_adapter(of, params, tmp_path / "adapter", labels=(), card={"prompt": "{instruction}: "})
    tiny_lm.language_model(family).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, str(folder)).double().eval()
    assert theirs.peft_config["default"].task_type == "CAUSAL_LM"
    data = rows(5, 1)
    assert data.starts is not None
    ids = torch.from_numpy(data.tokens[0].astype(np.int64))[None]
    labels = ids.clone()
    labels[0, : data.starts[0]] = -100
    with torch.no_grad():
        loss = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    assert float(of.losses(params, data, [0])) == pytest.approx(float(loss), rel=1e-5)
    back = import_adapter(folder, of)
    assert back.keys() == params.keys() and all(torch.equal(back[name], t) for name, t in params.items())


@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_loads_the_merged_model_with_its_head(tied: bool, tmp_path: Path) -> None:
    readout = GenerateReadout(tiny_lm.lm_head("llama", tied))
    of = HFModel(tiny_lm.base("llama", tied), Lora(rank=4, alpha=6.0), 0, 2048, readout)
    params = {k: t.float() for k, t in adapter(of, 4).items()}
    folder = export_merged(of, params, tmp_path / "whole", labels=(), card={"prompt": "chat"})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    data = rows(6, 1)
    assert data.starts is not None
    ids = torch.from_numpy(data.tokens[0].astype(np.int64))[None]
    labels = ids.clone()
    labels[0, : data.starts[0]] = -100
    with torch.no_grad():
        loss = float(loaded(input_ids=ids, labels=labels).loss)
    assert float(of.losses(params, data, [0])) == pytest.approx(loss, rel=1e-5)
    card = (folder / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "apply_chat_template" in card and "text-generation" in card
