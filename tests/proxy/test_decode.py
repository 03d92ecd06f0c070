"""The decoding loop: identities of three models, batches, settings per row, ends, candidates, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import black_boxes
import trios
from fedpeft.core.errors import RequestError
from fedpeft.models.merge import merge
from fedpeft.models.sessions import Speaker
from fedpeft.proxy.blackbox import BackendError, CannotDo
from fedpeft.proxy.decode import Completion, Decoding, Emitted, Settings, Trio, decode
from fedpeft.proxy.expert import Expert

FAMILIES = trios.FAMILIES
LARGE = {"gpt2": "llama", "llama": "gpt2"}
NO_END: frozenset[int] = frozenset()


def tokens(trio: Trio, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    own = Settings(**{"alpha": 1.0, "max_tokens": 10} | settings)
    return [list(c.tokens) for c in decode(trio, prompts, [own] * len(prompts))]


def generated(full: Any, prompt: list[int], room: int, **how: Any) -> list[int]:
    """transformers' own greedy answer, without the end token."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = full.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=room, do_sample=False, eos_token_id=trios.END,
        pad_token_id=0, **how,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return out[: out.index(trios.END)] if trios.END in out else out


@cache
def wholes(family: str) -> tuple[Any, Any, Any]:
    """The models of `trios.trio` as transformers has them: large, tuned, base."""
    small = trios.model(family, 1)
    tuned = merge(small, trios.adapter(small, 3), ()).eval()
    return trios.whole(LARGE[family], 2, 3), tuned, trios.whole(family, 1)


def plain(family: str, prompt: list[int], room: int, alpha: float) -> list[tuple[int, float]]:
    """Greedy proxy-tuned tokens with their log-probabilities, every text computed anew by transformers alone."""
    found: list[tuple[int, float]] = []
    for _ in range(room):
        ids = [*prompt, *(token for token, _ in found)]
        large, tuned, base = (trios.plain_logits(full, ids)[-1] for full in wholes(family))
        z = (large + alpha * (tuned - base)).log_softmax(dim=-1)
        found.append((int(z.argmax()), float(z.max())))
        if found[-1][0] == trios.END:
            break
    return found


# --- identities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.7, -1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_decodes_what_whole_texts_give_one_by_one(family: str, alpha: float) -> None:
    prompts = trios.prompts(1, 4)
    found = decode(trios.trio(family), prompts, [Settings(alpha=alpha, max_tokens=9)] * 4)
    for prompt, own in zip(prompts, found, strict=True):
        expected = plain(family, prompt, 9, alpha)
        ended = expected[-1][0] == trios.END
        assert list(own.tokens) == [token for token, _ in expected][: len(expected) - ended]
        assert own.finish == ("stop" if ended else "length")
        assert own.logprobs == pytest.approx([lp for _, lp in expected][: len(own.tokens)], abs=1e-3)
        assert (own.alpha, own.mass, own.least_mass, own.exact) == (alpha, 1.0, 1.0, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_0_and_equal_models_are_transformers_generate(family: str) -> None:
    trio, prompts = trios.trio(family), trios.prompts(2, 5)
    large, tuned, _ = wholes(family)
    of_large = [generated(large, prompt, 10) for prompt in prompts]
    of_tuned = [generated(tuned, prompt, 10) for prompt in prompts]
    assert of_large != of_tuned
    assert tokens(trio, prompts, alpha=0.0) == of_large
    assert tokens(replace(trio, tuned=None, base=None), prompts, alpha=None) == of_large
    assert tokens(replace(trio, tuned=trio.base), prompts, alpha=1.7) == of_large, "T = B: no alpha changes L"
    assert tokens(replace(trio, large=None, base=None), prompts, alpha=None) == of_tuned
    assert trio.base is not None
    same = replace(trio, large=black_boxes.box(trio.base))
    assert tokens(same, prompts, alpha=1.0) == of_tuned, "L = B: alpha 1 is T"
    mixed = decode(trio, prompts, [Settings(alpha=float(i % 2), max_tokens=10) for i in range(5)])
    assert [list(c.tokens) for c in mixed[::2]] == of_large[::2], "alpha of each row"
    assert [list(c.tokens) for c in mixed[1::2]] == tokens(trio, prompts)[1::2] != of_large[1::2]


class _Steering(transformers.LogitsProcessor):
    """z_L + alpha (z_T - z_B), then the repetition penalty on log-probabilities, within `generate`."""

    def __init__(self, tuned: Any, base: Any, penalty: float) -> None:
        self.tuned, self.base, self.penalty = tuned, base, penalty

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        ids = input_ids[0].tolist()
        z = scores + trios.plain_logits(self.tuned, ids)[-1] - trios.plain_logits(self.base, ids)[-1]
        own = transformers.RepetitionPenaltyLogitsProcessor(self.penalty)
        return own(input_ids, z.log_softmax(dim=-1))  # type: ignore[no-any-return]


def test_a_processor_within_generate_is_this_loop_and_a_penalty_of_its_configuration_is_not() -> None:
    """transformers puts its own penalty before the processor, where it changes z_L alone."""
    trio, prompts = trios.trio("llama"), trios.prompts(3, 6)
    large, tuned, base = wholes("llama")
    steering = transformers.LogitsProcessorList([_Steering(tuned, base, 2.0)])
    inside = [generated(large, prompt, 10, logits_processor=steering) for prompt in prompts]
    assert tokens(trio, prompts, repetition_penalty=2.0) == inside
    late = transformers.LogitsProcessorList([_Steering(tuned, base, 1.0)])
    before = [generated(large, prompt, 10, logits_processor=late, repetition_penalty=2.0) for prompt in prompts]
    assert tokens(trio, prompts, repetition_penalty=2.0) != before


def test_the_tuned_model_may_read_other_prompts() -> None:
    trio, prompts = trios.trio(), trios.prompts(4, 3)
    framed = [[1, 7, *prompt, 8] for prompt in prompts]
    expert = Expert((1, 7), (8,))
    found = decode(replace(trio, expert=expert), prompts, [Settings(alpha=1.0, max_tokens=6)] * 3)
    large, tuned, base = wholes("gpt2")
    for prompt, frame, own in zip(prompts, framed, found, strict=True):
        said: list[int] = []
        for _ in own.tokens:
            parts = ((large, prompt), (tuned, frame), (base, prompt))
            z = [trios.plain_logits(full, [*text, *said])[-1] for full, text in parts]
            said.append(int((z[0] + z[1] - z[2]).argmax()))
        assert list(own.tokens) == said


# --- rows -------------------------------------------------------------------------------------------------------

KINDS = (
    Settings(alpha=1.0, max_tokens=12),
    Settings(alpha=1.0, max_tokens=12, temperature=1.0, seed=3),
    Settings(alpha=0.5, max_tokens=7, temperature=0.8, top_k=12, top_p=0.9, min_p=0.02, seed=4, logprobs=3),
    Settings(alpha=2.0, max_tokens=12, temperature=1.3, repetition_penalty=1.4, frequency_penalty=0.3, seed=5),
    Settings(alpha=0.0, max_tokens=12, presence_penalty=1.0, logit_bias={9: 3.0}, bans=frozenset({2, 5}), beta=0.05),
)


def test_a_row_never_depends_on_its_neighbours() -> None:
    """Sampled, penalised, shorter and longer rows side by side: each has the tokens that it has alone."""
    trio, prompts = trios.trio(), trios.prompts(5, 5)
    together = decode(trio, prompts, KINDS)
    for prompt, settings, own in zip(prompts, KINDS, together, strict=True):
        (alone,) = decode(trio, [prompt], [settings])
        assert alone.tokens == own.tokens and alone.finish == own.finish
        assert alone.logprobs == pytest.approx(own.logprobs, abs=1e-3)
    order = [3, 0, 4, 2, 1]
    turned = decode(trio, [prompts[i] for i in order], [KINDS[i] for i in order])
    assert [c.tokens for c in turned] == [together[i].tokens for i in order]
    assert len({len(c.tokens) for c in together}) > 1


def test_rows_that_end_or_are_dropped_leave_all_caches() -> None:
    trio, prompts = trios.trio(ends=NO_END), trios.prompts(6, 4)
    box = trio.large
    assert isinstance(box, black_boxes.Box)
    box.calls.clear()
    settings = [Settings(alpha=1.0, max_tokens=n) for n in (2, 9, 9, 5)]
    undisturbed = decode(trio, prompts, settings)
    assert [rows for rows, _ in box.calls] == [4, 3, 3, 3, 2, 2, 2, 2]
    box.calls.clear()
    with Decoding(trio, prompts, settings) as decoding:
        steps = [decoding.step() for _ in range(3)]
        decoding.drop(2)
        assert decoding.active == [1, 3]
        while step := decoding.step():
            steps.append(step)
    assert [rows for rows, _ in box.calls] == [4, 3, 2, 2, 1, 1, 1, 1]
    assert [[e.row for e in step] for step in steps[:4]] == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3], [1, 3]]
    found = decoding.completions()
    assert [c.tokens for c in found] == [undisturbed[i].tokens[: 3 if i == 2 else None] for i in range(4)]
    assert box.open_sessions == 0


def test_penalties_and_bans_by_a_plain_loop() -> None:
    """Bias, bans, then penalties, on the combined model: presence and frequency count the answer alone."""
    trio, (prompt,) = trios.trio(ends=NO_END), trios.prompts(7, 1)
    own = Settings(
        alpha=1.0, max_tokens=12, logit_bias={9: 2.0, 11: -4.0}, bans=frozenset({20, 41}), repetition_penalty=1.5,
        presence_penalty=0.7, frequency_penalty=0.4,
    )  # fmt: skip
    (found,) = decode(trio, [prompt], [own])
    said: list[int] = []
    for _ in range(12):
        large, tuned, base = (trios.plain_logits(full, [*prompt, *said])[-1].numpy() for full in wholes("gpt2"))
        z = large + tuned - base
        z[9] += 2
        z[11] -= 4
        z[[20, 41]] = -np.inf
        z = z - np.log(np.exp(z - z.max()).sum()) - z.max()
        for token in {*prompt, *said}:
            z[token] = z[token] / 1.5 if z[token] > 0 else z[token] * 1.5
        for token in range(len(z)):
            z[token] -= 0.7 * (token in said) + 0.4 * said.count(token)
        said.append(int(z.argmax()))
    assert list(found.tokens) == said
    assert len(set(said)) > 3


def test_draws_have_the_distribution_of_the_filtered_model() -> None:
    """3,000 rows draw one token: its frequencies are the filtered, combined probabilities, to counting noise."""
    trio, (prompt,) = trios.trio(), trios.prompts(8, 1)
    wide = replace(trio, large=black_boxes.box(trio.large.speaker, max_batch=250))  # type: ignore[union-attr]
    n = 3000
    how = {"temperature": 1.5, "top_k": 8, "top_p": 0.95, "min_p": 0.02}
    rows = [Settings(alpha=1.0, max_tokens=1, seed=seed, **how) for seed in range(n)]  # type: ignore[arg-type]
    drawn = []
    for begin in range(0, n, 250):
        with Decoding(wide, [prompt] * 250, rows[begin : begin + 250]) as decoding:
            drawn += [emitted.token for emitted in decoding.step()]
    large, tuned, base = (trios.plain_logits(full, prompt)[-1].double() for full in wholes("gpt2"))
    p = ((large + tuned - base) / 1.5).softmax(dim=-1).numpy()
    order = np.argsort(-p)[:8]
    kept = p[order] / p[order].sum()
    kept = kept[: int(np.searchsorted(np.cumsum(kept), 0.95)) + 1]
    kept = kept[kept >= 0.02 * kept[0]]
    expected = np.zeros(trios.VOCABULARY)
    expected[order[: len(kept)]] = kept / kept.sum()
    found = np.bincount(drawn, minlength=trios.VOCABULARY) / n
    assert found[expected == 0].sum() == 0 and len(kept) > 3
    assert np.abs(found - expected).sum() / 2 < 2 * math.sqrt(len(kept) / n)


# --- ends -------------------------------------------------------------------------------------------------------


def emitted_text(steps: list[list[Emitted]], row: int) -> str:
    return "".join(e.text for step in steps for e in step if e.row == row)


def test_stop_texts_and_end_tokens_of_each_row() -> None:
    """Text of a byte-level vocabulary; what is shown step by step is the text of the completion."""
    tokenizer = trios.byte_tokenizer()
    trio = trios.trio(tokenizer=tokenizer, ends=NO_END)
    prompts, free = trios.prompts(9, 4), Settings(alpha=1.0, max_tokens=16, temperature=1.0, seed=1)
    plain_texts = decode(trio, prompts, [free] * 4)
    third = plain_texts[1].text[2:4]
    settings = [free, replace(free, stop=("never", third)), free, replace(free, max_tokens=3)]
    end = next(token for token in plain_texts[2].tokens[5:] if token not in plain_texts[1].tokens)
    trio = replace(trio, ends=frozenset({end}))
    with Decoding(trio, prompts, settings) as decoding:
        steps = []
        while step := decoding.step():
            steps.append(step)
        found = decoding.completions()
    whole: list[Completion] = list(plain_texts)
    ends = [own.tokens.index(end) if end in own.tokens else 16 for own in whole]
    assert found[0].tokens == whole[0].tokens[: ends[0]] and found[2].tokens == whole[2].tokens[: ends[2]]
    assert found[2].finish == "stop" and ends[2] >= 5
    assert found[1].text == whole[1].text[: whole[1].text.index(third)] and found[1].finish == "stop"
    assert found[3].tokens == whole[3].tokens[:3] and found[3].finish == "length"
    for row, own in enumerate(found):
        assert emitted_text(steps, row) == own.text
        finishes = [e.finish for step in steps for e in step if e.row == row]
        assert finishes[-1] == own.finish and not any(finishes[:-1])
    assert found[0].text == tokenizer.decode(found[0].tokens)


def test_likeliest_tokens_are_told_under_the_combined_model() -> None:
    trio, (prompt,) = trios.trio(), trios.prompts(10, 1)
    (own,) = decode(trio, [prompt], [Settings(alpha=1.0, max_tokens=1, logprobs=4, bans=frozenset({2, 20}))])
    z = [trios.plain_logits(full, prompt)[-1] for full in wholes("gpt2")]
    expected = (z[0] + z[1] - z[2]).log_softmax(dim=-1)
    values, ids = expected.topk(4)
    assert [token for token, _ in own.top[0]] == ids.tolist(), "before bans"
    assert [value for _, value in own.top[0]] == pytest.approx(values.tolist(), abs=1e-3)
    assert own.logprobs[0] == pytest.approx(float(expected[own.tokens[0]]), abs=1e-3)


def test_the_context_is_the_least_of_the_three() -> None:
    prompt = [3] * 55
    trio = trios.trio(ends=NO_END)
    assert len(tokens(trio, [prompt], max_tokens=99)[0]) == 9
    speaker = trio.large.speaker  # type: ignore[union-attr]
    narrow = replace(trio, large=black_boxes.box(speaker, max_context=60))
    both = decode(narrow, [prompt, [3]], [Settings(alpha=1.0, max_tokens=7)] * 2)
    assert [(len(c.tokens), c.finish) for c in both] == [(5, "length"), (7, "length")]
    with pytest.raises(RequestError, match=r"prompt 0 has 60 tokens and leaves no room.*60 at most"):
        decode(narrow, [[3] * 60], [Settings(alpha=1.0)])


def test_what_the_models_read_is_told_in_tokens_of_the_prompt() -> None:
    framed = replace(trios.trio(ends=NO_END), expert=Expert((1, 7), (8,)))
    with pytest.raises(RequestError, match=r"prompt 0 has 61 tokens and .*: the models read 61 at most"):
        decode(framed, [[3] * 61], [Settings(alpha=1.0)])
    assert len(tokens(framed, [[3] * 60], max_tokens=9)[0]) == 1
    alone = replace(framed, tuned=None, base=None)
    with pytest.raises(RequestError, match=r"prompt 0 has 64 tokens and .*: the models read 64 at most"):
        decode(alone, [[3] * 64], [Settings()])


# --- what the large model gives ---------------------------------------------------------------------------------


def test_all_candidates_are_the_full_scores_and_few_are_renormalised() -> None:
    trio, prompts = trios.trio(), trios.prompts(11, 4)
    full = decode(trio, prompts, [Settings(alpha=1.0, max_tokens=8)] * 4)
    every = decode(replace(trio, candidates=trios.VOCABULARY), prompts, [Settings(alpha=1.0, max_tokens=8)] * 4)
    for one, other in zip(full, every, strict=True):
        assert one.tokens == other.tokens and one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
        assert other.mass == pytest.approx(1, abs=1e-5)
    few = replace(trio, candidates=6)
    own = Settings(alpha=1.0, max_tokens=1, logprobs=9)
    for prompt, found in zip(prompts, decode(few, prompts, [own] * 4), strict=True):
        large, tuned, base = (trios.plain_logits(full, prompt)[-1] for full in wholes("gpt2"))
        best = large.topk(6).indices
        z = (large + tuned - base)[best].log_softmax(dim=-1)
        told = found.top[0] if found.tokens else ()
        if told:
            assert dict(told) == pytest.approx(dict(zip(best.tolist(), z.tolist(), strict=True)), abs=1e-3)
        assert found.mass == pytest.approx(float(large.softmax(0)[best].sum()), abs=1e-5) and found.mass < 1
    alike = decode(few, prompts, [Settings(alpha=1.0, max_tokens=8)] * 4)
    assert all(0 < own.least_mass <= own.mass < 1 for own in alike)


def test_logits_in_place_of_log_probabilities_change_nothing() -> None:
    trio, prompts = trios.trio(), trios.prompts(5, 5)
    raw = replace(trio, large=black_boxes.box(trio.large.speaker, raw=True))  # type: ignore[union-attr]
    for one, other in zip(decode(trio, prompts, KINDS), decode(raw, prompts, KINDS), strict=True):
        assert one.tokens == other.tokens and one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_padding_of_the_vocabulary_is_cut() -> None:
    """The large matrix has 7 rows more with large weights: all rows of scores are cut to the real tokens."""
    trio, prompts = trios.trio(ends=NO_END), trios.prompts(12, 3)
    padded = trios.model("llama", 2, 3, trios.VOCABULARY + 7)
    lm = padded.lm
    assert lm is not None and lm.tied is False
    with torch.no_grad():
        lm.projection(torch.float32)[0][trios.VOCABULARY :] *= 30
    own = [Settings(alpha=1.0, max_tokens=8, logprobs=2)] * 3
    found = decode(replace(trio, large=black_boxes.box(Speaker(padded))), prompts, own)
    assert all(token < trios.VOCABULARY for c in found for token in c.tokens)
    first = Speaker(padded).open(prompts).first[:, 0]
    assert (first.argmax(dim=-1) >= trios.VOCABULARY).any(), "uncut, padding would win"
    small = [speaker.open(prompts).first[:, 0] for speaker in (trio.tuned, trio.base) if speaker]
    z = (first[:, : trios.VOCABULARY] + small[0] - small[1]).log_softmax(dim=-1)
    for row, c in enumerate(found):
        assert c.tokens[0] == int(z[row].argmax()) and c.logprobs[0] == pytest.approx(float(z[row].max()), abs=1e-4)


def test_tokens_that_the_small_model_lacks_keep_the_large_ones_scores() -> None:
    trio, prompts = trios.trio(ends=NO_END), trios.prompts(13, 3)
    small = trios.model("gpt2", 1, 2, 50)
    short = replace(trio, tuned=Speaker(small, trios.adapter(small, 3)), base=Speaker(small))
    few = [[token for token in prompt if token < 50] or [3] for prompt in prompts]
    own = [Settings(alpha=1.0, max_tokens=1, logprobs=60)] * 3
    assert trio.large is not None
    z = trio.large.open(few, trio.want).first.values[:, 0]
    speakers = [speaker.open(few).first[:, 0] for speaker in (short.tuned, short.base) if speaker]
    z[:, :50] += speakers[0] - speakers[1]
    for row, c in enumerate(decode(short, few, own)):
        told = dict(c.top[0])
        assert len(told) == 60 and [told[i] for i in range(60)] == pytest.approx(
            z[row].log_softmax(dim=-1).tolist(), abs=1e-4
        )


# --- what is refused --------------------------------------------------------------------------------------------


def test_settings_out_of_range_are_told_all_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        Settings(max_tokens=0, temperature=-1, top_p=0.0, min_p=2, repetition_penalty=0, alpha=math.nan, stop=("",))
    for word in ("max_tokens is 0", "temperature is -1", "top_p is 0.0", "min_p is 2", "repetition_penalty is 0",
                 "alpha is nan", "stop is ['']"):  # fmt: skip
        assert word in str(caught.value)
    for penalty in (1e-46, 1e39):
        with pytest.raises(RequestError, match=r"it must be from 0\.01 to 10; 1 leaves all") as told:
            Settings(repetition_penalty=penalty)
        assert f"repetition_penalty is {penalty};" in str(told.value)
    for wrong in ({"alpha": math.inf}, {"temperature": math.nan}, {"logit_bias": {3: -math.inf}}, {"stop": ("a",) * 5}):
        with pytest.raises(RequestError):
            Settings(**wrong)  # type: ignore[arg-type]


def test_requests_that_cannot_be_met() -> None:
    trio, own = trios.trio(), Settings(alpha=1.0, max_tokens=4)
    cases: list[tuple[Any, list[list[int]], list[Settings], str]] = [
        (trio, [[3]], [Settings()], "row 0 has no alpha"),
        (trio, [[3]], [], "1 prompts came with 0 settings"),
        (trio, [[3], []], [own, own], "a prompt has no tokens"),
        (trio, [[3]], [replace(own, stop=("x",))], "there is no tokenizer"),
        (trio, [[3]], [replace(own, bans=frozenset({60}))], "token 60 in logit_bias or bans"),
        (trio, [[3]], [replace(own, bans=frozenset(range(60)))], "all candidates of a row are banned"),
        (replace(trio, large=black_boxes.box(trio.tuned, max_batch=1)), [[3], [4]], [own, own], "2 prompts are more"),
    ]
    for of, prompts, settings, words in cases:
        with pytest.raises(RequestError, match=words), Decoding(of, prompts, settings) as decoding:
            decoding.step()
    with pytest.raises(RequestError, match="drafts need a large"):
        Decoding(replace(trio, tuned=None, base=None), [[3]], [own], speculate=2)
    for missing in ({"base": None}, {"tuned": None}, {"large": None}):
        with pytest.raises(RequestError, match="cannot decode together"):
            replace(trio, **missing)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="end tokens"):
        replace(trio, ends=frozenset({60}))
    poor = black_boxes.box(trio.tuned, full=False, top_k=4)  # type: ignore[arg-type]
    with pytest.raises(CannotDo, match="decoding from 4 candidates"):
        replace(trio, large=poor)
    big = replace(trio, large=black_boxes.box(trio.tuned, max_batch=1))  # type: ignore[arg-type]
    assert len(decode(big, [[3], [4], [5]], [own] * 3)) == 3, "decode cuts into batches"


def test_a_large_model_that_dies_or_says_nonsense_is_named() -> None:
    trio, own = trios.trio(ends=NO_END), Settings(alpha=1.0, max_tokens=6)
    speaker = trio.large.speaker  # type: ignore[union-attr]
    dying = replace(trio, large=black_boxes.box(speaker, dies_after=2))
    with Decoding(dying, [[3], [4]], [own, own]) as decoding:
        steps = [decoding.step() for _ in range(3)]
        with pytest.raises(BackendError, match="has died"):
            decoding.step()
    assert [len(step) for step in steps] == [2, 2, 2] and dying.large.open_sessions == 0  # type: ignore[union-attr]
    mad = trios.model("gpt2", 9, 1)
    with torch.no_grad():
        mad.base.module.ln_f.weight.fill_(math.nan)
    with pytest.raises(BackendError, match="box gave scores that are not finite"):
        decode(replace(trio, large=black_boxes.box(Speaker(mad))), [[3]], [own])
