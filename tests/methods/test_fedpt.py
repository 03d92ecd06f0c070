"""FedPT on the toy of three numbers: what the server folds, what it distils, and who cannot take part."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import toy
from fedpeft import methods
from fedpeft.core import records, tree
from fedpeft.core.adapter import Bottleneck, Full, Lora
from fedpeft.core.errors import ConfigError
from fedpeft.core.exchange import ServerEnv, Update
from fedpeft.core.federate import Done, Start, federate
from fedpeft.core.fit import AdamW, Fit, Fitted
from fedpeft.core.model import Target, Teacher
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.fedpt import FedPT, State

DATA = {"a": toy.points((0, 0, 0), (1, 1, 1)), "b": toy.points((2, 0, 4))}
SPLITS = {client: {"train": rows} for client, rows in DATA.items()}


@dataclasses.dataclass
class Held:
    """Public points, and an alpha and a teacher that a reader can follow: alpha is the adapter's first number."""

    public: toy.Points | None = dataclasses.field(default_factory=lambda: toy.points((9, 9, 9), (7, 7, 7)))
    asked: list[Any] = dataclasses.field(default_factory=list)

    def best_alpha(self, params: dict[str, torch.Tensor]) -> float:
        self.asked.append(tree.sha256(params))
        return float(toy.vector(params)[0])

    def teacher(self, params: dict[str, torch.Tensor], alpha: float) -> Teacher:
        self.asked.append((tree.sha256(params), alpha))
        return lambda rows: Target(torch.full((len(rows), 1), alpha))


class Student(toy.ToyModel):
    """Distillation here moves every number to the mean of what the teacher says of the rows of the Fit."""

    def __init__(self) -> None:
        super().__init__((0.0, 0.0, 0.0))
        self.lessons: list[tuple[Fit, float, float]] = []

    def distil(self, fit: Fit, teach: Teacher, temperature: float = 1.0, share: float = 1.0) -> Fitted:
        self.lessons.append((fit, temperature, share))
        said = torch.cat([teach(rows).logits[:, 0] for rows in fit.batches]).mean()
        return dataclasses.replace(self.fit(dataclasses.replace(fit, batches=[])), params=filled(fit.params, said))


def filled(params: Any, value: Any) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(t, float(value)) for name, t in params.items()}


def run(method: Any, held: Any = None, rounds: int = 2, model: Any = None, start: Start | None = None) -> list[Done]:
    model = model or toy.ToyModel((0.0, 0.0, 0.0))
    engine = InProcess(lambda: method, model, SPLITS, 5)
    return list(federate(method, engine, model, rounds=rounds, seed=5, held=held, start=start))


@pytest.mark.parametrize("held", [None, Held(None), Held()])
def test_without_distillation_it_is_fedavg_to_the_bit(held: Held | None) -> None:
    """`distil: false`, no public texts, or no black box at all: the same cohorts, batches, Fits and means."""
    fields = {"cohort": 1, "epochs": 2, "batch_size": 1, "lr": 0.1, "clip": 1.0}
    method = FedPT(**fields, distil=not (held and held.public))
    states = [done.state for done in run(method, held, rounds=4)]
    averaged = [done.state for done in run(methods.build("fedavg", fields), rounds=4)]
    for state, other in zip(states, averaged, strict=True):
        assert tree.sha256(state.served) == tree.sha256(state.params) == tree.sha256(other.params)
        assert state.loss == other.loss and state.alpha is None
    assert held is None or not held.asked


def test_the_aggregate_is_served_and_its_student_is_sent() -> None:
    """Three numbers; one epoch of the mean: client a has 2 rows, b has 1, so P = (2 P_a + P_b) / 3."""
    held, model = Held(), Student()
    first, second = (d.state for d in run(FedPT(cohort=0, lr=0.3, batch_size=1, distil_epochs=2), held, 2, model))
    plain = run(FedPT(cohort=0, lr=0.3, batch_size=1, distil=False), held, 1)[-1].state
    assert tree.sha256(first.served) == tree.sha256(plain.served), "what is served has no part of the teacher"
    alpha = toy.vector(first.served)[0]
    assert first.alpha == alpha and toy.vector(first.params) == pytest.approx([alpha] * 3)
    digest = tree.sha256(first.served)
    assert held.asked[:2] == [digest, (digest, alpha)], "alpha and teacher are those of the aggregate"
    fit, temperature, share = model.lessons[0]
    assert (temperature, share, fit.clip, fit.optimizer) == (1.0, 1.0, 1.0, AdamW(0.3 / 3))
    assert sorted(row for batch in fit.batches for row in batch) == [0, 0, 1, 1]
    assert [sorted(row for batch in half for row in batch) for half in (fit.batches[:2], fit.batches[2:])] == [
        [0, 1]
    ] * 2
    assert tree.sha256(fit.params) == digest, "the student begins at the aggregate"
    sent = FedPT().send(first, "a")
    assert sent.params is first.params and sent.base == "toy"
    assert first.alpha != second.alpha, "alpha is chosen again in every round"


def test_hyper_parameters_reach_the_lesson() -> None:
    model = Student()
    method = FedPT(cohort=0, batch_size=2, share=0.5, temperature=2.0, distil_lr=7e-3, clip=None, serve="post")
    (done,) = run(method, Held(), 1, model)
    fit, temperature, share = model.lessons[0]
    assert (temperature, share, fit.clip, fit.optimizer) == (2.0, 0.5, None, AdamW(7e-3))
    assert [len(batch) for batch in fit.batches] == [2]
    assert method.result(done.state) is done.state.params
    assert FedPT().result(done.state) is done.state.served
    assert (
        method.choices(done.state) == {"teacher_alpha": done.state.alpha} and FedPT().choices(State({}, {}, "")) == {}
    )


def test_uniform_weights_forget_how_many_rows_there_are() -> None:
    """(1, 3) with 1 row and (5, 7) with 3: weighted by rows (4, 6), evenly (3, 5)."""
    ups = {
        "a": Update({"w": torch.tensor([1.0, 3.0])}, 1, 0.0),
        "b": Update({"w": torch.tensor([5.0, 7.0])}, 3, 0.0),
    }
    env = ServerEnv(toy.ToyModel((0.0, 0.0, 0.0)), ("a", "b"), 0, 1)
    state = State({}, {}, "")
    assert FedPT().average(state, ups, env).served["w"].tolist() == [4.0, 6.0]
    assert FedPT(weights="uniform").average(state, ups, env).served["w"].tolist() == [3.0, 5.0]


def test_a_client_with_another_base_is_lost_and_says_why() -> None:
    model, other = toy.ToyModel((0.0, 0.0, 0.0)), toy.ToyModel((0.0, 0.0, 0.0))
    other.sha256 = "f" * 64  # type: ignore[misc]
    method = FedPT(cohort=0)
    engine = InProcess(lambda: method, other, SPLITS, 5)
    loop = federate(method, engine, model, rounds=1, seed=5)
    with pytest.raises(Exception, match="sha256 toy, and this client has ffffffffffff; give it the server's model"):
        list(loop)


def test_resume_inside_a_distilling_run_gives_equal_bits() -> None:
    method = FedPT(cohort=1, lr=0.1)
    whole = run(method, Held(), 4, Student())
    for stop in (1, 2, 3):
        saved = whole[stop - 1].start
        state = records.decode(records.encode(saved.state), State)
        rest = run(method, Held(), 4, Student(), Start(saved.number, state, saved.versions))
        assert records.encode(rest[-1].state) == records.encode(whole[-1].state)


def test_the_order_of_the_public_texts_is_of_seed_and_round() -> None:
    held = Held(toy.Points(np.arange(30.0).reshape(10, 3)))
    model, again = Student(), Student()
    run(FedPT(cohort=0, batch_size=3), held, 2, model)
    run(FedPT(cohort=0, batch_size=3), held, 2, again)
    orders: list[Sequence[Sequence[int]]] = [fit.batches for fit, _, _ in model.lessons]
    assert orders == [fit.batches for fit, _, _ in again.lessons] and orders[0] != orders[1]


def test_what_it_trains() -> None:
    assert FedPT().adapter() == Lora(8, 16.0, ("all",))
    assert FedPT().accepts(Full()) is None and FedPT().accepts(Lora()) is None
    assert "lora or full, not bottleneck" in str(FedPT().accepts(Bottleneck()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 1.5}, "method.share is 1.5; it must be at least 0 and at most 1"),
        ({"temperature": 0.0}, "method.temperature is 0.0; it must be finite and above 0"),
        ({"distil_epochs": 0}, "method.distil_epochs is 0; it must be at least 1"),
        ({"distil_lr": float("nan")}, "method.distil_lr is nan"),
    ],
)
def test_ranges(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FedPT(**fields)
