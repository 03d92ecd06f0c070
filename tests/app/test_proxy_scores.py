"""`fedpeft evaluate` of runs with a large model: its scores steered and alone, and those of clients' own proxies."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.app.holding import SCORES, hold
from fedpeft.config import load_config
from fedpeft.core.errors import RequestError
from fedpeft.models.load import load_base
from fedpeft.proxy import backends
from fedpeft.runs.store import RunFolder
from said import config


@pytest.fixture(scope="module")
def local(models: Path) -> app.Run:
    """Every client for itself; the last two never had their turn."""
    values = config(models, run__rounds=1)
    values["method"] = {"name": "local", "lr": 2e-2, "cohort": 2, "epochs": 3}
    return app.run(values, out=models / "run-local")


def losses(scores: Any) -> dict[str, float]:
    return {who: values["loss"] for who, values in scores.items()}


def test_the_large_model_is_scored_steered_and_alone_as_the_run_did(ran: app.Run) -> None:
    found, best = app.evaluate(ran.folder), ran.metrics["best"]
    for split in ("validation", "test"):
        assert found[split].keys() == {"global", "base", "proxy", "large"}
        assert losses(found[split]) == pytest.approx(losses(best[split]), abs=1e-6)
        assert found[split]["proxy"]["alpha"] == ran.manifest["proxy"]["alpha"]
    assert found["rounds"] == {"global": best["round"], "proxy": best["round"]} and "not_scored" not in found
    assert len(list((ran.folder / SCORES).iterdir())) == 2, "what the large model said was there already"


def test_rows_of_a_file_and_without_the_large_model(ran: app.Run, models: Path) -> None:
    of_file, test = app.evaluate(ran.folder, models / "said_test.jsonl"), ran.metrics["best"]["test"]
    assert of_file["data"].keys() == {"global", "proxy", "large"}
    assert losses(of_file["data"]) == pytest.approx({who: test[who]["loss"] for who in of_file["data"]}, abs=1e-5)
    assert len(list((ran.folder / SCORES).iterdir())) == 2, "nothing is kept of a file's rows"
    alone = app.evaluate(ran.folder, large=False)
    assert alone["test"].keys() == {"global", "base"} and alone["rounds"].keys() == {"global"}


def test_a_large_model_of_few_candidates_has_no_losses(ran: app.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held = hold(build(load_config(ran.folder / "config.yaml")))
    assert held is not None
    weak: Any = type("Weak", (), {"caps": dataclasses.replace(held.large.caps, full=False, block=False)})()
    monkeypatch.setattr(backends, "open_backend", lambda *given, **named: weak)
    monkeypatch.setattr("fedpeft.app.holding._check", lambda held: None)
    found = app.evaluate(ran.folder)
    assert found["test"].keys() == {"global", "base"} and found["rounds"].keys() == {"global"}
    assert "tells a few candidates alone" in found["not_scored"]["proxy"]


def test_another_or_an_absent_large_model_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "proxy-gpt2", tmp_path / "large")
    values = config(models, run__rounds=1, proxy__large=str(tmp_path / "large"), task__generate_rows=0)
    done = app.run(values, out=tmp_path / "run")
    shutil.rmtree(tmp_path / "large")
    load_base.__globals__["_load"].cache_clear()
    with pytest.raises(RequestError, match=r"proxy\.large: there is no .*large"):
        app.evaluate(done.folder)
    assert len(app.predict(done.folder, models / "said_test.jsonl")) == 12, "which needs no large model"
    (tmp_path / "large").mkdir()
    with pytest.raises(RequestError, match=r"large.*; or leave the large model out \(--without-large\)"):
        app.evaluate(done.folder)
    (tmp_path / "large").rmdir()
    shutil.copytree(models / "proxy-llama", tmp_path / "large")
    with pytest.raises(RequestError, match=r"was .*large@.*, and is .*large@.* now; restore it, or .*--without-large"):
        app.evaluate(done.folder)
    assert app.evaluate(done.folder, large=False)["test"].keys() == {"global", "base"}


def test_own_proxies_are_the_mean_over_clients_at_an_alpha_of_their_own(local: app.Run) -> None:
    found = app.evaluate(local.folder, own_proxies=True)
    fed = build(load_config(local.folder / "config.yaml"))
    held = hold(fed)
    assert held is not None
    folder, each = RunFolder.open(local.folder), []
    checkpoint = folder.load_checkpoint(fed.method.state)
    assert checkpoint is not None
    for client in fed.clients:
        version = checkpoint.versions.get(client)
        own = fed.initial if version is None else folder.memories().load(client, version, fed.method.memory).params
        curve = held.curve(own)
        each.append({**held.scores(own, curve.best, "test")["proxy"], "alpha": curve.best})
    told = found["test"]["personalized_proxy"]
    assert told["clients"] == len(fed.clients) == 4
    assert found["rounds"]["personalized_proxy"] == found["rounds"]["ensemble_proxy"] == checkpoint.round
    for key in ("loss", "perplexity", "alpha"):
        assert told[key] == pytest.approx(statistics.fmean(own[key] for own in each), rel=1e-5)
    assert each[0]["alpha"] > 0 == each[-1]["alpha"], "a client that was not trained steers nothing"
    assert found["validation"]["personalized_proxy"]["loss"] < found["validation"]["large"]["loss"]
    assert "personalized_proxy" not in app.evaluate(local.folder)["test"]


def test_the_ensemble_of_own_proxies_adds_the_mean_of_their_changes(local: app.Run, models: Path) -> None:
    """Its loss from logits, added up by hand."""
    fed = build(load_config(local.folder / "config.yaml"))
    large = build(load_config(config(models, model__name=str(models / "proxy-gpt2"), method__lr=1e-3)))
    folder = RunFolder.open(local.folder)
    checkpoint = folder.load_checkpoint(fed.method.state)
    assert checkpoint is not None
    own = [folder.memories().load(c, v, fed.method.memory).params for c, v in checkpoint.versions.items()]
    own += [fed.initial] * (len(fed.clients) - len(own))
    told = app.evaluate(local.folder, own_proxies=True)["test"]["ensemble_proxy"]
    data, total, count = fed.whole("test"), 0.0, 0
    for row in range(len(data)):
        base = fed.model.token_logits(None, data, [row]).double()
        change = sum(fed.model.token_logits(params, data, [row]) - base for params in own) / len(own)
        z = large.model.token_logits(None, data, [row]) + told["alpha"] * change
        said = torch.from_numpy(data.tokens[row][int(data.starts[row]) :].astype("int64"))  # type: ignore[index]
        total += float(torch.nn.functional.cross_entropy(z, said, reduction="sum"))
        count += len(said)
    assert told["alpha"] > 0 and told["clients"] == 4 and told["loss"] == pytest.approx(total / count, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"large": False}, "own proxies steer the run's large model, and there is none here"),
        ({"data": "said_test.jsonl"}, r"own proxies are scored on the run's own rows, not on said_test\.jsonl"),
    ],
)
def test_own_proxies_of_what_has_none(options: dict[str, Any], message: str, local: app.Run, ran: app.Run) -> None:
    with pytest.raises(RequestError, match=message):
        app.evaluate(local.folder, **options, own_proxies=True)
    with pytest.raises(RequestError, match="clients of fedpt have no models of their own to steer with"):
        app.evaluate(ran.folder, **options, own_proxies=True)
