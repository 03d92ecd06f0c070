"""Changes of the base that pile up: who has which, and that equal versions have equal bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedpeft.core import changes, tree
from fedpeft.core.changes import Changed, Copy
from fedpeft.core.tree import Params


def step(seed: int, rank: int = 1, d: int = 6) -> dict[str, Tensor]:
    draw = np.random.default_rng(seed)
    return {
        "delta.s.left": torch.from_numpy(draw.normal(size=(d, rank))),
        "delta.s.right": torch.from_numpy(draw.normal(size=(rank, d))),
    }


def dense(total: Params) -> Tensor:
    if "delta.s.dense" in total:
        return total["delta.s.dense"]
    return total["delta.s.left"] @ total["delta.s.right"]


def test_a_client_that_missed_steps_ends_with_the_same_bits() -> None:
    """Whatever it missed: single steps, many, or everything; news cost at most the whole."""
    states, steps = [Changed()], [step(i, 1 + i % 2) for i in range(9)]
    for own in steps:
        states.append(changes.advanced(states[-1], own, ()))
    expected = sum(own["delta.s.left"] @ own["delta.s.right"] for own in steps)
    assert torch.allclose(dense(states[-1].total), torch.as_tensor(expected), atol=1e-12)
    for have in range(10):
        for now in range(have, 10):
            copy = Copy(states[have].total, have)
            news = changes.news_for(replace(states[now], known={"a": have}), "a")
            got = changes.kept_up(copy, news)
            assert tree.sha256(got.total) == tree.sha256(states[now].total) and got.version == now
            cost = sum(map(tree.count, news.steps)) + tree.count(news.whole or {})
            assert cost <= tree.count(states[now].total)
            if have == now:
                assert cost == 0


def test_factors_become_a_matrix_where_that_is_smaller() -> None:
    two, three = changes.grown(step(0, 2), step(1, 0)), changes.grown(step(0, 2), step(1, 1))
    assert two.keys() == {"delta.s.left", "delta.s.right"} and three.keys() == {"delta.s.dense"}


def test_an_answer_says_which_version_its_client_has() -> None:
    first = changes.advanced(Changed(), step(0), ("a",))
    assert first.known == {"a": 0} and changes.news_for(first, "a").version == 1
    second = changes.advanced(first, step(1), ("b",))
    assert second.known == {"a": 0, "b": 1}
    assert len(changes.news_for(second, "b").steps) == 1 and changes.news_for(second, "nobody").whole is not None


def test_a_step_of_another_precision_joins_a_dense_total() -> None:
    """Factors come in the dtype of answers; the total keeps its own, so that clients' copies keep equal bits."""
    whole = changes.grown({}, step(0, 6))
    assert whole.keys() == {"delta.s.dense"} and whole["delta.s.dense"].dtype == torch.float64
    more = changes.grown(whole, {name: t.float() for name, t in step(1).items()})
    assert more["delta.s.dense"].dtype == torch.float64
    expected = dense(whole) + step(1)["delta.s.left"] @ step(1)["delta.s.right"]
    assert torch.allclose(more["delta.s.dense"], expected, atol=1e-6)


def test_a_delta_of_factors_has_the_scale_on_the_left() -> None:
    b, a = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    made = changes.as_delta({"s.B": b, "s.A": a, "head.weight": b}, 0.5)
    assert made.keys() == {"delta.s.left", "delta.s.right"} and changes.dense_name("s") == "delta.s.dense"
    np.testing.assert_array_equal(made["delta.s.left"] @ made["delta.s.right"], [[1.5, 2.0], [3.0, 4.0]])
