"""Text that grows token by token: whole characters, stop texts across tokens, and the same as decoding at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tiny_lm
import trios
from fedpeft.proxy.texts import Writer


def written(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """What is shown after each token, and at the end."""
    writer, shown = Writer(tokenizer, stop), []
    for token in ids:
        text, stopped = writer.add(token)
        shown.append(text)
        if stopped:
            return shown
    return [*shown, writer.flush()[0]]


def test_half_characters_wait() -> None:
    tokenizer = trios.byte_tokenizer()
    ids = tokenizer.encode("aé€!")
    assert len(ids) == 1 + 2 + 3 + 1
    assert written(tokenizer, ids) == ["a", "", "é", "", "", "€", "!", ""]
    assert written(tokenizer, ids[:5]) == ["a", "", "é", "", "", "\ufffd"], "the end shows what there is"
    broken = [ids[1], *tokenizer.encode("b")]
    assert "".join(written(tokenizer, broken)) == tokenizer.decode(broken) == "\ufffdb"


def test_stop_texts_are_found_across_tokens_and_never_shown() -> None:
    tokenizer = trios.byte_tokenizer()
    ids = tokenizer.encode("to be or not")
    assert written(tokenizer, ids, ("be o",)) == ["t", "o", " ", "", "", "", ""]
    assert written(tokenizer, ids, ("be x",)) == ["t", "o", " ", "", "", "", "be o", "r", " ", "n", "o", "t", ""]
    assert "".join(written(tokenizer, ids, ("or", " b"))) == "to"
    assert written(tokenizer, tokenizer.encode("aab"), ("ab",)) == ["", "a", ""], "it may begin within a false start"
    assert written(tokenizer, tokenizer.encode("xa"), ("ab",)) == ["x", "", "a"], "what may begin one is shown at last"
    assert written(tokenizer, tokenizer.encode("né"), ("é",)) == ["n", "", ""]


@pytest.mark.parametrize("seed", range(10))
def test_shown_text_is_all_of_the_text(seed: int) -> None:
    """Random bytes, words, and special tokens in between."""
    rng = np.random.default_rng(seed)
    for tokenizer in (trios.byte_tokenizer(["Ġthe", "Ġof", "ing"]), tiny_lm.byte_tokenizer(), tiny_lm.word_tokenizer()):
        text = "once upon é € \u65e5\u672c a time ; 123"
        ids = tokenizer.encode(text) if seed == 0 else rng.integers(0, len(tokenizer), size=60).tolist()
        expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(written(tokenizer, ids)) == expected


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert written(None, [1, 2, 3]) == ["", "", "", ""]
