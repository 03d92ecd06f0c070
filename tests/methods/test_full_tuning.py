"""Vanilla fine-tuning: a round is plain training and a mean, what travels is the whole model, and whole runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import small
import tiny
from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.config import load_config
from fedpeft.core import tree
from fedpeft.core.adapter import Full, Lora
from fedpeft.core.errors import RequestError
from fedpeft.core.federate import federate
from fedpeft.core.fit import SGD, Fit
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.fedavg import FedAvg
from fedpeft.methods.full import METHOD
from fedpeft.models.export import import_adapter
from fedpeft.planner.cost import train_flops
from fedpeft.planner.device import DEFAULT


def test_a_round_is_plain_training_of_transformers_model_and_the_mean_by_examples() -> None:
    """Two clients of 3 and 5 rows in one batch each: AdamW's first step of every weight, averaged 3 to 5."""
    model = tiny.model("bert", Full())
    start = {name: t.double() for name, t in model.init(tiny.place()).items()}
    model.warm_start(start)
    data = {client: {"train": tiny.examples(tiny.place(n), n)} for client, n in (("a", 3), ("b", 5))}
    method = METHOD(lr=1e-2, head_lr=None, weight_decay=0.1)
    engine = InProcess(lambda: method, model, data, 0, batch=2)
    (done,) = federate(method, engine, model, rounds=1, seed=0)
    ends, losses = zip(*(plain_step(model.weights, start, data[client]["train"]) for client in "ab"), strict=True)
    expected = tree.mean(zip(ends, (3, 5), strict=True))
    assert done.state.loss == pytest.approx((3 * losses[0] + 5 * losses[1]) / 8)
    assert done.state.params.keys() == expected.keys() == start.keys()
    for name, t in done.state.params.items():
        slack = 2e-2 if name.endswith("key.bias") else 1e-6  # its gradient is rounding, of which Adam makes a step
        assert torch.allclose(t, expected[name], atol=slack, rtol=0), name


def plain_step(weights: Any, start: dict[str, Tensor], data: Any) -> tuple[dict[str, Tensor], float]:
    body, head = copy.deepcopy(tiny.module("bert")).eval(), nn.Linear(tiny.WIDTH, 3).double()
    head.load_state_dict({"weight": start["head.weight"], "bias": start["head.bias"]})
    with torch.no_grad():  # the start is in float32
        for name, path in weights.items():
            body.get_parameter(path).copy_(start[name])
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=1e-2, weight_decay=0.1)
    batch = tiny.padded(data, 1)
    states = body(**batch).last_hidden_state
    logits = head(tiny.pooled(states, batch["attention_mask"], "mean"))
    loss = F.cross_entropy(logits, torch.from_numpy(data.labels))
    loss.backward()
    optimizer.step()
    found = {name: body.get_parameter(path).detach() for name, path in weights.items()}
    return found | {"head.weight": head.weight.detach(), "head.bias": head.bias.detach()}, loss.item()


def test_it_brings_its_own_kind_and_fedavg_takes_it_too() -> None:
    assert METHOD().adapter() == Full() and METHOD().lr < FedAvg().lr
    assert METHOD().accepts(Lora()) is not None and FedAvg().accepts(Full()) is None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CACHE", str(folder / "cache"))
        yield small.make_place(folder)


def config(place: Path, **changes: Any) -> dict[str, Any]:
    values = small.config(place, **{"run__rounds": 2, "method__lr": 2e-3, **changes})
    values["method"]["name"], values["adapter"] = "full", {}
    return values


@pytest.fixture(scope="module")
def finished(place: Path) -> app.Run:
    return app.run(config(place), out=place / "full")


def test_a_run_learns_counts_its_costs_and_leaves_what_can_be_used(place: Path, finished: app.Run) -> None:
    manifest, fed = finished.manifest, build(load_config(finished.folder / "config.yaml"))
    size = tree.count(fed.initial)
    assert manifest["trainable_parameters"] == size > 19_000
    assert 0 <= manifest["bytes_down"] - 2 * 4 * 4 * size < 2 * 4 * 20_000  # rounds, cohort, bytes a number; headers
    assert manifest["metrics"]["best"]["test"]["global"]["accuracy"] > 0.7
    assert fed.config.run.cohort_batching == 1, "auto: clients with weights of their own train one after another"
    best = small.checkpoint(finished.folder, "full").best
    assert best is not None and tree.sha256(import_adapter(finished.folder / "adapter", fed.model)) == tree.sha256(best)
    predicted = app.predict(finished.folder, place / "test.jsonl")
    again = config(place, run__init_from=str(finished.folder))
    assert tree.sha256(build(load_config(again)).initial) == tree.sha256(best)
    model = finished.load_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "tiny")
    for row, text in list(zip(predicted, (r["text"] for r in small.rows(42, "test")), strict=True))[:4]:
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0].mean(dim=0)
        assert logits.softmax(dim=0).tolist() == pytest.approx(list(row["probabilities"].values()), abs=1e-5)


def test_it_exports_as_a_whole_model_alone(finished: app.Run, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"adapter\.kind full trains weights of the model itself .* add --merge"):
        app.export(finished.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = app.export(finished.folder, tmp_path / "out", merge=True)
    assert transformers.AutoModelForTokenClassification.from_pretrained(folder).config.num_labels == 3


def test_the_clock_and_the_estimate_count_the_weights(place: Path, finished: app.Run) -> None:
    """Three products a matrix where an adapter has two; LoRA also saves those that only the embeddings ask for.

    The estimate is that of the cohorts that the run will have, the expectation that of a mean client.
    """
    found, bare = app.check(config(place))["estimate"], app.check(small.config(place))["estimate"]
    fed = build(load_config(config(place)))
    rows = fed.whole("train")
    work = fed.model.cost(_all(fed, rows))
    flops = train_flops(fed.shape, *work[:2]) + 2 * work[2]
    mean = flops * 2 / len(fed.clients)  # two epochs of a mean client
    assert found["flops_per_client_and_round"] == pytest.approx(mean, rel=0.03)
    assert 1.4 < found["flops_per_client_and_round"] / bare["flops_per_client_and_round"] < 1.7
    alone = app.check(small.config(place, run__cohort_batching="off"))["estimate"]  # all weights train one by one
    assert found["memory_bytes"] > alone["memory_bytes"]
    line = max(finished_lines(finished), key=lambda own: float(own["simulated_seconds"]))
    seconds = DEFAULT.latency_s + line["bytes_down"] / DEFAULT.down_bytes_per_s
    seconds += line["bytes_up"] / DEFAULT.up_bytes_per_s
    computing = line["simulated_seconds"] - seconds
    per_token = flops / work[0]
    assert computing * DEFAULT.flops_per_s == pytest.approx(line["tokens"] * per_token, rel=0.1)


def _all(fed: Any, rows: Any) -> Fit:
    return Fit(fed.initial, rows, [range(len(rows))], SGD(0.0))


def finished_lines(run: app.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "exchanges.jsonl").read_text().splitlines()]
