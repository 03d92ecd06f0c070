"""What is refused before the first token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedpeft.core.errors import RequestError
from fedpeft.proxy.blackbox import CannotDo, Caps, Full, Labels, TopK
from fedpeft.proxy.demands import check_candidates, check_new, check_open, check_rollback, check_rows
from fedpeft.proxy.protocol import width_of

ALL = Caps("all", "f", 50, True, 50, True, 8, 4, True)
FEW = replace(ALL, identity="few", full=False, top_k=20, block=False, fingerprint=None)


def test_the_fewest_candidates():
    check_candidates("x", 5)
    with pytest.raises(CannotDo, match="decoding from 4 candidates"):
        check_candidates("x", 4)


@pytest.mark.parametrize(
    ("caps", "prompts", "want", "error", "words"),
    [
        (ALL, [], Full(), RequestError, "no tokens"),
        (ALL, [[1], []], Full(), RequestError, "no tokens"),
        (ALL, [[1]] * 5, Full(), RequestError, "5 prompts .* takes 4"),
        (ALL, [[1] * 9], Full(), RequestError, "9 tokens, and all reads 8"),
        (ALL, [[1, 50]], Full(), RequestError, "token 50 .* 0 to 49"),
        (ALL, [[-1]], Full(), RequestError, "token -1"),
        (ALL, [[1]], Labels(()), RequestError, "labels"),
        (ALL, [[1]], Labels((3, 3)), RequestError, "twice"),
        (ALL, [[1]], Labels((3, 50)), RequestError, "token 50"),
        (ALL, [[1]], TopK(4), CannotDo, "4 candidates"),
        (FEW, [[1]], TopK(21), CannotDo, "21 tokens.*gives 20"),
        (FEW, [[1]], Full(), CannotDo, "all tokens.*20 likeliest"),
    ],
)
def test_what_a_session_cannot_begin_with(caps, prompts, want, error, words):
    with pytest.raises(error, match=words):
        check_open(caps, prompts, want)


def test_what_it_can():
    check_open(ALL, [[1] * 8, [49]], Full())
    check_open(ALL, [[1]], TopK(50))
    check_open(FEW, [[1]], TopK(20))
    check_open(replace(FEW, vocab=0), [[10**6]], TopK(5))  # it does not tell its vocabulary
    check_new(ALL, [3, 5], [[1, 2, 3], [4, 5, 6]])
    check_rows([2, 0], 3)


@pytest.mark.parametrize(
    ("caps", "new", "words"),
    [
        (ALL, [[1]], "2 rows got"),
        (ALL, [[1], [1, 2]], "2 rows got"),
        (ALL, [[], []], "2 rows got"),
        (ALL, [[1] * 4] * 2, "9 tokens"),
        (ALL, [[1], [50]], "token 50"),
        (FEW, [[1, 2], [3, 4]], "one position a call"),
    ],
)
def test_what_cannot_be_appended(caps, new, words):
    with pytest.raises(RequestError, match=words):
        check_new(caps, [3, 5], new)


@pytest.mark.parametrize("rows", [[3], [0, 0], [-1]])
def test_rows_that_are_not_there_cannot_be_kept(rows):
    with pytest.raises(RequestError, match="cannot be kept of 3"):
        check_rows(rows, 3)


def test_what_was_not_added_to_every_row_cannot_be_taken_back():
    check_rollback([5, 9], [3, 4], 2)
    check_rollback([], [], 0)
    for n in (3, -1):
        with pytest.raises(RequestError, match=f"{n} tokens cannot be taken back: 2 were added"):
            check_rollback([5, 9], [3, 4], n)


def test_a_want_has_a_width():
    assert [width_of(want) for want in (Full(), TopK(7), Labels((3, 1)))] == [None, 7, 2]
