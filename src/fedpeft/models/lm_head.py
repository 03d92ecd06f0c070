"""The language model's own head over a base: states to logits over the vocabulary, nothing of it trained.

A masked model (BERT, RoBERTa, ELECTRA) has a dense layer, an activation and a norm before the projection onto the
vocabulary; a causal one (GPT-2, Llama) has the projection alone. Where the projection is tied to the embeddings, it is
the base's own tensor, or what takes its place where all weights train.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpeft.core.errors import ModelError
from fedpeft.core.hub import loading_from_hub
from fedpeft.models.families import KNOWN_MODELS, is_decoder
from fedpeft.models.load import Base

TOLERANCE = 0.02  # of the largest logit: how far the parts taken out may be from the whole model, in bfloat16 too
_held: dict[tuple[str, str, str], LmHead] = {}


class LmHead:
    """The head's frozen parts, in the precision of the states that it is given.

    Args:
        base: whose states they are.
        transform: what comes before the projection; None: nothing.
        projection: (vocabulary, d) weights, perhaps with a bias.
        tied: whether its weights are the base's embeddings of the tokens.
    """

    def __init__(self, base: Base, transform: nn.Module | None, projection: nn.Linear, tied: bool) -> None:
        self.base = base
        self.vocabulary = projection.out_features
        self.tied = tied
        self._parts: dict[torch.dtype, tuple[nn.Module | None, Tensor, Tensor | None]] = {}
        before = None if transform is None else copy.deepcopy(transform).to(base.device).requires_grad_(False).eval()
        bias = None if projection.bias is None else projection.bias.detach().clone().to(base.device)
        weight = self._embeddings(base.dtype) if tied else projection.weight.detach().clone().to(base.device)
        self._parts[base.dtype] = before, weight, bias

    def logits(self, states: Tensor) -> Tensor:
        """(n, vocabulary) of states (n, d)."""
        transform, weight, bias = self._in(states.dtype)
        return F.linear(states if transform is None else transform(states), weight, bias)

    def some(self, states: Tensor, words: Sequence[int]) -> Tensor:
        """(n, k) the columns of k tokens; the others are not computed."""
        transform, weight, bias = self._in(states.dtype)
        index = torch.tensor(words, device=weight.device)
        own = None if bias is None else bias[index]
        return F.linear(states if transform is None else transform(states), weight[index], own)

    def projection(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(vocabulary, d) weights and a bias perhaps, in a precision."""
        _, weight, bias = self._in(dtype)
        return weight, bias

    @property
    def own_bytes(self) -> int:
        """Memory beside the base's, in the base's precision."""
        transform, weight, bias = self._parts[self.base.dtype]
        kept: list[Tensor] = [] if transform is None else list(transform.parameters())
        kept += ([] if self.tied else [weight]) + ([] if bias is None else [bias])
        return sum(t.numel() * t.element_size() for t in kept)

    def _in(self, dtype: torch.dtype) -> tuple[nn.Module | None, Tensor, Tensor | None]:
        if dtype not in self._parts:
            transform, weight, bias = self._parts[self.base.dtype]
            self._parts[dtype] = (
                None if transform is None else copy.deepcopy(transform).to(dtype),
                self._embeddings(dtype) if self.tied else weight.to(dtype),
                None if bias is None else bias.to(dtype),
            )
        transform, weight, bias = self._parts[dtype]
        if self.tied:  # where the base's weights train, they are not its own in this pass
            weight = self._base(dtype).acting.weights.get(self.base.embeddings, weight)
        return transform, weight, bias

    def _embeddings(self, dtype: torch.dtype) -> Tensor:
        return cast(Tensor, self._base(dtype).module.get_input_embeddings().weight)

    def _base(self, dtype: torch.dtype) -> Base:
        return self.base.at(str(dtype).removeprefix("torch."))


def load_lm_head(source: str, base: Base) -> LmHead:
    """The head that belongs to a base, from the same place; one object for the life of the process.

    The whole model is read once more to take its head out, so memory for it is needed for that moment.

    Args:
        source: what the base is called in messages, such as `minilm`.

    Raises:
        ModelError: the checkpoint has no weights for a head, or the family's head is of an unknown form.
    """
    place = (base.source, str(base.dtype), str(base.device))
    held = _held.get(place)
    if held is None or held.base is not base:
        held = _held[place] = _load(source, base)
    return held


def _load(source: str, base: Base) -> LmHead:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    causal = is_decoder(base.family)
    kind: Any = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    try:
        with loading_from_hub(base.source):
            full, found = kind.from_pretrained(
                base.source, dtype=base.dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {source} cannot be loaded with a language-model head: {reason} Use task.format head."
        ) from error
    if found["missing_keys"]:  # the base was loaded before, so what lacks is of the head
        one = "a causal model saved with its head" if causal else "a model with one such as demo"
        raise ModelError(f"model {source} has no language-model head; use task.format head, or {one}")
    return lm_head_of(full, base, source)


def lm_head_of(full: Any, base: Base, source: str = "") -> LmHead:
    """The head of a transformers model with a language-model head that is there already.

    Args:
        full: whose body is the base's transformer.

    Raises:
        ModelError: what the parts give is not what the model gives; its head has a form that is not known.
    """
    unknown = ModelError(
        f"the language-model head of {source or base.source} has a form that is not known (family {base.family}); "
        f"use task.format head, or {KNOWN_MODELS}"
    )
    full = full.eval()
    projection = full.get_output_embeddings()
    if not isinstance(projection, nn.Linear):
        raise unknown
    tied = projection.weight is full.get_input_embeddings().weight
    head = LmHead(base, _transform(full), projection, tied)
    with torch.no_grad():  # a scale, a cap or a further layer of some family would show here
        tokens = torch.arange(min(8, head.vocabulary), device=full.device)[None]
        states = full.base_model(input_ids=tokens).last_hidden_state[0].to(base.device)
        if states.shape[-1] != base.module.config.hidden_size:
            raise unknown
        theirs = full(input_ids=tokens).logits[0].float().cpu()
        ours = head.logits(states).float().cpu()
    if not bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()):
        raise unknown
    return head


def _transform(full: Any) -> nn.Module | None:
    """What stands before the projection; None: nothing, or nothing that is known."""
    if hasattr(full, "cls"):  # BERT
        return cast(nn.Module, full.cls.predictions.transform)
    if hasattr(full, "generator_predictions"):  # ELECTRA
        return cast(nn.Module, full.generator_predictions)
    dense = getattr(getattr(full, "lm_head", None), "dense", None)
    return None if dense is None else nn.Sequential(dense, nn.GELU(), full.lm_head.layer_norm)  # RoBERTa


__all__ = ["LmHead", "lm_head_of", "load_lm_head"]
