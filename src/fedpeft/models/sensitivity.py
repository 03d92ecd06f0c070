"""How much each block's output changes when the embeddings of a sample are perturbed.

The idea is FibecFed's layer score (arXiv 2410.00131), its form ours: the paper's was not at hand.

e are the embeddings of a sample, m the mean norm of its real tokens' ones, ∇ the gradient of the sample's loss with
respect to e. The perturbation is gamma m ∇ / ||∇||_F (`l2`), gamma m sign(∇) / sqrt(T d) (`inf`), or of that length in
a random direction (`random`); zero at padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedpeft.core.errors import ModelError
from fedpeft.core.examples import Examples
from fedpeft.core.model import Perturbation
from fedpeft.core.rng import Rng
from fedpeft.core.train import stack_params
from fedpeft.core.tree import Params
from fedpeft.models.families import KNOWN_MODELS, block_paths
from fedpeft.models.fisher import hooked
from fedpeft.models.load import Base

if TYPE_CHECKING:
    from fedpeft.models.hf import HFModel


def sensitivity(
    model: HFModel,
    params: Params,
    data: Examples,
    rows: Sequence[int],
    perturbation: Perturbation,
    size: float,
    rng: Rng,
) -> tuple[Tensor, Tensor]:
    """See `Model.sensitivity`. In float32, without dropout.

    Raises:
        ModelError: a family whose blocks are not known.
    """
    base = model.base.at("float32" if model.base.dtype == torch.bfloat16 else "")
    paths = block_paths(base.module, base.family)
    if not paths:
        raise ModelError(f"the blocks of the family {base.family!r} are not known; use {KNOWN_MODELS}")
    stack = stack_params([params], model.device)
    items = [model.readout.training(0, data, row) for row in rows]
    changes, sizes = (torch.zeros(len(paths) + 1, len(items)) for _ in range(2))
    directions = _directions(rng, perturbation, [model.readout.length(item) for item in items], model.width)
    for part in model.parts(items):
        own, index = [items[i] for i in part], torch.from_numpy(part)
        noise = nn.utils.rnn.pad_sequence([directions[i] for i in part], batch_first=True) if directions else None
        with _watched(base, paths) as watch:
            with model.seen(base, stack, own, 0) as seen:
                mask = seen.batch.mask[:, :, None]
                model.readout.losses(seen).sum().backward()  # type: ignore[no-untyped-call]
            before = [state * mask for state in watch.states(mask)]
            assert watch.embeddings is not None and watch.embeddings.grad is not None, "the loss depends on them"
            change = perturbed(watch.embeddings.detach(), watch.embeddings.grad, mask, perturbation, size, noise)
            watch.change = change
            with torch.no_grad(), model.seen(base, stack, own, 0):
                after = [state * mask for state in watch.states(mask)]
        for layer, (old, new) in enumerate(zip(before, after, strict=True)):
            changes[layer, index] = (new - old).flatten(1).norm(dim=1).float().cpu()
            sizes[layer, index] = old.flatten(1).norm(dim=1).float().cpu()
    return changes, sizes


def perturbed(e: Tensor, gradient: Tensor, mask: Tensor, kind: str, size: float, noise: Tensor | None) -> Tensor:
    """The perturbation of every sample; zero where its gradient is.

    Args:
        e, gradient: (samples, tokens, d)
        mask: (samples, tokens, 1) True at real tokens.
        noise: (samples, tokens, d) a random direction, of `random` alone.
    """
    real = mask.to(e)
    tokens = real.sum(dim=(1, 2))
    length: Tensor = size * (e.norm(dim=2) * real[:, :, 0]).sum(dim=1) / tokens  # gamma m
    if kind == "inf":
        return (gradient * real).sign() * (length / (tokens * e.shape[2]).sqrt()).view(-1, 1, 1)
    direction: Tensor = (gradient if noise is None else noise.to(e)[:, : e.shape[1]]) * real
    norm = direction.flatten(1).norm(dim=1).clamp_min(torch.finfo(e.dtype).tiny)
    factor: Tensor = length / norm
    return direction * factor.view(-1, 1, 1)


def _directions(rng: Rng, kind: str, lengths: Sequence[int], width: int) -> list[Tensor]:
    """(tokens, d) a random direction per sample, in their order; nothing unless they are asked for."""
    return [torch.from_numpy(rng.standard_normal((n, width))) for n in lengths] if kind == "random" else []


class _Watch:
    """What a pass gave: the embeddings, and the states that enter and leave the blocks."""

    def __init__(self, count: int) -> None:
        self.embeddings: Tensor | None = None
        self.change: Tensor | None = None  # what is added to the embeddings in the next pass
        self.found: list[Tensor] = [torch.empty(0)] * (count + 1)

    def states(self, mask: Tensor) -> list[Tensor]:
        """Of the text's own tokens: those of a prompt come before them."""
        return [state[:, state.shape[1] - mask.shape[1] :].detach() for state in self.found]


@contextmanager
def _watched(base: Base, paths: Sequence[str]) -> Iterator[_Watch]:
    watch = _Watch(len(paths))

    def embed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if watch.change is not None:
            return output + watch.change.to(output)
        watch.embeddings = output.detach().requires_grad_()
        return watch.embeddings

    def entered(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        watch.found[0] = args[0] if args else kwargs["hidden_states"]

    def left(place: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            watch.found[place + 1] = output[0] if isinstance(output, tuple) else output

        return hook

    first = base.module.get_submodule(paths[0])
    handles = [
        base.module.get_input_embeddings().register_forward_hook(embed),
        first.register_forward_pre_hook(entered, with_kwargs=True),
    ]
    try:
        with hooked(base, {path: left(i) for i, path in enumerate(paths)}):
            yield watch
    finally:
        for handle in handles:
            handle.remove()
