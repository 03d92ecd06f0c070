"""One range of alpha, whoever gives it."""

from __future__ import annotations

import math
from typing import Any

import pytest

import trios
from fedpeft.config import load_config
from fedpeft.core.errors import RequestError
from fedpeft.proxy.asking import Limits, asked_of
from fedpeft.proxy.scoring import score
from fedpeft.proxy.settings import ALPHAS, Settings

LIMITS = Limits(16, 8, 60)
WAYS: dict[str, Any] = {
    "settings": lambda alpha: Settings(alpha=alpha),
    "scoring": lambda alpha: score(trios.trio(), [[3, 4]], [1], alpha),
    "request": lambda alpha: asked_of({"prompt": "x", "alpha": alpha}, "completions", LIMITS),
    "configuration": lambda alpha: load_config({"proxy": {"alpha": alpha}}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_range_is_the_same_everywhere(way: str) -> None:
    for alpha in (*ALPHAS, 0.0):
        WAYS[way](alpha)
    for alpha in (math.nextafter(ALPHAS[0], -math.inf), math.nextafter(ALPHAS[1], math.inf), math.inf, math.nan):
        with pytest.raises(RequestError, match="a number from -100 to 100"):
            WAYS[way](alpha)
