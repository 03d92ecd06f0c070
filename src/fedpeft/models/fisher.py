"""The Fisher information of LoRA's factors, sample by sample, at about the cost of one pass of training.

Per module and sample, with inputs X (T, d_in) and gradients of the outputs G (T, d_out): U = X A^T, V = G B, and the
gradients of the factors are ∂B = c G^T U and ∂A = c V^T X. Hooks see X and G; no gradient of a parameter is ever made
by autograd, and no sample needs a pass of its own. Clients with factors of their own share a pass, as they do in
training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedpeft.core.errors import FitError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, Fit, check_fit
from fedpeft.core.model import Fisher, FisherProbe
from fedpeft.core.pairs import stems
from fedpeft.core.train import stack_params
from fedpeft.models.adapters import Rows
from fedpeft.models.families import Slot
from fedpeft.models.load import Base

if TYPE_CHECKING:
    from fedpeft.models.hf import HFModel

POWERS = {"mean": 0.0, "sqrt": 0.5, "sum": 1.0}  # of the number of answer tokens, on the gradient of their mean loss
MOST_NUMBERS = 2**24  # per-sample gradients that are held at once


def fisher_many(model: HFModel, probes: Sequence[FisherProbe]) -> list[Fisher | Exception]:
    """See `Model.fisher_many`. No dropout; squares in float32.

    Returns:
        of each its Fisher, or FitError for params or rows that the model cannot train, or params without LoRA's
        factors; where the passes break as a whole (out of memory, say), each is tried alone.
    """
    results: dict[int, Fisher | Exception] = {}
    groups: dict[object, list[int]] = {}
    for i, probe in enumerate(probes):
        fit = Fit(probe.params, probe.data, [list(probe.rows)], SGD(0.0), also=probe.also, base=probe.base)
        try:
            check_fit(fit)
            model.check(fit)
            if not stems(probe.params):
                none = f"there are none among {sorted(probe.params)[:3]}"
                raise FitError(f"the Fisher information is of LoRA's factors, and {none}")
        except Exception as error:
            results[i] = error
        else:
            groups.setdefault((probe.base, frozenset(t.dtype for t in probe.params.values())), []).append(i)
    for members in groups.values():
        results.update(zip(members, _together(model, [probes[i] for i in members]), strict=True))
    return [results[i] for i in range(len(probes))]


def _together(model: HFModel, probes: Sequence[FisherProbe]) -> list[Fisher | Exception]:
    try:
        return list(_passes(model, probes))
    except Exception as error:
        if len(probes) == 1:
            return [error]
    return [_together(model, [probe])[0] for probe in probes]


def _passes(model: HFModel, probes: Sequence[FisherProbe]) -> Iterator[Fisher]:
    """Everybody's rows in common passes, each through its own client's factors."""
    stack = stack_params([probe.params for probe in probes], model.device, [probe.also for probe in probes])
    slots = {stem: model.places[stem] for stem in stems(stack.params)}
    names = [f"{stem}.{side}" for stem in slots for side in "AB"]
    items = [
        model.readout.training(client, cast(Examples, probe.data), row)
        for client, probe in enumerate(probes)
        for row in probe.rows
    ]
    whose = torch.tensor([item.client for item in items])
    trace = torch.zeros(len(items), dtype=torch.float64)
    sums = {name: torch.zeros(len(probes), stack.params[name].shape[1]) for name in names}
    most = max(1, MOST_NUMBERS // sum(stack.params[name][0].numel() for name in names))
    taps = _Taps(model.scale, {name: stack.params[name].float() for name in names})
    base = model.base.at(probes[0].base)
    with taps.on(base, slots):
        for whole in model.parts(items):
            for part in (whole[i : i + most] for i in range(0, len(whole), most)):
                own = [items[i] for i in part]
                with model.seen(base, stack, own, 0) as seen:
                    taps.begin(seen.rows)
                    losses = model.readout.losses(seen)
                    weights = [
                        float(max(1, model.readout.projected(item))) ** POWERS[probes[item.client].token_norm]
                        for item in own
                    ]
                    (losses * torch.tensor(weights).to(losses)).sum().backward()  # type: ignore[no-untyped-call]
                index = torch.from_numpy(part)
                for name, gradient in taps.found.items():
                    squares = gradient.square().sum(dim=2)  # (samples, rows of the matrix)
                    trace[index] += squares.sum(dim=1).double().cpu()
                    for client in sorted({item.client for item in own}):
                        sums[name][client] += squares[whose[index].to(squares.device) == client].sum(dim=0).cpu()
    for client, probe in enumerate(probes):
        n = len(probe.rows)
        shapes = {name: probe.params[name].shape for name in names if name in probe.params}
        rows = {name: sums[name][client, : shape[0]] / (n * shape[1]) for name, shape in shapes.items()}
        yield Fisher(trace[whose == client].float(), rows)


class _Taps:
    """Per-sample gradients of the factors, filled in by a backward pass; a module that is called again adds to them.

    Attributes:
        found: by factor, (samples, rows of the matrix, columns), of the newest pass.
    """

    def __init__(self, scale: float, factors: Mapping[str, Tensor]) -> None:
        self.found: dict[str, Tensor] = {}
        self._scale = scale
        self._factors = factors  # (clients, ...)
        self._whose = Rows(None)

    def begin(self, whose: Rows) -> None:
        """Forget the gradients; the next pass has these rows."""
        self.found.clear()
        self._whose = whose

    @contextmanager
    def on(self, base: Base, slots: Mapping[str, Slot]) -> Iterator[None]:
        """The modules of these slots are watched, as long as the context lasts."""
        by_path: dict[str, list[Slot]] = {}
        for slot in slots.values():
            by_path.setdefault(slot.path, []).append(slot)
        with hooked(base, {path: self._hook(places) for path, places in by_path.items()}):
            yield

    def _hook(self, places: Sequence[Slot]) -> Any:
        def tap(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # the lowest modules: here the graph begins
                output = output.detach().requires_grad_()
            x = args[0].detach()
            output.register_hook(lambda g: self._take(places, x, g))  # type: ignore[no-untyped-call]
            return output

        return tap

    def _take(self, places: Sequence[Slot], x: Tensor, g: Tensor) -> None:
        x, g = x.float(), g.float()
        for slot in places:
            a, b = (self._whose.pick(self._factors[f"{slot.name}.{side}"]) for side in "AB")
            out = g[..., slot.offset : slot.offset + slot.d_out]
            self._add(f"{slot.name}.B", self._scale * (out.transpose(1, 2) @ (x @ a.transpose(-1, -2))))
            self._add(f"{slot.name}.A", self._scale * ((out @ b).transpose(1, 2) @ x))

    def _add(self, name: str, gradient: Tensor) -> None:
        self.found[name] = self.found[name] + gradient if name in self.found else gradient


@contextmanager
def hooked(base: Base, hooks: dict[str, Any]) -> Iterator[None]:
    """Forward hooks on modules by path, as long as the context lasts."""
    handles = [base.module.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
