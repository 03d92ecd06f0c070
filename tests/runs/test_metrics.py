from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from fedpeft.core.errors import DataError, RequestError
from fedpeft.runs.metrics import METRICS, check_metric, constant_score, label_prior, majority, metrics_of, pool


def score(true, predicted, classes, loss=0.0):
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for t, p in zip(true, predicted, strict=True):
        confusion[t, p] += 1
    return {"confusion": confusion, "loss": torch.tensor(loss, dtype=torch.float64), "n": torch.tensor(len(true))}


def drawn(seed, classes, rows):
    rng = np.random.default_rng(seed)
    true = rng.integers(classes, size=rows)
    return true, np.where(rng.random(rows) < 0.6, true, rng.integers(classes, size=rows))


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("rows", [1, 5, 400])
def test_parity_with_sklearn(classes, rows):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    for seed in range(5):
        true, predicted = drawn(seed, classes, rows)
        sums = score(true, predicted, classes, loss=rows * 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sklearn warns of quotients 0 / 0
            macro = f1_score(true, predicted, average="macro", zero_division=0)
            mcc = matthews_corrcoef(true, predicted)
            f1 = f1_score(true, predicted, labels=[1], average="macro", zero_division=0)
        assert metrics_of(sums) == {"accuracy": pytest.approx(accuracy_score(true, predicted)), "loss": 0.5}
        assert metrics_of(sums, "macro_f1")["macro_f1"] == pytest.approx(macro, abs=1e-12)
        assert metrics_of(sums, "matthews")["matthews"] == pytest.approx(mcc, abs=1e-12)
        if classes == 2:
            found = metrics_of(sums, "acc_f1")
            assert found["f1"] == pytest.approx(f1, abs=1e-12)
            assert found["acc_f1"] == pytest.approx((found["accuracy"] + f1) / 2, abs=1e-12)


def test_pooled_sums_are_the_sums_of_pooled_rows():
    true, predicted = drawn(0, 3, 90)
    parts = [score(true[i::3], predicted[i::3], 3, loss=float(i)) for i in range(3)]
    before = parts[0]["confusion"].clone()
    for metric in ("macro_f1", "matthews"):
        assert metrics_of(pool([*parts, {}]), metric) == metrics_of(score(true, predicted, 3, loss=3.0), metric)
    assert torch.equal(parts[0]["confusion"], before)
    with pytest.raises(DataError, match="no score to pool"):
        pool([{}])
    with pytest.raises(DataError, match=r"\(3, 3\) and \(2, 2\)"):
        pool([parts[0], score([0], [0], 2)])


def test_degenerate_cases_are_numbers():
    for sums in (score([], [], 2), score([0, 0], [0, 0], 2), score([0, 1], [0, 0], 2), score([0], [1], 2)):
        for metric in METRICS:
            assert all(math.isfinite(v) for v in metrics_of(sums, metric).values())
    assert metrics_of(score([0, 1], [0, 0], 2), "matthews")["matthews"] == 0.0


def test_matthews_is_exact_for_many_rows():
    """Two classes, 3e9 right of each and 1e9 wrong of each: (9 - 1) / 16 = 0.5; the products pass 64 bits."""
    confusion = torch.tensor([[3, 1], [1, 3]]) * 10**9
    sums = {"confusion": confusion, "loss": torch.tensor(0.0), "n": torch.tensor(8 * 10**9)}
    assert metrics_of(sums, "matthews")["matthews"] == 0.5


def test_majority_by_hand():
    """Training labels 1 1 0 of three classes: always 1. Of the rows 1 0 2 1 two are right.

    Frequencies with one added: (2, 3, 1) / 6, so the loss is -(2 ln 1/2 + ln 1/3 + ln 1/6) / 4.
    """
    found = majority([1, 1, 0], [1, 0, 2, 1], 3)
    assert found["accuracy"] == 0.5
    assert found["loss"] == pytest.approx((2 * math.log(2) + math.log(3) + math.log(6)) / 4)
    sums = constant_score([1, 1, 0], [1, 0, 2, 1], 3)
    assert sums["confusion"].tolist() == [[0, 1, 0], [0, 2, 0], [0, 1, 0]]
    assert constant_score([2, 0], [1], 3)["confusion"].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]  # a tie
    with pytest.raises(DataError, match="label 3 is outside 0 to 2"):
        majority([0], [3], 3)


def test_label_prior_pools_each_clients_own_majority():
    """Client a always says 0 and is right in 2 of 3 rows, client b always says 1 and is right in its only row."""
    train, rows = {"a": [0, 0, 1], "b": [1]}, {"a": [0, 0, 1], "b": [1]}
    assert label_prior(train, rows, 2)["accuracy"] == 0.75
    assert majority([0, 0, 1, 1], [0, 0, 1, 1], 2)["accuracy"] == 0.5
    assert label_prior({}, {"c": [0, 1]}, 2)["accuracy"] == 0.5  # no training row: class 0


def test_metrics_that_cannot_be_selected():
    with pytest.raises(RequestError, match="loss cannot be selected"):
        check_metric("loss", 2)
    with pytest.raises(RequestError, match="did you mean 'macro_f1'"):
        check_metric("macro_F1", 2)
    with pytest.raises(RequestError, match="acc_f1 needs 2 classes and the task has 3"):
        metrics_of(score([0], [0], 3), "acc_f1")
