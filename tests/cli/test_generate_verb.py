"""`fedpeft generate`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

import small
import tiny_lm
from command_line import call
from fedpeft import app


def fedpeft(*arguments: Any) -> Any:
    return call(*map(str, arguments))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> app.Run:
    """A run of a small Llama with a GPT-2 in the role of the large model."""
    place = tmp_path_factory.mktemp("generate")
    tokenizer = tiny_lm.byte_tokenizer()
    for family in ("llama", "gpt2"):
        tiny_lm.save(family, tokenizer, place / family, len(tokenizer), positions=64)
    words = ["film", "time", "once"]
    rows = [{"instruction": f"a {words[i % 3]} ?", "response": " good ." if i % 3 else " bad ."} for i in range(24)]
    file = str(small.write_rows(place / "rows.jsonl", rows))
    values: dict[str, Any] = {
        "model": {"name": str(place / "llama"), "device": "cpu"},
        "task": {
            "train": file, "validation": file, "format": "generate", "template": "{instruction}{context}",
            "max_length": 32, "generate_rows": 0,
        },
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedpt", "cohort": 0, "lr": 2e-2},
        "run": {"rounds": 1, "threads": 1},
        "proxy": {"large": str(place / "gpt2"), "alpha": 0.5},
    }  # fmt: skip
    return app.run(values, out=place / "run")


def test_an_answer_alone_streamed_and_as_json(ran: app.Run) -> None:
    asked = ("generate", ran.folder, "--prompt", "a film ?", "--max-tokens", "5")
    plain, streamed = fedpeft(*asked), fedpeft(*asked, "--stream")
    told = json.loads(fedpeft(*asked, "--json").stdout)
    assert plain.stdout.strip("\n") == told["text"].strip("\n") == streamed.stdout.strip("\n")
    assert told["alpha"] == 0.5 and len(told["tokens"]) <= 5 and told["exact"] and told["mass"] == 1.0
    drafted = json.loads(fedpeft(*asked, "--json", "--speculate", "2").stdout)
    assert drafted["tokens"] == told["tokens"]


def test_comparison_and_draws(ran: app.Run) -> None:
    asked = ("generate", ran.folder, "--prompt", "a film ?", "--context", " it was", "--max-tokens", "4")
    both = json.loads(fedpeft(*asked, "--compare", "--json").stdout)
    assert list(both) == ["proxy", "large", "tuned_small", "base_small"] and both["large"]["alpha"] is None
    assert "large model alone:" in fedpeft(*asked, "--compare").stdout
    drawn = [
        json.loads(fedpeft(*asked, "--json", "--temperature", "5", "--seed", seed).stdout)["tokens"] for seed in "112"
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    zero = json.loads(fedpeft(*asked, "--json", "--alpha", "0").stdout)
    assert zero["tokens"] == both["large"]["tokens"]
    framed = [fedpeft(*asked, "--json", "--alpha", "2", "--expert-prompt", text).stdout for text in ("", "once time ")]
    first = [json.loads(told)["logprobs"][0] for told in framed]
    assert first[0] != first[1], "the tuned model reads more before it says its first token"
    alone = json.loads(fedpeft(*asked, "--json", "--large", "none").stdout)
    assert alone["alpha"] is None and alone["tokens"] == both["tuned_small"]["tokens"]


def test_a_blank_answer_is_told_beside_the_output(ran: app.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpeft.proxy import answers

    asked = ("generate", ran.folder, "--prompt", "a film ?", "--max-tokens", "2")
    assert "blank" not in fedpeft(*asked).stderr
    monkeypatch.setattr(answers.Writer, "add", lambda self, token: (" ", False))
    spaces = fedpeft(*asked)
    assert (spaces.exit_code, spaces.stdout.strip()) == (0, "")
    assert "note: the answer is blank: it has nothing but spaces and line breaks; ask in other words" in spaces.stderr
    monkeypatch.setattr(answers.Writer, "add", lambda self, token: ("", False))
    for way in ((), ("--stream",), ("--json",)):
        done = fedpeft(*asked, *way)
        assert done.exit_code == 0 and "blank: the model ended it before it said anything" in done.stderr
    assert json.loads(done.stdout)["text"] == ""
    told = fedpeft(*asked, "--compare").stderr.splitlines()
    assert len(told) == 4 and told[1].startswith("note: the answer of the large model alone is blank")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--alpha", "nan"), "alpha is nan; give a number from -100 to 100 (--alpha)"),
        (("--alpha", "-101"), "alpha is -101.0; give a number from -100 to 100 (--alpha)"),
        (("--stream", "--json"), "leave out --json"),
        (("--raw", "--context", "x"), "has no place in a raw prompt"),
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--token-env", "FEDPEFT_NO_SUCH_KEY"), "--token-env names the variable FEDPEFT_NO_SUCH_KEY"),
    ],
)
def test_what_is_refused_ends_with_2(more: tuple[str, ...], message: str, ran: app.Run) -> None:
    done = fedpeft("generate", ran.folder, "--prompt", "a film ?", *more)
    assert done.exit_code == 2 and message in done.stderr


def test_a_prompt_beyond_the_context_is_refused(ran: app.Run) -> None:
    done = fedpeft("generate", ran.folder, "--prompt", "it was a film " * 30)
    assert done.exit_code == 2 and "64" in done.stderr
