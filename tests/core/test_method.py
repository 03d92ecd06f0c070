"""Hyper-parameters as plain data, and the pieces that methods share."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.core.adapter import Lora
from fedpeft.core.errors import ConfigError
from fedpeft.core.examples import Examples
from fedpeft.core.exchange import ClientEnv, Nothing, Update
from fedpeft.core.fit import SGD, AdamW
from fedpeft.core.method import Defaults, check_ranges, local_batches, mean_loss, ordinary_fit, plain, rebuild

PARAMS = {"w": torch.zeros(2)}


@dataclass(frozen=True)
class Sample(Defaults):
    """The usual fields and one nested tuple."""

    cohort: int = 10
    epochs: int = 2
    batch_size: int = 4
    steps: int | None = None
    lr: float = 0.01
    head_lr: float | None = None
    weight_decay: float = 0.25
    clip: float | None = None
    optimizer: str = "adamw"
    levels: tuple[tuple[int, ...], ...] = ((1, 2), (3,))


class Bound:
    spec = Lora(dropout=0.125)


def env(rows: int = 10) -> ClientEnv:
    data = Examples(tuple(np.ones(3, np.int32) for _ in range(rows)), np.zeros(rows, np.int64))
    model: Any = Bound()
    return ClientEnv("a", model, {"train": data}, 7, 5, 2, "train")


# --- plain data -------------------------------------------------------------------------------------------------


def test_hyper_parameters_survive_json() -> None:
    method: Any = Sample(epochs=3, clip=0.5)
    again: Any = rebuild(Sample, json.loads(json.dumps(plain(method))))  # type: ignore[type-var]
    assert again == method and again is not method and hash(again) == hash(method)
    assert again.levels == ((1, 2), (3,))


def test_the_defaults_of_a_method() -> None:
    method = Defaults()
    assert method.adapter() == Lora() and method.accepts(Lora(rank=3)) is None and method.setup() == ()
    assert method.init_client(env()) == Nothing() and isinstance(method.init_client(env()), method.memory)
    assert method.personal(PARAMS, Nothing()) is PARAMS and not method.pooled


# --- local training ---------------------------------------------------------------------------------------------


def test_whole_epochs_use_every_row_once_each() -> None:
    batches = local_batches(Sample(), env())
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    assert sorted(r for b in batches[:3] for r in b) == sorted(r for b in batches[3:] for r in b) == list(range(10))
    assert [list(b) for b in batches] == [list(b) for b in env().data.epochs(2, 4, env().rng("batches"))]
    assert local_batches(Sample(), env(), "other") != batches


@pytest.mark.parametrize(("rows", "steps", "lengths"), [(10, 2, [4, 4]), (10, 5, [4, 4, 2, 4, 4]), (3, 2, [3, 3])])
def test_steps_cut_or_repeat_the_epochs(rows: int, steps: int, lengths: list[int]) -> None:
    assert [len(b) for b in local_batches(Sample(steps=steps, epochs=99), env(rows))] == lengths


def test_an_ordinary_fit_is_what_the_fields_say() -> None:
    fit = ordinary_fit(Sample(clip=0.5, head_lr=0.1), PARAMS, env())
    assert fit.params is PARAMS and fit.data is not None and fit.steps == 6
    assert fit.optimizer == AdamW(0.01, weight_decay=0.25) and fit.clip == 0.5 and fit.rates == {"head.": 0.1}
    assert fit.dropout == 0.125 and fit.seed == env().seed_for("dropout")
    plainer = ordinary_fit(Sample(optimizer="sgd"), PARAMS, env(), batches=[[0]], dropout=0.0)
    assert plainer.optimizer == SGD(0.01, weight_decay=0.25) and plainer.rates == {} and plainer.clip is None
    assert plainer.batches == [[0]] and plainer.dropout == 0.0


def test_the_loss_of_a_cohort_weighs_examples() -> None:
    """(1 * 0.5 + 3 * 2.5) / 4 = 2."""
    assert mean_loss([Update({}, 1, 0.5), Update({}, 3, 2.5)]) == 2.0
    assert mean_loss([]) == 0.0 == mean_loss([Update({}, 0, 9.0)])


# --- ranges -----------------------------------------------------------------------------------------------------


def test_good_numbers_pass() -> None:
    check_ranges(Sample())
    check_ranges(Sample(cohort=0, steps=1, epochs=1, batch_size=1, weight_decay=0.0, head_lr=1e-9, clip=1e-9))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("cohort", -1, "at least 0"), ("epochs", 0, "at least 1"), ("batch_size", 0, "at least 1"),
        ("steps", 0, "at least 1"), ("weight_decay", -0.1, "at least 0"), ("lr", 0.0, "above 0"),
        ("head_lr", 0.0, "above 0"), ("clip", -1.0, "above 0"), ("lr", math.nan, "above 0"),
        ("clip", math.inf, "above 0"),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_named_with_its_bound(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_ranges(Sample(**{field: value}))
    finite = "finite and " if isinstance(value, float) else ""
    assert caught.value.problems == (f"method.{field} is {value}; it must be {finite}{rule}",)


def test_all_problems_come_at_once_with_a_methods_own_bounds() -> None:
    with pytest.raises(ConfigError) as caught:
        check_ranges(
            Sample(lr=-1.0, epochs=0, clip=2.0), at_least={"cohort": 11}, below={"epochs": 9}, at_most={"clip": 1}
        )
    assert caught.value.problems == (
        "method.cohort is 10; it must be at least 11",
        "method.epochs is 0; it must be at least 1 and below 9",
        "method.lr is -1.0; it must be finite and above 0",
        "method.clip is 2.0; it must be above 0 and at most 1",
    )
    assert str(caught.value).startswith("4 problems in the configuration:\n  - method.cohort is 10")
