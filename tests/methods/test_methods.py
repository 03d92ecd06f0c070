"""How methods are found, built from plain data, and described."""

from __future__ import annotations

import dataclasses
import pkgutil
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from fedpeft import methods
from fedpeft.core.adapter import Lora
from fedpeft.core.errors import ConfigError, RequestError
from fedpeft.methods._schedule import with_schedule
from fedpeft.methods.fedavg import FedAvg
from fedpeft.methods.fedopt import FedOpt

OUTSIDE = '''
from dataclasses import dataclass
from fedpeft.core.method import Defaults

@dataclass(frozen=True)
class Mine(Defaults):
    """A method of one's own."""
    strength: float = 0.5  # how strong it is
    sizes: tuple[int, ...] = (1, 2)  # of its parts
    pair: tuple[int, float] = (1, 0.5)  # one of each
    on: bool = False  # whether it runs

broken = 3
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_method.py").write_text(OUTSIDE)
    (tmp_path / "needs_more.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_method", raising=False)
    return "some_method:Mine"


def test_a_method_is_a_module() -> None:
    modules = [m.name for m in pkgutil.iter_modules(methods.__path__) if not m.name.startswith("_")]
    assert methods.names() == sorted(modules)
    assert methods.load("fedavg") is FedAvg


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"no method 'fedavgg'; did you mean 'fedavg'\?"):
        methods.load("fedavgg")
    with pytest.raises(RequestError, match=r"there are: .*adapter, attempt, .*fedavg, "):
        methods.load("zzzz")
    with pytest.raises(RequestError):
        methods.load("__init__")


def test_a_method_from_outside(outside: str) -> None:
    assert methods.load(outside).__name__ == "Mine"
    assert methods.build(outside, {"strength": 2, "sizes": [3]}).sizes == (3,)  # type: ignore[attr-defined]
    assert methods.describe(methods.load(outside))[0] == ("strength", "a number", 0.5, "how strong it is")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:X", "no module 'no_such_module_here'"),
        ("some_method:Min", "no method class 'Min'; did you mean 'Mine'"),
        ("some_method:broken", "no method class 'broken'"),
        (":Mine", "write it as 'module:Class'"),
    ],
)
def test_what_is_wrong_with_a_method_from_outside(outside: str, name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        methods.load(name)


def test_an_import_error_inside_the_module_is_not_hidden(outside: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        methods.load("needs_more:X")


def test_values_are_fitted_to_the_fields() -> None:
    """Whole numbers pass as floats; YAML's `1e-3` is a text and passes as the float that it spells."""
    method = methods.build("fedavg", {"lr": "1e-3", "clip": 1, "steps": None, "optimizer": "sgd"})
    assert method == FedAvg(lr=0.001, clip=1.0, optimizer="sgd")
    assert type(method.clip) is float  # type: ignore[attr-defined]


def test_all_problems_come_at_once() -> None:
    values = {
        "epoch": 2, "cohort": 2.5, "lr": "fast", "clip": True, "optimizer": "adam", "batch_size": 0, "steps": [1],
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        methods.build("fedavg", values)
    assert sorted(caught.value.problems) == [
        "method.batch_size is 0; it must be at least 1",
        "method.clip is True; it must be a number or null",
        "method.cohort is 2.5; it must be a whole number",
        "method.epoch is not a field of fedavg; did you mean 'epochs'?",
        "method.lr is 'fast'; it must be a number",
        "method.optimizer is 'adam'; it must be adamw | sgd",
        "method.steps is [1]; it must be a whole number or null",
    ]


@pytest.mark.parametrize("value", [3, [1.5], ["a"], [1, True]])
def test_a_list_must_be_of_its_kind(outside: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"method.sizes is .*; it must be a list of whole numbers"):
        methods.build(outside, {"sizes": value})


def test_a_pair_must_be_a_pair(outside: str) -> None:
    assert methods.build(outside, {"pair": [2, 3]}).pair == (2, 3.0)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"it must be a list of \(a whole number, a number\)"):
        methods.build(outside, {"pair": [2, 3, 4]})


def test_the_description_is_the_comment_in_the_source() -> None:
    fields = {f.name: f for f in methods.describe(FedOpt)}
    assert list(fields) == [f.name for f in dataclasses.fields(FedOpt)]
    assert fields["server_optimizer"].type == "momentum | adam | yogi | adagrad"
    assert fields["tau"].meaning == "tau: degree of adaptivity; v starts from its square"
    assert fields["clip"] == (
        "clip", "a number or null", None, "bound on the gradient's norm at every local step; null: none",
    )  # fmt: skip


def test_any_dataclass_can_be_described() -> None:
    """Adapter specifications too, and fields that a class inherits or leaves without a default."""
    assert methods.describe(Lora)[0] == ("rank", "a whole number", 8, "rows of A, columns of B")

    @dataclass(frozen=True)
    class Wider(Lora):
        mode: Literal["x", "y"] = "x"  # which # of them

    last = methods.describe(Wider)[-1]
    assert last == ("mode", "x | y", "x", "which # of them")
    assert methods.describe(Wider)[0].meaning == "rows of A, columns of B"


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("fedavg", {"shedule": "fisher"}, "method.shedule is not a field of fedavg; did you mean 'schedule'?"),
        ("fibecfed", {"init": "all"}, "method.init is not a field of fibecfed; did you mean 'initialise'?"),
        (
            "fedavg",
            {"schedule_beta": 0.5},
            "method.schedule_beta is of a curriculum, and method.schedule is null; give",
        ),
        ("fedavg", {"schedule": None, "schedule_beta": 0.5}, "method.schedule is null; give method.schedule, too"),
        ("fedavg", {"x": 1}, "method.x is not a field of fedavg; there are: cohort, epochs"),
    ],
)
def test_what_was_meant_is_said(name: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        methods.build(name, values)


def test_the_fields_of_a_curriculum_are_described_where_it_is_taken() -> None:
    fields = {f.name for f in dataclasses.fields(with_schedule(methods.load("fedavg")))}
    assert set(methods.CURRICULUM) == fields - {f.name for f in dataclasses.fields(methods.load("fedavg"))}
    kind, *others = methods.describe_curriculum("fedavg")
    assert kind.default is None and kind.type == "null | fisher | loss | random | rarity | length | two_stage"
    assert [field.name for field in others] == list(methods.CURRICULUM[1:]) and all(f.meaning for f in others)
    assert methods.describe_curriculum("voc") == ()
