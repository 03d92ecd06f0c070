"""Rows of instruction, context and response, and their tokens: what is cut, what is learnt, what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small
import tiny_lm
from fedpeft.core.errors import DataError
from fedpeft.core.examples import Examples
from fedpeft.data.answers import ALPACA, ALPACA_CONTEXT, Prompting, cut_answers
from fedpeft.data.instructions import listed, read_public, references_of
from fedpeft.data.partition import PartitionSpec, partition
from fedpeft.data.sources import from_files
from fedpeft.data.tasks import Task, TaskSpec, load_task, read_texts
from fedpeft.data.templates import template_problems

TOKENIZER = tiny_lm.byte_tokenizer()  # <|endoftext|> is 0; words with their blank are one token, others their letters
END = 0
PLAIN = "Q {instruction} C {context} A"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"  # always asks for an answer


def spec(path: Path, rows: list[dict[str, Any]], **more: Any) -> TaskSpec:
    return TaskSpec(train=str(small.write_rows(path / "train.jsonl", rows)), format="generate", **more)


def row(i: int = 0, **more: Any) -> dict[str, Any]:
    return {"instruction": f"say {i}", "context": "it was good", "response": "a film", "category": "ab"[i % 2]} | more


def prompting(length: int = 200, template: str | None = PLAIN, **more: Any) -> Prompting:
    return Prompting(TOKENIZER, END, length, template, **more)


def texts(data: Examples, i: int = 0) -> tuple[str, str]:
    """A row's prompt and answer as text."""
    assert data.starts is not None
    ids, start = data.tokens[i].tolist(), int(data.starts[i])
    return TOKENIZER.decode(ids[:start]), TOKENIZER.decode(ids[start:])


# --- tables -----------------------------------------------------------------------------------------------------


def test_columns_are_found_and_categories_are_labels(tmp_path: Path) -> None:
    task = load_task(spec(tmp_path, [row(0), row(1, context=None), {**row(2), "category": ""}]))
    assert (task.text, task.text_pair, task.response, task.metric) == (
        "instruction",
        "context",
        "response",
        "perplexity",
    )
    assert task.labels == ("a", "b", "none") and task.train.labels.tolist() == [0, 1, 2]
    assert task.train.responses == ("a film",) * 3 and task.train.pairs == ("it was good", "", "it was good")
    named = spec(tmp_path, [{"ask": "x", "say": "y", "to": 1}], text="ask", response="say", label="to")
    task = load_task(named)
    assert (task.text, task.text_pair, task.response, task.labels) == ("ask", None, "say", ("1",))
    plain = load_task(spec(tmp_path, [{"speaker": "A", "text": "once"}]))
    assert (plain.text, plain.response, plain.train.responses, plain.labels) == ("text", None, None, ("none",))
    both = load_task(spec(tmp_path, [{"text": "q", "response": "r"}]))
    assert (both.text, both.response) == ("text", "response")


def test_responses_are_part_of_the_hash_and_follow_their_rows(tmp_path: Path) -> None:
    one, other = (load_task(spec(tmp_path, [row(0), row(1, response=r)])) for r in ("yes", "no"))
    assert one.sha256 != other.sha256
    assert other.train.take([1]).responses == ("no",)


def test_csv_holds_lists_as_json(tmp_path: Path) -> None:
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "response", "references", "choices"])
        writer.writerow(["q", "yes", json.dumps(["yes", "sure"]), json.dumps(["no", "yes"])])
    task = load_task(TaskSpec(train=str(tmp_path / "t.csv"), format="generate", metric="choice_accuracy"))
    assert references_of(task.train, "references") == [["yes", "sure"]] and references_of(task.train, "no") == [["yes"]]
    data = prompting(template=None).examples(task.train)
    assert data.choices is not None and data.choices[0] is not None and data.choices[0].right == 1
    assert [TOKENIZER.decode(t) for t in data.choices[0].tokens] == ["no<|endoftext|>", "yes<|endoftext|>"]
    assert listed("[broken") == ["[broken"] and listed(None) == [] and listed([1, "a"]) == ["1", "a"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([row()], {"response": "answer"}, "no column 'answer' .task.response.; it has: instruction"),
        ([row()], {"text": "question"}, "no column 'question' .task.text."),
        ([row()], {"labels": ["a", "b"]}, "task.labels is for labels"),
        ([row(response=3)], {}, "column 'response' is 3 and not a text"),
        ([row(choices=["x", "y"])], {}, "row 1 of .* its response is not one of its choices"),
        ([row()], {"metric": "choice_accuracy"}, "needs a column 'choices'"),
        ([row()], {"metric": "accuracy"}, "'accuracy' does not exist; there are: perplexity, choice_accuracy"),
        ([{"text": "a", "context": "b"}], {"text_pair": "context"}, "no column 'response' to go with it"),
    ],
)
def test_what_is_wrong_is_named(rows: list[Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_task(spec(tmp_path, rows, **options))


def test_problems_of_templates_and_words() -> None:
    assert template_problems("generate", None, None) == template_problems("generate", "chat", None) == []
    assert template_problems("generate", PLAIN, None) == template_problems("generate", "{context}:", None) == []
    assert "names %s" in template_problems("generate", "{instruction} %s", None)[0]
    assert "needs {instruction} or {context}" in template_problems("generate", "say", None)[0]
    assert "label_words" in template_problems("generate", None, ["a", "b"])[0]


def test_partitions_need_categories_for_dirichlet_alone(tmp_path: Path) -> None:
    many = load_task(spec(tmp_path, [row(i) for i in range(40)]))
    one = load_task(spec(tmp_path, [row(i, category="a") for i in range(40)]))
    for kind in ("iid", "quantity"):
        assert sum(map(len, partition(PartitionSpec(kind, 4), one).train.values())) == 36
    assert partition(PartitionSpec("natural", 9, by="category"), many).clients == ("000", "001")
    assert partition(PartitionSpec("dirichlet", 4), many).labels == ("a", "b")
    with pytest.raises(DataError, match=r"skews categories.*task.label, or use partition.kind quantity"):
        partition(PartitionSpec("dirichlet", 4), one)


def test_rows_to_answer_need_no_response(tmp_path: Path) -> None:
    task = load_task(spec(tmp_path, [row()]))
    table = read_texts(task, small.write_rows(tmp_path / "new.jsonl", [{"instruction": "say"}]))
    assert table.texts == ("say",) and table.pairs is None and table.responses == ("",)
    with pytest.raises(DataError, match="no column 'instruction'"):
        read_texts(task, small.write_rows(tmp_path / "new.jsonl", [{"question": "say"}]))


# --- tokens -----------------------------------------------------------------------------------------------------


def made(tmp_path: Path, *rows: dict[str, Any], **more: Any) -> Task:
    return load_task(spec(tmp_path, list(rows), **more))


def test_an_answer_is_the_response_and_the_end_token(tmp_path: Path) -> None:
    task = made(tmp_path, row(0), row(1, context=""))
    data = prompting().examples(task.train)
    assert texts(data) == ("Q say 0 C it was good A", "a film<|endoftext|>")
    assert data.tokens[0][-1] == END and cut_answers(data, END) == 0
    usual = prompting(600, None).examples(task.train)
    whole = ALPACA_CONTEXT.format(instruction="say 0", context="it was good")  # this tokenizer knows no line breaks
    assert texts(usual) == (whole.replace("\n", ""), "a film<|endoftext|>")
    assert texts(usual, 1)[0] == ALPACA.format(instruction="say 1").replace("\n", "")


def test_the_tokenizers_chat_template(tmp_path: Path) -> None:
    task, before = made(tmp_path, row(0)), TOKENIZER.chat_template
    TOKENIZER.chat_template = CHAT
    try:
        assert texts(prompting(template="chat").examples(task.train))[0] == "<user>say 0it was good<assistant>"
    finally:
        TOKENIZER.chat_template = before
    with pytest.raises(DataError, match="no chat template; write a template"):
        prompting(template="chat")


def test_the_context_is_cut_first_then_the_answer_and_never_the_template(tmp_path: Path) -> None:
    """The template takes 6 tokens ("Q", " ", " C", " ", " A": Q, blank, blank, C, ...); numbers below count tokens."""
    fixed = len(TOKENIZER("Q  C  A")["input_ids"])
    long = " it" * 50
    task = made(tmp_path, row(0, context=long, response=" was" * 4), row(1, context=long, response=" was" * 60))
    data = prompting(fixed + 40).examples(task.train)
    assert all(len(t) == fixed + 40 for t in data.tokens[1:]) and len(data.tokens[0]) <= fixed + 40
    before, answer = texts(data)
    assert before.startswith("Q say 0 C  it it") and before.endswith("it A") and answer == " was" * 4 + "<|endoftext|>"
    before, answer = texts(data, 1)
    assert before.endswith(" A") and answer == " was" * 20 and cut_answers(data, END) == 1
    # without room for any context the answer loses what is left, and the instruction stays
    short = made(tmp_path, row(0, instruction="say", context="", response=" was" * 60))
    assert texts(prompting(fixed + 20).examples(short.train))[0] == "Q say C  A"
    with pytest.raises(DataError, match=f"the template alone takes {fixed} tokens; use at least {fixed + 2}"):
        prompting(fixed + 1)


def test_prompts_leave_room_for_what_is_said(tmp_path: Path) -> None:
    fixed = len(TOKENIZER("Q  C  A")["input_ids"])
    task = made(tmp_path, row(0, context=" it" * 50), row(1))
    whole, other = prompting().prompts(task.train, 64)
    assert TOKENIZER.decode(other) == "Q say 1 C it was good A" and len(whole) > 50
    cut, same = prompting(fixed + 40).prompts(task.train, 10)
    assert len(cut) <= fixed + 30 and TOKENIZER.decode(cut).endswith("it A") and np.array_equal(same, other)
    assert len(prompting(fixed + 40).prompts(task.train, 500)[0]) <= fixed + 20  # at most half of what there is


def test_plain_text_is_learnt_but_for_its_first_token(tmp_path: Path) -> None:
    task = made(tmp_path, {"text": "it was good"}, {"text": "once" * 40})
    data = prompting(8, plain=True).examples(task.train)
    assert texts(data) == ("i", "t was good<|endoftext|>") and len(data.tokens[1]) == 8 and cut_answers(data, END) == 1
    assert [len(p) for p in prompting(8, plain=True).prompts(task.train, 2)] == [4, 6]
    with pytest.raises(DataError, match="gives no token"):
        prompting(8, plain=True).examples(made(tmp_path, {"text": ""}).train)
    with pytest.raises(DataError, match=r"task.template is for rows with a response"):
        made(tmp_path, {"text": "once"}, template=PLAIN)


def test_tokens_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    task = made(tmp_path, row(0), row(1))
    one, two = prompting().examples(task.train), prompting().examples(task.train)
    assert len(list((tmp_path / "cache").iterdir())) == 1 and one.starts is not None and two.starts is not None
    assert [t.tolist() for t in one.tokens] == [
        t.tolist() for t in two.tokens
    ] and one.starts.tolist() == two.starts.tolist()
    prompting(template="{instruction}:").examples(task.train)
    prompting().examples(replace(task.train, responses=("no", "no")))
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_public_texts_may_lack_a_response(tmp_path: Path) -> None:
    """Rows with a response are those of training; the others end with their prompt, and a row may say null."""
    tokenizer = tiny_lm.byte_tokenizer()
    own = Prompting(tokenizer, 0, 40, "{instruction} {context}")
    said = [{"instruction": "a film", "response": " good"}, {"instruction": "a time", "context": "once"}]
    said[1] |= {"response": None}  # type: ignore[dict-item]
    task = _task(tmp_path, [{**said[0], "context": "it was"}] * 2)
    table = read_public(task, from_files(str(_rows(tmp_path / "public.jsonl", said))))
    found = own.public(table)
    whole = own.examples(table.take([0]))
    assert (
        found.tokens[0].tolist() == whole.tokens[0].tolist() and found.starts is not None and whole.starts is not None
    )
    assert found.starts.tolist() == [whole.starts[0], len(found.tokens[1])]
    assert tokenizer.decode(found.tokens[1]) == "a time once"
    bare = read_public(task, from_files(str(_rows(tmp_path / "bare.jsonl", [{"instruction": "a film"}]))))
    assert own.public(bare).starts == [len(own.public(bare).tokens[0])]
    with pytest.raises(DataError, match="no public text"):
        own.public(table.take([]))
    with pytest.raises(DataError, match="no column 'instruction'"):
        read_public(task, from_files(str(_rows(tmp_path / "other.jsonl", [{"text": "a film"}]))))


def test_public_plain_texts_are_those_of_training(tmp_path: Path) -> None:
    own = Prompting(tiny_lm.byte_tokenizer(), 0, 40, plain=True)
    file = _rows(tmp_path / "plain.jsonl", [{"text": "it was a film"}, {"text": "once upon a time"}])
    task = load_task(TaskSpec(train=str(file), format="generate"))
    found = own.public(read_public(task, from_files(str(file))))
    assert found.starts is not None and found.starts.tolist() == [1, 1]
    assert [list(t) for t in found.tokens] == [list(t) for t in own.examples(task.train).tokens]
    with pytest.raises(DataError, match="no column 'text'"):
        read_public(task, from_files(str(_rows(tmp_path / "other.jsonl", [{"words": "a film"}]))))


def _rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _task(folder: Path, rows: list[dict[str, str]]) -> Any:
    return load_task(TaskSpec(train=str(_rows(folder / "train.jsonl", rows)), format="generate"))
