"""Adapters and merged models as folders that plain peft and plain transformers load.

| file | content |
|---|---|
| `adapter_config.json`, `adapter_model.safetensors` | a LoRA for token classification, as peft writes it |
| `config.json`, `model.safetensors` | instead of these two where the adapter is merged |
| `fedpeft.json` | what `import_adapter` needs to give back the very params, and how token logits are pooled |
| `README.md` | the model card |

and the tokenizer's files. Where several slots share a module (GPT-2's query, key and value), PEFT knows one LoRA of
summed rank: A is all their A below each other, B has their B as blocks, in the rows of each slot's outputs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.adapter import Lora
from fedpeft.core.errors import ModelError, RequestError, StoreError
from fedpeft.core.tree import Params
from fedpeft.models.adapters import delta, head
from fedpeft.models.card import model_card, published
from fedpeft.models.families import Slot
from fedpeft.models.hf import HFModel
from fedpeft.models.merge import HEADS, check_labels, merge, token_classifier
from fedpeft.models.peft_folder import CONFIG, NOTE, PREFIX, WEIGHTS, import_adapter, plain, read_json

__all__ = ["export_adapter", "export_merged", "import_adapter", "merge"]

CARD = "README.md"


def export_adapter(
    model: HFModel,
    params: Params,
    folder: Path,
    *,
    labels: Sequence[str],
    card: Mapping[str, Any],
    replace: bool = True,
) -> Path:
    """Write a LoRA with its head so that `peft.PeftModel.from_pretrained` loads it; gives the folder.

    Args:
        model: whose adapter `params` are.
        params: LoRA factors and head.
        folder: does not exist, is empty, or holds an earlier export.
        labels: names of the classes, in the order of the head's rows.
        card: facts for the model card; see `card.model_card`.
        replace: whether an earlier export of other parameters, or in another form, may go; the same may always.

    Raises:
        ModelError: params that PEFT cannot hold; the message names `--merge`.
        RequestError: a folder that holds something else.
        StoreError: the folder cannot be written.
    """
    names = check_labels(model, params, labels)
    loras = [name.removesuffix(".A") for name in params if name.endswith(".A")]
    folded = [name for name in params if name.startswith(delta.PREFIX)]
    if folded:
        raise ModelError(f"a PEFT adapter cannot hold a change of the base ({folded[0]}); export with --merge")
    if not any(params[f"{name}.A"].shape[0] for name in loras):
        raise ModelError("PEFT has no adapter that is a head alone; export with --merge")
    shell = token_classifier(model.base, names)
    inner = f"{shell.prefix}." if shell.prefix else ""
    modules = _by_module(model, loras)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, slots in modules.items():
        a, b = _joined(slots, params)
        if len(a):
            tensors[f"{PREFIX}{inner}{path}.lora_A.weight"] = a
            tensors[f"{PREFIX}{inner}{path}.lora_B.weight"] = b
            ranks[f"{inner}{path}"] = len(a)
    for name, t in (("weight", params[head.WEIGHT]), ("bias", params[head.BIAS])):
        tensors[f"{PREFIX}{shell.head}.{name}"] = t.detach().cpu().contiguous()
    config = _lora_config(model, shell.module, ranks)
    note = _note(model, params, "adapter", names) | {
        "modules": {path: [[s.name, len(params[f"{s.name}.A"])] for s in slots] for path, slots in modules.items()}
    }
    with _new_folder(Path(folder), note, replace) as draft:
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
        _write_json(draft / CONFIG, config)
        _finish(model, draft, "adapter", names, card)
    return Path(folder)


def export_merged(
    model: HFModel,
    params: Params,
    folder: Path,
    *,
    labels: Sequence[str],
    card: Mapping[str, Any],
    replace: bool = True,
) -> Path:
    """Write base, adapter and head as one model that plain transformers loads; gives the folder.

    Arguments and errors are those of `export_adapter`; base deltas and a head alone are allowed.
    """
    names = check_labels(model, params, labels)
    merged = merge(model, params, names)
    alone = params.keys() <= {head.WEIGHT, head.BIAS}
    note = _note(model, params, "head" if alone else "merged", names)
    with _new_folder(Path(folder), note, replace) as draft:
        merged.save_pretrained(draft)
        _finish(model, draft, "merged", names, card)
    return Path(folder)


def _by_module(model: HFModel, names: Sequence[str]) -> dict[str, list[Slot]]:
    """The slots of each module path, in the order of their outputs."""
    modules: dict[str, list[Slot]] = {}
    for slot in sorted((model.places[name] for name in names), key=lambda s: (s.offset, s.name)):
        modules.setdefault(slot.path, []).append(slot)
    return dict(sorted(modules.items()))


def _joined(slots: Sequence[Slot], params: Params) -> tuple[Tensor, Tensor]:
    """(A, B) of one module: (sum of ranks, d_in) and (width, sum of ranks)."""
    a = torch.cat([params[f"{s.name}.A"].detach().cpu() for s in slots])
    b = a.new_zeros(slots[0].width, len(a))
    column = 0
    for slot in slots:
        own = params[f"{slot.name}.B"]
        b[slot.offset : slot.offset + slot.d_out, column : column + own.shape[1]] = own.detach().cpu()
        column += own.shape[1]
    return a, b


def _lora_config(model: HFModel, module: Any, ranks: Mapping[str, int]) -> dict[str, Any]:
    """What peft reads: every module has the scale alpha / rank of the spec, whatever its own rank."""
    assert isinstance(model.spec, Lora), "LoRA factors belong to a LoRA"
    usual = max(ranks.values(), key=list(ranks.values()).count)
    odd = {path: rank for path, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "TOKEN_CLS",
        "base_model_name_or_path": published(model.base.source),
        "inference_mode": True,
        "r": usual,
        "lora_alpha": _alpha(model, usual),
        "lora_dropout": model.spec.dropout,
        "target_modules": _targets(module, set(ranks)),
        "fan_in_fan_out": any(type(module.get_submodule(path)).__name__ == "Conv1D" for path in ranks),
        "bias": "none",
        "modules_to_save": list(HEADS),
        "rank_pattern": odd,
        "alpha_pattern": {path: _alpha(model, rank) for path, rank in odd.items()},
    }


def _targets(module: Any, paths: set[str]) -> list[str]:
    """The last parts of the paths where these mean no other module, else the whole paths."""
    short = {path.rsplit(".", 1)[-1] for path in paths}
    meant = {path for path, _ in module.named_modules() if path.rsplit(".", 1)[-1] in short}
    return sorted(short if meant == paths else paths)


def _alpha(model: HFModel, rank: int) -> float | int:
    """The numerator of PEFT that makes the scale the model's own at this rank."""
    assert isinstance(model.spec, Lora), "LoRA factors belong to a LoRA"
    return plain(model.spec.alpha if rank == model.spec.rank else model.scale * rank)


def _note(model: HFModel, params: Params, form: str, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "format": 1,
        "form": form,  # adapter, merged, or head: a merged model whose base is unchanged
        "family": model.base.family,
        "pooling": model.pooling,
        "labels": list(labels),
        "classes": len(labels),
        "adapter": {"kind": model.spec.kind, **dataclasses.asdict(model.spec)},
        "params_sha256": tree.sha256(params),
    }


def _finish(model: HFModel, draft: Path, form: str, labels: Sequence[str], card: Mapping[str, Any]) -> None:
    """Tokenizer and card, which both forms have."""
    if model.base.tokenizer is not None:
        model.base.tokenizer.save_pretrained(draft)
    text = model_card(form, model.base.source, labels, model.pooling, model.base.tokenizer, card)
    (draft / CARD).write_text(text, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(folder: Path, note: Mapping[str, Any], replace: bool) -> Iterator[Path]:
    """A draft beside the folder, which takes its place when it is complete."""
    target = folder.expanduser().resolve()
    _check_target(target, note, replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            yield draft
            _write_json(draft / NOTE, {**note, "files": _files(draft)})
            _swap(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot write {target}: {error}; check the path and the disk, then try again") from error


def _swap(draft: Path, target: Path) -> None:
    """Rename the draft to the target; what was there goes when the new folder is in place."""
    old = draft.with_suffix(".old")
    earlier = target.exists()
    if earlier:
        os.rename(target, old)
    try:
        os.rename(draft, target)
    except OSError:
        if earlier:
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_target(target: Path, note: Mapping[str, Any], replace: bool) -> None:
    """Raise RequestError where something lies that must not go without being asked about."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    earlier = read_json(target / NOTE) if (target / NOTE).is_file() else {}
    held = earlier.get("files")
    if held is None or not set(_files(target)) <= {*held, NOTE}:
        raise RequestError(f"{target} holds something else than an earlier export; choose a new folder")
    if not replace and any(earlier.get(key) != note[key] for key in ("params_sha256", "form")):
        raise RequestError(
            f"{target} holds an export of other parameters, or in another form; choose a new folder, or let it go "
            "with --replace"
        )


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
