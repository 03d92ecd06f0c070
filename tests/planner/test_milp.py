"""Where the exact search stops, and what it says; `test_search.py` has what it finds."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from fedpeft.core.errors import RequestError
from fedpeft.planner import milp


def test_the_milp_stops_by_a_count_and_not_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are the same however busy the machine is: what was found in so many nodes, within the budgets."""
    asked, solve = [], scipy.optimize.milp

    def spy(*args: object, **told: object) -> object:
        asked.append(dict(told["options"]))  # type: ignore[call-overload]
        return solve(*args, **told)

    monkeypatch.setattr(scipy.optimize, "milp", spy)
    monkeypatch.setattr(milp, "NODES", 1)
    memory, seconds = np.random.default_rng(0).random((2, 60, 2)) * [0, 1]
    first, second = (milp.filled(memory + seconds, memory, seconds, 10.0, 9.0) for _ in range(2))
    taken = np.array(first, dtype=bool)
    assert first == second and taken.any()
    assert memory[taken, 1].sum() <= 10 * (1 + 1e-6) and seconds[taken, 1].sum() <= 9 * (1 + 1e-6)
    assert asked[0].keys() == {"mip_rel_gap", "node_limit"} and asked[0]["node_limit"] == 1


def test_no_plan_within_the_limit_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three equations of a market split (Cornuejols and Dawande 1998): no solver finds one in so few nodes."""
    monkeypatch.setattr(milp, "NODES", 3)
    shares = np.random.default_rng(0).integers(0, 100, (3, 30)).astype(float)
    half = shares.sum(axis=1) // 2
    with pytest.raises(RequestError, match=r"no plan was found in 3 nodes .* use the greedy search"):
        milp._solve(np.ones(30), shares, half, half)
    with pytest.raises(RequestError, match="no plan meets all demands; cover fewer weights"):
        milp._solve(np.ones(2), np.ones((1, 2)), [3], [4])
