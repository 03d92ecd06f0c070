"""Drafts of the small model: greedy tokens are those of the plain loop, drawn ones have the target's distribution."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import black_boxes
import tiny
import trios
from fedpeft.proxy import speculate
from fedpeft.proxy.blackbox import BackendError, CannotDo
from fedpeft.proxy.choosing import Choice
from fedpeft.proxy.decode import Decoding, Settings, Trio, decode
from fedpeft.proxy.repeats import Repeats

FAMILIES = trios.FAMILIES
NO_END: frozenset[int] = frozenset()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of the small model wherever it stands, also of random ones, which are sure of nothing."""
    monkeypatch.setattr(speculate, "SURE", 0.0)
    monkeypatch.setattr(Repeats, "draft", lambda self, most: [])


def alike(family: str, **how: Any) -> Trio:
    """A trio whose large model is its small one, tuned with half the change: drafts are often right."""
    trio = trios.trio(family, **how)
    assert trio.tuned is not None
    of, params = trio.tuned.model, trio.tuned.params
    near = {name: t * (0.97 if name.endswith("B") else 1.0) for name, t in params.items()}
    return replace(trio, large=black_boxes.box(type(trio.tuned)(of, near)))


PENALISED = Settings(
    alpha=1.0, max_tokens=16, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5, beta=0.01,
    bans=frozenset({5}), logit_bias={9: 1.0}, logprobs=2,
)  # fmt: skip


@pytest.mark.parametrize("settings", [Settings(alpha=1.0, max_tokens=16), PENALISED], ids=["plain", "penalised"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [trios.trio, alike], ids=["unlike", "alike"])
def test_greedy_tokens_are_those_of_the_plain_loop(always: None, make: Any, family: str, settings: Settings) -> None:
    trio, prompts = make(family), trios.prompts(1, 3)
    plain = decode(trio, prompts, [settings] * 3)
    for one, other in zip(plain, decode(trio, prompts, [settings] * 3, speculate=3), strict=True):
        assert (one.tokens, one.finish, one.exact) == (other.tokens, other.finish, other.exact)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
        assert [[t for t, _ in top] for top in one.top] == [[t for t, _ in top] for top in other.top]


def test_calls_are_saved_and_counted(always: None) -> None:
    """40 tokens: one from the prompt, the others in fewer calls; each call scores last token and drafts."""
    trio, prompt = alike("llama", ends=NO_END), trios.prompts(2, 1)
    box = trio.large
    assert isinstance(box, black_boxes.Box)
    with Decoding(trio, prompt, [Settings(alpha=1.0, max_tokens=40)], speculate=4) as decoding:
        while decoding.step():
            pass
        (own,), tally = decoding.completions(), decoding.drafting
    assert len(own.tokens) == 40
    assert tally.calls == len(box.calls) < 36 and tally.accepted + tally.calls == 39
    assert tally.drafted == sum(positions - 1 for _, positions in box.calls) >= tally.accepted
    assert box.open_sessions == 0


def test_models_that_agree_accept_every_draft(always: None) -> None:
    """alpha 1 and L = B: the target is T itself. 1 + 8 x 5 = 41 tokens in 8 calls; drawn ones too."""
    trio, prompt = trios.trio("gpt2", ends=NO_END), trios.prompts(2, 1)
    assert trio.base is not None
    same = replace(trio, large=black_boxes.box(trio.base))
    for temperature in (0.0, 1.0):
        own = Settings(alpha=1.0, max_tokens=41, temperature=temperature)
        with Decoding(same, prompt, [own], speculate=4) as decoding:
            lengths = []
            while step := decoding.step():
                lengths.append(len(step))
            assert lengths == [1] + [5] * 8 and decoding.drafting.accepted == decoding.drafting.drafted == 32


def test_a_greedy_draft_ends_where_the_small_model_is_not_sure() -> None:
    """T is sure behind 0, 1 and 2 and not behind 3: two drafts, and its scores there serve the target."""
    sure = torch.full((6, 6), -9.0)
    for token in range(3):
        sure[token, token + 1] = 9.0
    sure[3] = torch.tensor([0.0, 0.1, 0, 0, 0, 0])
    tuned, base, large = Bigrams(sure), Bigrams(torch.zeros(6, 6)), Bigrams(torch.zeros(6, 6))
    box = black_boxes.box(large)  # type: ignore[arg-type]
    trio = Trio(box, tuned, base, None, 6, NO_END)  # type: ignore[arg-type]
    (own,) = decode(trio, [[0]], [Settings(alpha=1.0, max_tokens=6)], speculate=4)
    assert own.tokens == (1, 2, 3, 1, 2, 3) and [positions for _, positions in box.calls] == [3, 2]


def test_answers_end_within_a_draft(always: None) -> None:
    """An end token, a stop text, and the most tokens, each where the plain loop ends."""
    tokenizer = trios.byte_tokenizer()
    trio, prompts = alike("gpt2", tokenizer=tokenizer, ends=NO_END), trios.prompts(4, 3)
    free = Settings(alpha=1.0, max_tokens=30)
    texts = decode(trio, prompts, [free] * 3)
    end = texts[0].tokens[5]
    assert end not in texts[0].tokens[:5] and end not in texts[1].tokens[:10]
    trio = replace(trio, ends=frozenset({end}))
    settings = [free, replace(free, stop=(texts[1].text[5:8],)), replace(free, max_tokens=7)]
    plain, drafted = decode(trio, prompts, settings), decode(trio, prompts, settings, speculate=4)
    assert plain == [replace(own, logprobs=one.logprobs, top=one.top) for own, one in zip(drafted, plain, strict=True)]
    assert len(plain[0].tokens) == 5 and plain[0].finish == "stop" and plain[2].finish == "length"
    assert plain[1].finish == "stop"


def test_rows_advance_each_for_itself_and_can_be_dropped(always: None) -> None:
    trio, prompts = alike("gpt2", ends=NO_END), trios.prompts(4, 3)
    settings = [Settings(alpha=1.0, max_tokens=12)] * 3
    alone = decode(trio, prompts, settings, speculate=3)
    with Decoding(trio, prompts, settings, speculate=3) as decoding:
        decoding.step()
        decoding.drop(1)
        rows: set[int] = set()
        while step := decoding.step():
            rows |= {emitted.row for emitted in step}
        assert rows == {0, 2} and [len(c.tokens) for c in decoding.completions()] == [12, 1, 12]
        assert decoding.completions()[2] == alone[2]


class Bigrams:
    """A speaker whose scores depend on the last token alone: fast enough to be asked thousands of times."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.vocab, self.positions = table, len(table), 10**6
        self.model = SimpleNamespace(device=tiny.CPU)

    def beside(self, other: Bigrams) -> bool:
        return False

    def open(self, prompts: list[list[int]]) -> Bigrams:
        self.first = self.logits([[prompt[-1]] for prompt in prompts])
        self.lengths = [len(prompt) for prompt in prompts]
        return self

    def logits(self, new: list[list[int]]) -> Tensor:
        return self.table[torch.tensor(new)]

    def rollback(self, n: int) -> None: ...

    def close(self) -> None: ...


def target(tables: list[Tensor], history: list[int], settings: Settings) -> NDArray[np.float64]:
    """The distribution of the next token by its definition."""
    large, tuned, base = (table[history[-1]].double().numpy() for table in tables)
    z = large + settings.alpha * (tuned - base)
    z = z - np.log(np.exp(z).sum())
    for token in set(history):
        z[token] *= settings.repetition_penalty
    z = z / settings.temperature
    order = np.argsort(-z, kind="stable")[: settings.top_k or None]
    p = np.exp(z[order]) / np.exp(z[order]).sum()
    kept = int((np.cumsum(p) - p < settings.top_p).sum())
    out = np.zeros(len(z))
    out[order[:kept]] = p[:kept] / p[:kept].sum()
    return out


@pytest.mark.parametrize("n", [500, pytest.param(6000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how", [{}, {"top_k": 4, "top_p": 0.9, "repetition_penalty": 1.6, "temperature": 1.3}], ids=["plain", "filtered"]
)
def test_drawn_tokens_have_the_distribution_of_the_target(how: dict[str, Any], n: int) -> None:
    """Three tokens each: the distance of their frequencies to the exact joint distribution is noise of counting.

    For n draws the expected distance is at most the sum of sqrt(p (1 - p) / n) / 2 over all outcomes; tokens of the
    draft's own distribution are much farther away.
    """
    rng, prompt = torch.Generator().manual_seed(1), [1, 0]
    tables = [2.5 * torch.randn(6, 6, generator=rng) for _ in range(3)]
    large, tuned, base = map(Bigrams, tables)
    trio = Trio(black_boxes.box(large), tuned, base, None, 6, NO_END)  # type: ignore[arg-type]
    own = Settings(**{"alpha": 0.6, "max_tokens": 3, "temperature": 1.0} | how)
    drawn = Counter(decode(trio, [prompt], [replace(own, seed=seed)], speculate=2)[0].tokens for seed in range(n))

    def joint(of: list[Tensor]) -> dict[tuple[int, ...], float]:
        found = {}
        for said in itertools.product(range(6), repeat=3):
            steps = [target(of, [*prompt, *said[:k]], own)[said[k]] for k in range(3)]
            found[said] = float(np.prod(steps))
        return found

    def distance(expected: dict[tuple[int, ...], float]) -> float:
        return sum(abs(drawn[said] / n - p) for said, p in expected.items()) / 2

    exact = joint(tables)
    assert sum(exact.values()) == pytest.approx(1)
    noise = sum(math.sqrt(p * (1 - p) / n) for p in exact.values()) / 2
    assert distance(exact) < 1.5 * noise
    assert distance(joint([tables[1], tables[1], tables[1]])) > 3 * noise


def test_tokens_of_a_call_are_those_that_the_accepted_share_foretells(always: None) -> None:
    """c (.5, .3, .2), q (.2, .7, .1) behind every token: a draft is accepted with probability a = sum min(c, q) = .6.

    Of 4 drafts and the target's own token a call then gives (1 - a^5) / (1 - a) = 2.3056 in the mean (Leviathan et al.
    2023), with a variance of 1.96: over about 1,300 calls the mean has a standard error of .039.
    """
    c, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1])
    share = float(torch.minimum(c, q).sum())
    foretold = (1 - share**5) / (1 - share)
    assert share == pytest.approx(0.6) and foretold == pytest.approx(2.3056)
    large, tuned, base = (Bigrams(row.expand(3, 3)) for row in (c.log() - q.log(), q.log(), torch.zeros(3)))
    trio = Trio(black_boxes.box(large), tuned, base, None, 3, NO_END)  # type: ignore[arg-type]
    own = Settings(alpha=1.0, max_tokens=3001, temperature=1.0, seed=1)
    with Decoding(trio, [[0]], [own], speculate=4) as decoding:
        lengths = [len(step) for step in iter(decoding.step, [])]
    assert sum(lengths) == 3001 and decoding.drafting.calls == len(lengths) - 1
    assert 3000 / decoding.drafting.calls == pytest.approx(foretold, abs=0.12)
    assert sum(length > 1 for length in lengths[1:]) / len(lengths[1:]) == pytest.approx(share, abs=0.04)


def test_a_backend_that_scores_one_position_cannot_check_drafts() -> None:
    trio = trios.trio()
    single = replace(trio, large=black_boxes.box(trio.large.speaker, block=False))  # type: ignore[union-attr]
    with pytest.raises(CannotDo, match=r"speculation.*one position a call"):
        Decoding(single, [[3]], [Settings(alpha=1.0)], speculate=2)
    assert decode(single, [[3]], [Settings(alpha=1.0, max_tokens=3)])[0].tokens


def test_rows_that_were_opened_are_closed_where_one_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    box, opens = black_boxes.box(trios.trio().large.speaker), itertools.count()  # type: ignore[union-attr]
    begin = box.open

    def open_two(*told: Any) -> Any:
        if next(opens) == 2:
            raise BackendError("large died; start it again")
        return begin(*told)

    monkeypatch.setattr(box, "open", open_two)
    with pytest.raises(BackendError, match="died"):
        Decoding(replace(trios.trio(), large=box), [[3], [4], [5]], [Settings(alpha=1.0)] * 3, speculate=2)
    assert box.open_sessions == 0


@pytest.mark.parametrize(("uniforms", "token"), [((0.42,), 1), ((0.43, 0.74), 0), ((0.43, 0.76), 2)])
def test_a_rejected_draft_is_replaced_from_the_residual(uniforms: tuple[float, ...], token: int) -> None:
    """c (.5, .3, .2), q (.2, .7, .1), draft 1: accepted with probability .3/.7, else drawn from (.75, 0, .25)."""
    choice = Choice(Settings(temperature=1.0, alpha=1.0, max_tokens=1), [0], 3)
    choice.rng = SimpleNamespace(random=iter(uniforms).__next__)  # type: ignore[assignment]
    row: Any = SimpleNamespace(_answer=SimpleNamespace(choice=choice))
    scores, drawn_from = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    assert speculate.Speculation._settle(row, scores, 1, drawn_from) == token
