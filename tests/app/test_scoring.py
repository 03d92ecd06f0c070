"""Scores against a plain computation from predictions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small
from fedpeft import app
from fedpeft.app.federation import Federation, build
from fedpeft.app.scoring import evaluate, score_global
from fedpeft.config import load_config
from fedpeft.core.exchange import ClientEnv
from fedpeft.core.memories import InMemory
from fedpeft.models.hf import HFModel
from fedpeft.runs.store import RunFolder


@pytest.fixture(scope="module")
def local(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, RunFolder]:
    """A finished run with personal models; only three of six clients had their turn."""
    folder = tmp_path_factory.mktemp("scoring") / "local"
    app.run(small.config(place, method__name="local", method__cohort=3, run__rounds=1), out=folder)
    return build(load_config(folder / "config.yaml")), RunFolder.open(folder)


def accuracy(fed: Federation, params: Mapping[str, torch.Tensor], client: str, split: str) -> list[bool]:
    data = fed.data[client][split]
    return [bool(ok) for ok in fed.model.logits(params, data).argmax(dim=1) == torch.from_numpy(data.labels)]


def test_global_and_personal_scores_are_those_of_plain_predictions(local: tuple[Federation, RunFolder]) -> None:
    fed, folder = local
    checkpoint = small.checkpoint(folder.path, "local")
    assert len(checkpoint.versions) == 3
    params = fed.method.result(checkpoint.state)
    scored = evaluate(fed, params, "test", memories=folder.memories(), versions=checkpoint.versions, number=1, round=1)
    assert scored is not None
    right: dict[str, list[bool]] = {"global": [], "personalized": []}
    for client in fed.clients:
        env = ClientEnv(client, fed.model, fed.data[client], fed.config.run.seed, 1)
        memory = fed.method.init_client(env)
        if client in checkpoint.versions:
            memory = small.memory(folder.path, client, "local")
        own = {
            "global": accuracy(fed, params, client, "test"),
            "personalized": accuracy(fed, fed.method.personal(params, memory), client, "test"),
        }
        for who, values in own.items():
            right[who] += values
            if values:
                assert scored.clients[client][who]["accuracy"] == pytest.approx(np.mean(values))
    for who, values in right.items():
        assert scored.metrics[who]["accuracy"] == pytest.approx(np.mean(values))
    assert scored.selected("accuracy") == scored.metrics["personalized"]["accuracy"]
    assert scored.bytes_down > 6 * 4 * 1123 and scored.bytes_up > 0


def test_baselines_are_those_of_the_labels(local: tuple[Federation, RunFolder]) -> None:
    fed, _ = local
    scored = evaluate(fed, fed.initial, "validation", memories=InMemory(), versions={}, number=0, round=0)
    assert scored is not None
    train, labels = fed.whole("train").labels, fed.whole("validation").labels
    assert scored.metrics["majority"]["accuracy"] == pytest.approx(np.mean(labels == np.bincount(train).argmax()))
    right = [
        label == np.bincount(fed.data[c]["train"].labels).argmax()
        for c in fed.clients
        for label in fed.data[c]["validation"].labels
    ]
    assert scored.metrics["label_prior"]["accuracy"] == pytest.approx(np.mean(right))


def test_a_client_scores_its_own_model_and_not_the_global_one(
    local: tuple[Federation, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    fed, _ = local
    scored, score = list[int](), HFModel.score

    def watched(model: HFModel, params: Any, data: Any) -> Any:
        scored.append(len(data))
        return score(model, params, data)

    monkeypatch.setattr(HFModel, "score", watched)
    evaluate(fed, fed.initial, "test", memories=InMemory(), versions={}, number=0, round=0)
    assert scored == [len(fed.data[c]["test"]) for c in fed.clients if len(fed.data[c]["test"])]


def test_personal_scores_can_be_left_out(local: tuple[Federation, RunFolder]) -> None:
    fed, _ = local
    where: dict[str, Any] = {"memories": InMemory(), "versions": {}, "number": 0, "round": 0}
    scored = evaluate(fed, fed.initial, "test", personal=False, **where)
    assert scored is not None and scored.metrics.keys() == {"global", "majority", "label_prior"}
    assert scored.bytes_down == scored.bytes_up == 0
    assert scored.selected("accuracy") == scored.metrics["global"]["accuracy"]


def test_client_that_cannot_score_is_told_and_left_out(
    local: tuple[Federation, RunFolder], monkeypatch: Any, caplog: Any
) -> None:
    fed, _ = local
    whole = type(fed.method).personal
    calls: list[int] = []

    def personal(self: Any, params: Any, memory: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return whole(self, params, memory)

    monkeypatch.setattr(type(fed.method), "personal", personal)
    scored = evaluate(fed, fed.initial, "test", memories=InMemory(), versions={}, number=0, round=0)
    assert scored is not None
    assert sum("personalized" in own for own in scored.clients.values()) == 5
    assert "client 001 has no test score: RuntimeError: no memory" in caplog.text


def test_pass_over_all_rows_equals_one_per_client(local: tuple[Federation, RunFolder]) -> None:
    fed, _ = local
    sums = score_global(fed, fed.initial, "test")
    for client in fed.clients:
        own = fed.model.score(fed.initial, fed.data[client]["test"])
        assert torch.equal(sums[client]["confusion"], own["confusion"]) and sums[client]["n"] == own["n"]
        assert float(sums[client]["loss"]) == pytest.approx(float(own["loss"]), rel=1e-5)


def test_split_without_rows_has_no_score(place: Path) -> None:
    fed = build(load_config(small.config(place, task__test=None)))
    assert evaluate(fed, fed.initial, "test", memories=InMemory(), versions={}, number=0, round=0) is None
