"""What a transformer costs in floating point operations and bytes sent, from its configuration alone.

There are two counts. `step_flops` is exact for one step of one client with LoRA: adapters, the classification head and
the end of the backward pass at the lowest trained matrix included. `forward_flops` and `train_flops` are for rows of
any lengths and adapters of any kind; what follows is about these two. Memory is in `memory.py`.

Counted are the matrix products of the blocks, two operations per multiply-add. Embeddings, norms, activations, biases,
the classification head and adapters are neglected. Per token a block has four attention projections and two or three of
the feed-forward part; per pair of tokens that see each other there are two products of the heads' total width (scores,
and their mix of values). Causal models are counted over the full square, as kernels compute it.

What a Fit costs beside them `Fitted.products` counts, and the clock of a run adds: adapters' matrices (rank 8 on query
and value 3 r / 2 d of a forward pass, .3 % for d = 4096 and 3 % for d = 384), a base's own weights that train, blocks
that checkpointing computes again (`models/work.py`, `models/adapters/full.py`). Adapters in passes forward alone are
neglected.

A language model's head is counted for the share of the tokens whose states enter it (a mask, an answer), without what a
masked model does to a state before the projection. A forward pass alone counts the whole vocabulary too, although a
cloze prediction computes the label words' columns only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from fedpeft.core.errors import ModelError
from fedpeft.planner.configuration import details, family_of, size

_PLACE = {"query": 0, "key": 0, "value": 0, "output": 1, "gate": 2, "up": 2, "down": 3}  # of a matrix's input
WHOLE = -1  # place of the first input that needs a gradient, where the block's own input needs one
NOTHING = 4  # ... where no input does


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer that decide what it costs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int  # fewer than heads where keys and values are shared (grouped queries)
    intermediate: int  # width inside the feed-forward part
    vocab: int
    family: str  # bert, roberta, gpt2, opt, llama or generic
    head_size: int
    mlp_matrices: int = 2  # 3 where the feed-forward part is gated
    lm_head: bool = False  # whether tokens also go through the output projection onto the vocabulary
    lm_share: float = 1.0  # share of the tokens that do: those at a mask or in an answer, say
    tied: bool = True  # whether that projection's weights are the embeddings
    positions: int = 0  # learned position embeddings
    token_types: int = 0  # learned embeddings of token types
    embedding: int = 0  # width of the embeddings where it is not `hidden` (ELECTRA); 0: it is
    biased: tuple[str, ...] = ()  # kinds of matrices that have a bias
    block_norms: int = 0  # numbers in the norms of one block
    outer_norms: int = 0  # numbers in the norms outside the blocks
    pre_norm: bool = (
        False  # norms before attention and feed-forward part and at the end (GPT-2, Llama), not after (BERT)
    )
    activation_copies: int = 1  # feed-forward inputs that the activation keeps: 4 where not fused; 0: its output (ReLU)

    @property
    def masked(self) -> bool:
        """Whether it reads in both directions, so that its language model has a head for masked tokens; not a decoder,
        wherever its norms are.
        """
        return self.family not in ("gpt2", "opt", "llama")

    @property
    def lower_flops(self) -> int:
        """Per token: the products of one block that read its input, query, key and value."""
        return 2 * self.hidden * self.head_size * (self.heads + 2 * self.kv_heads)

    @property
    def upper_flops(self) -> int:
        """Per token: the products of one block after attention, output projection and feed-forward part."""
        return 2 * self.hidden * (self.heads * self.head_size + self.mlp_matrices * self.intermediate)

    @property
    def pair_flops(self) -> int:
        """Per pair of tokens: scores and mix of values in one block."""
        return 4 * self.heads * self.head_size

    @property
    def head_flops(self) -> int:
        """Per token: the output projection onto the vocabulary, as a mean over all tokens."""
        return round(2 * self.hidden * self.vocab * self.lm_share) if self.lm_head else 0


def shape_of(config: Mapping[str, Any], lm_head: bool = False) -> Shape:
    """The shape that a model's configuration describes (`config.json`, or `config.to_dict()` of transformers).

    Args:
        config: keys as BERT, GPT-2 and Llama name them; another model type is read with the same names ("generic").
        lm_head: whether the model predicts tokens; a classifier has no projection onto the vocabulary.

    Raises:
        ModelError: a size is missing or not a positive whole number.
    """
    layers = size(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    hidden = size(config, "hidden_size", "n_embd", "d_model", "dim")
    heads = size(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    gated = _is_gated(config)
    head_size = size(config, "head_dim", default=hidden // heads)
    family = family_of(config)
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=size(config, "num_key_value_heads", default=heads),
        intermediate=size(config, "intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "d_ff", default=4 * hidden),
        vocab=size(config, "vocab_size"),
        family=family,
        head_size=head_size,
        mlp_matrices=3 if gated else 2,
        lm_head=lm_head,
        **details(config, family, hidden, head_size),
    )


def _is_gated(config: Mapping[str, Any]) -> bool:
    family = family_of(config)
    return family == "llama" or (family == "generic" and config.get("hidden_act") in ("silu", "swiglu"))


def forward_flops(shape: Shape, tokens: int, pairs: int) -> int:
    """Operations of a forward pass over rows of `tokens` in total, whose squared lengths sum to `pairs`."""
    per_token = shape.layers * (shape.lower_flops + shape.upper_flops) + shape.head_flops
    return per_token * tokens + shape.layers * shape.pair_flops * pairs


def train_flops(shape: Shape, tokens: int, pairs: int, lowest_block: int = 0) -> int:
    """Operations of a forward pass and of the gradients that adapters in a frozen base need.

    A frozen matrix has no gradient of its own, so the backward pass costs one product per matrix, not two, and
    attention four products where the forward pass has two. It ends in the lowest adapted block, below whose query, key
    and value nothing asks for a gradient. What a kernel computes again to save memory is not counted.

    Args:
        tokens: real tokens trained on, repeats counted.
        pairs: sum of the squared lengths of the same rows.
        lowest_block: the lowest block that holds an adapter; `shape.layers` means that only the head is trained.
    """
    if not 0 <= lowest_block <= shape.layers:
        raise ModelError(f"block {lowest_block} does not exist; the model has blocks 0 to {shape.layers - 1}")
    whole = shape.layers - lowest_block  # blocks that the gradient enters
    passed = max(whole - 1, 0)  # blocks that it leaves again at the bottom
    per_token = whole * shape.upper_flops + passed * shape.lower_flops
    per_token += shape.head_flops if whole else 0
    return forward_flops(shape, tokens, pairs) + per_token * tokens + 2 * whole * shape.pair_flops * pairs


# --- adapted weights --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A frozen matrix of a block, which a LoRA can be put on. GPT-2's fused matrix counts as three."""

    name: str  # "block.3.query", as models/families.py names slots
    block: int
    kind: str
    d_in: int
    d_out: int


def weights(shape: Shape, kinds: Sequence[str]) -> tuple[Weight, ...]:
    """The matrices of these kinds, block by block, in forward order.

    Raises:
        ModelError: a kind that the family does not have.
    """
    sizes = _sizes(shape)
    if unknown := [kind for kind in kinds if kind not in sizes]:
        raise ModelError(f"the model has no weights of kind {unknown[0]!r}; it has {', '.join(sizes)}")
    chosen = [kind for kind in sizes if kind in kinds]
    return tuple(Weight(f"block.{b}.{kind}", b, kind, *sizes[kind]) for b in range(shape.layers) for kind in chosen)


def all_weights(shape: Shape) -> tuple[Weight, ...]:
    """The matrices of every kind that the family has."""
    return weights(shape, tuple(_sizes(shape)))


@lru_cache(maxsize=256)
def _sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) by kind, in forward order."""
    d, f, wide, shared = (
        shape.hidden,
        shape.intermediate,
        shape.heads * shape.head_size,
        shape.kv_heads * shape.head_size,
    )
    sizes = {"query": (d, wide), "key": (d, shared), "value": (d, shared), "output": (wide, d)}
    gate = {"gate": (d, f)} if shape.mlp_matrices == 3 else {}
    return sizes | gate | {"up": (d, f), "down": (f, d)}


def weight_of(shape: Shape, name: str, sizes: Mapping[str, tuple[int, int]] | None = None) -> Weight:
    """The matrix of a name; one of a kind without a name of ours (a pattern's) counts as d x d.

    Args:
        sizes: (d_in, d_out) by kind, where they are at hand.

    Raises:
        ModelError: no block of this model has it.
    """
    stem, _, rest = name.partition(".")
    block, _, kind = rest.partition(".")
    sizes = _sizes(shape) if sizes is None else sizes
    if stem != "block" or not block.isdigit() or int(block) >= shape.layers or kind in _PLACE.keys() - sizes.keys():
        known = f"block.0.{next(iter(sizes))} to block.{shape.layers - 1}.{list(sizes)[-1]}"
        raise ModelError(f"the model has no weight {name!r}; it has {known}")
    return Weight(name, int(block), kind, *sizes.get(kind, (shape.hidden, shape.hidden)))


def update_bytes(adapted: Iterable[Weight], ranks: Mapping[str, int], head_numbers: int = 0) -> int:
    """Tensor bytes of a message in float32: 4 sum r (d_in + d_out), and the head. The codec's header comes on top.

    Args:
        adapted: the weights that may be in the message.
        ranks: of those that are, by name: a client's own on the way up, the largest one on the way down.
        head_numbers: of a trained head.
    """
    return 4 * (sum(ranks.get(w.name, 0) * (w.d_in + w.d_out) for w in adapted) + head_numbers)


# --- one step ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one step of one client's local training does, with LoRA, on rows of equal length."""

    rows: int  # b
    tokens: int  # of each row
    trained: Mapping[str, int]  # rank by weight name
    frozen: Mapping[str, int] = field(default_factory=dict)  # rank by name of components applied and not trained
    base: str = "float32"  # what the frozen matrices are kept in: a dtype, int8, nf4 (nfk for any k), nf4dq
    compute: str = "float32"  # dtype of activations, and of what of the base is no matrix of a block
    classes: int | None = None  # of a trained head on the pooled state; None: language-model loss, no trained head
    depth: int | None = None  # lowest block whose whole backward pass counts, for bounds; None: what `trained` needs
    checkpointing: bool = False  # blocks keep their input alone and are computed again
    eager: bool = False  # attention written out, not torch's fused kernel

    @property
    def n_tokens(self) -> int:
        """N, tokens of all rows."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Flops:
    """Floating point operations, two per multiply-add."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Of the step."""
        return self.forward + self.backward


def first_input(shape: Shape, step: Step) -> tuple[int, int]:
    """The block that the backward pass ends in, and the place of its first input that needs a gradient.

    Inputs have the places 0 to 3, in forward order: of query, key and value; of the output projection; of gate and up;
    of down. The input of the first adapter needs no gradient itself; what comes later does. `WHOLE`: the block's own
    input needs one, as in all blocks above. (`shape.layers`, `WHOLE`): nothing in the blocks is trained.

    Raises:
        ModelError: `depth` is above a trained weight, or no block.
    """
    if step.depth is not None and not 0 <= step.depth <= shape.layers:
        raise ModelError(f"depth is {step.depth}; the model has blocks 0 to {shape.layers - 1}")
    places = [(w.block, _PLACE.get(w.kind, 0)) for w, _ in ranked(shape, step.trained)]
    lowest = min(places, default=(shape.layers, WHOLE))
    if step.depth is None:
        return lowest
    if lowest[0] < step.depth:
        raise ModelError(f"depth is {step.depth}, but a weight of block {lowest[0]} is trained")
    return step.depth, WHOLE


def ranked(shape: Shape, ranks: Mapping[str, int]) -> list[tuple[Weight, int]]:
    """The weights with a rank above 0."""
    sizes = _sizes(shape)
    return [(weight_of(shape, name, sizes), rank) for name, rank in ranks.items() if rank > 0]


def step_flops(shape: Shape, step: Step) -> Flops:
    """Operations of one forward and backward pass: every matrix product, full attention.

    Frozen matrices have one product forward and one backward (the gradient of their input), an adapter of rank r
    2 N r (d_in + d_out) forward and twice that backward, half of it where it is frozen. In the lowest block the
    gradients of inputs not later than the first adapter's are not computed. Checkpointing adds the forward pass of the
    blocks that the backward pass enters. Exact against torch's FlopCounterMode with eager attention; a fused kernel has
    all four products of attention's backward pass, wherever its gradient goes, and computes some of the forward pass
    again, which is not counted.

    Raises:
        ModelError: see `first_input` and `weight_of`.
    """
    n, (lowest, place) = step.n_tokens, first_input(shape, step)
    products = {kind: 2 * n * d_in * d_out for kind, (d_in, d_out) in _sizes(shape).items()}
    attention = n * step.tokens * shape.pair_flops
    block = sum(products.values()) + attention
    forward, again = shape.layers * block, (shape.layers - lowest) * block
    backward = 0
    for b in range(lowest, shape.layers):
        first = place if b == lowest else WHOLE
        backward += sum(count for kind, count in products.items() if _PLACE[kind] > first)
        backward += attention // 2 * _attention_products(shape, step, b, first)
    for is_trained, ranks in ((True, step.trained), (False, step.frozen)):
        for weight, rank in ranked(shape, ranks):
            low, high = 2 * n * rank * weight.d_in, 2 * n * rank * weight.d_out
            forward += low + high
            if weight.block < lowest:
                continue
            again += low + high
            passed = weight.block > lowest or _PLACE.get(weight.kind, 0) > place
            backward += 2 * high + low if is_trained else high * passed  # gradients of B, of A x, and of A
            backward += low * passed
    head = _head_products(shape, step)
    backward += head if lowest < shape.layers else 0
    backward += 2 * step.rows * shape.hidden * step.classes if step.classes else 0
    return Flops(forward + head, backward + (again if step.checkpointing else 0))


def _attention_products(shape: Shape, step: Step, block: int, first: int) -> int:
    """How many products of attention the backward pass has in a block: with the gradient of all inputs, four."""
    if first > 0:
        return 0
    if first == WHOLE or not step.eager or shape.family == "gpt2":  # GPT-2's fused matrix has one output
        return 4
    query, key, value = (bool(step.trained.get(f"block.{block}.{kind}")) for kind in ("query", "key", "value"))
    return (query or key) + query + key + value


def _head_products(shape: Shape, step: Step) -> int:
    """Operations from the last hidden state to the loss; as many go back to it."""
    if step.classes is not None:
        pooling = 2 * step.n_tokens * shape.hidden if shape.masked else 0  # decoders take the last token
        return pooling + 2 * step.rows * shape.hidden * step.classes
    width = shape.embedding or shape.hidden
    transform = shape.hidden * width if shape.masked else 0
    return 2 * lm_tokens(shape, step) * (width * shape.vocab + transform)


def lm_tokens(shape: Shape, step: Step) -> int:
    """Tokens whose states go through the language model's head."""
    return round(step.n_tokens * shape.lm_share)
