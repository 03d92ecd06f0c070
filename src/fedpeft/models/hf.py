"""The `Model` over a frozen transformer: adapters with a client axis, many clients in one forward and backward pass."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec
from fedpeft.core.errors import FitError, ModelError, RecordError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import Data, Fit, Fitted, alone, blocks_in
from fedpeft.core.model import Fisher, FisherProbe, Perturbation, Teacher, TokenNorm
from fedpeft.core.rng import Rng, rng_for
from fedpeft.core.train import Stack, stack_params, train_many
from fedpeft.core.tree import Params, block_of
from fedpeft.models import checks, distil, probes, virtual, work
from fedpeft.models.adapters import Rows, delta
from fedpeft.models.adapters.full import FullAdapter
from fedpeft.models.adapters.kinds import build_adapter
from fedpeft.models.checkpointing import checkpointed
from fedpeft.models.families import is_decoder, slots
from fedpeft.models.fisher import fisher_many
from fedpeft.models.lm_head import LmHead
from fedpeft.models.load import Base
from fedpeft.models.noise import row_keys
from fedpeft.models.parts import Batch, collate, cut
from fedpeft.models.readouts import Item, Readout, Seen
from fedpeft.models.readouts.head import HeadReadout
from fedpeft.models.sensitivity import sensitivity
from fedpeft.models.soften import softened

TOKEN_BUDGET = 2048  # padded tokens of one forward pass


class HFModel:
    """A frozen transformer with one kind of adapter and one task format.

    Several models may share one base: the base holds the hooks, a model only says what acts during its own passes.

    Args:
        base: from `load_base`.
        spec: the adapter that `init` draws.
        classes: number of labels.
        token_budget: most padded tokens of one forward pass; bounds the memory of activations.
        readout: the task format; None: a trained head on the pooled last hidden state.

    Raises:
        ModelError: a spec that does not fit the base.
    """

    def __init__(
        self,
        base: Base,
        spec: AdapterSpec,
        classes: int,
        token_budget: int = TOKEN_BUDGET,
        readout: Readout | None = None,
    ) -> None:
        if token_budget < 1:
            raise ModelError(f"run.token_budget is {token_budget}; it must be at least 1")
        self.base = base
        self.classes = classes
        self.token_budget = token_budget
        self.width = int(base.module.config.hidden_size)
        self.blocks = int(base.module.config.num_hidden_layers)
        self._spec = spec
        self._warm: Params | None = None
        self.adapter = build_adapter(spec, base)
        self.slots = dict(self.adapter.slots)
        self.scale = float(getattr(self.adapter, "scale", 1.0))
        self.places = slots(base.module, base.family) | self.slots
        self._last = is_decoder(base.family)
        self.readout: Readout = readout or HeadReadout(classes, self.width, self._last)
        self.weights: Mapping[str, str] = getattr(self.adapter, "weights", {})  # paths of the base's own, by name
        self._layout = checks.Layout(
            spec.kind,
            {**self.adapter.shapes(), **delta.shapes(self.places), **self.readout.shapes()},
            {**checks.HEAD_PARTNERS, **delta.PARTNERS, **self.adapter.partners},
            self.weights.keys(),
            self.adapter.networks,
        )
        self._segments = int(getattr(base.module.config, "type_vocab_size", 0) or 0) > 1
        self._pad = int(getattr(base.module.config, "pad_token_id", None) or 0)
        caches = "use_cache" in inspect.signature(base.module.forward).parameters
        self._extra: dict[str, Any] = {"use_cache": False} if caches else {}

    @property
    def spec(self) -> AdapterSpec:
        """The adapter that `init` draws."""
        return self._spec

    @property
    def config(self) -> dict[str, Any]:
        """See `Base.config`."""
        return self.base.config

    @property
    def sha256(self) -> str:
        """See `Base.sha256`."""
        return self.base.sha256

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.device

    @property
    def lm(self) -> LmHead | None:
        """The language model's head of a model that predicts text; None where it predicts labels."""
        found = getattr(self.readout, "lm", None)
        return found if self.readout.classes == 0 and isinstance(found, LmHead) else None

    @property
    def pooling(self) -> str:
        """What the head sees of a row: the "mean" over its real tokens, or the "last" of them."""
        return "last" if self._last else "mean"

    def on(self, base: str) -> HFModel:
        """The same model, which predicts by another precision or by some of the blocks; names are those of `Fit.base`.

        Raises:
            ModelError: see `Base.at`.
        """
        other = copy.copy(self)
        other.base = self.base.at(base)
        return other

    # --- parameters ---

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Fresh adapter and readout, or those of `warm_start`."""
        if self._warm is not None:
            return {name: t.clone() for name, t in self._warm.items()}
        return self.adapter.init(rng) | self.readout.init(rng)

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

    def check(self, fit: Fit) -> None:
        """Raise FitError unless every parameter is one that this model has, in the right shape, with its partner."""
        checks.check_fit(self, fit)

    def check_params(self, params: Params) -> None:
        """Raise FitError at the first parameter that this model does not have, or not in this shape."""
        self._layout.check(params)

    def lowest_block(self, names: Iterable[str]) -> int:
        """The lowest block that these parameters act in: no backward pass goes below it.

        The readout's parameters act above all blocks, and so do the base's last norms; those before the first block
        count as in block 0.
        """
        above = self.readout.params | getattr(self.adapter, "above", frozenset())
        acting = [block_of(name) or 0 for name in names if name not in above]
        return min(acting, default=self.blocks)

    # --- training ---

    def fit(self, fit: Fit) -> Fitted:
        """Train one fit; raises what went wrong."""
        return alone(self.fit_many([fit]))

    def fit_many(self, fits: Sequence[Fit]) -> list[Fitted | Exception]:
        """Train every fit, the whole cohort in the same passes; a failed one gives its exception.

        Clients with weights of their own cannot share a pass: they train one after another, the same as alone.
        """
        if self.weights:
            return [train_many([fit], self, self.check)[0] for fit in fits]
        return train_many(fits, self, self.check)

    def backward(self, stack: Stack, rows: Sequence[Sequence[int]], step: int) -> Tensor:
        """See `train.Objective`: gradients of each client's mean loss over its own rows, or their answer tokens."""
        losses: Tensor | None = None
        for items, terms in self.loss_terms(stack, rows, step):
            if terms.requires_grad:  # not where nothing of this part's clients trains
                terms.sum().backward()  # type: ignore[no-untyped-call]
            if losses is None:
                losses = torch.zeros(len(rows), dtype=terms.dtype, device=self.device)
            index = torch.tensor([item.client for item in items], device=self.device)
            losses.index_add_(0, index, terms.detach())
        assert losses is not None, "a step has rows"
        return losses

    def loss_terms(
        self, stack: Stack, rows: Sequence[Sequence[int]], step: int
    ) -> Iterator[tuple[Sequence[Item], Tensor]]:
        """Part by part, the items and each one's share of its client's mean loss, with a graph to trained leaves.

        A part's backward pass must end before the next part is taken: with checkpointing it runs the adapters again.
        """
        base = self.base.at(stack.fits[0].base)
        every = [
            self.readout.training(client, cast(Examples, fit.data), row)
            for client, (fit, own) in enumerate(zip(stack.fits, rows, strict=True))
            for row in own
        ]
        weights = np.fromiter(map(self.readout.weight, every), np.float64, count=len(every))
        shares = weights / np.bincount([item.client for item in every], weights)[[item.client for item in every]]
        for part in self.parts(every):
            items = [every[i] for i in part]
            kept = checkpointed(base) if stack.fits[0].checkpointing else nullcontext()
            with kept, self.seen(base, stack, items, step) as seen:  # in place until the consumer's backward has ended
                terms = softened(self.readout.losses(seen), items, stack.fits)
                yield items, terms * torch.from_numpy(shares[part]).to(terms)

    def cost(self, fit: Fit) -> tuple[int, int, int]:
        """See `train.Objective`: tokens and pairs of all rows that a fit uses, prompts included."""
        data = cast(Examples, fit.data)
        used = [row for batch in fit.batches for row in batch]
        items = {row: self.readout.training(0, data, row) for row in used}
        tokens, pairs = self._work((self.readout.length(items[row]) for row in used), fit.params)
        products = self._beside(fit, tokens, pairs)
        if not isinstance(self.adapter, FullAdapter):
            return tokens, pairs, products + work.of_factors(fit, self.lowest_block(fit.trained), tokens)
        tied = getattr(getattr(self.readout, "lm", None), "tied", False)
        projected = sum(self.readout.projected(items[row]) for row in used) if tied else 0
        return tokens, pairs, products + self.adapter.products(fit.trained, tokens, projected)

    def _beside(self, fit: Fit, tokens: int, pairs: int) -> int:
        """Multiply-adds of frozen blocks that are computed twice, less those of blocks that are left out."""
        lowest, kept = self.lowest_block(fit.trained), blocks_in(fit.base)
        inside = range(self.blocks) if kept is None else kept
        again = [b for b in inside if b >= lowest] if fit.checkpointing else []
        more = work.computed_again(self.places, again, tokens, pairs)
        return more if kept is None else more - work.saved(self.places, kept, lowest, tokens, pairs)

    def passes(self, params: Params | None, data: Data, rows: Sequence[int] | None = None) -> tuple[int, int]:
        """Tokens and pairs of forward passes that predict the labels of the rows."""
        examples = cast(Examples, data)
        index = range(len(examples)) if rows is None else rows
        items = (item for row in index for item in self.readout.predicting(0, examples, row))
        return self._work(map(self.readout.length, items), params or {})

    def _work(self, lengths: Iterable[int], params: Params) -> tuple[int, int]:
        tokens, keys = self.adapter.context(params)
        whole = [n + tokens for n in lengths]
        return round(sum(whole)), round(sum(n * (n + keys) for n in whole))

    # --- passes ---

    def parts(self, items: Sequence[Item]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """Indices of the items, cut by length under the token budget."""
        if not items:
            return []
        return cut(np.fromiter(map(self.readout.length, items), dtype=np.int64, count=len(items)), self.token_budget)

    @contextmanager
    def seen(self, base: Base, stack: Stack, items: Sequence[Item], step: int) -> Iterator[Seen]:
        """One forward pass of the items, with the adapters of all clients in place while it is used."""
        whose = self._rows(stack, items, step)
        batch = collate([self.readout.sequence(item) for item in items], self._pad, self.device, self._segments)
        with self.acting(base, stack, whose):
            yield Seen(base, stack, items, batch, whose, self._hidden(base, batch, items))

    @contextmanager
    def acting(self, base: Base, stack: Stack, whose: Rows) -> Iterator[None]:
        """The adapters of all clients are in place, for passes of these rows, as long as the context lasts."""
        base.acting.clear()
        try:
            layers = ((stack.params, stack.sizes), *zip(stack.also, stack.also_sizes, strict=True))
            for layer, _ in layers:  # a change of the base comes before what acts on the base's outputs
                delta.bind(layer, self.places, whose, base)
            for layer, sizes in layers:
                self.adapter.bind(layer, sizes, whose, base)
            yield
        finally:
            base.acting.clear()

    def _rows(self, stack: Stack, items: Sequence[Item], step: int) -> Rows:
        clients = [item.client for item in items]
        index = None if min(clients) == max(clients) else torch.tensor(clients, device=self.device)
        if not any(fit.dropout for fit in stack.fits):
            return Rows(index, clients[0])
        seeds = [stack.fits[client].seed for client in clients]
        drop = torch.tensor([stack.fits[client].dropout for client in clients], device=self.device)
        return Rows(index, clients[0], row_keys(seeds, step, [item.row for item in items], self.device), drop)

    def _hidden(self, base: Base, batch: Batch, items: Sequence[Item]) -> Tensor:
        """(rows, tokens, d) last hidden states of the text's own tokens.

        A prompt that is made of the text must not see an answer that stands behind it.
        """
        acting = base.acting
        inputs: dict[str, Any] = {**batch.inputs, **self._extra}
        if acting.prefixes:
            inputs["prefixes"] = acting.prefixes
        if acting.weights:
            return cast(Tensor, functional_call(base.module, acting.weights, (), inputs).last_hidden_state)
        if acting.virtual is None:
            return cast(Tensor, base.module(**inputs).last_hidden_state)
        ahead = [n for item in items if (n := self.readout.known(item)) is not None]
        known = torch.tensor(ahead, device=self.device) if ahead else None
        return virtual.run(base, batch, inputs, acting.virtual, known)

    # --- predictions ---

    def logits(self, params: Params | None, data: Data, rows: Sequence[int] | None = None) -> Tensor:
        """(rows, classes) predictions before the softmax, without gradient, on the CPU.

        Raises:
            ModelError: params without the readout's own, such as a head: the base alone gives no class.
        """
        own = params or {}
        if lacking := sorted(self.readout.params - own.keys()):
            raise ModelError(f"predictions of this task need a head; give params with {lacking[-1]}")
        self.check_params(own)
        examples = cast(Examples, data)
        index = range(len(examples)) if rows is None else [int(i) for i in rows]
        items = [item for row in index for item in self.readout.predicting(0, examples, row)]
        stack = stack_params([own], self.device)
        found: Tensor | None = None
        with torch.no_grad():
            for part in self.parts(items):
                with self.seen(self.base, stack, [items[i] for i in part], 0) as seen:
                    logits = self.readout.logits(seen).float().cpu()
                if found is None:
                    found = torch.empty(len(items), logits.shape[1])
                found[torch.from_numpy(part)] = logits
        return torch.empty(0, self.classes) if found is None else found.view(len(index), -1)

    def losses(
        self, params: Params, data: Data, rows: Sequence[int], also: tuple[Params, ...] = (), base: str = ""
    ) -> Tensor:
        """(rows,) the loss of each row's own label or answer, without gradient and dropout, on the CPU."""
        items = [self.readout.training(0, cast(Examples, data), row) for row in rows]
        return self.item_losses(params, items, also, base)

    def item_losses(
        self, params: Params, items: Sequence[Item], also: tuple[Params, ...] = (), base: str = ""
    ) -> Tensor:
        """(items,) the loss of each, without gradient and dropout, on the CPU."""
        stack, found = stack_params([params], self.device, [also]), torch.zeros(len(items))
        with torch.no_grad():
            for part in self.parts(items):
                with self.seen(self.base.at(base), stack, [items[i] for i in part], 0) as seen:
                    found[torch.from_numpy(part)] = self.readout.losses(seen).float().cpu()
        return found

    def outcomes(self, params: Params | None, data: Examples) -> Tensor:
        """(rows, ..) what becomes of each row, on the CPU; `readout.sums` turns it into sums."""
        return self.readout.outcomes(self, params, data)

    def score(self, params: Params, data: Data) -> dict[str, Tensor]:
        """Sums over the rows that pool over clients by addition; their names are the task format's."""
        return self.readout.sums(self.outcomes(params, cast(Examples, data)), cast(Examples, data))

    def token_logits(self, params: Params | None, data: Data, rows: Sequence[int] | None = None) -> Tensor:
        """See `distil.token_logits`."""
        return distil.token_logits(self, params, cast(Examples, data), rows)

    def distil(self, fit: Fit, teach: Teacher, temperature: float = 1.0, share: float = 1.0) -> Fitted:
        """See `distil.distil`."""
        return distil.distil(self, fit, teach, temperature, share)

    # --- probes ---

    def hidden(self, params: Params | None, data: Data, rows: Sequence[int]) -> Tensor:
        """See `probes.hidden`."""
        return probes.hidden(self, params or {}, cast(Examples, data), rows)

    def hessian(
        self, params: Params, data: Data, rows: Sequence[int], names: Iterable[str] | None = None
    ) -> Callable[[Params], dict[str, Tensor]]:
        """See `probes.hessian`."""
        return probes.hessian(self, params, cast(Examples, data), rows, frozenset(params if names is None else names))

    def fisher(
        self,
        params: Params,
        data: Data,
        rows: Sequence[int],
        token_norm: TokenNorm = "sqrt",
        also: tuple[Params, ...] = (),
    ) -> Fisher:
        """See `Model.fisher`; raises what went wrong."""
        return alone(self.fisher_many([FisherProbe(params, data, rows, token_norm, also)]))

    def fisher_many(self, probes: Sequence[FisherProbe]) -> list[Fisher | Exception]:
        """See `fisher.fisher_many`."""
        return fisher_many(self, probes)

    def sensitivity(
        self, params: Params, data: Data, rows: Sequence[int], perturbation: Perturbation, size: float, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """See `sensitivity.sensitivity`."""
        return sensitivity(self, params, cast(Examples, data), rows, perturbation, size, rng)
