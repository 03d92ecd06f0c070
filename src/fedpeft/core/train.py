"""Local training of many clients at once, on stacked parameters: the one loop behind every `Model.fit_many`.

A model brings an `Objective`, which adds the gradients of one step to the stacked leaves; everything else of a `Fit`
(prox, penalty, mask, clip, drift, optimizer, decay, learning rates) happens here, for all clients in one sweep over a
flat buffer with one row per client.

    1. group the fits that can share a sweep; order each group by number of steps, descending
    2. lay all parameters out in one flat buffer, one row per client; names and shapes that a client lacks are padding
    3. per step, for the first k clients, those that still have steps:
         loss gradients, penalty, prox -> mask -> clip per client -> drift -> optimizer and decay -> mask of the update
    4. cut every client's own parameters out again; a client whose numbers are not finite gives its error instead
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fedpeft.core.errors import ClientError, DivergedError
from fedpeft.core.fit import AdamW, Fit, Fitted, Moments, check_fit
from fedpeft.core.tree import Params

Shape: TypeAlias = tuple[int, ...]
Sizes: TypeAlias = "Mapping[str, tuple[Shape | None, ...]]"
Number: TypeAlias = "float | Tensor"  # one value for all clients, or a column (clients, 1)


@dataclass(frozen=True)
class Stack:
    """The adapters of k clients in one forward pass.

    Attributes:
        fits: the k fits, in the order of the client axis.
        params: every name of every fit, (k, ...); trained ones are leaves with a gradient, the others are frozen.
        also: the further adapters, layer by layer, (k, ...), frozen.
        sizes: the shape that each client has under a name, None where it has none; the rest of its row is zeros.
        also_sizes: the same of each further layer.
    """

    fits: Sequence[Fit]
    params: Mapping[str, Tensor]
    also: tuple[Mapping[str, Tensor], ...]
    sizes: Mapping[str, tuple[Shape | None, ...]]
    also_sizes: tuple[Mapping[str, tuple[Shape | None, ...]], ...] = ()


class Objective(Protocol):
    """What a model adds to the training loop."""

    @property
    def device(self) -> torch.device:
        """Where the stacked parameters live during training."""
        ...

    def backward(self, stack: Stack, rows: Sequence[Sequence[int]], step: int) -> Tensor:
        """Add the gradient of each client's mean loss over its own rows to `.grad` of the trained leaves.

        Args:
            stack: the k clients that are active in this step.
            rows: k lists of indices into each fit's data.
            step: counted from 0, for the noise of dropout.

        Returns:
            (k,) the mean losses, detached.
        """
        ...

    def cost(self, fit: Fit) -> tuple[int, int, int]:
        """What a fit takes.

        Returns:
            real tokens that go through the model; the sum over rows of tokens times keys that they attend to; further
            multiply-adds, see `Fitted.products`.
        """
        ...


def train_many(fits: Sequence[Fit], objective: Objective, check: Callable[[Fit], None]) -> list[Fitted | Exception]:
    """Train all fits; each gets its Fitted or the exception that is to be thrown into its own work.

    Args:
        check: the model's own check of a Fit, after `check_fit`; raises FitError.
    """
    results: dict[int, Fitted | Exception] = {}
    groups: dict[object, list[int]] = {}
    for i, fit in enumerate(fits):
        try:
            check_fit(fit)
            check(fit)
        except Exception as error:
            results[i] = error
        else:
            dtypes = frozenset(t.dtype for t in fit.params.values())
            buffered = getattr(fit.optimizer, "momentum", 1.0) != 0  # without, SGD keeps no buffer
            shared = (type(fit.optimizer), buffered, fit.penalty, fit.base, fit.checkpointing, dtypes)
            groups.setdefault(shared, []).append(i)
    for members in groups.values():
        members.sort(key=lambda i: -fits[i].steps)
        results.update(zip(members, _train_group([fits[i] for i in members], objective), strict=True))
    return [results[i] for i in range(len(fits))]


def _train_group(fits: Sequence[Fit], objective: Objective) -> list[Fitted | Exception]:
    """One sweep for all; where it breaks (out of memory, say), one by one, so that only the culprit is lost.

    The others are then trained alone: equal to rounding, not to the bit.
    """
    try:
        return list(_Sweep(fits, objective).run())
    except Exception as error:
        if len(fits) == 1:
            return [error if isinstance(error, ClientError) else _as_client_error(error)]
    return [_train_group([fit], objective)[0] for fit in fits]


def _as_client_error(error: Exception) -> ClientError:
    wrapped = ClientError(f"local training failed: {type(error).__name__}: {' '.join(str(error).split())}")
    wrapped.__cause__ = error
    return wrapped


class _Sweep:
    """The flat buffers of one group and the steps over them."""

    def __init__(self, fits: Sequence[Fit], objective: Objective) -> None:
        self.fits = fits
        self.objective = objective
        self.device = objective.device
        self.dtype = functools.reduce(torch.promote_types, (t.dtype for t in fits[0].params.values()))
        trained = sorted({name for fit in fits for name in fit.trained})
        self.shapes = {name: _widest(name, fits) for name in trained}
        self.spans: dict[str, slice] = {}
        self.total = 0
        for name, shape in self.shapes.items():
            self.spans[name] = slice(self.total, self.total + math.prod(shape))
            self.total += math.prod(shape)
        self.values = self._flat([fit.params for fit in fits])
        self.gradients = torch.zeros_like(self.values)
        self.mask = self._mask()
        self.drift = self._flat([fit.drift or {} for fit in fits]) if any(fit.drift for fit in fits) else None
        self.center = self._centers()
        starts = [fit.moments or Moments() for fit in fits]
        self.first = self._flat([m.first for m in starts])
        self.second = self._flat([m.second for m in starts]) if isinstance(fits[0].optimizer, AdamW) else None
        self.rates = self._rates()
        self.frozen = {
            name: _stacked([fit.params.get(name) for fit in fits], self.device)
            for name in sorted({n for fit in fits for n in fit.params} - set(trained))
        }
        depth = max(len(fit.also) for fit in fits)
        self.also = tuple(_stacked_layer([fit.also[i : i + 1] for fit in fits], self.device) for i in range(depth))

    # --- layout ---

    def _flat(self, params: Sequence[Params]) -> Tensor:
        """(clients, total), zeros where a client has no number."""
        flat = torch.zeros(len(params), self.total, dtype=self.dtype, device=self.device)
        for row, own in zip(flat, params, strict=True):
            for name, span in self.spans.items():
                if name in own:
                    self._place(row[span], name, own[name])
        return flat

    def _place(self, span: Tensor, name: str, value: Tensor) -> None:
        window = span.view(self.shapes[name])[tuple(slice(n) for n in value.shape)]
        window.copy_(value.reshape(window.shape))

    def _cut(self, row: Tensor, name: str, shape: torch.Size) -> Tensor:
        window = row[self.spans[name]].view(self.shapes[name])[tuple(slice(n) for n in shape)]
        return window.clone().reshape(shape).cpu()

    def _mask(self) -> Tensor | None:
        """1 where a number may change: trained, present at this client, and not masked; None where all may."""
        rows = [{n: (fit.mask or {}).get(n, torch.ones_like(fit.params[n])) for n in fit.trained} for fit in self.fits]
        even = all(
            name in fit.trained and fit.params[name].shape == shape
            for fit in self.fits
            for name, shape in self.shapes.items()
        )
        return None if even and not any(fit.mask for fit in self.fits) else self._flat(rows) != 0

    def _centers(self) -> Tensor | None:
        if not any(fit.prox for fit in self.fits):
            return None
        return self._flat([(fit.prox.center if fit.prox else None) or fit.params for fit in self.fits])

    def _rates(self) -> Tensor | None:
        """(clients, total) factor on the optimizer's rate where `Fit.rates` names another rate, else None."""
        if not any(fit.rates and fit.steps for fit in self.fits):
            return None
        factors = torch.ones_like(self.values)
        for row, fit in zip(factors, self.fits, strict=True):
            for name, span in self.spans.items():
                prefixes = [p for p in fit.rates if name.startswith(p)]
                if prefixes and fit.steps:
                    row[span] = fit.rates[max(prefixes, key=len)] / _top_rate(fit)
        return factors

    # --- steps ---

    def run(self) -> Iterator[Fitted | Exception]:
        """Run all steps, then give every client's result in the group's order."""
        losses: list[list[Tensor]] = [[] for _ in self.fits]
        active, stack = -1, None
        for step in range(self.fits[0].steps):
            k = sum(fit.steps > step for fit in self.fits)
            if k != active:
                active, stack = k, self._stack(k)
            assert stack is not None
            rows = [fit.batches[step] for fit in stack.fits]
            for own, loss in zip(losses, self._step(stack, rows, step, k), strict=False):
                own.append(loss)
        for i, fit in enumerate(self.fits):
            yield self._result(i, fit, losses[i])

    def _stack(self, k: int) -> Stack:
        params = dict(_narrow(self.frozen, k))
        for name, span in self.spans.items():
            shape = (k, *self.shapes[name])
            params[name] = self.values[:k, span].view(shape).detach().requires_grad_()
        fits = self.fits[:k]
        sizes = {name: tuple(_size(fit.params, name) for fit in fits) for name in params}
        also = tuple(dict(_narrow(layer, k)) for layer in self.also)
        return Stack(fits, params, also, sizes, tuple(_layer_sizes(fits, i, layer) for i, layer in enumerate(also)))

    def _step(self, stack: Stack, rows: Sequence[Sequence[int]], step: int, k: int) -> Tensor:
        fits, values, gradients = stack.fits, self.values[:k], self.gradients[:k]
        losses = self.objective.backward(stack, rows, step)
        penalty = fits[0].penalty
        if penalty is not None:
            penalty(stack.params).sum().backward()  # type: ignore[no-untyped-call]
        self._gather(stack.params, gradients)
        if self.center is not None:
            mu = _column([fit.prox.mu if fit.prox else 0.0 for fit in fits], values)
            gradients.add_((values - self.center[:k]).mul_(mu))
        mask = None if self.mask is None else self.mask[:k]
        if mask is not None:
            gradients.mul_(mask)
        if any(fit.clip is not None for fit in fits):
            bounds = values.new_tensor([math.inf if f.clip is None else f.clip for f in fits])
            norms = torch.linalg.vector_norm(gradients, dim=1)
            gradients.mul_((bounds / (norms + 1e-6)).clamp_(max=1.0)[:, None])
        if self.drift is not None:
            gradients.add_(self.drift[:k])
        before = values.clone() if mask is not None else None
        self._update(fits, step, k)
        if mask is not None and before is not None:
            torch.where(mask, values, before, out=values)
        return losses

    def _gather(self, params: Mapping[str, Tensor], gradients: Tensor) -> None:
        """Move the leaves' gradients into the flat buffer; autograd makes a fresh, contiguous one at the next step."""
        for name, span in self.spans.items():
            leaf = params[name]
            window = gradients[:, span]
            if leaf.grad is None:
                window.zero_()
            else:
                window.copy_(leaf.grad.flatten(1))
                leaf.grad = None

    def _update(self, fits: Sequence[Fit], step: int, k: int) -> None:
        values, gradients, first = self.values[:k], self.gradients[:k], self.first[:k]
        lr = _column([_rate(fit, step) for fit in fits], values)
        lr = lr if self.rates is None else self.rates[:k] * lr
        decay = _column([fit.optimizer.weight_decay for fit in fits], values)
        if self.second is None:
            if not _is_zero(decay):
                gradients.add_(values * decay)
            momentum = _column([fit.optimizer.momentum for fit in fits if not isinstance(fit.optimizer, AdamW)], values)
            if not _is_zero(momentum):
                gradients = first.mul_(momentum).add_(gradients)
            values.sub_(torch.mul(gradients, lr, out=self.gradients[:k]))
            return
        second, adams = self.second[:k], [fit.optimizer for fit in fits if isinstance(fit.optimizer, AdamW)]
        counts = [step + 1 + (fit.moments.step if fit.moments else 0) for fit in fits]
        beta2 = _column([a.betas[1] for a in adams], values)
        rest1, rest2 = (_column([1 - a.betas[i] for a in adams], values) for i in (0, 1))
        bias1 = _column([1 - a.betas[0] ** t for a, t in zip(adams, counts, strict=True)], values)
        bias2 = _column([math.sqrt(1 - a.betas[1] ** t) for a, t in zip(adams, counts, strict=True)], values)
        if not _is_zero(decay):
            values.mul_(1 - lr * decay)
        first.lerp_(gradients, rest1)
        second.mul_(beta2).add_(gradients.square_().mul_(rest2))
        denominator = torch.sqrt(second, out=gradients).div_(bias2).add_(_column([a.eps for a in adams], values))
        values.sub_(torch.div(first, denominator, out=denominator).mul_(lr / bias1))

    # --- results ---

    def _result(self, i: int, fit: Fit, losses: Sequence[Tensor]) -> Fitted | Exception:
        curve = torch.stack(list(losses)).tolist() if losses else []
        bad = next((t for t, loss in enumerate(curve) if not math.isfinite(loss)), None)
        if bad is not None or not bool(torch.isfinite(self.values[i]).all()):
            where = "the parameters are not finite" if bad is None else f"the loss is {curve[bad]} at step {bad + 1}"
            return DivergedError(f"training of {fit.steps} steps diverged: {where}; lower method.lr or set method.clip")
        params = {name: t.detach().clone().cpu() for name, t in fit.params.items()}
        for name in fit.trained:
            params[name] = self._cut(self.values[i], name, fit.params[name].shape).to(fit.params[name].dtype)
        examples = sum(len(batch) for batch in fit.batches)
        return Fitted(params, tuple(curve), fit.steps, examples, self._moments(i, fit), *self.objective.cost(fit))

    def _moments(self, i: int, fit: Fit) -> Moments:
        cut = {name: fit.params[name].shape for name in fit.trained}
        before = fit.moments or Moments()
        first = dict(before.first) | {n: self._cut(self.first[i], n, s) for n, s in cut.items()}
        second = dict(before.second)
        if self.second is not None:
            second |= {n: self._cut(self.second[i], n, s) for n, s in cut.items()}
        return Moments(before.step + fit.steps, first, second)


# --- stacking ---------------------------------------------------------------------------------------------------


def stack_params(params: Sequence[Params], device: torch.device, also: Sequence[tuple[Params, ...]] = ((),)) -> Stack:
    """A Stack without training, for forward passes: one client per params, everything frozen.

    Args:
        also: of each client, further adapters or base deltas that act for it.
    """
    depth = max(len(own) for own in also)
    further = ([own[i] if i < len(own) else {} for own in also] for i in range(depth))
    layers = [_frozen(params, device), *(_frozen(own, device) for own in further)]
    (stacked, sizes), *others = layers
    return Stack((), stacked, tuple(layer for layer, _ in others), sizes, tuple(own for _, own in others))


def _frozen(params: Sequence[Params], device: torch.device) -> tuple[dict[str, Tensor], Sizes]:
    names = sorted({name for own in params for name in own})
    stacked = {name: _stacked([own.get(name) for own in params], device) for name in names}
    return stacked, {name: tuple(_size(own, name) for own in params) for name in names}


def _stacked(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """(clients, ...) with zeros as padding; equal tensors share one memory (stride 0 on the client axis)."""
    given = [t for t in tensors if t is not None]
    first = given[0]
    if len(given) == len(tensors) and all(t is first or torch.equal(t, first) for t in given[1:]):
        return first.detach().to(device).unsqueeze(0).expand(len(tensors), *first.shape)
    shape = [max(sizes) for sizes in zip(*(t.shape for t in given), strict=True)]
    out = torch.zeros(len(tensors), *shape, dtype=first.dtype, device=device)
    for row, tensor in zip(out, tensors, strict=True):
        if tensor is not None:
            row[tuple(slice(n) for n in tensor.shape)] = tensor.to(device)
    return out


def _stacked_layer(layers: Sequence[tuple[Params, ...]], device: torch.device) -> dict[str, Tensor]:
    own = [layer[0] if layer else {} for layer in layers]
    return {name: _stacked([p.get(name) for p in own], device) for name in sorted({n for p in own for n in p})}


def _layer_sizes(fits: Sequence[Fit], depth: int, layer: Mapping[str, Tensor]) -> dict[str, tuple[Shape | None, ...]]:
    own = [fit.also[depth] if depth < len(fit.also) else {} for fit in fits]
    return {name: tuple(_size(params, name) for params in own) for name in layer}


def _narrow(layer: Mapping[str, Tensor], k: int) -> Iterator[tuple[str, Tensor]]:
    return ((name, t[:k]) for name, t in layer.items())


def _widest(name: str, fits: Sequence[Fit]) -> Shape:
    shapes = [tuple(fit.params[name].shape) for fit in fits if name in fit.params]
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def _size(params: Params, name: str) -> Shape | None:
    return tuple(params[name].shape) if name in params else None


def _column(values: Sequence[float], like: Tensor) -> Number:
    """One float where all clients agree, else a column (clients, 1)."""
    if all(v == values[0] for v in values):
        return values[0]
    return like.new_tensor(values)[:, None]


def _is_zero(number: Number) -> bool:
    return not isinstance(number, Tensor) and number == 0.0


def _rate(fit: Fit, step: int) -> float:
    lr = fit.optimizer.lr
    return lr[step] if isinstance(lr, tuple) else lr


def _top_rate(fit: Fit) -> float:
    """What `Fit.rates` is relative to: the rate, or the largest of a schedule, which the named rates then follow."""
    lr = fit.optimizer.lr
    return max(lr) if isinstance(lr, tuple) else lr
