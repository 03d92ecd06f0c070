"""Adapters and merged models as folders that plain peft and plain transformers load.

| file | content |
|---|---|
| `adapter_config.json`, `adapter_model.safetensors` | an adapter as peft has it (see `layouts.py`) |
| `adapter_model.safetensors` alone | any other adapter, under fedpeft's own names of parameters |
| `config.json`, `model.safetensors` | instead of these two where the adapter is merged |
| `fedpeft.json` | what `import_adapter` needs to give back the very params, and how token logits are pooled |
| `README.md` | the model card |

and the tokenizer's files.
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

from safetensors import SafetensorError
from safetensors.torch import save_file

from fedpeft.core import pairs, tree
from fedpeft.core.adapter import Lora, Prefix
from fedpeft.core.errors import RequestError, StoreError
from fedpeft.core.tree import Params
from fedpeft.models.adapters import delta, head
from fedpeft.models.adapters.prompt import TOKENS
from fedpeft.models.card import model_card, published
from fedpeft.models.factored import factored
from fedpeft.models.hf import HFModel
from fedpeft.models.layouts import layout_of
from fedpeft.models.merge import check_labels, merge
from fedpeft.models.peft_folder import CONFIG, FORMAT, NOTE, WEIGHTS, import_adapter, read_json

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
    beside: Mapping[str, Any] | None = None,
    rank: int | None = None,
) -> Path:
    """Write an adapter with its head, so that `peft.PeftModel.from_pretrained` loads it where PEFT has its kind.

    Args:
        model: whose adapter `params` are.
        params: the adapter and, where the format has one, the head.
        folder: does not exist, is empty, or holds an earlier export.
        labels: names of the classes, in the order of the head's rows.
        card: facts for the model card; see `card.model_card`.
        replace: whether an earlier export of other parameters, or in another form, may go; the same may always.
        beside: further files by name, plain data to be written as JSON.
        rank: write the nearest LoRA of this rank in the place of what was trained, base deltas included.

    Raises:
        ModelError: params that only a merged model holds, in which case the message names `--merge`; a rank that
            cannot be had.
        RequestError: a folder that holds something else.
        StoreError: the folder cannot be written.
    """
    names = check_labels(model, params, labels)
    told: dict[str, Any] = {}
    if rank is not None:
        found = factored(model, params, rank)
        model, params, told = found.model, found.params, {"factored": found.facts()}
        card = {**card, "factored": {**found.facts(), "scores": "of what was trained, before it was cut to this rank"}}
    layout = layout_of(model, params, names)
    changed = any(name.startswith(delta.PREFIX) for name in params)
    told |= {"changes_base": True} if changed else {}
    if isinstance(model.spec, Lora) and not changed and not pairs.learnt(params):
        told["learnt"] = False
    note = {**_note(model, params, layout.form, names), **layout.note, **told}
    with _new_folder(Path(folder), note, replace) as draft:
        save_file(dict(layout.tensors), draft / WEIGHTS, metadata={"format": "pt"})
        if layout.config is not None:
            _write_json(draft / CONFIG, layout.config)
        prompt = len(params[TOKENS]) if TOKENS in params else 0
        _finish(model, draft, _card_form(model, params, layout.form), names, card, prompt, beside)
    return Path(folder)


def export_merged(
    model: HFModel,
    params: Params,
    folder: Path,
    *,
    labels: Sequence[str],
    card: Mapping[str, Any],
    replace: bool = True,
    beside: Mapping[str, Any] | None = None,
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
        _finish(model, draft, "merged" if model.lm is None else "speaking_merged", names, card, beside=beside)
    return Path(folder)


def _note(model: HFModel, params: Params, form: str, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "form": form,  # adapter (of PEFT), own, merged, or head: a merged model whose base is unchanged
        "family": model.base.family,
        "base": published(model.base.source),  # None: a model of the package
        "base_precision": model.base.precision,  # in training; what is merged has the full weights
        "pooling": model.pooling,
        "labels": list(labels),
        "classes": len(labels),
        "adapter": {"kind": model.spec.kind, **dataclasses.asdict(model.spec)},
        "params_sha256": tree.sha256(params),
    }


def _card_form(model: HFModel, params: Params, form: str) -> str:
    """What the card explains: whole weights, a prefix, an adapter without a head and a change of the base have words of
    their own."""
    if any(name.startswith(delta.PREFIX) for name in params):
        return "folded"
    if model.lm is not None:
        return "speaking" if form == "adapter" else "own"
    if head.WEIGHT not in params:
        return "bare"
    if model.weights:
        return "full"
    return "prefix" if form == "adapter" and isinstance(model.spec, Prefix) else form


def _finish(
    model: HFModel,
    draft: Path,
    form: str,
    labels: Sequence[str],
    card: Mapping[str, Any],
    prompt: int = 0,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Tokenizer and card, which both forms have; `prompt` is the number of tokens that peft puts before the text."""
    if model.base.tokenizer is not None:
        model.base.tokenizer.save_pretrained(draft)
    text = model_card(form, model.base.source, labels, model.pooling, model.base.tokenizer, card, prompt)
    (draft / CARD).write_text(text, encoding="utf-8")
    for file, value in (beside or {}).items():
        _write_json(draft / file, value)


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
