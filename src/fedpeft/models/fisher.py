"""The Fisher information of LoRA's factors, sample by sample, at about the cost of one pass of training.

Per module and sample, with inputs X (T, d_in) and gradients of the outputs G (T, d_out): U = X A^T, V = G B, and the
gradients of the factors are ∂B = c G^T U and ∂A = c V^T X. Hooks see X and G; no gradient of a parameter is ever made
by autograd, and no sample needs a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedpeft.core.errors import FitError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, Fit, check_fit
from fedpeft.core.model import Fisher, TokenNorm
from fedpeft.core.pairs import stems
from fedpeft.core.train import stack_params
from fedpeft.core.tree import Params
from fedpeft.models.families import Slot
from fedpeft.models.load import Base

if TYPE_CHECKING:
    from fedpeft.models.hf import HFModel

POWERS = {"mean": 0.0, "sqrt": 0.5, "sum": 1.0}  # of the number of answer tokens, on the gradient of their mean loss
MOST_NUMBERS = 2**24  # per-sample gradients that are held at once


def fisher(
    model: HFModel,
    params: Params,
    data: Examples,
    rows: Sequence[int],
    token_norm: TokenNorm = "sqrt",
    also: tuple[Params, ...] = (),
) -> Fisher:
    """See `Model.fisher`. No dropout; squares in float32.

    Raises:
        FitError: params or rows that the model cannot train, or params without LoRA's factors.
    """
    fit = Fit(params, data, [list(rows)], SGD(0.0), also=also)
    check_fit(fit)
    model.check(fit)
    slots = {stem: model.places[stem] for stem in stems(params)}
    if not slots:
        raise FitError(f"the Fisher information is of LoRA's factors, and there are none among {sorted(params)[:3]}")
    stack = stack_params([params], model.device, also)
    items = [model.readout.training(0, data, row) for row in rows]
    trace = torch.zeros(len(items), dtype=torch.float64)
    sums = {f"{stem}.{side}": torch.zeros(len(params[f"{stem}.{side}"])) for stem in slots for side in "AB"}
    most = max(1, MOST_NUMBERS // sum(params[name].numel() for name in sums))
    with _taps(model, params, slots) as gradients:
        for whole in model.parts(items):
            for part in (whole[i : i + most] for i in range(0, len(whole), most)):
                own = [items[i] for i in part]
                gradients.clear()
                with model.seen(model.base, stack, own, 0) as seen:
                    losses = model.readout.losses(seen)
                    tokens = torch.tensor([max(1, model.readout.projected(item)) for item in own])
                    weights = tokens.to(losses) ** POWERS[token_norm]
                    (losses * weights).sum().backward()  # type: ignore[no-untyped-call]
                for name, gradient in gradients.items():
                    squares = gradient.square().sum(dim=2)  # (samples, rows of the matrix)
                    trace[torch.from_numpy(part)] += squares.sum(dim=1).double().cpu()
                    sums[name] += squares.sum(dim=0).cpu()
    counts = {name: len(items) * params[name].shape[1] for name in sums}
    return Fisher(trace.float(), {name: total / counts[name] for name, total in sums.items()})


@contextmanager
def _taps(model: HFModel, params: Params, slots: dict[str, Slot]) -> Iterator[dict[str, Tensor]]:
    """Per-sample gradients of the factors, filled in by a backward pass; a module that is called again adds to them."""
    found: dict[str, Tensor] = {}
    by_path: dict[str, list[Slot]] = {}
    for slot in slots.values():
        by_path.setdefault(slot.path, []).append(slot)
    own = {n: params[n].to(model.device, torch.float32) for stem in slots for n in (f"{stem}.A", f"{stem}.B")}

    def add(name: str, gradient: Tensor) -> None:
        found[name] = found[name] + gradient if name in found else gradient

    def take(places: Sequence[Slot], x: Tensor, g: Tensor) -> None:
        x, g = x.float(), g.float()
        for slot in places:
            a, b = own[f"{slot.name}.A"], own[f"{slot.name}.B"]
            out = g[..., slot.offset : slot.offset + slot.d_out]
            add(f"{slot.name}.B", model.scale * (out.transpose(1, 2) @ (x @ a.T)))
            add(f"{slot.name}.A", model.scale * ((out @ b).transpose(1, 2) @ x))

    def hook(places: Sequence[Slot]) -> Any:
        def tap(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # the lowest modules: here the graph begins
                output = output.detach().requires_grad_()
            x = args[0].detach()
            output.register_hook(lambda g: take(places, x, g))  # type: ignore[no-untyped-call]
            return output

        return tap

    with hooked(model.base, {path: hook(places) for path, places in by_path.items()}):
        yield found


@contextmanager
def hooked(base: Base, hooks: dict[str, Any]) -> Iterator[None]:
    """Forward hooks on modules by path, as long as the context lasts."""
    handles = [base.module.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
