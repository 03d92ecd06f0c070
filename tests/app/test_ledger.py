"""The book of a run, worked out by hand."""

from __future__ import annotations

import json

import torch

from fedpeft.app.ledger import Ledger
from fedpeft.core.exchange import Nothing, Receipt
from fedpeft.core.federate import Done
from fedpeft.runs.stopping import Limits

NONE = Limits()


def done(*receipts: Receipt, answered: tuple[str, ...] = ()) -> Done:
    return Done(1, 1, "train", True, Nothing(), {}, answered, answered, receipts)


def test_costs_add_up_and_a_line_has_its_rounds_share() -> None:
    """Two exchanges in round 1: the slowest client that answered makes the time, everybody's bytes count."""
    ledger = Ledger()
    ledger.count(done(Receipt("a", 10, 5, 0.0, 2.0), Receipt("b", 10, 6, 0.0, 3.0), answered=("a", "b")), 1.0)
    ledger.count(
        done(Receipt("a", 20, 7, 0.0, 9.0, lost="no answer"), Receipt("b", 1, 1, 0.0, 0.5), answered=("b",)), 1.5
    )
    first = ledger.line(1, 0.25, 2.0)
    assert first == {
        "round": 1,
        "train_loss": 0.25,
        "bytes_down": 41,
        "bytes_up": 19,
        "seconds": 2.0,
        "simulated_seconds": 3.5,
        "clients": 3,
        "lost_clients": 1,
    }
    ledger.count(done(Receipt("c", 100, 50, 0.0, 4.0), answered=("c",)), 3.0)
    second = ledger.line(2, None, 4.5)
    assert (second["bytes_down"], second["bytes_up"], second["seconds"], second["simulated_seconds"]) == (
        100,
        50,
        2.5,
        4.0,
    )
    assert (second["clients"], second["lost_clients"]) == (1, 0)
    totals = {"bytes_down": 141, "bytes_up": 69, "seconds": 4.5, "simulated_seconds": 7.5, "evaluation_bytes": 0}
    assert ledger.totals() == totals


def test_best_parameters_are_the_first_ones_with_the_best_score() -> None:
    ledger = Ledger()
    given = [{"w": torch.tensor(float(i))} for i in range(4)]
    for round, (params, value) in enumerate(zip(given, (0.5, 0.7, 0.7, None), strict=True)):
        ledger.judge(params, value, round, NONE, {"global": value})
    assert ledger.best is given[1]
    assert (ledger.best_value, ledger.best_round, ledger.best_scores) == (0.7, 1, {"global": 0.7})


def test_ledger_survives_json_and_goes_on_counting() -> None:
    ledger, limits = Ledger(), Limits(patience=3)
    ledger.count(done(Receipt("a", 10, 5, 0.0, 2.0), answered=("a",)), 1.0)
    ledger.line(1, 0.1, 1.0)
    ledger.judge({}, 0.5, 1, limits)
    ledger.judge({}, 0.4, 2, limits)
    ledger.count(done(Receipt("a", 10, 5, 0.0, 2.0), answered=("a",)), 2.0)  # in the middle of round 3
    again = Ledger.of(json.loads(json.dumps(ledger.plain())), ledger.best)
    assert again == ledger
    for book in (ledger, again):
        book.judge({}, 0.3, 3, limits)
        book.judge({}, 0.2, 4, limits)
    assert again == ledger and ledger.stopped is not None and "patience 3" in ledger.stopped
    assert again.line(4, None, 5.0) == ledger.line(4, None, 5.0)


def test_budget_is_spent_whatever_the_score() -> None:
    ledger = Ledger(bytes_down=60, bytes_up=40, seconds=8.0)
    assert ledger.spent(NONE) is None
    assert ledger.spent(Limits(bytes=101, seconds=8.1, score=0.1, patience=1)) is None
    assert ledger.spent(Limits(bytes=100)) == "100 bytes sent reached run.stop.bytes 100"
    assert ledger.spent(Limits(seconds=8)) == "8.0 s reached run.stop.seconds 8"


def test_stopped_run_is_opened_again_by_other_limits_alone() -> None:
    ledger = Ledger(bytes_down=100)
    ledger.judge({}, None, 1, Limits(bytes=50))
    assert ledger.stopped is not None
    ledger.reopen(Limits(bytes=50))
    assert ledger.stopped is not None
    ledger.reopen(Limits(bytes=500))
    assert ledger.stopped is None
