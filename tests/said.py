"""A task of questions and answers over a small Llama, with a GPT-2 in the role of the large model that it steers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small
import tiny_lm
from fedpeft.core.rng import rng_for


def rows(n: int, place: str) -> list[dict[str, Any]]:
    """A word that decides the answer."""
    rng = rng_for(0, "proxying", place)
    words = [str(rng.choice(["film", "time", "once"])) for _ in range(n)]
    return [{"instruction": f"a {word} ?", "response": " good ." if word == "film" else " bad ."} for word in words]


def make(place: Path) -> Path:
    """Both models with one tokenizer, and the texts."""
    tokenizer = tiny_lm.byte_tokenizer()
    for family in ("llama", "gpt2"):
        tiny_lm.save(family, tokenizer, place / f"proxy-{family}", len(tokenizer), positions=64)
    for name, n in (("said", 48), ("said_validation", 12), ("said_test", 12)):
        small.write_rows(place / f"{name}.jsonl", rows(n, name))
    public = [*rows(4, "public"), {"instruction": "a film ?"}, {"instruction": "it was ?", "response": None}]
    small.write_rows(place / "said_public.jsonl", public)
    return place


def config(place: Path, **changes: Any) -> dict[str, Any]:
    """Four clients and two rounds of fedpt; changes as `section__key`."""
    values = small.config(place, model__name=str(place / "proxy-llama"), partition__kind="iid", run__rounds=2)
    values["partition"]["clients"] = 4
    values["method"] = {"name": "fedpt", "cohort": 2, "epochs": 2, "batch_size": 8, "lr": 2e-2}
    values["task"] = {
        "name": "said", "train": str(place / "said.jsonl"), "validation": str(place / "said_validation.jsonl"),
        "test": str(place / "said_test.jsonl"), "format": "generate", "template": "{instruction}", "max_length": 32,
        "generate_rows": 3, "generate_tokens": 4,
    }  # fmt: skip
    values["proxy"] = {"large": str(place / "proxy-gpt2")}
    return small.changed(values, changes)
