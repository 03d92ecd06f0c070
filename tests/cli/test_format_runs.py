"""A run in the format cloze from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer.testing
import yaml

import small
import tiny_lm
from fedpeft.cli import app as command_line


def call(*arguments: Any, code: int = 0) -> typer.testing.Result:
    result = typer.testing.CliRunner().invoke(command_line, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def test_a_template_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    place = small.make_place(tmp_path / "place")
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny")
    values = small.config(place, run__rounds=1)
    values["model"]["name"] = str(tiny_lm.save("bert", tokenizer, place / "masked", len(tokenizer)))
    values["task"] |= {"format": "cloze", "label_words": ["soup", "boat", "yarn"]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    template = ("--set", 'task.template="{text} : <mask>"')
    said = json.loads(call("check", tmp_path / "c.yaml", "--json", *template).stdout)
    assert said["task"]["tokens_per_row"] == 9  # five words, the template's two, [CLS] and [SEP]
    call("run", tmp_path / "c.yaml", "--out", tmp_path / "run", *template)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["task"]["template"] == "{text} : <mask>"
    small.write_rows(tmp_path / "rows.jsonl", small.rows(3, "new"))
    assert "probabilities" in call("predict", tmp_path / "run", "--data", tmp_path / "rows.jsonl", "--json").stdout
    refused = call("check", tmp_path / "c.yaml", "--set", 'task.label_words=["soup", "soups", "boat"]', code=2)
    assert "label word ' soups'" in refused.output and "task.label_words" in refused.output
