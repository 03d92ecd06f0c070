"""The bounds of the demo model on the demo task, one seed; `scripts/train_demo_model.py --evaluate` runs three."""

from pathlib import Path

import pytest

from fedpeft.data.demo import load_demo

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "src" / "fedpeft" / "assets" / "demo"


@pytest.mark.slow
def test_lora_on_the_demo_model_reaches_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test accuracy of seed 0: centralised .10 above random weights at matched scales, federated .62.

    The centralised bound, .70, is for the mean of three seeds (.701, see the model card); one seed may miss it by one
    standard error of 1,007 test rows, .014.
    """
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from demo_model import evaluation

    scores = {name: values[0] for name, values in evaluation.evaluate(ASSETS, load_demo(), seeds=(0,)).items()}
    assert scores["centralised"] >= 0.70 - 0.014
    assert scores["centralised"] >= scores["centralised, random weights"] + 0.10
    assert scores["federated"] >= 0.62
