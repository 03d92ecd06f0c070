"""Speakers: caches, left padding, taking back and keeping rows, against transformers on whole texts without a cache."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import tiny
import tiny_lm
import trios
from fedpeft.core.adapter import Bottleneck, Full, Lora, Prefix, Prompt
from fedpeft.core.errors import FitError, ModelError, RequestError
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import lm_head_of
from fedpeft.models.load import freeze
from fedpeft.models.merge import merge
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.models.sessions import Speaker

CLOSE = {"rtol": 0.0, "atol": 1e-3}  # float32; observed below 4e-5
FAMILIES = trios.FAMILIES


def speaker(family: str, tuned: bool = True) -> tuple[Speaker, Any]:
    """A speaker, and transformers' own model with the same weights."""
    of = trios.model(family, 1)
    params = trios.adapter(of, 3)
    return (Speaker(of, params), merge(of, params, ()).eval()) if tuned else (Speaker(of), trios.whole(family, 1))


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_with_a_cache_is_each_row_alone_without(family: str, tuned: bool) -> None:
    """Positions count real tokens: GPT-2 has learned ones, which left padding would move."""
    own, full = speaker(family, tuned)
    texts = trios.prompts(0, 4)
    assert len(set(map(len, texts))) > 2
    session = own.open(texts)
    behind = [session.first, session.logits([[5], [6], [7], [8]]), session.logits([[9, 10, 11]] * 4)]
    whole = [[*text, k, 9, 10, 11] for text, k in zip(texts, (5, 6, 7, 8), strict=True)]
    assert session.lengths == list(map(len, whole))
    for row, text in enumerate(whole):
        expected = trios.plain_logits(full, text)[-5:]
        torch.testing.assert_close(torch.cat([part[row] for part in behind]), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_leave_and_tokens_are_taken_back(family: str) -> None:
    own, full = speaker(family)
    texts = trios.prompts(4, 4)
    session = own.open(texts)
    session.logits([[3, 4, 5]] * 4)
    session.keep([2, 0])
    session.rollback(2)
    found = session.logits([[20, 21], [22, 23]])
    assert session.lengths == [len(texts[2]) + 3, len(texts[0]) + 3]
    for row, text in enumerate(([*texts[2], 3, 20, 21], [*texts[0], 3, 22, 23])):
        torch.testing.assert_close(found[row], trios.plain_logits(full, text)[-2:], **CLOSE)
    session.rollback(3)
    with pytest.raises(RequestError, match="1 tokens cannot be taken back: 0 were added"):
        session.rollback(1)
    again = session.logits([[3], [3]])
    torch.testing.assert_close(again[0, 0], trios.plain_logits(full, [*texts[2], 3])[-1], **CLOSE)


def test_a_sliding_window_is_taken_back_beyond_its_edge() -> None:
    config = transformers.MistralConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, sliding_window=5, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        full = transformers.AutoModelForCausalLM.from_config(config).eval()
    base = freeze(full.base_model, None, "window", tiny.CPU)
    own = Speaker(HFModel(base, Lora(rank=2), 0, 2048, GenerateReadout(lm_head_of(full, base))))
    text = trios.prompts(1, 1, 12)[0] + [7] * 8
    session = own.open([text])
    for _ in range(3):
        session.logits([[4, 5, 6]])
        session.rollback(2)
    found = session.logits([[9, 10]])
    torch.testing.assert_close(found[0], trios.plain_logits(full, [*text, 4, 4, 4, 9, 10])[-2:], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_speakers_over_one_base_take_turns(family: str) -> None:
    """An adapter acts during its own passes alone; off, the scores are the base's to the last bit."""
    of = trios.model(family, 1)
    tuned, base = Speaker(of, trios.adapter(of, 3)), Speaker(of)
    texts = trios.prompts(2, 3)
    alone = [base.open(texts).first, tuned.open(texts).first]
    one, other = tuned.open(texts), base.open(texts)
    assert torch.equal(other.first, alone[0]) and torch.equal(one.first, alone[1])
    assert not torch.allclose(one.first, other.first, atol=0.1)
    new = [[4], [5], [6]]
    expected = base.open(texts).logits(new)
    one.logits(new)
    assert torch.equal(other.logits(new), expected)
    with torch.no_grad():
        plain = trios.whole(family, 1)(input_ids=torch.tensor([texts[0]]), logits_to_keep=1).logits
    assert torch.equal(base.open(texts[:1]).first, plain), "adapter off is the base, all bits"


@pytest.mark.parametrize("spec", [Lora(rank=4, alpha=6.0), Bottleneck(size=4)], ids=lambda spec: spec.kind)
def test_both_in_one_pass_are_each_alone(spec: Any) -> None:
    of = trios.model("llama", 1, spec=spec)
    tuned, base = Speaker(of, trios.adapter(of, 3)), Speaker(of)
    assert tuned.beside(base)
    texts, others = trios.prompts(2, 3), trios.prompts(5, 3)
    both, one, other = tuned.open_beside(texts, base, others), tuned.open(texts), base.open(others)
    torch.testing.assert_close(both.first, torch.cat([one.first, other.first]), **CLOSE)
    new = [[4], [5], [6]]
    both.logits(new * 2), one.logits(new), other.logits(new)
    both.keep([2, 0, 5, 3]), one.keep([2, 0]), other.keep([2, 0])
    found = both.logits([[8], [9], [8], [9]])
    torch.testing.assert_close(found, torch.cat([one.logits([[8], [9]]), other.logits([[8], [9]])]), **CLOSE)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call
def test_peft_gives_the_same_scores(tmp_path: Any) -> None:
    """The adapter in PEFT's own hands, left-padded with a mask and positions."""
    from fedpeft.models.export import export_adapter

    of = trios.model("gpt2", 1)
    params = trios.adapter(of, 3)
    folder = export_adapter(of, params, tmp_path / "adapter", labels=(), card={"prompt": "{instruction}"})
    trios.whole("gpt2", 1).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    texts = trios.prompts(6, 3)
    first = Speaker(of, params).open(texts).first
    for row, text in enumerate(texts):
        torch.testing.assert_close(first[row, 0], trios.plain_logits(theirs, text)[-1], **CLOSE)


@pytest.mark.parametrize("spec", [Prefix(length=3), Full()], ids=lambda spec: spec.kind)
def test_prefixes_and_weights_of_its_own_act_too(spec: Any) -> None:
    """A prefix takes no position; weights of one's own reach a tied head. Both need a pass of their own."""
    of = trios.model("gpt2", 1, spec=spec)
    params = trios.adapter(of, 3, 0.1)
    own = Speaker(of, params)
    assert not own.beside(Speaker(of))
    texts = trios.prompts(7, 3)
    session = own.open(texts)
    found = torch.cat([session.first, session.logits([[4, 5]] * 3)], dim=1)
    for row, text in enumerate(texts):
        (whole,) = own.scores([[*text, 4, 5]], [(len(text) - 1, len(text) + 2)])
        torch.testing.assert_close(found[row], whole, **CLOSE)
        assert not torch.allclose(whole, Speaker(of).scores([[*text, 4, 5]])[0][-3:], atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_texts_are_padded_on_the_right_and_cut_into_parts(family: str) -> None:
    of = trios.model(family, 1)
    params = trios.adapter(of, 3)
    texts = trios.prompts(3, 7, 20)
    spans = [(len(text) // 2, len(text)) for text in texts]
    small = HFModel(of.base, of.spec, 0, 25, of.readout)  # a budget of 25 tokens
    full = merge(of, params, ()).eval()
    for own in (Speaker(of, params), Speaker(small, params)):
        for text, (first, end), found in zip(texts, spans, own.scores(texts, spans), strict=True):
            torch.testing.assert_close(found, trios.plain_logits(full, text)[first:end], rtol=0, atol=1e-4)
    assert [len(found) for found in Speaker(of).scores(texts)] == list(map(len, texts)) and Speaker(of).scores([]) == []


def test_what_cannot_be_read_is_refused() -> None:
    of = trios.model("gpt2", 1)
    own = Speaker(of)
    assert (own.positions, own.vocab) == (64, 60)
    for prompts, words in (
        ([], "no tokens"),
        ([[3], []], "no tokens"),
        ([[3] * 65], "65 tokens and the model gpt2-1-2-60 reads 64"),
        ([[3, 60]], "token 60 does not exist"),
        ([[-1]], "token -1 does not exist"),
    ):
        with pytest.raises(RequestError, match=words):
            own.open(prompts)
    session = own.open([[3], [4, 5]])
    for new in ([[3]], [[3], [4, 5]], [[], []]):
        with pytest.raises(RequestError, match="give each as many"):
            session.logits(new)
    session.close()
    session.close()
    with pytest.raises(RequestError, match="closed"):
        session.logits([[3], [4]])
    with pytest.raises(RequestError, match=r"span \(1, 3\) lies outside"):
        own.scores([[3, 4]], [(1, 3)])
    with pytest.raises(RequestError, match="1 texts came with 2 spans"):
        own.scores([[3, 4]], [(0, 1), (0, 1)])


def test_what_cannot_speak_is_refused() -> None:
    with pytest.raises(ModelError, match=r"task\.format generate"):
        Speaker(tiny.model("gpt2"))
    prompted = HFModel(tiny_lm.base("gpt2"), Prompt(length=2), 0, 2048, GenerateReadout(tiny_lm.lm_head("gpt2")))
    with pytest.raises(ModelError, match="'prompt' puts tokens into the text"):
        Speaker(prompted, prompted.init(tiny.place()))
    with pytest.raises(FitError, match="does not exist"):
        Speaker(trios.model("gpt2", 1), {"block.0.other.A": Tensor()})
