"""Instance-dependent prompts with a client axis: a two-layer network makes each row's prompt of its sentence vector.

    prompt = up(gelu(down(s))),   down: d -> m, up: m -> P d, with biases

`s` is the frozen base's mean last hidden state over the row's real tokens, without any adapter and without gradient; it
costs one more forward pass. Reference: Wu et al. 2022, arXiv 2204.04497, the single-layer variant with two dense layers
(S-IDPG-DNN). As in the authors' code: GELU, weights N(0, 0.02^2), biases 0. Departures: they take the first token's
state, which says nothing in a decoder; the mean is ours. Their dropout in the network is left out.

Parameters: `prompt.down.weight` (m, d), `prompt.down.bias` (m,), `prompt.up.weight` (P e, m), `prompt.up.bias` (P e,),
e the width of the word embeddings, token after token; m and P may differ between clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedpeft.core.adapter import InstancePrompt
from fedpeft.core.errors import FitError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.models.adapters import Layer, Network, Partner, Rows, Shape, Sizes, Text
from fedpeft.models.adapters.prompt import at_least_one, check, complete, linear, normal, put, width
from fedpeft.models.families import Slot
from fedpeft.models.load import Base

_NAMES = ("prompt.down.weight", "prompt.down.bias", "prompt.up.weight", "prompt.up.bias")
_DOWN, _DOWN_BIAS, _UP, _UP_BIAS = _NAMES


class InstancePromptAdapter:
    """A prompt at the input embeddings that is made of the row's text.

    Raises:
        ModelError: a length or size below 1, or a base that takes no embeddings.
    """

    slots: Mapping[str, Slot] = {}
    partners: Mapping[str, Partner] = {}
    networks: Sequence[Network] = ((_NAMES, _DOWN, _UP),)

    def __init__(self, spec: InstancePrompt, base: Base) -> None:
        check(spec.length, base)
        at_least_one("size", spec.size)
        self.spec = spec
        self.given = int(base.module.config.hidden_size)  # d of the sentence vector
        self.width = width(base)

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """Weights N(0, 0.02^2), biases 0."""
        size, numbers = self.spec.size, self.spec.length * self.width
        return {
            _DOWN: normal((size, self.given), rng),
            _DOWN_BIAS: torch.zeros(size),
            _UP: normal((numbers, size), rng),
            _UP_BIAS: torch.zeros(numbers),
        }

    def shapes(self) -> dict[str, Shape]:
        """None stands for m and for P times the width of the word embeddings."""
        return {_DOWN: (None, self.given), _DOWN_BIAS: (None,), _UP: (None, None), _UP_BIAS: (None,)}

    def bind(self, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> None:
        """Put each row's own prompt before its text."""
        if not any(complete(_NAMES, _DOWN, _UP, layer, sizes)):
            return
        counts = [self._length(size[0]) if size else 0 for size in sizes[_UP_BIAS]]

        def make(text: Text) -> Tensor:
            low = F.gelu(linear(text.sentence()[:, None], layer[_DOWN], layer[_DOWN_BIAS], rows))
            return linear(low, layer[_UP], layer[_UP_BIAS], rows).view(len(text.states), -1, self.width)

        put(make, counts, rows, base)

    def context(self, params: Params) -> tuple[float, float]:
        """P tokens more in every block; the pass for the sentence vectors is not in this count."""
        return float(self._length(params[_UP_BIAS].shape[0])) if _UP_BIAS in params else 0.0, 0.0

    def _length(self, numbers: int) -> int:
        if numbers % self.width:
            raise FitError(
                f"parameter {_UP_BIAS!r} has {numbers} numbers, which are no whole embeddings of {self.width} each"
            )
        return numbers // self.width
