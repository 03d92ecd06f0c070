"""Evaluation as an exchange: the global and every client's own model, on the client's own rows."""

from __future__ import annotations

import pytest
from torch import Tensor

from fedpeft.core.evaluate import Evaluate, Question
from fedpeft.core.exchange import Call
from fedpeft.core.federate import federate
from fedpeft.core.tree import Params
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods import build
from fedpeft.methods.local import Memory
from toy import BODY, Points, ToyModel, params, points

ROWS = points([1.0, 0.0, 0.0], [3.0, 0.0, 0.0])
DATA = {
    "a": {"train": ROWS, "validation": points([2.0, 0.0, 0.0])},
    "b": {"train": ROWS, "validation": points()},
    "c": {"train": ROWS},
}


def asked(
    engine: InProcess,
    method: object,
    split: str = "validation",
    versions: dict[str, int] | None = None,
    personal_alone: bool = False,
) -> dict:
    exchange = Evaluate(method).exchange()  # type: ignore[arg-type]
    question = Question(params(1.0, 0.0, 0.0), split, personal_alone=personal_alone)
    call = Call(exchange, 5, 2, 9, versions=versions or {})
    answers = engine.exchange(call, {client: exchange.send(question, client) for client in engine.clients()})
    assert all(receipt.lost is None and not receipt.staged for receipt in answers.receipts)
    return dict(answers.ups)


def test_which_methods_make_personal_models() -> None:
    assert [build(name, {}).personalised for name in ("fedavg", "scaffold", "local")] == [False, False, True]


def test_global_model_is_scored_on_the_rows_of_each_client() -> None:
    """At w = (1, 0, 0) and x = (2, 0, 0) the loss is 1/2; a method without personal models gives it twice."""
    method = build("fedavg", {})
    found = asked(InProcess(lambda: method, ToyModel(), DATA, 0), method)
    assert {name: float(value) for name, value in found["a"].shared.items()} == {"loss": 0.5, "n": 1.0}
    assert found["a"].personal.keys() == found["a"].shared.keys()
    assert found["b"].shared == found["b"].personal == found["c"].shared == {}
    train = asked(InProcess(lambda: method, ToyModel(), DATA, 0), method, "train")
    assert float(train["c"].shared["loss"]) == 2.0 and int(train["c"].shared["n"]) == 2  # (1 - 1)² / 2 + (3 - 1)² / 2


def test_the_global_model_is_scored_only_where_that_is_asked_for() -> None:
    passes: list[float] = []

    class Watched(ToyModel):
        def score(self, params: Params, data: Points) -> dict[str, Tensor]:
            passes.append(float(params[BODY][0]))
            return super().score(params, data)

    method = build("local", {"cohort": 0, "batch_size": 2, "optimizer": "sgd", "lr": 1.0})
    engine = InProcess(lambda: method, Watched((1.0, 0.0, 0.0)), DATA, 0)
    (done,) = federate(method, engine, engine.model, rounds=1, seed=0)
    both = asked(engine, method, versions=dict(done.versions))["a"]
    assert passes == [1.0, 2.0]
    own = asked(engine, method, versions=dict(done.versions), personal_alone=True)["a"]
    assert passes == [1.0, 2.0, 2.0]
    assert own.shared == {} and own.personal == both.personal


def test_own_model_comes_from_the_committed_memory_which_stays() -> None:
    """One step of SGD at rate 1 takes w to the mean of the rows, x = 2, where the loss is 0."""
    method = build("local", {"cohort": 0, "batch_size": 2, "optimizer": "sgd", "lr": 1.0})
    engine = InProcess(lambda: method, ToyModel((1.0, 0.0, 0.0)), DATA, 0)
    (done,) = federate(method, engine, engine.model, rounds=1, seed=0)
    found = asked(engine, method, versions=dict(done.versions))
    assert float(found["a"].shared["loss"]) == 0.5 and float(found["a"].personal["loss"]) == pytest.approx(0.0)
    assert found["b"].personal == {}
    for client, version in done.versions.items():
        assert isinstance(engine.memories.load(client, version, Memory), Memory)
    assert asked(engine, method, versions=dict(done.versions)).keys() == DATA.keys()
    fresh = asked(engine, method)  # without a committed memory: the one before the first turn
    assert float(fresh["a"].personal["loss"]) == 0.5
