"""An adapter folded into its base: a model of plain transformers, as fast as the base.

A model that predicts text becomes the family's causal language model, with the head that the base came with.

The head is linear on the pooled last hidden state, and pooling is linear, so the same head on every token and pooled
logits afterwards give the same numbers: the model is a token classifier of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.pairs import Pair
from fedpeft.core.tree import Params
from fedpeft.models import attention
from fedpeft.models.adapters import delta, head
from fedpeft.models.families import Slot
from fedpeft.models.hf import HFModel
from fedpeft.models.load import Base

HEADS = ("classifier", "score")  # what transformers calls a token classifier's head


@dataclass(frozen=True)
class Shell:
    """The family's token classifier or causal language model, without memory for its weights.

    Attributes:
        module: of transformers, on the meta device.
        prefix: the name of the base within it.
        head: the name of its linear head.
    """

    module: Any
    prefix: str
    head: str


def shell_of(model: HFModel, labels: Sequence[str]) -> Shell:
    """What an export is loaded into: a causal language model where text is predicted, else a token classifier.

    Raises:
        ModelError: transformers has none for the family.
    """
    return token_classifier(model.base, labels) if model.lm is None else causal_lm(model.base, model.lm.tied)


def causal_lm(base: Base, tied: bool) -> Shell:
    """The causal language model that fits a base.

    Args:
        tied: whether its head has the embeddings' weights.
    """
    from transformers import AutoModelForCausalLM

    config = _plain_config(base)
    config.tie_word_embeddings = tied
    with torch.device("meta"):
        module: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    linear = module.get_output_embeddings()
    name = next(name for name, child in module.named_children() if child is linear)
    return Shell(module, module.base_model_prefix, name)


def _plain_config(base: Base) -> Any:
    """The base's configuration in float32, for a process without fedpeft, which does not know our attention."""
    config = copy.deepcopy(base.module.config)
    if config._attn_implementation == attention.NAME:
        config._attn_implementation = attention.STOCK
    config.dtype = torch.float32
    return config


def token_classifier(base: Base, labels: Sequence[str]) -> Shell:
    """The token classifier that fits a base.

    Raises:
        ModelError: transformers has none for the family.
    """
    from transformers import AutoModelForTokenClassification

    config = _plain_config(base)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    try:
        with torch.device("meta"):
            module = AutoModelForTokenClassification.from_config(config)  # type: ignore[no-untyped-call]
    except ValueError:
        raise ModelError(
            f"transformers has no token classifier for the family {base.family!r}, so its head cannot be exported; "
            "predict with fedpeft, or use a model of another family"
        ) from None
    found = [name for name, child in module.named_children() if name in HEADS and isinstance(child, nn.Linear)]
    if len(found) != 1:
        raise ModelError(f"the token classifier of the family {base.family!r} has no linear head; use another family")
    return Shell(module, module.base_model_prefix, found[0])


def check_labels(model: HFModel, params: Params, labels: Sequence[str] | None) -> list[str]:
    """The names of the classes (LABEL_0, ... where none are given), after a check of the params.

    Raises:
        ModelError: params that are not this model's, that lack their head, or with another number of classes.
    """
    try:
        model.check_params(params)
    except FitError as error:
        raise ModelError(str(error)) from None
    if head.WEIGHT not in params and head.WEIGHT in model.readout.params:
        raise ModelError(f"there is no {head.WEIGHT!r} among the params; give the head with the adapter")
    classes = params[head.WEIGHT].shape[0] if head.WEIGHT in params else model.classes
    names = [f"LABEL_{i}" for i in range(classes)] if labels is None else [str(label) for label in labels]
    if len(names) != classes or len(set(names)) != classes:
        raise ModelError(f"there are {len(set(names))} different labels for a head of {classes} classes: {names[:20]}")
    return names


def merge(model: HFModel, params: Params, labels: Sequence[str] | None = None) -> Any:
    """A new token classifier (of text: causal language model), float32, in eval mode; the base keeps its bits.

    Args:
        model: whose adapter `params` are; where its base is quantised, the full weights are read again.
        params: adapter, base delta and head.
        labels: names of the classes for its configuration.

    Raises:
        ModelError: params that do not fit, or a family without a token classifier.
    """
    names = check_labels(model, params, labels)
    _check_foldable(model, params)
    shell = shell_of(model, names)
    body = _whole(model.base).copy_module(torch.float32)
    with torch.no_grad():
        for name in model.weights.keys() & params.keys():
            body.get_parameter(model.weights[name]).copy_(params[name])
        for name, slot in model.places.items():
            parts = [b @ a for b, a in low_rank(params, name, model.scale)] + dense(params, name)
            if parts:
                _fold(body.get_submodule(slot.path), slot, torch.stack(parts).sum(dim=0))
    merged = shell.module
    setattr(merged, shell.prefix, body)
    setattr(merged, shell.head, _head(model, params, body).requires_grad_(False))
    return merged.eval()


def _whole(base: Base) -> Base:
    """The base with full weights: an adapter is never folded into rounded ones."""
    if not base.quantized:
        return base
    if base.unquantized is None:
        raise ModelError(
            f"the base is quantised as {base.quantized}, and nothing is known of its full weights; merge with a model "
            "on the unquantised base"
        )
    return base.unquantized()


def _head(model: HFModel, params: Params, body: Any) -> nn.Linear:
    """The trained head, or the language model's own."""
    if model.lm is None:
        weight, bias = params[head.WEIGHT], params.get(head.BIAS)
    else:
        weight, bias = model.lm.projection(torch.float32)
    classes, width = weight.shape
    linear = nn.Linear(width, classes, bias=bias is not None, device="meta")
    if model.lm is not None and model.lm.tied:
        linear.weight = body.get_input_embeddings().weight
    else:
        linear.weight = nn.Parameter(weight.detach().float().clone().to(model.device))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().float().clone().to(model.device))
    return linear


def _check_foldable(model: HFModel, params: Params) -> None:
    """Raise ModelError unless everything is a change of weights, or the head."""
    if head.WEIGHT not in params and model.lm is None:
        raise ModelError(
            "a model is merged as a text classifier with a head, and task.format cloze and verbalizer train none; "
            "export the adapter without --merge, or use fedpeft.predict"
        )
    folded = {f"{name}.{side}" for name in model.places for side in "ABPEQ"}
    folded |= model.weights.keys()
    odd = [name for name in params if name not in folded and not name.startswith((delta.PREFIX, "head."))]
    if odd:
        raise ModelError(
            f"an adapter of kind {model.spec.kind!r} ({odd[0]}) cannot be folded into the weights; export it without "
            "--merge, or use fedpeft.predict"
        )


def low_rank(params: Params, slot: str, scale: float) -> list[Pair]:
    """Pairs (B, A), in float64, whose products are added to a projection; the scale alpha / rank sits on B."""
    parts: list[Pair] = []
    if f"{slot}.A" in params:
        parts.append((scale * params[f"{slot}.B"].double(), params[f"{slot}.A"].double()))
    if f"{slot}.E" in params:
        p, e, q = (params[f"{slot}.{side}"].double() for side in "PEQ")
        parts.append((scale * p * e, q))
    name = f"{delta.PREFIX}{slot}"
    if f"{name}.left" in params:
        parts.append((params[f"{name}.left"].double(), params[f"{name}.right"].double()))
    return parts


def dense(params: Params, slot: str) -> list[Tensor]:
    """(d_out, d_in) what is added to a projection beside `low_rank`, in float64; empty: nothing."""
    name = f"{delta.PREFIX}{slot}.dense"
    return [params[name].double()] if name in params else []


def _fold(projection: nn.Module, slot: Slot, change: Tensor) -> None:
    """Add the change, in float64, to the slot's part of a projection's weight."""
    weight = projection.get_parameter("weight")
    rows = weight if isinstance(projection, nn.Linear) else weight.T  # Conv1D keeps (d_in, d_out)
    own = rows[slot.offset : slot.offset + slot.d_out]
    own.copy_(own.cpu().double() + change.cpu())  # on the CPU: not every device knows float64
