"""The head: pooling, classes per client, and the token classifiers of transformers as its oracle."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from fedpeft.core.adapter import HeadOnly
from fedpeft.models.adapters import Rows, head


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "distilbert"])
def test_logits_equal_a_token_classifier_of_transformers(family: str, tmp_path: Path) -> None:
    model = tiny.model(family, HeadOnly())
    params = tiny.params(model, tiny.place())
    data = tiny.examples(tiny.place(1), 9)
    reference = tiny.token_classifier(tiny.saved(family, tmp_path), 3)
    linear = getattr(reference, "classifier", None) or reference.score
    linear.load_state_dict({"weight": params["head.weight"], "bias": params["head.bias"]})
    with torch.no_grad():
        expected = tiny.plain_logits(reference, data, model.pooling, pad=1)
    assert (model.logits(params, data) - expected).abs().max() < 1e-6
    assert expected.std() > 0.01


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0], [2.0], [9.0]], [[4.0], [6.0], [8.0]]])
    lengths = torch.tensor([2, 3])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert head.pool(hidden, mask, lengths, last=False).tolist() == [[1.5], [6.0]]
    assert head.pool(hidden, mask, lengths, last=True).tolist() == [[2.0], [8.0]]


def test_a_fresh_head_is_small_and_has_no_bias() -> None:
    params = head.init(50, 400, tiny.place())
    assert params["head.weight"].shape == (50, 400) and not params["head.bias"].any()
    assert params["head.weight"].std().item() == pytest.approx(0.02, rel=0.02)


def test_clients_with_fewer_classes_never_predict_the_others() -> None:
    rng = np.random.default_rng(0)
    weight, bias = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    weight[0, :2] = torch.from_numpy(rng.normal(size=(2, 4)))  # client 0 has two classes
    weight[1] = torch.from_numpy(rng.normal(size=(3, 4)))
    bias[1] = torch.tensor([0.1, 0.2, 0.3])
    states = torch.from_numpy(rng.normal(size=(3, 4))).float()
    layer = {head.WEIGHT: weight, head.BIAS: bias}
    got = head.apply(layer, states, Rows(torch.tensor([1, 0, 1])), [2, 3])
    assert got[1, 2] == -math.inf
    assert torch.allclose(got[1, :2], weight[0, :2] @ states[1])
    assert torch.allclose(got[[0, 2]], states[[0, 2]] @ weight[1].T + bias[1])
    alone = head.apply(layer, states, Rows(None, 0), [2, 3])  # a part that has rows of this client only
    assert alone.shape == (3, 2)
    assert torch.allclose(alone, states @ weight[0, :2].T)
