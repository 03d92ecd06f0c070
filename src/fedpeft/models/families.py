"""Where the projections of a transformer are: one name per projection, whatever the family calls it.

A *slot* is a projection that an adapter can be put on. Its name is `block.{l}.{kind}`; kinds are

    query key value output    of the attention
    gate up down              of the feed-forward part (gate: Llama alone)

A family that is not known here is reached by pattern: `targets: ["*.attn.wq"]` matches module paths of linear layers.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedpeft.core.errors import ModelError
from fedpeft.models.quantize import QuantisedLinear

KINDS = ("query", "key", "value", "output", "gate", "up", "down")
ALL = "all"  # as a target: every kind that the family has


@dataclass(frozen=True)
class Slot:
    """A projection d_in -> d_out; where several share one module (GPT-2), its outputs start at `offset`."""

    name: str
    path: str  # of the module within the base
    d_in: int
    d_out: int
    offset: int = 0
    width: int = 0  # outputs of the whole module; equal to d_out unless fused


_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_LLAMA = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_GPT2 = {
    "query": "attn.c_attn",
    "key": "attn.c_attn",
    "value": "attn.c_attn",
    "output": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_OPT = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}
_NORMS: dict[int, tuple[str, str]] = {  # by table of kinds: the norm of each half of a block
    id(_BERT): ("attention.output.LayerNorm", "output.LayerNorm"),
    id(_LLAMA): ("input_layernorm", "post_attention_layernorm"),
    id(_GPT2): ("ln_1", "ln_2"),
    id(_OPT): ("self_attn_layer_norm", "final_layer_norm"),
}
FAMILIES: dict[str, tuple[str, Mapping[str, str]]] = {  # model_type: path of the blocks, kinds within one
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), ("encoder.layer", _BERT)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), ("layers", _LLAMA)),
    "gpt2": ("h", _GPT2),
    "opt": ("decoder.layers", _OPT),
}

KNOWN_MODELS = "a BERT, RoBERTa, GPT-2, OPT or Llama model"  # whose blocks are known, for messages


def is_decoder(model_type: str) -> bool:
    """Whether the family reads left to right, so that its last token has seen the whole text."""
    return model_type in FAMILIES and FAMILIES[model_type][1] is not _BERT


def block_paths(base: nn.Module, model_type: str) -> list[str]:
    """The module paths of a known family's blocks, lowest first; empty for a family that is not known."""
    if model_type not in FAMILIES:
        return []
    stem = FAMILIES[model_type][0]
    return [f"{stem}.{name}" for name, _ in base.get_submodule(stem).named_children()]


def attention_paths(base: nn.Module, model_type: str) -> list[str]:
    """The module paths of a known family's attention, one a block, lowest first; empty for a family not known."""
    if model_type not in FAMILIES:
        return []
    inner = FAMILIES[model_type][1]["query"].rpartition(".")[0]  # the module that its projections lie in
    return [f"{path}.{inner}" for path in block_paths(base, model_type)]


def norm_paths(base: nn.Module, model_type: str, block: int) -> tuple[str, str]:
    """The module paths of a known family's norms of one block: that of its attention, that of its feed-forward part."""
    path = block_paths(base, model_type)[block]
    attention, ffn = _NORMS[id(FAMILIES[model_type][1])]
    return f"{path}.{attention}", f"{path}.{ffn}"


def key_value_size(config: Any) -> tuple[int, int]:
    """(number of key/value heads, size of a head) of a known family's attention, from its configuration."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or int(config.hidden_size) // heads  # some families choose their own size
    return int(getattr(config, "num_key_value_heads", None) or heads), int(size)


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer (GPT-2's transposed one and packed ones included), or None."""
    if isinstance(module, nn.Linear | QuantisedLinear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        d_in, d_out = module.get_parameter("weight").shape
        return int(d_in), int(d_out)
    return None


def block_linears(base: nn.Module, model_type: str) -> list[str]:
    """The module paths of all linear layers within the blocks; of a family not known, those in numbered modules."""
    stems = [f"{path}." for path in block_paths(base, model_type)]
    return [
        path
        for path, module in base.named_modules()
        if linear_size(module) is not None
        and (path.startswith(tuple(stems)) if stems else any(part.isdigit() for part in path.split(".")))
    ]


def slots(base: nn.Module, model_type: str) -> dict[str, Slot]:
    """All named slots of a known family, by name; empty for a family that is not known."""
    if model_type not in FAMILIES:
        return {}
    stem, kinds = FAMILIES[model_type]
    modules = dict(base.named_modules())
    found: dict[str, Slot] = {}
    block = 0
    while f"{stem}.{block}" in modules:
        for kind, inner in kinds.items():
            size = linear_size(modules[path]) if (path := f"{stem}.{block}.{inner}") in modules else None
            if size is None:
                continue
            d_in, width = size
            fused = list(kinds.values()).count(inner)
            order = [k for k, v in kinds.items() if v == inner].index(kind)
            d_out = width // fused
            name = f"block.{block}.{kind}"
            found[name] = Slot(name, path, d_in, d_out, order * d_out, width)
        block += 1
    return found


def choose(base: nn.Module, model_type: str, targets: Sequence[str], blocks: Sequence[int] | None) -> dict[str, Slot]:
    """The slots that an adapter's `targets` and `blocks` name.

    Raises:
        ModelError: a target or a block that the model does not have; the message lists what it has.
    """
    known = slots(base, model_type)
    n_blocks = 1 + max((int(name.split(".")[1]) for name in known), default=-1)
    if blocks is not None and known and (wrong := [b for b in blocks if not 0 <= b < n_blocks]):
        raise ModelError(f"adapter.blocks names block {wrong[0]}; the model has blocks 0 to {n_blocks - 1}")
    chosen: dict[str, Slot] = {}
    for target in targets:
        hits = _matches(base, known, target)
        if not hits:
            kinds = sorted({name.rsplit(".", 1)[1] for name in known}, key=KINDS.index)
            has = f"it has {', '.join(kinds)}" if kinds else f"its family {model_type!r} is not known by name"
            raise ModelError(
                f"adapter.targets names {target!r}, which the model does not have; {has}, or give a pattern over its "
                f"linear layers, such as {_example(base)!r}"
            )
        chosen.update((s.name, s) for s in hits if blocks is None or _block(s.name) in blocks)
    if not chosen:
        raise ModelError(f"adapter.targets {list(targets)} with adapter.blocks {blocks} selects no projection")
    return dict(sorted(chosen.items(), key=lambda item: (_block(item[0]), item[0])))


def _matches(base: nn.Module, known: Mapping[str, Slot], target: str) -> list[Slot]:
    if target == ALL:
        return list(known.values())
    if "*" not in target:
        return [slot for name, slot in known.items() if name.rsplit(".", 1)[1] == target]
    found = []
    for path, module in base.named_modules():
        size = linear_size(module)
        if size is not None and fnmatch.fnmatchcase(path, target):
            name = own_name(path)
            found.append(Slot(name, path, size[0], size[1], 0, size[1]))
    return found


def own_name(path: str) -> str:
    """`encoder.layers.3.attn.wq` -> `block.3.attn.wq`; `norm` -> `module.norm`, where there is no number."""
    parts = re.match(r"^(?:[A-Za-z_]\w*\.)*(\d+)\.(.+)$", path)
    return f"block.{parts.group(1)}.{parts.group(2)}" if parts else f"module.{path}"


def _block(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "block" else -1


def _example(base: nn.Module) -> str:
    paths = [path for path, module in base.named_modules() if linear_size(module) is not None]
    return "*." + paths[0].rsplit(".", 1)[-1] if paths else "*"
