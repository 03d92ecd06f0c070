"""Which class makes which kind of adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fedpeft.core.adapter import (
    AdaLora,
    AdapterSpec,
    Bottleneck,
    Full,
    HeadOnly,
    InstancePrompt,
    LatePrompt,
    Lora,
    MixedPrompt,
    Prefix,
    Prompt,
)
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Adapter, Layer, Network, Partner, Rows, Shape, Sizes
from fedpeft.models.adapters.bottleneck import BottleneckAdapter
from fedpeft.models.adapters.full import FullAdapter
from fedpeft.models.adapters.instance import InstancePromptAdapter
from fedpeft.models.adapters.late import LatePromptAdapter
from fedpeft.models.adapters.lora import LoraAdapter
from fedpeft.models.adapters.mixed import MixedPromptAdapter
from fedpeft.models.adapters.prefix import PrefixAdapter
from fedpeft.models.adapters.prompt import PromptAdapter
from fedpeft.models.adapters.triplet import TripletAdapter
from fedpeft.models.families import Slot
from fedpeft.models.load import Base


class NoAdapter:
    """The base as it is."""

    slots: Mapping[str, Slot] = {}
    partners: Mapping[str, Partner] = {}
    networks: Sequence[Network] = ()

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
    return _BUILDERS[type(spec)](spec, base)


_BUILDERS: dict[type[AdapterSpec], Callable[[Any, Base], Adapter]] = {
    Lora: LoraAdapter,
    AdaLora: TripletAdapter,
    HeadOnly: lambda spec, base: NoAdapter(),
    Prefix: PrefixAdapter,
    Prompt: PromptAdapter,
    Bottleneck: BottleneckAdapter,
    InstancePrompt: InstancePromptAdapter,
    MixedPrompt: MixedPromptAdapter,
    LatePrompt: LatePromptAdapter,
    Full: FullAdapter,
}
