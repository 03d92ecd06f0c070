"""Drafts from what the text said before."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import black_boxes
import trios
from fedpeft.proxy.decode import Decoding, Settings, decode
from fedpeft.proxy.repeats import LEAST, Repeats


@pytest.mark.parametrize(
    ("text", "most", "drafted"),
    [
        ([1, 2, 3, 4, 1, 2], 4, [3, 4]),  # two agree, two are drafted
        ([9, 1, 2, 3, 4, 9, 1, 2], 4, [3, 4, 9]),  # three agree
        ([9, 1, 2, 3, 4, 9, 1, 2], 1, [3]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 4, [4, 1]),  # the latest place counts
        ([5, 6, 5, 6, 5, 6], 4, [5, 6, 5, 6]),  # round and round
        ([7, 7, 7, 7, 7], 3, [7, 7, 7]),
        ([1, 2, 3, 4], 4, []),
        ([1, 2, 1, 2], 0, []),
        ([1], 4, []),
        ([], 4, []),
    ],
)
def test_what_followed_before_is_drafted(text: list[int], most: int, drafted: list[int]) -> None:
    assert Repeats(text).draft(most) == drafted
    grown = Repeats(text[:1])
    for token in text[1:]:
        grown.add([token])
    assert grown.draft(most) == drafted


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 6))
def test_drafts_are_those_of_a_search_through_the_text(text: list[int], most: int) -> None:
    places = [p for p in range(LEAST, len(text)) if text[p - LEAST : p] == text[-LEAST:]]
    expected: list[int] = []
    if places:
        p = places[-1]
        agreed = next(k for k in range(LEAST, 99) if k >= p or text[p - 1 - k] != text[-1 - k])
        whole = list(text)
        while len(whole) < len(text) + min(most, agreed):
            whole.append(whole[p + len(whole) - len(text)])
        expected = whole[len(text) :]
    assert Repeats(text).draft(most) == expected


class Cycle:
    """A speaker that says token + 1 of a ring whatever else was said; as sure as it is told."""

    def __init__(self, sure: float, size: int = 6) -> None:
        self.vocab, self.positions = size, 10**6
        self.table = sure * torch.eye(size).roll(1, dims=1)
        self.model = type("Model", (), {"device": torch.device("cpu")})
        self.read = 0

    def beside(self, other: Cycle) -> bool:
        return False

    def open(self, prompts: list[list[int]]) -> Cycle:
        self.first = self.logits([[prompt[-1]] for prompt in prompts])
        self.lengths = [len(prompt) for prompt in prompts]
        self.read = 0
        return self

    def logits(self, new: list[list[int]]) -> torch.Tensor:
        self.read += 1
        return self.table[torch.tensor(new)]

    def rollback(self, n: int) -> None: ...

    def close(self) -> None: ...


def test_a_repetition_is_drafted_without_the_small_model() -> None:
    """A ring of six tokens, and a small model that is never sure: drafts come from the prompt's own round."""
    tuned, base, large = Cycle(0.1), Cycle(0.0), Cycle(9.0)
    trio = trios.Trio(black_boxes.box(large), tuned, base, None, 6, frozenset())  # type: ignore[arg-type]
    prompt, settings = [0, 1, 2, 3, 4, 5, 0, 1], [Settings(alpha=1.0, max_tokens=21)]
    with Decoding(trio, [prompt], settings, speculate=4) as decoding:
        while decoding.step():
            pass
        (own,), tally = decoding.completions(), decoding.drafting
    assert own.tokens == tuple((2 + place) % 6 for place in range(21))
    assert tally.accepted == tally.drafted and tally.calls == tuned.read == base.read < 8


@pytest.mark.parametrize("how", [{}, {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "bans": frozenset({5})}])
@pytest.mark.parametrize("family", trios.FAMILIES)
def test_greedy_tokens_are_those_of_the_plain_loop_on_repeating_prompts(family: str, how: dict[str, Any]) -> None:
    """Whole models, whose caches take rejected drafts back."""
    trio = trios.trio(family, ends=frozenset())
    prompts = [(own * 4)[:14] for own in trios.prompts(3, 3)]
    settings = [Settings(alpha=1.0, max_tokens=16, **how)] * 3
    for one, other in zip(decode(trio, prompts, settings), decode(trio, prompts, settings, speculate=3), strict=True):
        assert (one.tokens, one.finish) == (other.tokens, other.finish)


@pytest.mark.parametrize("n", [600])
def test_drawn_tokens_behind_repeated_drafts_have_the_distribution_of_the_target(n: int) -> None:
    """The pair (0, 1) was followed by 2: accepted with its probability, others drawn from the rest."""
    tuned, base, large = Cycle(0.0), Cycle(0.0), Cycle(1.5)
    trio = trios.Trio(black_boxes.box(large), tuned, base, None, 6, frozenset())  # type: ignore[arg-type]
    own = Settings(alpha=1.0, max_tokens=3, temperature=1.0)
    rows = [decode(trio, [[0, 1, 2, 3, 0]], [replace(own, seed=seed)], speculate=2)[0].tokens for seed in range(n)]
    behind = torch.tensor([[first, second] for first, second, _ in rows])
    for token in range(6):
        followed = behind[behind[:, 0] == token, 1]
        if len(followed) > 60:
            expected = large.table[token].softmax(dim=-1)
            seen = torch.bincount(followed, minlength=6) / len(followed)
            noise = float((expected * (1 - expected) / len(followed)).sqrt().sum()) / 2
            assert float((seen - expected).abs().sum()) / 2 < 2 * noise
    assert Counter(first for first, *_ in rows)[1] > n / 4


@pytest.mark.parametrize(("ends", "vocab"), [({4}, 6), (set(), 4)], ids=["end", "unknown"])
def test_neither_an_end_token_nor_an_unknown_one_is_drafted(ends: set[int], vocab: int) -> None:
    """The prompt's own continuation has 4, at which an answer ends or which not all models have."""
    tuned, base, large = Cycle(0.1), Cycle(0.0), Cycle(9.0)
    trio = trios.Trio(black_boxes.box(large), tuned, base, None, vocab, frozenset(ends))  # type: ignore[arg-type]
    prompt, settings = [1, 2, 3, 4, 5, 0, 1, 2], [Settings(alpha=1.0, max_tokens=4 if ends else 1)]
    plain, drafted = decode(trio, [prompt], settings), decode(trio, [prompt], settings, speculate=3)
    assert plain[0].tokens == drafted[0].tokens == (3,) and plain[0].finish == drafted[0].finish
