"""All weights of the base: each client trains a copy of its own, which takes the base's place for a forward pass.

Parameters have the path that they have in the base: `block.{l}.*` within block l, `module.*` elsewhere, such as
`block.3.attention.self.query.weight` and `module.embeddings.word_embeddings.weight` in BERT. They start at the base's
own values, float32, so nothing changes at first. The base itself is never changed: transformers' modules are given the
client's tensors for the length of the pass (`torch.func.functional_call`), and have their own again behind it.

A pass has one set of weights, so clients train one after another. Where the language model's head is tied to the
embeddings of the tokens, it moves along with them (`lm_head.py`); nothing else of that head trains.

With `blocks` only the weights of these blocks are parameters, and everything else is the base's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from fedpeft.core.adapter import Full
from fedpeft.core.errors import FitError, ModelError
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params, block_of
from fedpeft.models.adapters import Layer, Network, Partner, Rows, Shape, Sizes
from fedpeft.models.families import Slot, block_paths, is_decoder, linear_size, norm_paths, own_name, slots
from fedpeft.models.load import Base

ENTRY = ("query", "key", "value")  # the projections of a block that read its input


class FullAdapter:
    """Every weight of a base.

    Attributes:
        weights: by parameter, the path of the base's weight that it takes the place of, in the base's order.
        above: parameters that act above all blocks: the last norm of decoders.

    Raises:
        ModelError: a base whose weights are not plain numbers, because it is quantised; blocks that it does not have.
    """

    slots: Mapping[str, Slot] = {}
    partners: Mapping[str, Partner] = {}
    networks: Sequence[Network] = ()

    def __init__(self, spec: Full, base: Base) -> None:
        own = dict(base.module.named_parameters())
        packed = [path for path, weight in own.items() if not weight.is_floating_point()]
        if packed:
            raise ModelError(
                f"adapter.kind full trains the base's weights, and this base is quantised ({packed[0]} is "
                f"{own[packed[0]].dtype}); set model.quantize to none, or use adapter.kind lora"
            )
        self.spec = spec
        every = {own_name(path): path for path in own}
        if len(every) < len(own):
            raise ModelError(
                f"adapter.kind full needs a model with one stack of blocks; the family {base.family!r} has more"
            )
        inside = None if spec.blocks is None else _chosen(spec.blocks, base)
        self.weights: Mapping[str, str] = {
            name: path for name, path in every.items() if inside is None or block_of(name) in inside
        }
        names = list(self.weights)
        inner = [place for place, name in enumerate(names) if block_of(name) is not None]
        self.above = frozenset(names[inner[-1] + 1 :] if inner else ())
        self._below = frozenset(names[: inner[0]] if inner else names)
        self._values = {name: own[path] for name, path in self.weights.items()}
        self._embeddings = own_name(base.embeddings)
        self._matrices = {name: int(own[path].numel()) for name, path in self.weights.items() if _is_matrix(path, base)}
        known = slots(base.module, base.family)
        entry = [known[name] for name in (f"block.0.{kind}" for kind in ENTRY) if name in known]
        self._entry = sum(slot.d_in * slot.d_out for slot in entry)
        self._first = _first_norms(self.weights, base)

    def init(self, rng: Rng) -> dict[str, Tensor]:
        """The base's own values."""
        return {name: value.detach().float().cpu().clone() for name, value in self._values.items()}

    def shapes(self) -> Mapping[str, Shape]:
        """Those of the base's weights."""
        return {name: tuple(value.shape) for name, value in self._values.items()}

    def bind(self, layer: Layer, sizes: Sizes, rows: Rows, base: Base) -> None:
        """Let the one client's weights take the place of the base's; those that it lacks are the base's."""
        for name, path in self.weights.items():
            if name not in layer:
                continue
            if rows.client is not None or path in base.acting.weights:
                raise FitError("a forward pass has one set of weights; give one client's rows, and nothing in Fit.also")
            if sizes[name][rows.only] is not None:
                base.acting.weights[path] = rows.pick(layer[name]).to(base.dtype)

    def context(self, params: Params) -> tuple[float, float]:
        """No token and no key more."""
        return 0.0, 0.0

    def products(self, trained: Iterable[str], tokens: int, projected: int) -> int:
        """Multiply-adds of a backward pass beyond those through frozen matrices.

        A matrix that trains costs one product more. Where embeddings or a norm before attention train, the gradient
        also goes through the projections that read the lowest block's input.

        Args:
            trained: names of parameters.
            tokens: that go through the blocks.
            projected: of these, how many states a language model's head reads that is tied to the embeddings.
        """
        names = frozenset(trained)
        own = sum(size for name, size in self._matrices.items() if name in names)
        lowest = min(
            (block for name in names & self.weights.keys() if (block := block_of(name)) is not None), default=0
        )
        entry = self._entry if names & (self._below | self._first.get(lowest, frozenset())) else 0
        tied = int(self._values[self._embeddings].numel()) if self._embeddings in names else 0
        return tokens * (own + entry) + projected * tied


def _chosen(blocks: Sequence[int], base: Base) -> frozenset[int]:
    """The blocks by their own numbers. Raises ModelError: none, one twice, or one that the base does not have."""
    count = len(block_paths(base.module, base.family))
    own = [block + count if block < 0 else block for block in blocks]
    wrong = [block for block, place in zip(blocks, own, strict=True) if not 0 <= place < count or own.count(place) > 1]
    if wrong or not own:
        what = f"names block {wrong[0]}, which is not there, or is there twice" if wrong else "names no block"
        has = f"blocks 0 to {count - 1}" if count else f"no blocks that are known (family {base.family!r})"
        raise ModelError(
            f"adapter.blocks {tuple(blocks)} {what}; the model has {has}: name others, or lower method.blocks where "
            "the method has named them"
        )
    return frozenset(own)


def _first_norms(weights: Mapping[str, str], base: Base) -> dict[int, frozenset[str]]:
    """By block, the norm before its attention; encoders have theirs behind it."""
    if not is_decoder(base.family):
        return {}
    paths = [norm_paths(base.module, base.family, i)[0] for i in range(len(block_paths(base.module, base.family)))]
    return {i: frozenset(n for n, p in weights.items() if p.startswith(f"{path}.")) for i, path in enumerate(paths)}


def _is_matrix(path: str, base: Base) -> bool:
    """Whether the weight is the matrix of a linear layer."""
    module, _, last = path.rpartition(".")
    return last == "weight" and linear_size(base.module.get_submodule(module)) is not None
