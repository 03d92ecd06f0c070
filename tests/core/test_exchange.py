"""The usual check of an answer, and what a place of a run gives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import toy
from fedpeft.core.errors import RecordError
from fedpeft.core.exchange import Call, ClientEnv, Meter, Nothing, ServerEnv, Update, Weights, anything, matching
from fedpeft.core.fit import SGD, Fit, Fitted, Moments
from fedpeft.core.rng import rng_for

SENT = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}


def test_an_answer_with_the_layout_of_the_question_is_accepted() -> None:
    matching(Weights(SENT), Update({name: t + 1 for name, t in SENT.items()}, 1, 0.0))
    matching(Nothing(), Update(SENT, 1, 0.0))
    matching(Weights(SENT), Nothing())


@pytest.mark.parametrize(
    ("params", "examples", "words"),
    [
        ({"w": torch.zeros(2, 3)}, 1, "differ in 1 names, first: 'b'"),
        (SENT | {"x": torch.zeros(1)}, 1, "first: 'x'"),
        (SENT | {"b": torch.zeros(4)}, 1, r"'b' has shape \(4,\) where \(3,\) was expected"),
        (SENT, -1, "counts -1 examples"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(params: Any, examples: int, words: str) -> None:
    with pytest.raises(RecordError, match=words):
        matching(Weights(SENT), Update(params, examples, 0.0))
    anything(Weights(SENT), Update(params, examples, 0.0))


def test_versions_grow_with_exchange_and_attempt_and_never_repeat() -> None:
    versions = [Call(ANY, number, 0, 1, attempt).version for number in range(5) for attempt in range(4)]
    assert versions == sorted(set(versions)) and versions[0] > 0


def test_the_first_adapter_is_the_same_for_the_server_and_every_client() -> None:
    class Drawing:
        def init(self, rng: Any) -> Any:
            return {"w": torch.from_numpy(rng.standard_normal(3))}

    model: Any = Drawing()
    server = ServerEnv(model, (), 7, 1, round=3, exchange="x", attempt=2).initial()["w"]
    client = ClientEnv("a", model, {}, 7, 1).initial()["w"]
    assert torch.equal(server, client)
    assert torch.equal(server, torch.from_numpy(rng_for(7, "adapter").standard_normal(3)))
    assert not torch.equal(server, ServerEnv(model, (), 8, 1).initial()["w"])


def test_the_training_data_of_a_client() -> None:
    data: Any = object()
    assert ClientEnv("a", ANY, {"train": data}, 0, 1).data is data


def test_a_meter_adds_what_fits_cost() -> None:
    """Rows 0 and 3 have the label 1, row 1 has 0: three rows of the one, two of the other."""
    meter = Meter(steps=1, forward_tokens=5)
    fit = Fit(toy.params(0, 0), toy.points([1, 0], [-1, 0], [0, 0], [2, 2]), [[0, 1], [3], [1, 0]], SGD(1.0))
    fitted = Fitted({}, (1.0, 2.0, 6.0), 3, 20, Moments(), tokens=100, pairs=900)
    meter.add(fit, fitted, lowest_block=2)
    meter.train(1, 1, 2)
    meter.train(7, 49, 0)
    assert meter == Meter(4, 20, {2: (101, 901), 0: (7, 49)}, 5, 0, labels=Counter({1: 3, 0: 2}))
    assert (meter.trained_tokens, meter.trained_pairs) == (108, 950)


@pytest.mark.parametrize(
    ("base", "packed"), [("", 0), ("bfloat16", 0), ("blocks:0,1", 0), ("int8", 6), ("nf4:simulated", 6)]
)
def test_a_meter_counts_the_steps_on_a_quantised_base(base: str, packed: int) -> None:
    meter = Meter()
    fitted = Fitted({}, (1.0, 2.0, 6.0), 3, 20, Moments(), tokens=100, pairs=900)
    for checkpointing in (False, True, True):
        fit = Fit(toy.params(0, 0), toy.points([1, 0]), [[0]] * 3, SGD(1.0), base=base, checkpointing=checkpointing)
        meter.add(fit, fitted, lowest_block=2)
    assert meter.packed == (Counter({(2, False): 3, (2, True): packed}) if packed else Counter())


def test_the_loss_of_a_fit_is_the_mean_over_its_steps() -> None:
    assert Fitted({}, (1.0, 2.0, 6.0), 3, 20, Moments()).loss == 3.0
    assert Fitted({}, (), 0, 0, Moments()).loss == 0.0


ANY: Any = None


@pytest.mark.parametrize(
    ("up", "message"),
    [
        (Update({"w": torch.zeros(3, dtype=torch.int64)}, 1, 0.0), "is torch.int64 where torch.float32"),
        (Update({"w": torch.zeros(3)}, 0, 0.0), "counts 0 examples"),
        (Update({"w": torch.zeros(3)}, 2**60, 0.0), "lies between 1 and 2.53"),
        (Update({"w": torch.zeros(3)}, 1, 1e308), "loss is 1e.308"),
    ],
)
def test_an_answer_that_would_spoil_the_fold_is_refused(up: Update, message: str) -> None:
    down = Weights({"w": torch.zeros(3)})
    matching(down, Update({"w": torch.ones(3)}, 5, 0.5))
    with pytest.raises(RecordError, match=message):
        matching(down, up)
