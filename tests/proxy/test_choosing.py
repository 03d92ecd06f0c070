"""How a row draws: the order of its filters, and temperatures near zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedpeft.proxy.choosing import Choice, choose, probabilities
from fedpeft.proxy.settings import Settings

SHARES = torch.tensor([[0.4, 0.3, 0.2, 0.1]])


def row(**values: Any) -> Choice:
    return Choice(Settings(**{"alpha": 1.0, "max_tokens": 1, "temperature": 1.0, **values}), [0], 4)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2, "top_p": 0.5}, [1.0, 0.0, 0.0, 0.0]),  # of (4, 3)/7 the first is enough; of all four it is not
        ({"top_p": 0.6, "min_p": 0.8}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_k": 3}, [4 / 9, 3 / 9, 2 / 9, 0.0]),
    ],
)
def test_each_filter_acts_on_what_the_one_before_left(filters: dict[str, Any], kept: list[float]) -> None:
    assert probabilities(SHARES.log(), [row(**filters)])[0].tolist() == pytest.approx(kept)


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-40, 1e-300, 5e-324])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    shares = probabilities(SHARES.log(), [row(temperature=temperature)])[0].tolist()
    assert shares == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-30)
    assert choose(SHARES.log(), [row(temperature=temperature)]) == [0]
