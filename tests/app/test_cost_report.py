"""The costs of a run whose large model is known: counted in its folder, shown on its page."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import small
import tiny_lm
from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.app.planning import read_config
from fedpeft.app.proxy_costs import choices_of_alpha, compare_costs, large_model, message_bytes, small_model
from fedpeft.config import load_config
from fedpeft.core import records, wire
from fedpeft.core.exchange import Weights
from fedpeft.planner.cost import all_weights, shape_of, train_flops
from fedpeft.runs.history import group, read_history
from fedpeft.runs.report_costs import proxy_costs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("place")
    tokenizer = tiny_lm.byte_tokenizer()
    for name, blocks in (("little", 2), ("large", 12)):
        tiny_lm.save("llama", tokenizer, folder / name, len(tokenizer), positions=48, blocks=blocks)
    answers = [" good .", " bad film .", " odd ."]
    rows = [{"instruction": f"a {'film' if i % 2 else 'time'} ?", "response": answers[i % 3]} for i in range(48)]
    small.write_rows(folder / "ask.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CACHE", str(folder / "cache"))
        yield folder


def config(place: Path, **changes: Any) -> dict[str, Any]:
    """Three clients, all of them in two rounds of two epochs, LoRA on every matrix."""
    values: dict[str, Any] = {
        "model": {"name": str(place / "little"), "device": "cpu"},
        "task": {
            "name": "ask", "train": str(place / "ask.jsonl"), "test": str(place / "ask.jsonl"), "format": "generate",
            "template": "{instruction}", "max_length": 40, "generate_rows": 0,
        },
        "partition": {"kind": "iid", "clients": 3},
        "method": {"name": "fedpt", "cohort": 0, "epochs": 2, "lr": 1e-2},
        "adapter": {"kind": "lora", "rank": 3, "targets": ["query", "key", "value", "output", "gate", "up", "down"]},
        "run": {"rounds": 2, "threads": 1},
        "proxy": {"large": str(place / "large"), "alpha": 1.0},
    }  # fmt: skip
    return small.changed(values, changes)


@pytest.fixture(scope="module")
def finished(place: Path) -> app.Run:
    return app.run(config(place), out=place / "run")


def test_a_run_leaves_both_bills(place: Path, finished: app.Run) -> None:
    found, fed = finished.manifest["proxy_costs"], build(load_config(finished.folder / "config.yaml"))
    proxy, direct = found["proxy"], found["direct"]
    lengths = np.concatenate([fed.data[c]["train"].lengths for c in fed.clients]).astype(int)
    tokens, pairs = 4 * int(lengths.sum()), 4 * int((lengths**2).sum())  # two rounds of two epochs, everybody
    assert found["counted"] == {"clients": 3, "turns": 6, "tokens": tokens}
    assert proxy["adapter_bytes"] == finished.manifest["bytes_down"] + finished.manifest["bytes_up"]
    whole = sum(p.numel() for p in fed.base.module.parameters()) * 4 + fed.model.lm.own_bytes  # type: ignore[union-attr]
    assert proxy["once_bytes"] == whole
    numbers = sum(t.numel() for t in fed.initial.values())
    assert proxy["client_flops"] == train_flops(fed.shape, tokens, pairs) + 6 * numbers * tokens
    assert direct["client_flops"] / proxy["client_flops"] == pytest.approx(6, rel=0.1), "six times as many blocks"
    assert direct["adapter_bytes"] / proxy["adapter_bytes"] == pytest.approx(6, rel=0.05)
    assert direct["server_flops"] == 0 == proxy["server_flops"], "alpha was given, and nothing distilled"
    test = fed.whole("test")
    prompt = round(float(test.starts.mean()))  # type: ignore[union-attr]
    assert found["requests"] == {"prompt_tokens": prompt, "answer_tokens": round(float(test.lengths.mean()) - prompt)}
    extra = proxy["token_flops"] - direct["token_flops"]
    saved = direct["client_flops"] - proxy["client_flops"] - proxy["server_flops"]
    assert found["break_even_tokens"] == pytest.approx(saved / extra) and found["lacks"] is None


def test_the_page_shows_them(finished: app.Run) -> None:
    page = (finished.folder / "report.html").read_text()
    assert "costs and saves" in page and "operations of a served token" in page and ", counted" in page
    assert page.count("proxy_costs") == 0, "the manifest's own section leaves them out"
    (g,) = group([read_history(finished.folder)])
    shown = proxy_costs(g)
    assert "served tokens that has used up" in shown
    told = finished.manifest["proxy_costs"]
    worse = {**told, "large": "<b>", "break_even_tokens": None, "lacks": "a & b"}
    path = finished.folder / "manifest.json"
    kept = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(kept) | {"proxy_costs": worse}))
        (g,) = group([read_history(finished.folder)])
        shown = proxy_costs(g)
    finally:
        path.write_text(kept)
    assert "&lt;b&gt;" in shown and "and so does every served token. Not counted: a &amp; b." in shown


@pytest.mark.parametrize("name", wire.WIRES)
def test_a_message_of_the_large_model_is_as_long_as_one_that_is_encoded(place: Path, name: str) -> None:
    fed = build(load_config(config(place)))
    own = small_model(fed)
    assert own is not None
    model = large_model(fed, own, shape_of(read_config(str(place / "large")), lm_head=True))
    params = {}
    for w in all_weights(model.shape):
        params |= {f"{w.name}.A": torch.zeros(3, w.d_in), f"{w.name}.B": torch.zeros(w.d_out, 3)}
    record = Weights(params)
    exact = len(records.encode(record if name == "float32" else wire.pack(record, name)))
    assert message_bytes(model, name) == pytest.approx(exact, rel=6e-3)  # block numbers of two digits


def test_the_large_model_is_tuned_in_the_same_kinds_of_weights(place: Path) -> None:
    """All where the small one has all, though the families have different ones; else those that it has."""
    gpt2 = shape_of({"model_type": "gpt2", "n_layer": 5, "n_embd": 16, "n_head": 2, "vocab_size": 60}, lm_head=True)
    for targets, kinds in (
        (["query", "key", "value", "output", "gate", "up", "down"], {"query", "key", "value", "output", "up", "down"}),
        (["query", "gate"], {"query"}),
    ):
        fed = build(load_config(config(place) | {"adapter": {"kind": "lora", "rank": 3, "targets": targets}}))
        own = small_model(fed)
        assert own is not None
        ranks = large_model(fed, own, gpt2).ranks
        assert {name.split(".")[2] for name in ranks} == kinds and len(ranks) == 5 * len(kinds)
        assert set(ranks.values()) == {3}


LINE = {"client": "000", "round": 1, "steps": 4, "bytes_down": 10, "bytes_up": 10, "tokens": 100, "pairs": 900}


def test_distillation_is_counted_where_its_texts_are_given(place: Path) -> None:
    values = config(place)
    values["proxy"]["public"] = str(place / "ask.jsonl")
    fed = build(load_config(values))
    lines = [LINE, {**LINE, "round": 3}, {**LINE, "steps": 0, "tokens": 0}]
    without, found = compare_costs(fed, lines), compare_costs(fed, lines, fed.whole("validation"))
    assert without is not None and found is not None
    assert without["lacks"] == "the server's distillation" and found["lacks"] is None
    assert found["counted"] == {"clients": 1, "turns": 2, "tokens": 200}
    assert found["proxy"]["server_flops"] > 3 * without["proxy"]["server_flops"], "three rounds"


def test_what_cannot_be_compared_is_left_out(place: Path) -> None:
    (place / "bare").mkdir()
    for large in (None, "http://localhost:9", str(place / "bare")):
        fed = build(load_config(config(place, proxy__large=large)))
        assert compare_costs(fed, [LINE]) is None
    assert compare_costs(build(load_config(config(place))), []) is None
    fed = build(load_config(config(place) | {"adapter": {"kind": "full"}}))
    assert compare_costs(fed, [LINE]) is None


@pytest.mark.parametrize(
    ("alpha", "serve", "distilled", "choices"),
    [("auto", "pre", 0, 1), ("auto", "pre", 3, 3), ("auto", "post", 3, 4), (0.5, "post", 3, 0)],
)
def test_alpha_is_chosen_for_every_teacher_and_for_what_is_served(
    alpha: Any, serve: str, distilled: int, choices: int
) -> None:
    fed: Any = SimpleNamespace(
        config=SimpleNamespace(proxy=SimpleNamespace(alpha=alpha)), method=SimpleNamespace(serve=serve)
    )
    assert choices_of_alpha(fed, distilled) == choices
