"""The `Model` over a frozen transformer: adapters with a client axis, many clients in one forward and backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, Lora
from fedpeft.core.errors import FitError, ModelError, RecordError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import Data, Fit, Fitted
from fedpeft.core.rng import Rng, rng_for
from fedpeft.core.train import Stack, stack_params, train_many
from fedpeft.core.tree import Params, block_of
from fedpeft.models.adapters import Rows, delta, head, lora
from fedpeft.models.families import Slot, choose, is_decoder, slots
from fedpeft.models.load import Base
from fedpeft.models.noise import row_keys
from fedpeft.models.parts import Batch, collate, cut

TOKEN_BUDGET = 2048  # padded tokens of one forward pass
_PARTNERS = {  # side of a pair: the other side, and the dimensions that must agree
    "A": ("B", 0, 1),
    "B": ("A", 1, 0),
    "left": ("right", 1, 0),
    "right": ("left", 0, 1),
    "weight": ("bias", 0, 0),
    "bias": ("weight", 0, 0),
}


class HFModel:
    """A frozen transformer with one kind of adapter and a classification head.

    Several models may share one base: the base holds the hooks, a model only says what acts during its own passes.

    Args:
        base: from `load_base`.
        spec: the adapter that `init` draws and whose scale applies.
        classes: number of labels.
        token_budget: most padded tokens of one forward pass; bounds the memory of activations.

    Raises:
        ModelError: a spec that does not fit the base.
    """

    def __init__(self, base: Base, spec: AdapterSpec, classes: int, token_budget: int = TOKEN_BUDGET) -> None:
        if token_budget < 1:
            raise ModelError(f"run.token_budget is {token_budget}; it must be at least 1")
        self.base = base
        self.classes = classes
        self.token_budget = token_budget
        self.width = int(base.module.config.hidden_size)
        self._spec = spec
        self._warm: Params | None = None
        self.slots: dict[str, Slot] = {}
        if isinstance(spec, Lora):
            if spec.rank < 1:
                raise ModelError(f"adapter.rank is {spec.rank}; it must be at least 1")
            self.slots = choose(base.module, base.family, spec.targets, spec.blocks)
        self.places = slots(base.module, base.family) | self.slots
        self.scale = spec.alpha / spec.rank if isinstance(spec, Lora) else 1.0
        self._shapes = self._known_shapes()
        self._last = is_decoder(base.family)
        self._segments = int(getattr(base.module.config, "type_vocab_size", 0) or 0) > 1
        self._pad = int(getattr(base.module.config, "pad_token_id", None) or 0)
        caches = "use_cache" in inspect.signature(base.module.forward).parameters
        self._extra = {"use_cache": False} if caches else {}

    @property
    def spec(self) -> AdapterSpec:
        """The adapter that `init` draws."""
        return self._spec

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.device

    @property
    def pooling(self) -> str:
        """What the head sees of a row: the "mean" over its real tokens, or the "last" of them."""
        return "last" if self._last else "mean"

    # --- parameters ---

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Fresh adapter and head (with B = 0 the base's hidden states are unchanged), or those of `warm_start`."""
        if self._warm is not None:
            return {name: t.clone() for name, t in self._warm.items()}
        params = lora.init(self._spec, self.slots, rng) if isinstance(self._spec, Lora) else {}
        return params | head.init(self.classes, self.width, rng)

    def warm_start(self, params: Params) -> None:
        """Let `init` give these parameters from now on.

        Raises:
            FitError: they are not an adapter of this model.
        """
        self.check_params(params)
        try:
            tree.same_layout(self.init(rng_for(0, "adapter")), params)
        except RecordError as error:
            raise FitError(f"the parameters to start from are not those of this model's adapter: {error}") from None
        self._warm = params

    def _known_shapes(self) -> dict[str, tuple[int | None, ...]]:
        adapter = lora.shapes(self._spec, self.places) if isinstance(self._spec, Lora) else {}
        heads: dict[str, tuple[int | None, ...]] = {head.WEIGHT: (None, self.width), head.BIAS: (None,)}
        return adapter | delta.shapes(self.places) | heads

    def check(self, fit: Fit) -> None:
        """Raise FitError unless every parameter is one that this model has, in the right shape, with its partner."""
        if not isinstance(fit.data, Examples):
            raise FitError(f"a Fit's data is a {type(fit.data).__name__}; this model needs tokenised Examples")
        for layer in (fit.params, *fit.also):
            self.check_params(layer)
        if head.WEIGHT not in fit.params:
            raise FitError(f"a Fit has no {head.WEIGHT!r}; send the head with the adapter")
        if any(head.WEIGHT in layer for layer in fit.also):
            raise FitError(f"Fit.also holds {head.WEIGHT!r}; a forward pass has one head, that of Fit.params")
        classes, labels = fit.params[head.WEIGHT].shape[0], fit.data.labels
        if len(labels) and not 0 <= (odd := int(labels.min() if labels.min() < 0 else labels.max())) < classes:
            raise FitError(f"a label is {odd}; the head has classes 0 to {classes - 1}")
        self.base.at(fit.base)

    def check_params(self, params: Params) -> None:
        """Raise FitError at the first parameter that this model does not have, or not in this shape."""
        for name, t in params.items():
            want = self._shapes.get(name)
            if want is None:
                raise FitError(f"parameter {name!r} does not exist in this model with adapter {self._spec.kind!r}")
            if len(want) != t.dim() or any(w is not None and w != n for w, n in zip(want, t.shape, strict=True)):
                shown = tuple("any" if w is None else w for w in want)
                raise FitError(f"parameter {name!r} has shape {tuple(t.shape)}; this model needs {shown}")
        for name, t in params.items():
            stem, _, side = name.rpartition(".")
            other, dim, partner_dim = _PARTNERS.get(side, ("", 0, 0))
            partner = f"{stem}.{other}"
            if other and partner not in params:
                raise FitError(f"parameter {name!r} came without its partner {partner}")
            if other and t.shape[dim] != params[partner].shape[partner_dim]:
                both = f"{tuple(t.shape)} and {tuple(params[partner].shape)}"
                raise FitError(f"parameters {name!r} and {partner!r} do not fit together: {both}")

    def lowest_block(self, params: Params) -> int:
        """The lowest block that has an adapter: no backward pass goes below it."""
        blocks = [b for name in params if (b := block_of(name)) is not None]
        return min(blocks, default=int(self.base.module.config.num_hidden_layers))

    # --- training ---

    def fit(self, fit: Fit) -> Fitted:
        """Train one fit; raises what went wrong."""
        fitted = self.fit_many([fit])[0]
        if isinstance(fitted, Exception):
            raise fitted
        return fitted

    def fit_many(self, fits: Sequence[Fit]) -> list[Fitted | Exception]:
        """Train every fit, the whole cohort in the same passes; a failed one gives its exception."""
        return train_many(fits, self, self.check)

    def backward(self, stack: Stack, rows: Sequence[Sequence[int]], step: int) -> Tensor:
        """See `train.Objective`: gradients of the mean cross-entropy of each client's own rows."""
        base = self.base.at(stack.fits[0].base)
        losses = torch.zeros(len(rows), dtype=stack.params[head.WEIGHT].dtype, device=self.device)
        for part in self._parts(stack, rows):
            with self._bound(base, stack, part, step) as whose:
                batch = self._collate(part)
                logits = self._forward(base, stack, batch, whose)
            labels = torch.tensor([int(data.labels[row]) for _, data, row in part], device=self.device)
            shares = [1 / len(rows[client]) for client, _, _ in part]
            weights = torch.tensor(shares, dtype=logits.dtype, device=self.device)
            terms = F.cross_entropy(logits, labels, reduction="none") * weights
            if terms.requires_grad:  # not where nothing of this part's clients trains
                terms.sum().backward()  # type: ignore[no-untyped-call]
            index = torch.tensor([client for client, _, _ in part], device=self.device)
            losses.index_add_(0, index, terms.detach().to(losses.dtype))
        return losses

    def _parts(self, stack: Stack, rows: Sequence[Sequence[int]]) -> Iterator[list[tuple[int, Examples, int]]]:
        """The rows of all clients as (client, its examples, row), cut by length under the token budget."""
        every = [
            (client, cast(Examples, fit.data), row)
            for client, (fit, own) in enumerate(zip(stack.fits, rows, strict=True))
            for row in own
        ]
        lengths = np.fromiter((len(data.tokens[row]) for _, data, row in every), dtype=np.int64, count=len(every))
        for part in cut(lengths, self.token_budget):
            yield [every[i] for i in part]

    def _collate(self, part: Sequence[tuple[int, Examples, int]]) -> Batch:
        return collate([(data, row) for _, data, row in part], self._pad, self.device, self._segments)

    @contextmanager
    def _bound(self, base: Base, stack: Stack, part: Sequence[tuple[int, Examples, int]], step: int) -> Iterator[Rows]:
        """Put the adapters of all clients in place for one forward pass."""
        clients = [client for client, _, _ in part]
        index = None if min(clients) == max(clients) else torch.tensor(clients, device=self.device)
        whose = Rows(index, clients[0])
        if stack.fits and any(fit.dropout for fit in stack.fits):
            seeds = [stack.fits[client].seed for client in clients]
            drop = torch.tensor([stack.fits[client].dropout for client in clients], device=self.device)
            whose = Rows(index, clients[0], row_keys(seeds, step, [row for _, _, row in part], self.device), drop)
        base.active.clear()
        try:
            for layer in (stack.params, *stack.also):
                self._apply(base, layer, whose)
            yield whose
        finally:
            base.active.clear()

    def _apply(self, base: Base, layer: Mapping[str, Tensor], whose: Rows) -> None:
        for name, slot in self.places.items():
            module = base.module.get_submodule(slot.path) if _touches(layer, name) else None
            if module is None:
                continue
            base.hook(module)
            applied = base.active.setdefault(module, [])
            if f"{name}.A" in layer:
                applied.append(lora.apply(layer[f"{name}.A"], layer[f"{name}.B"], self.scale, slot, whose))
            if any(f"{delta.PREFIX}{name}.{side}" in layer for side in ("left", "dense")):
                applied.append(delta.apply(layer, slot, whose))

    def _forward(self, base: Base, stack: Stack, batch: Batch, whose: Rows) -> Tensor:
        """(rows, classes) logits."""
        hidden = base.module(**batch.inputs, **self._extra).last_hidden_state
        pooled = head.pool(hidden, batch.mask, batch.lengths, self._last)
        classes = [size[0] if size else 0 for size in stack.sizes[head.WEIGHT]]
        return head.apply(stack.params, pooled, whose, classes)

    # --- predictions ---

    def logits(self, params: Params | None, data: Data, rows: Sequence[int] | None = None) -> Tensor:
        """(rows, classes) predictions before the softmax, without gradient, on the CPU.

        Raises:
            ModelError: params without a head: the base alone gives no class.
        """
        if params is None or head.WEIGHT not in params:
            raise ModelError("predictions of a classification task need a head; give params with head.weight")
        self.check_params(params)
        examples = cast(Examples, data)
        index = list(range(len(examples))) if rows is None else [int(i) for i in rows]
        out = torch.empty(len(index), params[head.WEIGHT].shape[0])
        stack = stack_params([params], self.device)
        lengths = examples.lengths[np.asarray(index, dtype=np.int64)] if index else np.zeros(0, dtype=np.int64)
        with torch.no_grad():
            for part in cut(lengths, self.token_budget) if index else ():
                members = [(0, examples, index[i]) for i in part]
                with self._bound(self.base, stack, members, 0) as whose:
                    logits = self._forward(self.base, stack, self._collate(members), whose)
                out[torch.from_numpy(part)] = logits.float().cpu()
        return out

    def score(self, params: Params, data: Data) -> dict[str, Tensor]:
        """Sums over the rows: `confusion` (true, predicted) int64, `loss` summed cross-entropy, `n` rows."""
        return classification_sums(self.logits(params, data), torch.from_numpy(cast(Examples, data).labels))


def classification_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Confusion matrix (classes, classes; rows true), summed cross-entropy (float64) and count, from logits."""
    classes = logits.shape[1]
    predicted = logits.argmax(dim=1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)
    loss = F.cross_entropy(logits.double(), labels, reduction="sum") if len(labels) else torch.zeros(()).double()
    return {"confusion": confusion, "loss": loss, "n": torch.tensor(len(labels))}


def _touches(layer: Mapping[str, Tensor], slot: str) -> bool:
    return f"{slot}.A" in layer or any(f"{delta.PREFIX}{slot}.{side}" in layer for side in ("left", "dense"))
