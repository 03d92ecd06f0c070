"""Server optimisers by hand, and what they are for: drift that averages away only with control variates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.maths.drift import Control, Momentum, Step, average, damped_momentum, peptao, reference, visit


def p(value: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([value], dtype=torch.float64)}


def number(params: Mapping[str, Tensor]) -> float:
    return float(params["w"])


FIRST = {"a": Step(p(0.6), 3, 2), "b": Step(p(0.2), 1, 1)}
SECOND = {"a": Step(p(0.3975), 3, 2), "d": Step(p(0.2975), 1, 2)}
DEFAULTS = {"beta": 0.9, "drift_weight": 1.0}


def test_two_rounds_of_peptao() -> None:
    """Golden values of the specification, section 9."""
    w, m, controls = peptao(p(1.0), FIRST, Momentum(rate=0.05), {}, beta=0.9, drift_weight=1.0)
    assert (number(w), number(m.v), number(m.control)) == pytest.approx((0.4975, 0.05, 0.2857143), abs=1e-7)
    assert {k: number(c.params) for k, c in controls.items()} == pytest.approx({"a": 0.2, "b": 0.8})
    assert m.rate == pytest.approx(0.0495)
    w, m, controls = peptao(w, SECOND, m, controls, beta=0.9, drift_weight=1.0)
    assert (number(w), number(m.v), number(m.control)) == pytest.approx((0.2410823, 0.0575, 0.1444444), abs=1e-7)
    assert controls.keys() == {"a", "b", "d"} and number(controls["b"].params) == pytest.approx(0.8)


def test_the_difference_of_two_steps_as_input_of_the_momentum() -> None:
    """Round 1: g = 0. Round 2: delta went from .5 to .5 - .3725 = .1275."""
    w, m, controls = peptao(p(1.0), FIRST, Momentum(rate=0.05), {}, beta=0.9, drift_weight=0.0, difference=True)
    assert (number(w), number(m.v), number(m.previous)) == pytest.approx((0.5, 0.0, 0.5))
    w2, m2, _ = peptao(w, SECOND, m, controls, beta=0.9, drift_weight=0.0, difference=True)
    delta = 0.5 - (0.75 * 0.3975 + 0.25 * 0.2975)
    v = 0.1 * (0.5 - delta)
    assert (number(m2.v), number(m2.previous)) == pytest.approx((v, delta))
    assert number(w2) == pytest.approx(0.5 - delta - 0.0495 * v)


def test_without_rate_and_drift_it_is_averaging() -> None:
    w, m, controls = peptao(p(1.0), FIRST, Momentum(rate=0.0), {}, beta=0.9, drift_weight=0.0)
    w, m, controls = peptao(w, SECOND, m, controls, beta=0.9, drift_weight=0.0)
    assert number(w) == number(average(SECOND)) and m.rate == 0.0
    w, m = damped_momentum(p(1.0), FIRST, Momentum(rate=1.0), 0.0)
    assert number(w) == pytest.approx(number(average(FIRST)), abs=1e-12)
    *_, none = peptao(p(1.0), FIRST, Momentum(rate=0.0), {}, beta=0.9, drift_weight=1.0, keep_controls=False)
    assert not none


def test_damped_momentum_by_hand() -> None:
    """delta = .5, .5: v = .05, .095; w = 1 - .05 = .95, then .855 with answers half a unit below."""
    w, m = damped_momentum(p(1.0), FIRST, Momentum(rate=1.0), 0.9)
    assert (number(w), number(m.v)) == pytest.approx((0.95, 0.05))
    w, m = damped_momentum(w, {"a": Step(p(0.45), 7, 1)}, m, 0.9)
    assert (number(w), number(m.v), m.rate) == pytest.approx((0.855, 0.095, 1.0))


@given(st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 9), st.integers(1, 5)), min_size=2, max_size=5))
def test_a_correction_over_all_devices_is_zero(devices: list[tuple[float, int, int]]) -> None:
    """With everybody taking part, the correction of the second round leaves the mean alone."""
    steps = {str(i): Step(p(value), n, k) for i, (value, n, k) in enumerate(devices)}
    again = {name: Step(p(0.3 * number(s.params)), s.examples, s.steps) for name, s in steps.items()}
    w, m, controls = peptao(p(1.0), steps, Momentum(rate=0.0), {}, beta=0.9, drift_weight=1.0)
    w, m, controls = peptao(w, again, m, controls, beta=0.9, drift_weight=1.0)
    assert number(w) == pytest.approx(number(average(again)), abs=1e-9)


def test_the_order_of_devices_matters_to_the_reference_alone() -> None:
    start = Momentum(v=p(0.1), control=p(0.2), previous=p(0.4), rate=0.05)
    controls = {"a": Control(p(0.5), 6.0), "b": Control(p(-0.3), 1.0)}
    turned = dict(reversed(FIRST.items()))
    ends = [peptao(p(1.0), steps, start, controls, beta=0.9, drift_weight=1.0)[0] for steps in (FIRST, turned)]
    assert number(ends[0]) == pytest.approx(number(ends[1]), abs=1e-12)
    ends = [reference(p(1.0), steps, start, controls, lr=0.1, share=0.5)[0] for steps in (FIRST, turned)]
    assert abs(number(ends[0]) - number(ends[1])) > 1e-3


def test_the_chained_loop_of_the_reference() -> None:
    """Golden values of the specification: ten equal devices, and three that pull apart, in both orders."""
    w, v = visit(p(0.0), p(0.0), p(1.0), 1.0, [(1, p(0.0))] * 10)
    assert (number(w), number(v)) == pytest.approx((-1.7757046, 0.4138106), abs=1e-7)
    w, v = visit(p(0.0), p(1.0), p(0.0), 0.1, [(1, p(1.0)), (1, p(0.0)), (1, p(-1.0))])
    assert (number(w), number(v)) == pytest.approx((-0.3219667, 1.383), abs=1e-7)
    w, v = visit(p(0.0), p(1.0), p(0.0), 0.1, [(1, p(-1.0)), (1, p(0.0)), (1, p(1.0))])
    assert (number(w), number(v)) == pytest.approx((-0.0146333, 0.243), abs=1e-7)


def test_two_rounds_of_the_reference_by_hand() -> None:
    """With plain floats, step by step as the specification writes it."""
    lr, share, weights = 0.1, 0.5, {"a": 0.75, "b": 0.25}
    w, m, controls = reference(p(1.0), FIRST, Momentum(rate=0.05), {}, lr=lr, share=share)
    c_a, c_b = 0.4 / (2 * lr), 0.8 / (1 * lr)
    c = share * (2 * c_a + 1 * c_b) / 3
    assert number(w) == pytest.approx(0.5) and number(m.previous) == pytest.approx(0.5)
    assert number(controls["a"].params) == pytest.approx(c_a) and number(m.control) == pytest.approx(c)
    answers = {"a": Step(p(0.45), 3, 2), "b": Step(p(0.4), 1, 1)}
    w2, m2, controls = reference(w, answers, m, controls, lr=lr, share=share)
    new_a, new_b = c_a - c + 0.05 / (2 * lr), c_b - c + 0.1 / lr
    c2 = c + share * (2 * (new_a - c_a) + (new_b - c_b)) / 3
    wbar = 0.75 * 0.45 + 0.25 * 0.4
    x, u, end, velocity, rate = wbar, 0.0, 0.0, 0.0, 0.99 * 0.05
    for name, own in (("a", new_a), ("b", new_b)):
        u = 0.9 * u + 0.1 * (0.5 - (0.5 - wbar)) + c2 - own
        x -= rate * u
        end, velocity = end + weights[name] * x, velocity + weights[name] * u
    assert (number(w2), number(m2.v), number(m2.control), m2.rate) == pytest.approx((end, velocity, c2, rate))
    _, bare, none = reference(w, answers, m, {}, lr=lr, share=share, keep_controls=False)
    assert not none and number(bare.v) == pytest.approx(0.1 * wbar * (0.75 + 0.25 * 1.9))


def test_two_devices_that_pull_apart_are_visited_in_turn() -> None:
    """F = (w -+ 1)^2 / 2, SGD .3, one step: with control variates the server finds 0, without them it swings."""
    ends = {}
    for drift_weight in (0.0, 1.0):
        w, m, controls = p(1.0), Momentum(rate=0.0), {}
        for round in range(200):
            target = 1.0 if round % 2 == 0 else -1.0
            answer = p(number(w) - 0.3 * (number(w) - target))
            steps = {"ab"[round % 2]: Step(answer, 1, 1)}
            w, m, controls = peptao(w, steps, m, controls, beta=0.9, drift_weight=drift_weight)
        ends[drift_weight] = abs(number(w))
    assert ends[1.0] < 1e-9
    assert ends[0.0] == pytest.approx(0.1764706, abs=1e-6)


# --- softmax regression over a hundred devices ----------------------------------------------------------------------

DEVICES, COHORT, ROUNDS, CLASSES, FEATURES = 100, 10, 100, 3, 20


def test_drift_control_helps_on_softmax_regression() -> None:
    """The toy of the specification's section 7, one seed of four: loss at least .01 lower, half the deviation."""
    rng = np.random.default_rng(0)
    means = 0.5 * rng.normal(size=(CLASSES, FEATURES))
    labels = rng.integers(0, CLASSES, size=2490)
    x = means[labels] + 1.2 * rng.normal(size=(2490, FEATURES))
    test_labels = rng.integers(0, CLASSES, size=4000)
    test_x = means[test_labels] + 1.2 * rng.normal(size=(4000, FEATURES))
    parts = deal(labels, rng)
    tail = {}
    for name in ("fedavg", "peptao"):
        order = np.random.default_rng(1)
        w, m, controls = {"w": torch.zeros(CLASSES, FEATURES + 1, dtype=torch.float64)}, Momentum(rate=0.05), {}
        losses = []
        for _ in range(ROUNDS):
            cohort = order.choice(DEVICES, size=COHORT, replace=False)
            steps = {str(i): train(w["w"].numpy(), x[parts[i]], labels[parts[i]], order) for i in cohort}
            if name == "fedavg":
                w = average(steps)
            else:
                w, m, controls = peptao(w, steps, m, controls, **DEFAULTS)
            losses.append(loss(w["w"].numpy(), test_x, test_labels))
        tail[name] = np.array(losses[-20:])
    assert tail["peptao"].mean() <= tail["fedavg"].mean() - 0.01
    assert tail["peptao"].std() <= 0.5 * tail["fedavg"].std()


def deal(labels: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Dirichlet(5) sizes and Dirichlet(1) labels per device; rows of a class that ran out come from the others."""
    sizes = np.maximum(1, np.floor(rng.dirichlet(np.full(DEVICES, 5.0)) * len(labels))).astype(int)
    left = [list(rng.permutation(np.flatnonzero(labels == k))) for k in range(CLASSES)]
    parts = []
    for size in sizes:
        wish = rng.dirichlet(np.ones(CLASSES))
        rows = []
        for _ in range(size):
            able = wish * np.array([bool(rows_of) for rows_of in left])
            if able.sum() < 1e-12:
                able = np.array([len(rows_of) for rows_of in left], dtype=float)
            if not able.sum():
                break
            rows.append(left[rng.choice(CLASSES, p=able / able.sum())].pop())
        parts.append(np.array(rows))
    return parts


def shares(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    scores = x @ w[:, :-1].T + w[:, -1]
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def loss(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    return float(-np.log(shares(w, x)[np.arange(len(y)), y]).mean())


def train(start: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> Step:
    """Two epochs of Adam at 4e-2 in batches of 8, moments from zero."""
    w, m, v, t = start.copy(), np.zeros_like(start), np.zeros_like(start), 0
    for _ in range(2):
        order = rng.permutation(len(x))
        for i in range(0, len(x), 8):
            rows = order[i : i + 8]
            error = shares(w, x[rows])
            error[np.arange(len(rows)), y[rows]] -= 1
            g = error.T @ np.c_[x[rows], np.ones(len(rows))] / len(rows)
            t += 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w - 4e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return Step({"w": torch.from_numpy(w)}, len(x), t)


def test_the_servers_rate_falls_to_its_floor_and_no_further() -> None:
    w, m, controls = p(1.0), Momentum(rate=0.05), {}
    rates = []
    for _ in range(800):
        w, m, controls = peptao(w, FIRST, m, controls, beta=0.9, drift_weight=0.0)
        rates.append(m.rate)
    assert rates[0] == pytest.approx(0.0495) and rates[600] == pytest.approx(0.05 * 0.99**601)
    assert rates[-1] == rates[-2] == pytest.approx(1e-4)
