"""Label words as tokens: one token each in the format `cloze`, an answer of several in the format `verbalizer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedpeft.core.errors import DataError
from fedpeft.data.templates import Template

_COUNTS = {0: "no", 2: "two", 3: "three", 4: "four", 5: "five"}


def word_ids(words: Sequence[str], tokenizer: Any, given: bool = True) -> tuple[int, ...]:
    """The token of each label word, as it reads behind a blank.

    Args:
        tokenizer: of transformers.
        given: whether `task.label_words` says these words; else they are the labels' own names.

    Raises:
        DataError: a word of several tokens, one that the model does not know, or two words of the same token.
    """
    found: dict[int, str] = {}
    for word in words:
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        parts = tokenizer.convert_ids_to_tokens(ids)
        problem = ""
        if len(ids) != 1:
            shown = "(" + ", ".join(map(repr, parts)) + ")"
            problem = f"has {_COUNTS.get(len(ids), len(ids))} tokens {shown}"
        elif ids[0] == tokenizer.unk_token_id:
            problem = "is not in the model's vocabulary"
        elif ids[0] in found:
            problem = f"is the same token as {found[ids[0]]!r}"
        if problem and given:
            raise DataError(f"label word {' ' + word!r} {problem}; choose another in task.label_words")
        if problem:
            raise DataError(
                f"label {word!r} {problem}, so it cannot be its own word; give task.label_words, one word of one token "
                f"for each label, in this order: {', '.join(words)}"
            )
        found[ids[0]] = word
    return tuple(found)


def answer_ids(words: Sequence[str], template: Template, tokenizer: Any, end: int) -> tuple[tuple[int, ...], ...]:
    """The tokens of each label's answer: word, rest of the template, end token.

    They are what follows the template's own words before the answer, so that a word has its blank as in running text.

    Args:
        template: with an answer.
        end: id of the end token.

    Raises:
        DataError: the tokenizer joins the answer with what stands before it, or two words give one answer.
    """
    context, blank, rest = template.split()
    before = context.render("a", "a", "").text

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    stem = tokens(before)
    answers = []
    for word in words:
        whole = tokens(f"{before}{blank}{word}{rest}")
        if whole[: len(stem)] != stem or len(whole) == len(stem):
            raise DataError(f"the answer {word!r} has no tokens of its own; put a blank before %s in task.template")
        answers.append((*whole[len(stem) :], end))
    for i, answer in enumerate(answers):
        if answer in answers[:i]:
            raise DataError(
                f"label words {words[answers.index(answer)]!r} and {words[i]!r} are the same tokens; choose other "
                "words in task.label_words"
            )
    return tuple(answers)
