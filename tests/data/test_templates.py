"""Templates and label words: what they may be, what known data sets have, and rows as tokens in a template."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import small
import tiny_lm
from fedpeft.core.errors import DataError
from fedpeft.core.examples import Examples
from fedpeft.data.tasks import Table, TaskSpec, load_task
from fedpeft.data.templates import Template, known, parse, template_problems
from fedpeft.data.tokens import tokenise
from fedpeft.data.words import answer_ids, word_ids

DATA = Path(os.environ.get("FEDPEFT_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")
ONE, TWO, FIRST = "{text} . It was <mask> .", "{a} ? <mask> , {b}", "<mask> : {text}"


def table(texts: list[str], pairs: list[str] | None = None) -> Table:
    return Table(tuple(texts), None if pairs is None else tuple(pairs), np.arange(len(texts)))


def filled(template: str, text: str, pair: str = "", mask: str = "") -> str:
    """A template filled in the plain way; only for texts without fields in them."""
    for field, value in (("{text}", text), ("{a}", text), ("{b}", pair), ("{text_pair}", pair), ("<mask>", mask)):
        template = template.replace(field, value)
    return template


# --- templates --------------------------------------------------------------------------------------------------


@given(st.text(max_size=20), st.text(max_size=20))
def test_a_row_is_filled_in_as_it_stands(text: str, pair: str) -> None:
    """Fields in a row's texts are text, and the spans hold the texts."""
    row = parse(TWO).render(text + "{b}<mask>", pair + "{text}", "[M]")
    assert row.text == text + "{b}<mask> ? [M] , " + pair + "{text}"
    assert [row.text[a:b] for a, b in row.spans] == [text + "{b}<mask>", pair + "{text}"]
    assert row.mask is not None and row.text[row.mask : row.mask + 3] == "[M]"


def test_fields_have_two_names() -> None:
    assert parse("{a}{text_pair} {label}") == parse("{text}{b} %s") == Template(("{text}", "{b}", " ", "%s"))


@pytest.mark.parametrize(
    ("template", "before", "blank", "rest"),
    [
        ("{text} It was %s .", ("{text}", " It was"), " ", " ."),
        ("{text} {label}", ("{text}",), " ", ""),
        ("{text}(%s)", ("{text}", "("), "", ")"),
        ("{text}%s", ("{text}",), "", ""),
    ],
)
def test_the_answer_takes_the_blank_before_it(template: str, before: tuple[str, ...], blank: str, rest: str) -> None:
    assert parse(template).split() == (Template(before), blank, rest)


@pytest.mark.parametrize(
    ("format", "template", "words", "problem"),
    [
        ("guess", None, None, "task.format 'guess' does not exist; there are: head, cloze, verbalizer"),
        (
            "head",
            ONE,
            None,
            "task.template belongs to the formats cloze, verbalizer and generate, and task.format is head",
        ),
        ("head", None, ["a", "b"], "task.label_words belongs to the formats"),
        ("cloze", "{text} .", None, "has 0 times <mask>; format cloze needs it once"),
        ("cloze", "<mask> {text} <mask>", None, "has 2 times <mask>"),
        ("cloze", "{text} <mask> %s", None, "has %s, which format cloze does not know; write <mask>"),
        ("verbalizer", "{text} <mask> %s", None, "has <mask>, which format verbalizer does not know; write %s"),
        ("verbalizer", "%s : {text}", None, "has a text behind %s; in the format verbalizer texts come before"),
        ("cloze", "{sentence} <mask>", None, "names {sentence}; its fields are {text}, {a} and {b}, <mask> (cloze)"),
        ("cloze", "It was <mask> .", None, "needs {text} (or {a}) once, and {b} at most once"),
        ("cloze", "{text} <mask> {a}", None, "needs {text} (or {a}) once"),
        ("cloze", ONE, ["a", " "], "task.label_words is ['a', ' ']; give a different word for each label"),
        ("cloze", ONE, ["a", "a "], "task.label_words is ['a', 'a ']; give a different word"),
    ],
)
def test_problem_of_a_template(format: str, template: str | None, words: list[str] | None, problem: str) -> None:
    assert any(problem in found for found in template_problems(format, template, words))


def test_nothing_is_wrong_with_what_is_shipped_and_all_problems_come_at_once() -> None:
    for format in ("cloze", "verbalizer"):
        for pairs in (False, True):
            assert template_problems(format, known(format, ["trec", "own"], ["a"], pairs)[0], None) == []
    assert template_problems("cloze", TWO, ["No", "Yes"]) == template_problems("head", None, None) == []
    assert len(template_problems("cloze", "{x} %s", ["a", "a"])) == 5


def test_what_the_loss_is_over_is_a_matter_of_cloze() -> None:
    assert template_problems("cloze", None, None, "labels") == []
    (verbalizer,) = template_problems("verbalizer", None, None, "labels")
    assert verbalizer == "task.loss_over: labels belongs to the format cloze, and task.format is verbalizer"
    (unknown,) = template_problems("cloze", None, None, "words")
    assert unknown == "task.loss_over 'words' does not exist; there are: vocabulary, labels"
    assert len(TaskSpec(name="demo", format="cloze", template="{text}", label_words=["a", "a"]).problems()) == 2


# --- what a task takes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "labels", "words"),
    [
        ("sst2", ["negative", "positive"], ("terrible", "great")),
        ("mr", ["0", "1"], ("terrible", "great")),
        ("cola", ["unacceptable", "acceptable"], ("unacceptable", "acceptable")),
        ("trec", ["NUM", "DESC"], ("Number", "Description")),
        ("subj", ["0", "1"], ("subjective", "objective")),
        ("demo", ["files", "tooling"], ("files", "debug")),
    ],
)
def test_words_of_single_texts_by_label(name: str, labels: list[str], words: tuple[str, ...]) -> None:
    assert known("cloze", ["folder", name], labels, False) == (FIRST if name in ("trec", "demo") else ONE, words)
    assert known("verbalizer", [name], labels, False) == ("{text} It was %s .", words)


def test_words_of_pairs_by_label_and_what_is_not_known() -> None:
    assert known("cloze", ["rte"], ["entailment", "not_entailment"], True) == (TWO, ("Yes", "No"))
    assert known("cloze", ["MRPC"], ["not_equivalent", "equivalent"], True) == (TWO, ("No", "Yes"))
    assert known("verbalizer", ["boolq"], ["0", "1"], True) == ("{a} {b} They are %s .", ("No", "Yes"))
    assert known("cloze", ["rte"], ["yes", "maybe"], True) == (TWO, None)


def test_a_task_with_a_template(tmp_path: Path) -> None:
    folder = tmp_path / "sst2"
    folder.mkdir()
    rows = [{"text": "t", "label": v} for v in ("positive", "negative", "mixed")]
    path = str(small.write_rows(folder / "train.jsonl", rows))
    assert load_task(TaskSpec(train=path)).pattern is None
    own = load_task(TaskSpec(train=path, format="cloze"))
    assert (own.template, own.words, own.named) == (ONE, ("mixed", "negative", "positive"), True)
    two = load_task(TaskSpec(train=path, format="cloze", classes=["positive", "negative"]))
    assert (two.words, two.named) == (("terrible", "great"), False)
    said = load_task(TaskSpec(train=path, format="verbalizer", template="{text} : %s", label_words=["x", "y", "z "]))
    assert (said.template, said.words, said.pattern) == ("{text} : %s", ("x", "y", "z"), parse("{text} : %s"))
    with pytest.raises(
        DataError, match=r"task.label_words has 2 words; give one for each of mixed, negative, positive"
    ):
        load_task(TaskSpec(train=path, format="cloze", label_words=["x", "y"]))
    with pytest.raises(DataError, match=r"has \{b\}, and rows have one text; change the template, or task.text"):
        load_task(TaskSpec(train=path, format="cloze", template=TWO))
    pairs = str(small.write_rows(folder / "p.jsonl", small.rows(6, "p", pairs=True)))
    assert load_task(TaskSpec(train=pairs, format="cloze")).template == TWO
    with pytest.raises(DataError, match=r"has no \{b\}, and rows have two texts"):
        load_task(TaskSpec(train=pairs, format="cloze", template=ONE))


@pytest.mark.parametrize("name", ["cola", "mr", "mrpc", "rte", "sst2", "trec"])
def test_known_data_sets_as_their_own_files_describe_them(name: str) -> None:
    """The experiments' data came with their template and words."""
    path = DATA / name / "meta.json"
    if not path.is_file():
        pytest.skip(f"no data at {path.parent}")
    meta = json.loads(path.read_text())
    template, words = known("cloze", [name], meta["labels"], "sentence1" in meta["template"])
    theirs = meta["template"].replace("{mask}", "<mask>").replace("{sentence1}", "{a}").replace("{sentence2}", "{b}")
    assert (template, words) == (theirs, tuple(meta["label_words"]))


# --- words ------------------------------------------------------------------------------------------------------


def test_words_are_one_token_behind_a_blank() -> None:
    words, joined = tiny_lm.word_tokenizer(), tiny_lm.byte_tokenizer("roberta")
    assert word_ids(["good", "Bad"], words) == tuple(words.convert_tokens_to_ids(["good", "bad"]))
    assert word_ids(["good", "bad"], joined) == tuple(joined.convert_tokens_to_ids(["Ġgood", "Ġbad"]))


@pytest.mark.parametrize(
    ("words", "given_", "message"),
    [
        (
            ["goodish", "bad"],
            True,
            r"^label word ' goodish' has two tokens \('good', '##ish'\); choose another in task",
        ),
        (["bad", "great"], True, r"label word ' great' is not in the model's vocabulary; choose another"),
        (["good", "Good"], True, r"label word ' Good' is the same token as 'good'"),
        (
            ["goodish", "bad"],
            False,
            r"label 'goodish' has two tokens .* give task.label_words, .* order: goodish, bad$",
        ),
    ],
)
def test_a_word_that_cannot_be_used(words: list[str], given_: bool, message: str) -> None:
    with pytest.raises(DataError, match=message):
        word_ids(words, tiny_lm.word_tokenizer(), given=given_)


def test_an_answer_is_what_follows_the_context() -> None:
    """Context and answer together are the tokens of the whole sentence."""
    tokenizer = tiny_lm.byte_tokenizer()
    template = parse("{text} It was %s .")
    answers = answer_ids(["good", "goodish", "odd film"], template, tokenizer, 0)
    context = tokenizer("once upon It was")["input_ids"]
    for word, answer in zip(["good", "goodish", "odd film"], answers, strict=True):
        assert [*context, *answer] == [*tokenizer(f"once upon It was {word} .")["input_ids"], 0]
    assert len(answers[0]) < len(answers[1])
    with pytest.raises(DataError, match="label words 'a' and 'a' are the same tokens"):
        answer_ids(["a", "a"], template, tokenizer, 0)
    with pytest.raises(DataError, match=r"put a blank before %s in task.template"):
        answer_ids(["ood", "bad"], parse("{text} g%s"), tokenizer, 0)


# --- tokens -----------------------------------------------------------------------------------------------------

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "words": tiny_lm.word_tokenizer,
    "roberta": lambda: tiny_lm.byte_tokenizer("roberta"),
}
LONG = "once upon a time it was a film , they are good"


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [ONE, FIRST])
def test_rows_that_fit_are_the_filled_template(kind: str, template: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    texts = ["once upon a time", "a", "", f"a {tokenizer.mask_token} film"]
    found = tokenise(table(texts), tokenizer, 40, tmp_path, parse(template))
    assert found.marks is not None and found.marks.dtype == np.int64 and found.segments is None
    for text, tokens, mark in zip(texts, found.tokens, found.marks, strict=True):
        assert tokens.tolist() == tokenizer(filled(template, text, mask=tokenizer.mask_token))["input_ids"]
        assert tokens[mark] == tokenizer.mask_token_id
    both = np.flatnonzero(found.tokens[3] == tokenizer.mask_token_id)
    assert len(both) == 2 and found.marks[3] == (both[1] if template == ONE else both[0])


@pytest.mark.parametrize("blanks", [1, 3])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [ONE, FIRST])
def test_the_text_is_cut_and_never_the_template(blanks: int, kind: str, template: str, tmp_path: Path) -> None:
    tokenizer, text = TOKENIZERS[kind](), LONG.replace(" ", " " * blanks)
    fixed = len(tokenise(table(["a"]), tokenizer, 40, tmp_path, parse(template)).tokens[0]) - 1
    whole = tokenizer(filled(template, text, mask=tokenizer.mask_token))["input_ids"]
    start = 1 if template == ONE else fixed - 1  # behind <s>, or behind the template
    for room in range(1, 14):
        found = tokenise(table([text]), tokenizer, fixed + room, tmp_path, parse(template))
        tokens = found.tokens[0].tolist()
        assert len(tokens) == min(fixed + room, len(whole)) and found.marks is not None
        assert tokens[found.marks[0]] == tokenizer.mask_token_id
        kept = tokens[start : start + room]
        assert kept == whole[start : start + room]
        rest = tokens[:start] + tokens[start + room :]
        assert rest == whole[:start] + whole[len(whole) - len(rest) + start :]


def test_of_a_pair_the_longer_text_is_cut_first(tmp_path: Path) -> None:
    tokenizer = tiny_lm.word_tokenizer()
    found = tokenise(table(["once upon a time", "a"], ["good", "bad odd film"]), tokenizer, 9, tmp_path, parse(TWO))
    expected = ["once upon a ? [MASK] , good", "a ? [MASK] , bad odd film"]
    assert [t.tolist() for t in found.tokens] == [tokenizer(text)["input_ids"] for text in expected]
    assert found.marks is not None and found.marks.tolist() == [5, 3]


def test_a_literal_mask_that_is_cut_or_kept_is_not_the_labels(tmp_path: Path) -> None:
    tokenizer = tiny_lm.word_tokenizer()
    texts = ["[MASK] [MASK] a b c d e f", "a b c d e f [MASK]"]
    found = tokenise(table(texts), tokenizer, 9, tmp_path, parse(ONE))
    assert found.marks is not None and found.marks.tolist() == [6, 6]
    assert [int((t == tokenizer.mask_token_id).sum()) for t in found.tokens] == [3, 1]


def test_a_template_that_leaves_no_room(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"leaves 7 tokens for a row, and the template takes 7 .*; use at least 1 more"):
        tokenise(table([LONG]), tiny_lm.word_tokenizer(), 7, tmp_path, parse(ONE))
    assert len(tokenise(table([LONG]), tiny_lm.word_tokenizer(), 8, tmp_path, parse(ONE)).tokens[0]) == 8


def test_a_context_has_no_end_token_and_leaves_room_for_the_answer(tmp_path: Path) -> None:
    for frame in ("gpt2", "roberta"):  # RoBERTa's frame ends with </s>
        tokenizer = tiny_lm.byte_tokenizer(frame)
        context = parse("{text} It was %s .").split()[0]
        found = tokenise(table(["once upon", LONG]), tokenizer, 16, tmp_path, context, reserve=3)
        ids = tokenizer("once upon It was")["input_ids"]
        assert found.tokens[0].tolist() == (ids[:-1] if frame == "roberta" else ids) and found.marks is None
        assert len(found.tokens[1]) == 13
        assert found.tokens[1].tolist()[-4:] == found.tokens[0].tolist()[-4:]  # Ġ I t Ġwas


def test_the_cache_knows_the_template(tmp_path: Path) -> None:
    tokenizer, rows = tiny_lm.word_tokenizer(), table(["once upon", "a film"])
    plain = tokenise(rows, tokenizer, 12, tmp_path)
    one = tokenise(rows, tokenizer, 12, tmp_path, parse(ONE))
    other = tokenise(rows, tokenizer, 12, tmp_path, parse(FIRST))
    assert len(list(tmp_path.iterdir())) == 3
    again = tokenise(rows, tokenizer, 12, tmp_path, parse(ONE))
    assert [t.tolist() for t in again.tokens] == [t.tolist() for t in one.tokens] and again.marks is not None
    assert one.marks is not None and again.marks.tolist() == one.marks.tolist() == [6, 6]
    assert plain.marks is None and other.marks is not None and other.marks.tolist() == [1, 1]


def test_a_damaged_mark_is_made_anew(tmp_path: Path) -> None:
    tokenizer, rows = tiny_lm.word_tokenizer(), table(["once upon", "a film"])
    tokenise(rows, tokenizer, 12, tmp_path, parse(ONE))
    path = next(tmp_path.iterdir())
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **(arrays | {"marks": np.array([99, 0])}))
    found = tokenise(rows, tokenizer, 12, tmp_path, parse(ONE))
    assert found.marks is not None and found.marks.tolist() == [6, 6]


def test_a_part_of_the_rows_has_its_own_marks() -> None:
    tokens = tuple(np.arange(5, dtype=np.int32) for _ in range(3))
    rows = Examples(tokens, np.arange(3), None, np.array([4, 2, 1]))
    part = rows.take([2, 0])
    assert part.marks is not None and part.marks.tolist() == [1, 4] and rows.take([]).marks is not None
    assert Examples(tokens, np.arange(3)).take([1]).marks is None
