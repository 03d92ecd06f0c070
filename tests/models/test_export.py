"""Exports are read by plain peft and come back bit for bit; the folder is complete or as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from exports import CARD, LABELS, assert_equal_logits, deltas, lora_model, with_peft
from fedpeft.core import tree
from fedpeft.core.adapter import HeadOnly, Lora
from fedpeft.core.errors import ModelError, RequestError, StoreError
from fedpeft.models import export
from fedpeft.models.export import export_adapter, export_merged, import_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's call

SPECS = {
    "usual": Lora(rank=4, alpha=6.0),
    "odd scale": Lora(rank=49, alpha=1.0),
    "a block": Lora(rank=3, blocks=(1,)),
    "one kind": Lora(rank=3, targets=("value",)),
    "attention output": Lora(rank=3, targets=("output",)),  # shares its last path component with another
    "all": Lora(rank=2, alpha=5.0, targets=("*",)),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("case", SPECS)
def test_peft_loads_an_adapter_with_equal_logits_and_it_comes_back(family: str, case: str, tmp_path: Path) -> None:
    spec = SPECS[case]
    if spec.targets == ("*",):
        spec = replace(spec, targets=tiny.everything(family))
    model = lora_model(family, spec)
    params = tiny.params(model, tiny.place())
    folder = export_adapter(model, params, tmp_path / "out", labels=LABELS, card=CARD)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "fedpeft.json"
    ]  # fmt: skip
    assert_equal_logits(with_peft(family, tiny.saved(family, tmp_path / "base", "float32"), folder), model, params)
    back = import_adapter(folder, model)
    assert tree.sha256(back) == tree.sha256(params)
    assert {n: t.dtype for n, t in back.items()} == {n: t.dtype for n, t in params.items()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_unequal_ranks_keep_the_scale(family: str, tmp_path: Path) -> None:
    """Every module has its own rank, one has none; alpha / rank of the spec applies to all."""
    model = lora_model(family, Lora(rank=4, alpha=6.0, targets=("query", "value", "down")))
    params = tiny.params(model, tiny.place())
    for i, (name, slot) in enumerate(model.slots.items()):
        rank = (4, 0, 7, 1, 4)[i % 5]
        own = tiny.params(model, tiny.place(i), rank=rank, slots=[slot.name])
        params |= {n: t for n, t in own.items() if n.startswith(name)}
    folder = export_adapter(model, params, tmp_path / "out", labels=LABELS, card={})
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert {config["alpha_pattern"][path] / rank for path, rank in config["rank_pattern"].items()} == {1.5}
    assert_equal_logits(with_peft(family, tiny.saved(family, tmp_path / "base", "float32"), folder), model, params)
    assert tree.sha256(import_adapter(folder, model)) == tree.sha256(params)


def test_what_is_written_is_what_peft_writes(tmp_path: Path) -> None:
    """The same keys and shapes as peft's own save, and no key in its configuration that peft does not know."""
    model = lora_model("bert")
    params = tiny.params(model, tiny.place())
    ours = export_adapter(model, params, tmp_path / "out", labels=LABELS, card={})
    loaded = with_peft("bert", tiny.saved("bert", tmp_path / "base", "float32"), ours)
    loaded.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)  # which would look at the hub
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert tree.sha256(theirs) == tree.sha256(load_file(ours / "adapter_model.safetensors"))
    config, known = (json.loads((f / "adapter_config.json").read_text()) for f in (ours, tmp_path / "theirs"))
    assert config.keys() <= known.keys()
    for key in config.keys() - {"target_modules", "modules_to_save", "base_model_name_or_path"}:
        assert config[key] == known[key], key
    assert config["target_modules"] == sorted(known["target_modules"]) == ["query", "value"]
    assert set(config["modules_to_save"]) == set(known["modules_to_save"])


def test_writing_needs_no_peft(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})
import tiny
from fedpeft.models.export import export_adapter, export_merged, import_adapter
model = tiny.model("gpt2", dtype="float32")
params = tiny.params(model, tiny.place())
import_adapter(export_adapter(model, params, {str(tmp_path / "a")!r}, labels=list("abc"), card={{}}), model)
export_merged(model, params, {str(tmp_path / "m")!r}, labels=list("abc"), card={{}})
assert "peft" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_peft_cannot_hold_is_refused_and_the_message_names_merge(tmp_path: Path) -> None:
    model = lora_model("bert")
    params = tiny.params(model, tiny.place())
    alone = {n: t for n, t in params.items() if "head" in n}
    with pytest.raises(ModelError, match="--merge"):
        export_adapter(tiny.model("bert", HeadOnly(), "float32"), alone, tmp_path / "out", labels=LABELS, card={})
    assert not list(tmp_path.iterdir())


def test_a_change_of_the_base_is_kept_in_our_own_form(tmp_path: Path) -> None:
    model = lora_model("bert")
    params = tiny.params(model, tiny.place()) | deltas(model)
    folder = export_adapter(model, params, tmp_path / "out", labels=LABELS, card=CARD)
    card = (folder / "README.md").read_text()
    assert not (folder / "adapter_config.json").exists() and "# Change of" in card and "`--rank N`" in card
    assert json.loads((folder / "fedpeft.json").read_text())["changes_base"] is True
    fresh = export_adapter(model, model.init(tiny.place()), tmp_path / "fresh", labels=LABELS, card=CARD)
    assert json.loads((fresh / "fedpeft.json").read_text())["learnt"] is False
    assert tree.sha256(import_adapter(folder, model)) == tree.sha256(params)


@pytest.mark.parametrize("write", [export_adapter, export_merged])
def test_wrong_requests_are_refused(write: Any, tmp_path: Path) -> None:
    model = lora_model("bert")
    params = tiny.params(model, tiny.place())
    headless = {n: t for n, t in params.items() if "head" not in n}
    for given, labels, message in [
        (params, ["a", "b"], "2 different labels for a head of 3 classes"),
        (params, ["a", "b", "a"], "2 different labels for a head of 3 classes"),
        (headless, LABELS, "no 'head.weight'"),
        (params | {"block.9.query.A": torch.zeros(1, 32)}, LABELS, "does not exist"),
    ]:
        with pytest.raises(ModelError, match=message):
            write(model, given, tmp_path / "out", labels=labels, card={})
    assert not list(tmp_path.iterdir())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("write", [export_adapter, export_merged])
def test_only_an_earlier_export_is_replaced(write: Any, tmp_path: Path) -> None:
    model = lora_model("bert")
    one, two = tiny.params(model, tiny.place()), tiny.params(model, tiny.place(2))
    out = tmp_path / "deep" / "out"
    write(model, one, out, labels=LABELS, card={})
    first = snapshot(out)
    assert write(model, two, out, labels=LABELS, card={}) == out
    assert snapshot(out) != first
    second = snapshot(out)
    with pytest.raises(RequestError, match=r"holds an export of other parameters, .* with --replace"):
        write(model, one, out, labels=LABELS, card={}, replace=False)
    assert snapshot(out) == second
    write(model, two, out, labels=LABELS, card={}, replace=False)  # the same again harms nobody
    assert snapshot(out) == second
    other_form = export_merged if write is export_adapter else export_adapter
    with pytest.raises(RequestError, match="in another form"):
        other_form(model, two, out, labels=LABELS, card={}, replace=False)
    (out / "notes.txt").write_text("mine")
    kept = snapshot(out)
    with pytest.raises(RequestError, match="something else"):
        write(model, one, out, labels=LABELS, card={})
    assert snapshot(out) == kept
    other = tmp_path / "other"
    other.mkdir()
    write(model, one, other, labels=LABELS, card={})  # an empty folder will do
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(RequestError, match="something else"):
        write(model, one, file, labels=LABELS, card={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "file", "other"]
    assert [p.name for p in out.parent.iterdir()] == ["out"], "no drafts are left"


def test_a_failure_half_way_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model("bert")
    params = tiny.params(model, tiny.place())
    out = export_adapter(model, params, tmp_path / "out", labels=LABELS, card={})
    before = snapshot(out)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "model_card", full)
    with pytest.raises(StoreError, match=r"cannot write .*No space left on device"):
        export_adapter(model, params, out, labels=LABELS, card={})
    monkeypatch.undo()
    monkeypatch.setattr(export.os, "rename", broken_rename := RenameOnce())
    with pytest.raises(StoreError, match="cannot write"):
        export_adapter(model, params, out, labels=LABELS, card={})
    monkeypatch.undo()
    assert broken_rename.calls == 3
    assert snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class RenameOnce:
    """`os.rename` whose second call fails: the one that puts the draft in place."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, source: Path, target: Path) -> None:
        self.calls += 1
        if self.calls == 2:
            raise OSError(5, "Input/output error")
        os.replace(source, target)
