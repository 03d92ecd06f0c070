"""How each kind of adapter is laid out as a folder: as PEFT holds it where it can, else under our own names.

| adapter | form | tensors |
|---|---|---|
| LoRA | PEFT's LORA | `lora_A.weight`, `lora_B.weight` by module; slots that share a module are joined |
| a prefix of equal length in all layers, with a head | PEFT's PREFIX_TUNING | `prompt_embeddings` (P, all numbers) |
| a prompt with a head, or where text is predicted | PEFT's PROMPT_TUNING | `prompt_embeddings` (P, d) |
| everything else | fedpeft's own | the parameters under their own names; of `full` all weights of the base |

A row of a prefix is (layers, 2, heads, size). PEFT moves the text's positions behind a prefix, which fedpeft does not:
the numbers are the same, PEFT's outputs are not unless it is called with the text's own positions. A prefix in some
layers only cannot be a prefix of zeros elsewhere: a key of zeros takes part in the softmax.

Where several slots share a module (GPT-2's query, key and value), PEFT knows one LoRA of summed rank: A is all their A
below each other, B has their B as blocks, in the rows of each slot's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedpeft.core.adapter import Lora, Prefix, Prompt
from fedpeft.core.errors import ModelError
from fedpeft.core.tree import Params
from fedpeft.models.adapters import delta, head
from fedpeft.models.adapters.prompt import TOKENS
from fedpeft.models.card import published
from fedpeft.models.families import Slot, key_value_size
from fedpeft.models.hf import HFModel
from fedpeft.models.merge import HEADS, shell_of
from fedpeft.models.peft_folder import PREFIX, PROMPTS, SOURCES, plain, unseen

HEAD_ALONE = "PEFT has no adapter that is a head alone; export with --merge"


@dataclass(frozen=True)
class Layout:
    """A folder's content.

    Attributes:
        form: "adapter" where PEFT loads it, "own" where fedpeft alone does.
        tensors: of `adapter_model.safetensors`.
        config: `adapter_config.json`; None: there is none.
        note: what `fedpeft.json` says besides the usual.
    """

    form: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    note: Mapping[str, Any] = field(default_factory=dict)


def layout_of(model: HFModel, params: Params, labels: Sequence[str]) -> Layout:
    """The layout of a model's parameters.

    Raises:
        ModelError: parameters that only a merged model can hold.
    """
    if any(name.startswith(delta.PREFIX) for name in params):  # PEFT has no change of the base; `merge` folds it in
        return Layout("own", {name: t.detach().cpu().contiguous() for name, t in params.items()})
    if params.keys() <= {head.WEIGHT, head.BIAS}:
        raise ModelError(HEAD_ALONE)
    known = _PEFT.get(type(model.spec))
    found = known(model, params, labels) if known else None
    if found is not None:
        return found
    sources = {key: value for key, value in unseen(model).items() if key == SOURCES}  # the rest is in the specification
    return Layout("own", {name: t.detach().cpu().contiguous() for name, t in params.items()}, note=sources)


# --- LoRA ---------------------------------------------------------------------------------------------------------


def _lora(model: HFModel, params: Params, labels: Sequence[str]) -> Layout:
    loras = [name.removesuffix(".A") for name in params if name.endswith(".A")]
    if not any(params[f"{name}.A"].shape[0] for name in loras):
        raise ModelError(HEAD_ALONE)
    shell = shell_of(model, labels)
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
    tensors |= _head(params, f"{PREFIX}{shell.head}")
    listed = {path: [[s.name, len(params[f"{s.name}.A"])] for s in slots] for path, slots in modules.items()}
    config = _lora_config(model, shell.module, ranks, head.WEIGHT in params)
    return Layout("adapter", tensors, config, {"modules": listed})


def _head(params: Params, stem: str) -> dict[str, Tensor]:
    """The head under PEFT's name; nothing where the format has none."""
    names = {f"{stem}.weight": head.WEIGHT, f"{stem}.bias": head.BIAS}
    return {theirs: params[ours].detach().cpu().contiguous() for theirs, ours in names.items() if ours in params}


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


def _lora_config(model: HFModel, module: Any, ranks: Mapping[str, int], headed: bool) -> dict[str, Any]:
    """What peft reads: every module has the scale alpha / rank of the spec, whatever its own rank."""
    assert isinstance(model.spec, Lora), "LoRA factors belong to a LoRA"
    usual = max(ranks.values(), key=list(ranks.values()).count)
    odd = {path: rank for path, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "TOKEN_CLS" if headed else None if model.lm is None else "CAUSAL_LM",
        "base_model_name_or_path": published(model.base.source),
        "inference_mode": True,
        "r": usual,
        "lora_alpha": _alpha(model, usual),
        "lora_dropout": model.spec.dropout,
        "target_modules": _targets(module, set(ranks)),
        "fan_in_fan_out": any(type(module.get_submodule(path)).__name__ == "Conv1D" for path in ranks),
        "bias": "none",
        "modules_to_save": list(HEADS) if headed else None,
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


# --- virtual tokens -----------------------------------------------------------------------------------------------


def _prefix(model: HFModel, params: Params, labels: Sequence[str]) -> Layout | None:
    """A prefix in all layers; None where PEFT cannot hold it."""
    rows = [params.get(f"prefix.{block}") for block in range(model.blocks)]
    whole = [row.detach().cpu() for row in rows if row is not None]
    if len(whole) < len(rows) or len({row.shape for row in whole}) > 1 or head.WEIGHT not in params:
        return None
    heads, size = key_value_size(model.base.module.config)
    weight = torch.stack(whole).permute(2, 0, 1, 3, 4)  # (blocks, 2, P, heads, size) -> (P, blocks, 2, heads, size)
    shared = {"num_attention_heads": heads, "token_dim": heads * size, "encoder_hidden_size": heads * size}
    return _virtual(model, params, labels, "PREFIX_TUNING", weight.reshape(len(weight), -1), shared)


def _prompt(model: HFModel, params: Params, labels: Sequence[str]) -> Layout | None:
    """A prompt at the embeddings; None without a head, unless text is predicted."""
    if (head.WEIGHT not in params and model.lm is None) or TOKENS not in params:
        return None
    tokens = params[TOKENS].detach().cpu()
    config = model.base.module.config
    shared = {"num_attention_heads": int(config.num_attention_heads), "token_dim": tokens.shape[1]}
    return _virtual(model, params, labels, "PROMPT_TUNING", tokens, shared | {"prompt_tuning_init": "RANDOM"})


def _virtual(
    model: HFModel, params: Params, labels: Sequence[str], kind: str, weight: Tensor, shared: Mapping[str, Any]
) -> Layout:
    shell = shell_of(model, labels)
    config = {
        "peft_type": kind,
        "task_type": "TOKEN_CLS" if model.lm is None else "CAUSAL_LM",
        "base_model_name_or_path": published(model.base.source),
        "inference_mode": True,
        "num_virtual_tokens": len(weight),
        "num_transformer_submodules": 1,
        "num_layers": model.blocks,
        "modules_to_save": list(HEADS) if model.lm is None else None,
        **shared,
    }
    tensors = {PROMPTS: weight.contiguous(), **_head(params, f"base_model.{shell.head}")}
    return Layout("adapter", tensors, config)


_PEFT: dict[type, Callable[[HFModel, Params, Sequence[str]], Layout | None]] = {
    Lora: _lora,
    Prefix: _prefix,
    Prompt: _prompt,
}
