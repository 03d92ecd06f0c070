"""Folders of PEFT adapters, read: those that `export` wrote and those that peft wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.adapter import Lora
from fedpeft.core.errors import FitError, ModelError
from fedpeft.models.adapters import head
from fedpeft.models.adapters.mixed import MixedPromptAdapter
from fedpeft.models.adapters.prompt import TOKENS
from fedpeft.models.families import Slot, key_value_size
from fedpeft.models.hf import HFModel
from fedpeft.models.merge import HEADS

NOTE, CONFIG, WEIGHTS = "fedpeft.json", "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1  # of fedpeft.json
PROMPTS = "prompt_embeddings"  # PEFT's name of virtual tokens
PREFIX = "base_model.model."  # what peft puts before every module path
UNKNOWN_LORA = ("use_dora", "use_qalora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication")
UNSEEN = {"bottleneck": ("activation",), "lpt": ("length",)}  # by kind: settings that no shape of a parameter shows
SOURCES = "sources_sha256"
Modules = Mapping[str, list[tuple[str, int]]]  # by path: the slots that share the module, with their ranks


def import_adapter(folder: Path, model: HFModel) -> dict[str, Tensor]:
    """The params that `export_adapter` wrote, bit for bit, or those of a LoRA, prefix or prompt that peft wrote.

    A LoRA of peft is taken over module by module; on a fused module (GPT-2's c_attn) every slot gets the same A. Its
    head is taken where there is one. A merged export gives its head where nothing else had been trained.

    Args:
        folder: an export, or the folder of a PEFT adapter.
        model: on the same base, with the same alpha / rank, activation, length or sources where its kind has these.

    Raises:
        ModelError: a folder, an adapter or modules that this model cannot take; the message says which.
    """
    folder = Path(folder)
    note = read_json(folder / NOTE) if (folder / NOTE).is_file() else {}
    if note and note.get("format") != FORMAT:
        raise ModelError(
            f"{folder / NOTE} is damaged or of another version: its format is {note.get('format')!r}, not {FORMAT}; "
            "export the adapter again, or read it with the fedpeft that wrote it"
        )
    form = note.get("form", "adapter")
    if form == "head":
        params = _head_of_merged(folder)
    elif form == "own":
        _check_settings(note, model, folder)
        params = _read_tensors(folder / WEIGHTS)
    elif form == "adapter":
        params = _from_peft(folder, model, note)
    else:
        raise ModelError(
            f"{folder} holds a merged model, whose adapter cannot be told from its base; give it as model.name"
        )
    try:
        model.check_params(params)
    except FitError as error:
        raise ModelError(f"{folder} does not fit this model: {error}") from None
    return params


def unseen(model: HFModel) -> dict[str, Any]:
    """What the outputs of a model's adapter depend on besides its parameters and their shapes."""
    found = {key: getattr(model.spec, key) for key in UNSEEN.get(model.spec.kind, ())}
    if isinstance(model.adapter, MixedPromptAdapter):  # by content, as folders are elsewhere on other machines; a
        found[SOURCES] = sorted(tree.sha256({"source": one}) for one in model.adapter.sources)  # mixture has no order
    return found


def _check_settings(note: Mapping[str, Any], model: HFModel, folder: Path) -> None:
    """Raise ModelError where parameters under our own names would give other outputs in this model."""
    try:
        told = {**note["adapter"], SOURCES: note.get(SOURCES)}
        kind = told["kind"]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{folder / NOTE} is damaged ({error!r}); export the adapter again") from None
    if kind != model.spec.kind:
        raise ModelError(
            f"{folder} holds an adapter of kind {kind!r}, this model's is {model.spec.kind!r}; set adapter.kind to "
            f"{kind!r}"
        )
    for key, own in unseen(model).items():
        if told.get(key) == own:
            continue
        if key == SOURCES:
            raise ModelError(
                f"{folder}: its prompt was trained with other sources than this model's; name the same runs in "
                "adapter.sources"
            )
        raise ModelError(
            f"{folder}: its adapter was trained with adapter.{key} {told.get(key)!r}, this model has {own!r}; set "
            f"adapter.{key} to {told.get(key)!r}"
        )


def _modules(note: Mapping[str, Any], model: HFModel, folder: Path) -> Modules:
    """What an export says about its modules; ModelError where this model has other ones, or another scale."""
    try:
        spec = note["adapter"]
        rank, alpha = int(spec["rank"]), float(spec["alpha"])
        modules = {str(p): [(str(name), int(n)) for name, n in own] for p, own in note["modules"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / NOTE} is damaged ({error!r}); export the adapter again") from None
    if isinstance(model.spec, Lora):
        _check_scale(alpha / rank, rank, alpha, model, folder)
    for path, own in modules.items():
        for name, _ in own:
            if name not in model.places or model.places[name].path != path:
                raise ModelError(
                    f"{folder}: its adapter acts on {name!r}, which this model does not have; "
                    "take the base model that it was trained on, and adapter.targets with that projection"
                )
    return modules


def _from_peft(folder: Path, model: HFModel, note: Mapping[str, Any]) -> dict[str, Tensor]:
    config, tensors = read_json(folder / CONFIG), _read_tensors(folder / WEIGHTS)
    kind = config.get("peft_type")
    if kind in ("PREFIX_TUNING", "PROMPT_TUNING"):
        return _virtual(folder, model, config, tensors)
    if kind != "LORA":
        raise ModelError(f"{folder} holds a {kind} adapter of PEFT; give a LORA, a PREFIX_TUNING or a PROMPT_TUNING")
    modules = _modules(note, model, folder) if note else None
    if modules is None:
        _check_lora(config, model, folder)
    params = _take_head(tensors, config, model, folder)
    for path in sorted({key.split(".lora_")[0] for key in tensors if ".lora_" in key}):
        a, b = (tensors.pop(f"{path}.lora_{side}.weight", None) for side in "AB")
        if a is None or b is None:
            raise ModelError(f"{folder}: {path} has no lora_A.weight and lora_B.weight; give a LoRA of linear layers")
        params |= _split(path, a, b, model, modules)
    if tensors:
        raise ModelError(f"{folder} holds {min(tensors)!r}, which this model has no place for; give a plain LoRA")
    dtype = params[head.WEIGHT].dtype if head.WEIGHT in params else torch.float32
    for name in (name for own in (modules or {}).values() for name, rank in own if rank == 0):  # PEFT knows no rank 0
        slot = model.places[name]
        params[f"{name}.A"] = torch.zeros(0, slot.d_in, dtype=dtype)
        params[f"{name}.B"] = torch.zeros(slot.d_out, 0, dtype=dtype)
    return params


def _virtual(folder: Path, model: HFModel, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prefix in all layers, or a prompt, with its head."""
    weight = tensors.pop(PROMPTS, None)
    if weight is None or config.get("prefix_projection"):
        raise ModelError(f"{folder} has no plain {PROMPTS!r}; give an adapter without a projection")
    bare = {name.removeprefix("base_model."): t for name, t in tensors.items()}
    params = _take_head(bare, config, model, folder)
    if bare:
        raise ModelError(f"{folder} holds {min(bare)!r}, which this model has no place for; give a plain adapter")
    if config["peft_type"] == "PROMPT_TUNING":
        return params | {TOKENS: weight}
    heads, size = key_value_size(model.base.module.config)
    if weight.shape[1] != model.blocks * 2 * heads * size:
        raise ModelError(
            f"{folder}: a row of its prefix has {weight.shape[1]} numbers, this model needs "
            f"{model.blocks} x 2 x {heads} x {size}; take the base model that it was trained on"
        )
    layers = weight.view(len(weight), model.blocks, 2, heads, size).permute(1, 2, 0, 3, 4)
    return params | {f"prefix.{block}": layer.contiguous() for block, layer in enumerate(layers)}


def _check_lora(config: Mapping[str, Any], model: HFModel, folder: Path) -> None:
    used = [key for key in UNKNOWN_LORA if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise ModelError(
            f"{folder}: its LoRA uses {used[0]} ({config[used[0]]}), which this model cannot apply; "
            "train it without, or merge it into its base with peft and give that as model.name"
        )
    rank, alpha = config["r"], config["lora_alpha"]
    _check_scale(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank, rank, alpha, model, folder)


def _check_scale(scale: float, rank: int, alpha: float, model: HFModel, folder: Path) -> None:
    if abs(scale - model.scale) > 1e-9 * abs(scale):
        raise ModelError(
            f"{folder}: its LoRA is scaled by {scale:g}, this model's by {model.scale:g}; "
            f"set adapter.rank to {rank} and adapter.alpha to {plain(scale * rank)}"
        )


def _split(path: str, a: Tensor, b: Tensor, model: HFModel, modules: Modules | None) -> dict[str, Tensor]:
    """The factors of one module of PEFT as those of our slots."""
    pieces = path.removeprefix(PREFIX).split(".")
    known = {slot.path for slot in model.places.values()} if modules is None else modules.keys()
    inner = next((p for i in range(len(pieces)) if (p := ".".join(pieces[i:])) in known), None)
    if inner is None:
        raise ModelError(
            f"the adapter changes the module {'.'.join(pieces)!r}, which is no projection of this model; take the base "
            "model that it was trained on"
        )
    params: dict[str, Tensor] = {}
    if modules is None:
        for slot in _covering(inner, model):
            params[f"{slot.name}.A"] = a.clone()
            params[f"{slot.name}.B"] = b[slot.offset : slot.offset + slot.d_out].clone()
        return params
    row = 0
    for name, rank in modules[inner]:
        slot, rows = model.places[name], slice(row, row + rank)
        params[f"{name}.A"] = a[rows].clone()
        params[f"{name}.B"] = b[slot.offset : slot.offset + slot.d_out, rows].clone()
        row += rank
    return params


def _covering(path: str, model: HFModel) -> list[Slot]:
    """Slots that together are a whole module: one that the spec names, one of the family, or all that share it."""
    own = {s.name: s for s in (*model.slots.values(), *model.places.values()) if s.path == path}
    whole = next((s for s in own.values() if s.d_out == s.width), None)
    return [whole] if whole is not None else list(own.values())


def _take_head(
    tensors: dict[str, Tensor], config: Mapping[str, Any], model: HFModel, folder: Path
) -> dict[str, Tensor]:
    """The head, taken out of PEFT's tensors; empty where there is none."""
    keys = [key for key in tensors if key.removeprefix(PREFIX).split(".")[0] in HEADS]
    if not keys:
        return {}
    weight = next((key for key in keys if key.removeprefix(PREFIX) in {f"{h}.weight" for h in HEADS}), None)
    task = config.get("task_type")
    if weight is None or not (task == "TOKEN_CLS" or (task == "SEQ_CLS" and model.pooling == "last")):
        raise ModelError(
            f"{folder}: its head ({keys[0]}, task {task}) is not linear on the pooled last hidden state; give an "
            "adapter for token classification, or one without modules_to_save"
        )
    found = {head.WEIGHT: tensors.pop(weight)}
    bias = tensors.pop(f"{weight.removesuffix('weight')}bias", None)
    found[head.BIAS] = bias if bias is not None else found[head.WEIGHT].new_zeros(len(found[head.WEIGHT]))
    return found


def _head_of_merged(folder: Path) -> dict[str, Tensor]:
    names = {f"{h}.{side}": name for h in HEADS for side, name in (("weight", head.WEIGHT), ("bias", head.BIAS))}
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {names[key]: file.get_tensor(key) for key in names.keys() & set(file.keys())}
    return found


def plain(number: float) -> float | int:
    """The number without a fraction of zero, as people write it."""
    return int(number) if number == int(number) else number


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}); give the folder of a PEFT adapter in safetensors") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); give the folder of a PEFT adapter") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no object; give the folder of a PEFT adapter")
    return value
