"""What a method may ask a model besides training and predictions: hidden states and products with the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, Fit, check_fit
from fedpeft.core.train import Stack, stack_params
from fedpeft.core.tree import Params
from fedpeft.models.families import KNOWN_MODELS, block_paths
from fedpeft.models.readouts import Item

if TYPE_CHECKING:
    from fedpeft.models.hf import HFModel
    from fedpeft.models.load import Base


def hidden(model: HFModel, params: Params, data: Examples, rows: Sequence[int]) -> Tensor:
    """(blocks, rows, tokens, d) outputs of the blocks, zero at padding, without gradient, on the CPU.

    A base in bfloat16 is taken in float32: its noise would count as a difference of rows.

    They are taken from the blocks themselves: the last entry of transformers' `output_hidden_states` is after the
    final norm in decoders. No dropout; tokens of a soft prompt are not among them.

    Args:
        params: the adapter that acts; empty: the frozen base alone.

    Raises:
        ModelError: a family whose blocks are not known.
    """
    paths = block_paths(model.base.module, model.base.family)
    if not paths:
        raise ModelError(f"the blocks of the family {model.base.family!r} are not known; use {KNOWN_MODELS}")
    base = model.base.at(_exact(model))
    stack = stack_params([params], model.device)
    longest = int(data.lengths[list(rows)].max())
    found = torch.zeros(len(paths), len(rows), longest, model.width)
    with torch.no_grad(), _outputs(base, paths) as outputs:
        items = [Item(0, data, row) for row in rows]  # without any answer
        for part in model.parts(items):
            with model.seen(base, stack, [items[i] for i in part], 0) as seen:
                own = seen.batch.mask
                for block, state in zip(found, outputs, strict=True):
                    text = state[:, state.shape[1] - own.shape[1] :] * own[:, :, None]
                    kept = min(longest, own.shape[1])
                    block[torch.from_numpy(part), :kept] = text[:, :kept].float().cpu()
    return found


@contextmanager
def _outputs(base: Base, paths: Sequence[str]) -> Iterator[list[Tensor]]:
    """The newest output of every block, as long as the context lasts."""
    outputs: list[Tensor] = [torch.empty(0)] * len(paths)

    def keep(place: int) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            state = output[0] if isinstance(output, tuple) else output
            assert isinstance(state, Tensor), "a block gives its hidden states"
            outputs[place] = state

        return hook

    handles = [base.module.get_submodule(path).register_forward_hook(keep(i)) for i, path in enumerate(paths)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _exact(model: HFModel) -> str:
    """The precision that probes take the base in: float32 at least."""
    return "float32" if model.base.dtype == torch.bfloat16 else ""


def hessian(
    model: HFModel, params: Params, data: Examples, rows: Sequence[int], names: frozenset[str]
) -> Callable[[Params], dict[str, Tensor]]:
    """v -> H v, with H the Hessian of the rows' mean loss over the named parameters; exact, without dropout.

    A base in bfloat16 is taken in float32: differences of Hessians would drown in its noise.

    Second derivatives need attention that can be differentiated twice, so these passes use plain products. The graph of
    the gradient is kept for all products: memory grows with the rows, so give one batch.

    Args:
        params: where H is taken.
        names: the parameters that H is over; the others are constants.

    Returns:
        a function from and to tensors by name, in the layout of `names`.

    Raises:
        FitError: params, rows or names that the model cannot train.
    """
    if unknown := names - params.keys():
        raise FitError(f"a Hessian over {min(unknown)!r} was asked, which is not among the parameters")
    fit = Fit(params, data, [list(rows)], SGD(0.0), train=names, base=_exact(model))
    check_fit(fit)
    model.check(fit)
    leaves = {name: params[name].detach().to(model.device).clone().requires_grad_() for name in sorted(names)}
    frozen = {name: t for name, t in params.items() if name not in names}
    plain = stack_params([frozen], model.device)
    sizes = {name: (tuple(t.shape),) for name, t in params.items()}
    stacked = {**plain.params, **{name: leaf.unsqueeze(0) for name, leaf in leaves.items()}}
    gradients = [torch.zeros_like(leaf) for leaf in leaves.values()]
    with sdpa_kernel(SDPBackend.MATH):
        for _, terms in model.loss_terms(Stack((fit,), stacked, (), sizes), [list(rows)], 0):
            part = torch.autograd.grad(terms.sum(), list(leaves.values()), create_graph=True, materialize_grads=True)
            gradients = [total + own for total, own in zip(gradients, part, strict=True)]

    def product(vector: Params) -> dict[str, Tensor]:
        given = [vector[name].detach().to(leaf) for name, leaf in leaves.items()]
        found = torch.autograd.grad(
            gradients, list(leaves.values()), grad_outputs=given, retain_graph=True, materialize_grads=True
        )
        return {name: t.detach().cpu() for name, t in zip(leaves, found, strict=True)}

    return product
