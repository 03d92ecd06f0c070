"""Attentional mixtures of prompts with a client axis: a target prompt, and frozen source prompts mixed by attention.

    h = norm(up(silu(down(x)))),   x the maximum over the text's embeddings, (d,)
    a = softmax over j of max(P_j) . h / (d e),   max(P_j) the maximum over the tokens of prompt j, (d,)
    prompt = P_target + sum_j a_j P_j,   j over the sources and the target itself

Reference: Asai et al. 2022, arXiv 2205.11961, equations 1 to 4; no biases in down and up, temperature d e, the target
starts from rows of the vocabulary, as in the authors' code and its configuration for single tasks. Both layers start as
torch's linear layers do (the attention is not trained on the source tasks first, which the paper has as an option).

Parameters: `prompt.tokens` (P, d) the target, `prompt.down` (r, d), `prompt.up` (d, r), `prompt.norm.weight` (d,),
`prompt.norm.bias` (d,); r may differ between clients, P is that of the sources. The sources are part of the adapter:
they do not train and do not travel, so every site needs them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.core.adapter import MixedPrompt
from fedpeft.core.errors import ModelError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Layer, Network, Partner, Rows, Shape, Sizes, Text
from fedpeft.models.adapters.prompt import (
    TOKENS,
    at_least_one,
    check,
    complete,
    linear,
    put,
    uniform,
    vocabulary,
    width,
)
from fedpeft.models.families import Slot
from fedpeft.models.load import Base

WEIGHTS = "adapter_model.safetensors"
_DOWN, _UP, _SCALE, _SHIFT = "prompt.down", "prompt.up", "prompt.norm.weight", "prompt.norm.bias"
_NAMES = (TOKENS, _DOWN, _UP, _SCALE, _SHIFT)


class MixedPromptAdapter:
    """A prompt at the input embeddings, mixed for each row of the target's and the sources' tokens.

    Attributes:
        sources: (sources, P, d) float32.

    Raises:
        ModelError: a length or size below 1, no source, a source that cannot be read or has another shape, or a base
            that takes no embeddings.
    """

    slots: Mapping[str, Slot] = {}
    partners: Mapping[str, Partner] = {"down": ("up", 0, 1), "up": ("down", 1, 0)}
    networks: Sequence[Network] = ((_NAMES, _DOWN, _UP),)

    def __init__(self, spec: MixedPrompt, base: Base) -> None:
        check(spec.length, base)
        at_least_one("size", spec.size)
        self.spec = spec
        self.base = base
        self.width = width(base)
        self.sources = read_sources(spec.sources, (spec.length, self.width))

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """The target from the vocabulary, the network as torch starts linear layers and norms."""
        size, d = self.spec.size, self.width
        return {
            TOKENS: vocabulary(self.base, self.spec.length, rng),
            _DOWN: uniform(d, (size, d), rng),
            _UP: uniform(size, (d, size), rng),
            _SCALE: torch.ones(d),
            _SHIFT: torch.zeros(d),
        }

    def shapes(self) -> dict[str, Shape]:
        """None stands for r."""
        d = self.width
        return {TOKENS: (self.spec.length, d), _DOWN: (None, d), _UP: (d, None), _SCALE: (d,), _SHIFT: (d,)}

    def bind(self, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> None:
        """Put each row's mixture before its text."""
        there = complete(_NAMES, _DOWN, _UP, layer, sizes)
        if not any(there):
            return

        def make(text: Text) -> Tensor:
            target = rows.pick(layer[TOKENS]).expand(len(text.states), -1, -1)
            sources = self.sources.to(target)[None].expand(len(target), -1, -1, -1)
            prompts = torch.cat([sources, target[:, None]], dim=1)  # (rows, sources + 1, P, d)
            shares = torch.softmax(self._scores(text, prompts, layer, rows), dim=1)
            return target + torch.einsum("nj,njpd->npd", shares, prompts)

        put(make, [self.spec.length if own else 0 for own in there], rows, base)

    def _scores(self, text: Text, prompts: Tensor, layer: Layer, rows: Rows) -> Tensor:
        """(rows, sources + 1) how well each prompt suits the text."""
        x = text.states.masked_fill(~text.mask[:, :, None], -math.inf).amax(dim=1)
        low = F.silu(linear(x[:, None], layer[_DOWN], None, rows))
        high = F.layer_norm(linear(low, layer[_UP], None, rows)[:, 0], (self.width,))
        query = high * rows.pick(layer[_SCALE]) + rows.pick(layer[_SHIFT])
        keys = prompts.amax(dim=2)
        return torch.bmm(keys, query[:, :, None]).squeeze(2) / (self.width * math.e)

    def context(self, params: Params) -> tuple[float, float]:
        """P tokens more in every block."""
        return float(self.spec.length) if TOKENS in params else 0.0, 0.0


def read_sources(folders: Sequence[str], shape: tuple[int, int]) -> Tensor:
    """(sources, P, d) float32: the prompts that earlier runs have exported.

    Args:
        folders: of runs, or of adapters as this package or PEFT writes them for prompt tuning.
        shape: (P, d) that each must have.

    Raises:
        ModelError: no folder, or one that holds no such prompt.
    """
    if not folders:
        raise ModelError(
            "adapter.kind 'attempt' mixes source prompts and was given none; train prompts on other tasks "
            "(adapter.kind prompt) and name the run folders in method.sources or adapter.sources"
        )
    return torch.stack([_source(Path(folder).expanduser(), shape) for folder in folders])


def _source(folder: Path, shape: tuple[int, int]) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = next((p for p in (folder / WEIGHTS, folder / "adapter" / WEIGHTS) if p.is_file()), None)
    if path is None:
        raise ModelError(
            f"source {str(folder)!r} has no {WEIGHTS}, nor has its folder adapter; give the folder of a finished run "
            "of adapter.kind prompt, or of a PEFT prompt-tuning adapter"
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"source {path} cannot be read: {error}; export it anew") from error
    kind = _kind(path.parent)
    if kind not in ("", "prompt", "PROMPT_TUNING"):
        raise ModelError(
            f"source {path} is no prompt but an adapter of kind {kind}; give the folder of a run of adapter.kind "
            "prompt (methods prompt_tuning, fedprompt), or of a PEFT prompt-tuning adapter"
        )
    found = next((tensors[name] for name in ("prompt_embeddings", TOKENS) if name in tensors), None)
    if found is None:
        raise ModelError(
            f"source {path} holds no prompt (prompt_embeddings or {TOKENS}); give a run of adapter.kind prompt"
        )
    if tuple(found.shape) != shape:
        raise ModelError(
            f"source {path} has a prompt of shape {tuple(found.shape)}; {shape} is needed: set adapter.length to that "
            "of the sources, and use sources of the same base model"
        )
    return found.float()


def _kind(folder: Path) -> str:
    """What an export calls its adapter's kind, else what PEFT calls it; "" where nothing is said."""
    for name, keys in (("fedpeft.json", ("adapter", "kind")), ("adapter_config.json", ("peft_type",))):
        try:
            told = json.loads((folder / name).read_text(encoding="utf-8"))
            for key in keys:
                told = told[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return str(told)
    return ""
