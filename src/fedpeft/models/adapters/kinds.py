"""Which class makes which kind of adapter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedpeft.core.adapter import AdapterSpec, HeadOnly, InstancePrompt, LatePrompt, Lora, MixedPrompt, Prefix, Prompt
from fedpeft.core.errors import ModelError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Adapter, Layer, Partner, Rows, Shape, Sizes
from fedpeft.models.adapters.instance import InstancePromptAdapter
from fedpeft.models.adapters.late import LatePromptAdapter
from fedpeft.models.adapters.lora import LoraAdapter
from fedpeft.models.adapters.mixed import MixedPromptAdapter
from fedpeft.models.adapters.prefix import PrefixAdapter
from fedpeft.models.adapters.prompt import PromptAdapter
from fedpeft.models.families import Slot
from fedpeft.models.load import Base


class NoAdapter:
    """The base as it is."""

    slots: Mapping[str, Slot] = {}
    partners: Mapping[str, Partner] = {}

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def shapes(self) -> Mapping[str, Shape]:
        """Nothing."""
        return {}

    def bind(self, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> None:
        """Nothing acts."""

    def context(self, params: Params) -> tuple[float, float]:
        """Nothing is added."""
        return 0.0, 0.0


def build_adapter(spec: AdapterSpec, base: Base) -> Adapter:
    """The adapter of a specification over a base.

    Raises:
        ModelError: a specification that does not fit the base.
    """
    if isinstance(spec, Lora):
        return LoraAdapter(spec, base)
    if isinstance(spec, Prefix):
        return PrefixAdapter(spec, base)
    if isinstance(spec, Prompt):
        return PromptAdapter(spec, base)
    if isinstance(spec, InstancePrompt):
        return InstancePromptAdapter(spec, base)
    if isinstance(spec, MixedPrompt):
        return MixedPromptAdapter(spec, base)
    if isinstance(spec, LatePrompt):
        return LatePromptAdapter(spec, base)
    if isinstance(spec, HeadOnly):
        return NoAdapter()
    raise ModelError(f"adapter.kind {spec.kind!r} cannot be built")
