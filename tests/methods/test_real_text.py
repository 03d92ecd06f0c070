"""FedPT on text: code of the standard library, new to both models of the embedded pair.

The small model alone stays behind the untuned large one; steered by it, the large one comes nearer to what it would be
after tuning. Bounds on mean losses per token of test windows.
"""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_small_model_that_has_read_code_steers_one_that_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    gap = importlib.import_module("benchmarks.gap")
    cell = gap.measure("code", "lora", 0, Namespace(rows=None, rounds=None, steps=15))
    test, alpha = cell["test"], cell["alpha"]
    assert test["base_large"] < test["base_small"] - 0.1
    assert 0.25 <= alpha <= 1
    proxy = test["proxy"][gap.GRID.index(alpha)]
    assert proxy < test["base_large"] - 0.05 and proxy < test["tuned_small"] - 0.1
    assert test["tuned_large"] < proxy
    assert cell["adapter_numbers"] == {"small": 11_520, "large": 55_296}  # 46,080 and 221,184 bytes
