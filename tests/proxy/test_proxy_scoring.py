"""Given texts under combined models: sums token by token, choices, and the curve over alpha, against transformers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import black_boxes
import trios
from fedpeft.core.errors import RequestError
from fedpeft.models.merge import merge
from fedpeft.proxy.blackbox import CannotDo
from fedpeft.proxy.decode import Trio
from fedpeft.proxy.expert import Expert
from fedpeft.proxy.scoring import GRID, AlphaCurve, alpha_curve, choose_continuation, score


@pytest.fixture(scope="module")
def wholes() -> list[Any]:
    """The models of `trios.trio` as transformers has them: large, tuned, base."""
    small = trios.model("gpt2", 1)
    tuned = merge(small, trios.adapter(small, 3), ()).eval()
    return [trios.whole("llama", 2, 3), tuned, trios.whole("gpt2", 1)]


def texts(seed: int, n: int = 6) -> tuple[list[list[int]], list[int]]:
    """With where their scored parts begin: one token, a few, all but the first."""
    own = [[3, 4, *text] for text in trios.prompts(seed, n, 20)]
    return own, [1 if i % 3 == 0 else max(1, len(text) - 1 - 2 * (i % 3)) for i, text in enumerate(own)]


def each(wholes: list[Any], ids: list[int], start: int) -> list[Tensor]:
    """(n, V) of each model, behind the tokens before the scored ones."""
    return [trios.plain_logits(full, ids)[start - 1 : -1] for full in wholes]


def sums(z: Tensor, ids: list[int], start: int) -> float:
    """The log-probability of the scored part, token by token."""
    return sum(float(z[k].log_softmax(dim=-1)[token]) for k, token in enumerate(ids[start:]))


# --- texts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caps", [{}, {"max_batch": 2}, {"max_context": 24}], ids=str)
def test_scores_of_texts_are_explicit_sums(wholes: list[Any], caps: dict[str, int]) -> None:
    trio = trios.trio("gpt2")
    trio = replace(trio, large=black_boxes.box(trio.large.speaker, **caps))  # type: ignore[union-attr]
    sequences, starts = texts(0)
    for own, ids, start in zip(score(trio, sequences, starts, 0.7, n_top=3), sequences, starts, strict=True):
        large, tuned, base = each(wholes, ids, start)
        z = large + 0.7 * (tuned - base)
        assert own.total == pytest.approx(sums(z, ids, start), abs=1e-3) and len(own.logprobs) == len(ids) - start
        best = z.log_softmax(dim=-1).topk(3, dim=-1)
        for told, values, tokens in zip(own.top, best.values.tolist(), best.indices.tolist(), strict=True):
            assert [t for t, _ in told] == tokens and [v for _, v in told] == pytest.approx(values, abs=1e-3)
    assert trio.large.open_sessions == 0  # type: ignore[union-attr]


def test_models_alone_score_texts_too(wholes: list[Any]) -> None:
    trio, (sequences, starts) = trios.trio("gpt2"), texts(1)
    for k, alone in enumerate((replace(trio, tuned=None, base=None), replace(trio, large=None, base=None))):
        for own, ids, start in zip(score(alone, sequences, starts), sequences, starts, strict=True):
            assert own.total == pytest.approx(sums(each(wholes, ids, start)[k], ids, start), abs=1e-4)


def test_the_tuned_model_may_read_other_prompts(wholes: list[Any]) -> None:
    trio, (sequences, starts) = trios.trio("gpt2"), texts(2)
    framed = [[1, 7, *ids[:start], 8] for ids, start in zip(sequences, starts, strict=True)]
    found = score(replace(trio, expert=Expert((1, 7), (8,))), sequences, starts, 1.0)
    for own, ids, start, frame in zip(found, sequences, starts, framed, strict=True):
        large, _, base = each(wholes, ids, start)
        tuned = trios.plain_logits(wholes[1], [*frame, *ids[start:]])[len(frame) - 1 : -1]
        assert own.total == pytest.approx(sums(large + tuned - base, ids, start), abs=1e-3)


def test_a_large_model_is_asked_in_batches_of_like_length() -> None:
    trio, (sequences, starts) = trios.trio("gpt2"), texts(3, 12)
    box = black_boxes.box(trio.large.speaker, max_batch=4)  # type: ignore[union-attr]
    score(replace(trio, large=box), sequences, starts, 1.0)
    lengths = sorted(len(ids) - start for ids, start in zip(sequences, starts, strict=True))
    assert all(rows <= 4 for rows, _ in box.calls)
    assert [width + 1 for _, width in box.calls] == [own for own in lengths[3::4] if own > 1]


# --- choices ----------------------------------------------------------------------------------------------------


def test_labels_are_chosen_without_the_other_scores(wholes: list[Any]) -> None:
    """The same argmax as over the whole vocabulary, and the same differences; a backend of few scores will do."""
    trio = trios.trio("gpt2")
    poor = replace(trio, large=black_boxes.box(trio.large.speaker, full=False, top_k=5, block=False))  # type: ignore[union-attr]
    for prompt in trios.prompts(4, 8):
        labels = [[9], [20], [11], [41]]
        found = choose_continuation(poor, prompt, labels, 0.8)
        large, tuned, base = (trios.plain_logits(full, prompt)[-1] for full in wholes)
        z = (large + 0.8 * (tuned - base)).log_softmax(dim=-1)
        expected = [float(z[own]) for (own,) in labels]
        assert found.best == max(range(4), key=lambda i: expected[i])
        assert [own - found.scores[0] for own in found.scores] == pytest.approx(
            [own - expected[0] for own in expected], abs=1e-3
        )
        alone = choose_continuation(replace(trio, large=None, base=None), prompt, labels)
        assert alone.best == max(range(4), key=lambda i: float(tuned[labels[i][0]]))


def test_continuations_of_several_tokens(wholes: list[Any]) -> None:
    tokenizer = trios.byte_tokenizer()
    trio = trios.trio("gpt2", tokenizer=tokenizer)
    prompt, options = [7, 9, 12], [[20, 21], [30], [31, 33, 40, 50]]
    total = []
    for option in options:
        ids = [*prompt, *option]
        large, tuned, base = each(wholes, ids, 3)
        total.append(sums(large + tuned - base, ids, 3))
    bare = []
    for option in options:
        large, tuned, base = each(wholes, [1, *option], 1)
        bare.append(sums(large + tuned - base, [1, *option], 1))
    sizes = [len(tokenizer.decode(option).encode()) for option in options]
    ways = {
        "sum": total,
        "tokens": [own / len(option) for own, option in zip(total, options, strict=True)],
        "bytes": [own / size for own, size in zip(total, sizes, strict=True)],
        "prior": [own - other for own, other in zip(total, bare, strict=True)],
    }
    for way, expected in ways.items():
        found = choose_continuation(trio, prompt, options, 1.0, way, empty=[1])  # type: ignore[arg-type]
        assert found.scores == pytest.approx(expected, abs=1e-3) and found.best == expected.index(max(expected))
    assert choose_continuation(trio, prompt, [[30], [30]], 1.0).best == 0, "the first on ties"


# --- the curve --------------------------------------------------------------------------------------------------


def test_one_pass_is_a_pass_for_each_alpha(wholes: list[Any]) -> None:
    trio, (sequences, starts) = trios.trio("gpt2"), texts(5, 9)
    curve = alpha_curve(trio, sequences, starts)
    assert curve.tokens == sum(len(ids) - start for ids, start in zip(sequences, starts, strict=True))
    assert tuple(curve.nll)[: len(GRID)] == GRID
    for alpha, nll in curve.nll.items():
        parts = [own.total for own in score(trio, sequences, starts, alpha)]
        assert nll == pytest.approx(-sum(parts) / curve.tokens, abs=1e-5)
    z = [each(wholes, ids, start) for ids, start in zip(sequences, starts, strict=True)]
    for k, alone in ((0, curve.base_large), (1, curve.tuned_small), (2, curve.base_small)):
        whole = [sums(own[k], ids, start) for own, ids, start in zip(z, sequences, starts, strict=True)]
        assert alone == pytest.approx(-sum(whole) / curve.tokens, abs=1e-4)
    assert curve.nll[0.0] == curve.base_large
    own_grid = alpha_curve(trio, sequences, starts, (0.5, 3.0))
    assert tuple(own_grid.nll) == (0.0, 0.5, 3.0) and own_grid.nll[0.5] == pytest.approx(curve.nll[0.5])


def test_the_end_of_the_grid_is_looked_beyond() -> None:
    """L = B, and T moves a little towards the texts: more of it is better, so 3 and 4 are looked at."""
    trio = trios.trio("gpt2")
    assert trio.base is not None
    sequences, starts = texts(6)
    up = _towards(trio, sequences, starts)
    curve = alpha_curve(up, sequences, starts)
    assert tuple(curve.nll) == (*GRID, 3.0, 4.0) and curve.best > 2 and curve.advice is None
    assert curve.best_of(3)[0] == curve.best and len(curve.best_of(3)) == 3
    worse = alpha_curve(replace(up, tuned=up.base, base=up.tuned), sequences, starts)
    assert tuple(worse.nll) == GRID and worse.best == 0.0


def _towards(trio: Trio, sequences: list[list[int]], starts: list[int]) -> Trio:
    """T after one small gradient step on the texts; L and B are what it was before."""
    import numpy as np

    from fedpeft.core.examples import Examples
    from fedpeft.core.fit import SGD, Fit
    from fedpeft.models.sessions import Speaker

    of = trios.model("gpt2", 1)
    start = trios.adapter(of, 3)
    tokens = tuple(np.asarray(ids, np.int32) for ids in sequences)
    data = Examples(tokens, np.zeros(len(tokens), np.int64), starts=np.asarray(starts))
    after = of.fit(Fit(start, data, [list(range(len(tokens)))], SGD(0.003))).params
    before = Speaker(of, start)
    return replace(trio, large=black_boxes.box(before), tuned=Speaker(of, after), base=before)


def test_what_the_curve_advises() -> None:
    def curve(nll: dict[float, float], tuned: float) -> AlphaCurve:
        return AlphaCurve(nll, nll[0.0], tuned, 9.0, 1)

    assert curve({0.0: 3.0, 0.5: 2.0, 1.0: 2.0}, 4.0).best == 0.5, "the smaller on ties"
    assert curve({0.0: 3.0, 0.5: 2.0}, 4.0).advice is None
    assert "does not help" in str(curve({0.0: 3.0, 0.5: 3.0}, 4.0).advice)
    assert "serve it alone" in str(curve({0.0: 3.0, 0.5: 2.0}, 1.9).advice)


# --- what is refused --------------------------------------------------------------------------------------------


def test_what_cannot_be_scored() -> None:
    trio = trios.trio("gpt2")
    for sequences, starts, words in (
        ([[3, 4]], [0], "scored from 0 on; use 1 to 1"),
        ([[3, 4]], [2], "scored from 2 on"),
        ([[3, 4]], [1, 1], "1 texts came with 2 starts"),
        ([[3, 60]], [1], "token 60 does not exist"),
        ([[3] * 65], [1], "65 tokens"),
    ):
        with pytest.raises(RequestError, match=words):
            score(trio, sequences, starts, 1.0)
    for alpha in (None, math.nan):
        with pytest.raises(RequestError, match="alpha is"):
            score(trio, [[3, 4]], [1], alpha)
        with pytest.raises(RequestError, match="alpha is"):
            choose_continuation(trio, [3], [[4], [5]], alpha)
    with pytest.raises(RequestError, match="compares three models"):
        alpha_curve(replace(trio, tuned=None, base=None), [[3, 4]], [1])
    with pytest.raises(RequestError, match="0 texts"):
        alpha_curve(trio, [], [])
    for options, how, words in (
        ([], {}, "0 options"),
        ([[4], []], {}, "some without tokens"),
        ([[4], [60]], {}, "not all among 60"),
        ([[4], [5]], {"normalise": "prior"}, "an empty prompt"),
        ([[4], [5]], {"normalise": "mean"}, "normalise is 'mean'; use one of sum, tokens, bytes, prior"),
    ):
        with pytest.raises(RequestError, match=words):
            choose_continuation(trio, [3], options, 1.0, **how)  # type: ignore[arg-type]
    speaker = trio.large.speaker  # type: ignore[union-attr]
    poor = replace(trio, large=black_boxes.box(speaker, full=False, top_k=20))
    with pytest.raises(CannotDo, match="gives the 20 likeliest"):
        alpha_curve(poor, [[3, 4]], [1])
    single = replace(trio, large=black_boxes.box(speaker, block=False))
    with pytest.raises(CannotDo, match="one position a call"):
        score(single, [[3, 4, 5]], [1], 1.0)
    assert len(score(single, [[3, 4, 5]], [2], 1.0)[0].logprobs) == 1, "one token needs no block"
    assert torch.isfinite(torch.tensor(score(single, [[3, 4, 5]], [2], 1.0)[0].total))
