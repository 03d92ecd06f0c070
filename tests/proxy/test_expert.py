"""What the tuned small model alone reads around a prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tiny_lm
from fedpeft.core.errors import RequestError
from fedpeft.core.examples import Examples
from fedpeft.proxy.expert import Expert, expert_of

PLAIN = tiny_lm.byte_tokenizer()


class Framing:
    """A tokenizer of characters that puts 1 in front of a text; it may have a chat template."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        lead = [1] if add_special_tokens else []
        return {"input_ids": lead + list(map(ord, text)), "special_tokens_mask": [1] * len(lead) + [0] * len(text)}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return f"<{messages[0]['role']}>{messages[0]['content']}<assistant>"


def codes(text: str) -> list[int]:
    return list(map(ord, text))


@pytest.mark.parametrize(
    ("text", "read"),
    [("Be brief. ", "Be brief. hi"), ("<{prompt}>", "<hi>"), ("{prompt} ?", "hi ?"), ("chat me: ", "chat me: hi")],
)
def test_a_text_stands_behind_what_begins_every_text(text: str, read: str) -> None:
    found = expert_of(text, Framing())
    assert found is not None
    assert found.around([1, *codes("hi")]) == [1, *codes(read)]
    assert found.around(codes("hi")) == codes(read), "a prompt without it stays without"
    assert found.around([1]) == [1, *codes(read.replace("hi", ""))]


def test_chat_is_the_tokenizers_template_which_begins_texts_in_its_own_way() -> None:
    found = expert_of("chat", Framing("yes"))
    assert found is not None and found.around([1, *codes("hi")]) == codes("<user>hi<assistant>")


def test_none_and_an_empty_text_are_nothing() -> None:
    assert expert_of(None, PLAIN) is None and expert_of("", PLAIN) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt} and {prompt}", r"has \{prompt\} 2 times; give a text with \{prompt\} at most once, or chat"),
        ("{prompt}", r"'\{prompt\}' gives no token"),
        ("chat", "has no chat template; write a text"),
    ],
)
def test_what_is_no_expert_prompt(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        expert_of(text, PLAIN)


def test_rows_keep_their_answers_behind_it() -> None:
    rows = (np.asarray([1, 5, 6, 7], np.int32), np.asarray([1, 5], np.int32))
    data = Examples(rows, np.zeros(2, np.int64), starts=np.asarray([2, 2]))
    found = Expert((8, 8), (9,), (1,)).examples(data)
    assert [own.tolist() for own in found.tokens] == [[1, 8, 8, 5, 9, 6, 7], [1, 8, 8, 5, 9]]
    assert found.starts is not None and found.starts.tolist() == [5, 5]
