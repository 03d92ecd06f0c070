"""What proxy-tuning is held against where both models can be opened: each alone, untrained, federated and central."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import small
import tiny_lm
from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.config import load_config

SIZES = {"little": 2, "large": 5}  # blocks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, tokenizer = tmp_path_factory.mktemp("place"), tiny_lm.byte_tokenizer()
    for name, blocks in SIZES.items():
        tiny_lm.save("llama", tokenizer, folder / name, len(tokenizer), positions=48, blocks=blocks)
    rows = [{"instruction": "a film ?" if i % 2 else "a time ?", "response": " good ."} for i in range(40)]
    small.write_rows(folder / "ask.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CACHE", str(folder / "cache"))
        yield folder


def config(place: Path, model: str, method: str) -> dict[str, Any]:
    file = str(place / "ask.jsonl")
    task = {"name": "ask", "train": file, "test": file, "format": "generate", "template": "{instruction}"}
    return {
        "model": {"name": str(place / model), "device": "cpu"},
        "task": task | {"max_length": 40, "generate_rows": 2, "generate_tokens": 4},
        "partition": {"kind": "iid", "clients": 3},
        "method": {"name": method, "lr": 1e-2, "epochs": 2} | ({"cohort": 0} if method == "fedavg" else {}),
        "run": {"rounds": 2, "threads": 1},
    }


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("method", ["fedavg", "centralized"])
def test_each_model_alone(model: str, method: str, place: Path) -> None:
    """LoRA learns the answer; the report has a line of the untrained model, whose loss is transformers' own."""
    done = app.run(config(place, model, method), out=place / f"{model}-{method}")
    scores = done.metrics["best"]["test"]
    assert scores["global"]["perplexity"] < 0.7 * scores["base"]["perplexity"]
    assert "the untrained base" in (done.folder / "report.html").read_text()
    assert done.manifest["bytes_down"] > 0

    fed = build(load_config(done.folder / "config.yaml"))
    assert fed.model.blocks == SIZES[model]
    plain, test = transformers.AutoModelForCausalLM.from_pretrained(place / model).eval(), fed.whole("test")
    total = count = 0.0
    assert test.starts is not None
    with torch.no_grad():
        for tokens, start in zip(test.tokens, test.starts.tolist(), strict=True):
            ids = torch.from_numpy(tokens).long()[None]
            logits = plain(input_ids=ids).logits[0, start - 1 : -1]
            total += F.cross_entropy(logits, ids[0, start:], reduction="sum").item()
            count += len(tokens) - start
    assert scores["base"]["loss"] == pytest.approx(total / count, rel=1e-5)
