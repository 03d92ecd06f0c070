"""Whether parameters are those of a model, and whether it can run a Fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import Fit, blocks_in
from fedpeft.core.tree import Params, block_of
from fedpeft.models.adapters import Network, Partner, Shape
from fedpeft.models.adapters.prompt import complete
from fedpeft.models.families import KNOWN_MODELS, block_paths

if TYPE_CHECKING:
    from fedpeft.models.hf import HFModel

HEAD_PARTNERS: Mapping[str, Partner] = {"weight": ("bias", 0, 0), "bias": ("weight", 0, 0)}


@dataclass(frozen=True)
class Layout:
    """Which parameters a model has.

    Attributes:
        kind: of its adapter, for messages.
        shapes: of every name; None stands for any size.
        partners: by the last part of a name, which other one it needs, and which of their dimensions are equal.
        alone: names that mean something without a partner.
        networks: of the adapter: the names of a whole network, and of its way down and up; see `prompt.complete`.
    """

    kind: str
    shapes: Mapping[str, Shape]
    partners: Mapping[str, Partner]
    alone: Collection[str]
    networks: Sequence[Network]

    def check(self, params: Params) -> None:
        """Raise FitError at the first parameter that is not among these, not in this shape, or without its partner."""
        for name, t in params.items():
            want = self.shapes.get(name)
            if want is None:
                raise FitError(f"parameter {name!r} does not exist in this model with adapter {self.kind!r}")
            if len(want) != t.dim() or any(w is not None and w != n for w, n in zip(want, t.shape, strict=True)):
                shown = tuple("any" if w is None else w for w in want)
                raise FitError(f"parameter {name!r} has shape {tuple(t.shape)}; this model needs {shown}")
        for name, t in params.items():
            stem, _, side = name.rpartition(".")
            if name in self.alone:
                continue
            other, dim, partner_dim = self.partners.get(side, ("", 0, 0))
            partner = f"{stem}.{other}"
            if other and partner not in params:
                raise FitError(f"parameter {name!r} came without its partner {partner}")
            if other and t.shape[dim] != params[partner].shape[partner_dim]:
                both = f"{tuple(t.shape)} and {tuple(params[partner].shape)}"
                raise FitError(f"parameters {name!r} and {partner!r} do not fit together: {both}")
        own = {name: (tuple(t.shape),) for name, t in params.items()}
        for names, down, up in self.networks:
            complete(names, down, up, params, own)


def check_fit(model: HFModel, fit: Fit) -> None:
    """Raise FitError unless the model can run the fit: its data, every parameter, its head, its base."""
    if not isinstance(fit.data, Examples):
        raise FitError(f"a Fit's data is a {type(fit.data).__name__}; this model needs tokenised Examples")
    for layer in (fit.params, *fit.also):
        model.check_params(layer)
    twice = [name for layer in fit.also for name in layer if name in model.readout.params]
    if twice:
        raise FitError(f"Fit.also holds {twice[0]!r}; a forward pass has one head, that of Fit.params")
    model.readout.check(fit.params, fit.data)
    try:
        model.base.at(fit.base)
    except ModelError as error:
        raise FitError(f"Fit.base: {error}") from None
    if (kept := blocks_in(fit.base)) is not None:
        for name in (name for layer in (fit.params, *fit.also) for name in layer):
            if block_of(name) not in (None, *kept):
                raise FitError(f"a Fit has {name!r}, whose block its base {fit.base!r} leaves out; leave it out, too")
    if fit.checkpointing and not block_paths(model.base.module, model.base.family):
        raise FitError(
            f"Fit.checkpointing needs to know the blocks, and those of the family {model.base.family!r} are not "
            f"known; leave it out, or use {KNOWN_MODELS}"
        )
