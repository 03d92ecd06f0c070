"""What a list of methods tells beside their names, and the list of curricula."""

from __future__ import annotations

import json
import typing

from typer.testing import CliRunner

from fedpeft.cli import app
from fedpeft.cli.listing import EASY_FIRST, SCHEDULES
from fedpeft.methods import _schedule


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_methods_are_listed_with_what_tells_them_apart() -> None:
    lines = {line.split()[0]: line for line in call("list", "methods").splitlines()}
    assert lines["fedavg"].endswith("[lora]") and lines["ptuning_v2"].endswith("[prefix]")
    assert lines["fibecfed"].endswith("[lora, personal models, own curriculum, set-up]")
    assert lines["hetlora"].endswith("[lora, unequal ranks]") and lines["centralized"].endswith("[lora]")
    assert lines["fedpipe"].endswith("[lora, set-up]")
    assert lines["slw"].endswith("[lora, own curriculum]") and lines["local"].endswith("[lora, personal models]")
    told = {one["name"]: one["traits"] for one in json.loads(call("list", "methods", "--json"))}
    assert told["flora"] == ["lora", "unequal ranks"]


def test_every_curriculum_is_listed_with_its_options() -> None:
    kinds = typing.get_args(_schedule.Kind)
    assert set(SCHEDULES) == set(kinds) and set(EASY_FIRST) == set(_schedule.RANKED)
    assert [line.split()[0] for line in call("list", "schedules").splitlines()] == list(SCHEDULES)
    assert "schedule_beta" in call("list", "schedules", "loss") and "schedule_" not in call(
        "list", "schedules", "rarity"
    )
