"""What a step of local training needs in memory, from a model's configuration alone.

N = rows * tokens, d hidden width, A attention width, K width of keys and values, f feed-forward width, e bytes of the
compute dtype. A block keeps for its backward pass (sizes per token; a tensor is kept once, whoever needs it):

    norms               the input of each whose output needs a gradient, d (a fused LayerNorm, or RMSNorm's factors)
    attention, fused    query A, key K, value K, output A, and a logarithm per head
    attention, eager    what of query, key and value needs the others' gradient, and the weights, heads * tokens
    feed-forward part   gated: gate, its activation, up, 3 f; else what the activation keeps, f, or 4 f written out; a
                        ReLU keeps its output, which down's adapter needs too
    trained adapters    the input of their matrix, and r for what lies between their factors

In the lowest block that is only what follows the first adapter's input, and below it nothing (`cost.first_input`). The
final norm keeps its input. Formulas, and checks on CPU, nothing on a GPU: FedPipe's specification in this project,
section 8; its authors' cost model is not public.

**Two loops.** `plain`: a plain loop over parameters with AdamW, float32 adapters on a base of any dtype; its peak is
the larger of base + 12 T + activations + loss and base + 16 T, with T trained numbers. `ours`: `core/train.py` and
`models/hf.py`, one client. There

- trained numbers exist as they were received, and in flat buffers as values, gradients and two moments, 20 T; when the
  result is cut out, its values and moments come on top, 32 T, and a copy of the frozen adapters;
- adapters compute in the base's dtype, so they share inputs with it, and keep a copy of themselves where it is not
  float32;
- the last hidden state lives until the backward pass ends, N d;
- only one part of a step is in the model at a time, at most `token_budget` tokens: give the rows of one part;
- what a moment of the pass holds beside what is kept can exceed the loss: the top block's feed-forward part on the way
  down or up, or a block below that keeps nothing. `Block.moments` lists them, read off a tracker of live storages;
- of a quantised base the largest matrix of a block is unpacked at such a moment;
- with checkpointing a block keeps its input alone, and its inside is there again, with its gradients, in the backward
  pass; the top block's is the most, since all inputs below it are there too.

Against that tracker, float32, fused attention, f of at least 2 d: within 2.1 % of all but the base on a grid of 440
cases of BERT, GPT-2 and Llama, and within 4.4 % on 72 random ones drawn afterwards; of OPT within 1.3 % on 36; on 96 of
four blocks within 1.7 % in float32, on nf4 and on int8. With checkpointing on the same 96 from 4.4 % too little to 9 %
too much in float32, 18 % on a quantised base, where the case is tiny. A narrower f, eager attention and a bfloat16 base
are looser (`docs/log.md`). Resident memory: `benchmarks/peak.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedpeft.core.errors import ModelError
from fedpeft.core.packing import format_of
from fedpeft.planner.activations import DTYPE_BYTES, POSITIONS, Block
from fedpeft.planner.cost import NOTHING, WHOLE, Shape, Step, all_weights, first_input, lm_tokens, ranked

# The two half precisions were measured here (10^7 weights); double quantisation is taken to add nothing to nf4's error.
# int8 is that of 64 numbers to a scale; our rows of 384 have .0073, of 4096 .0087.
WEIGHT_ERROR: Mapping[str, float] = {  # relative, of weights N(0, 0.02); FedPipe's specification, 4.5
    "float64": 0.0, "float32": 0.0, "bfloat16": 0.0017, "float16": 0.0002,
    "int8": 0.0059, "nf8": 0.0142, "nf4": 0.0919, "nf4dq": 0.0919, "nf3": 0.197, "nf2": 0.564,
}  # fmt: skip
Loop = Literal["ours", "plain"]


def weight_bytes(base: str) -> float:
    """Bytes of one frozen weight: of a dtype, or of a format in which it is packed.

    Raises:
        ModelError: a precision that is not known.
    """
    if base in DTYPE_BYTES:
        return DTYPE_BYTES[base]
    form = format_of(base)
    if form is None or form.simulated:  # a simulated format keeps weights in their own dtype
        raise ModelError(f"precision {base!r} is not known; use one of {', '.join(DTYPE_BYTES)}, int8, nf4, nf4dq")
    return form.bytes_per_weight


# --- the base ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Numbers of a base by what they are."""

    matrices: int  # of the blocks: the only ones that quantisation touches
    biases: int
    norms: int
    embeddings: int
    head: int  # of the language model, beside what it shares with the embeddings

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.biases + self.norms + self.embeddings + self.head


def parameters(shape: Shape) -> Parameters:
    """Every number of the transformer, its unused pooler left out, with the language model's head if it has one."""
    every = all_weights(replace(shape, layers=1))
    width = shape.embedding or shape.hidden
    projected = width * shape.hidden + shape.hidden if shape.embedding else 0
    head = 0
    if shape.lm_head:
        head = 0 if shape.tied else width * shape.vocab
        if shape.masked:  # dense layer and norm before the projection, which has a bias
            head += shape.hidden * width + width + 2 * width + shape.vocab
    return Parameters(
        shape.layers * sum(w.d_in * w.d_out for w in every),
        shape.layers * sum(w.d_out for w in every if w.kind in shape.biased),
        shape.layers * shape.block_norms + shape.outer_norms,
        width * (shape.vocab + shape.positions + shape.token_types) + projected,
        head,
    )


def base_bytes(shape: Shape, base: str, compute: str) -> int:
    """Bytes of the frozen base: its blocks' matrices as `base` says, everything else in the compute dtype."""
    of = parameters(shape)
    return round(of.matrices * weight_bytes(base) + (of.total - of.matrices) * DTYPE_BYTES[compute])


# --- a step -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of a step by what they are for. `peak` is the most at one time, and may be less or more than their sum."""

    base: int
    frozen: int  # adapters that are applied and not trained
    trained: int  # plain: values; ours: as received, values, gradients
    optimizer: int  # two moments
    activations: int  # what the backward pass will use
    loss: int  # plain: of the loss; ours: the most that a moment of the pass needs besides, in the loss or in a block
    peak: int


def peak_memory(shape: Shape, step: Step, loop: Loop = "ours") -> Memory:
    """Bytes of a step, its pass through the model and the optimizer's work.

    Args:
        shape: whether it has the language model's head follows from the step, whether that is tied from the shape.
        step: of one client; where a step is cut into parts, `rows` and `tokens` of the largest.
        loop: whose training loop.

    Raises:
        ModelError: see `first_input`, `weight_bytes`.
    """
    shape = replace(shape, lm_head=step.classes is None)
    head = (shape.hidden + 1) * step.classes if step.classes else 0
    numbers = head + sum(r * (w.d_in + w.d_out) for w, r in ranked(shape, step.trained))
    frozen = 4 * sum(r * (w.d_in + w.d_out) for w, r in ranked(shape, step.frozen))
    base = base_bytes(shape, step.base, step.compute)
    lowest, place = first_input(shape, step)
    plain = loop == "plain"
    blocks = [Block(shape, step, b, place if b == lowest else WHOLE, plain) for b in range(lowest, shape.layers)]
    kept = [sum(block.kept().values()) for block in blocks]
    final = _final(shape, step) if blocks else 0
    loss = _loss(shape, step)
    if plain:
        activations, together = sum(kept) + final, loss
        if step.checkpointing and blocks:
            activations, together = len(blocks) * _state(shape, step) + final + max(kept), max(0, loss - max(kept))
        static = base + frozen + 12 * numbers
        peak = static + max(activations + together, 4 * numbers)
        return Memory(base, frozen, 4 * numbers, 8 * numbers, activations, loss, peak)
    if step.checkpointing and blocks:
        activations = (len(blocks) + 1) * _state(shape, step) + final
        together = max(loss, _again(shape, step, blocks, kept, final))
    else:
        activations = sum(kept) + final + _state(shape, step)
        together = max(loss, _passing(shape, step, blocks, kept, final))
    peak = base + frozen + max(20 * numbers + activations + together, 32 * numbers + frozen)
    return Memory(base, frozen, 12 * numbers, 8 * numbers, activations, together, peak)


def _final(shape: Shape, step: Step) -> int:
    """Bytes that the final norm keeps, and the factors of rotary encoding, which all blocks share."""
    if shape.family != "llama":
        return _state(shape, step) if shape.pre_norm else 0
    return max(_state(shape, step), 4 * step.n_tokens * shape.hidden)  # RMSNorm computes in float32


def _passing(shape: Shape, step: Step, blocks: Sequence[Block], kept: Sequence[int], final: int) -> int:
    """The most that a moment of the pass through the blocks needs beside what is kept and the last hidden state."""
    state, every = _state(shape, step), sum(kept) + final + _state(shape, step)
    n_below = shape.layers - len(blocks)
    moments = [Block(shape, step, n_below - 1, NOTHING, False).on_the_way_up()] if n_below else []
    if blocks:
        top, lower = blocks[-1], sum(kept[:-1])
        moments.append(lower + top.on_the_way_up())
        moments.append(lower + state + top.attention_on_the_way_down())
        ended = final if shape.pre_norm else top.sizes["s2"]  # a norm that is done
        passed = state if top.first <= 1 else 0  # the gradient of the block's output is also that of x1
        moments.append(every - ended + passed + top.on_the_way_down())
        moments.append(every + (5 * final if shape.family == "llama" else 2 * state))  # the final norm, backward
    return max(0, max(moments, default=0) - every)


def _again(shape: Shape, step: Step, blocks: Sequence[Block], kept: Sequence[int], final: int) -> int:
    """The same where a block keeps its input alone and the backward pass computes it again.

    Then its output's gradient is there, its inside as in a pass with gradients, and the inputs of the blocks below.
    """
    state = _state(shape, step)
    ended = final if shape.pre_norm else 0
    moments = [5 * final if shape.family == "llama" else 2 * state]
    for above, (block, own) in enumerate(zip(reversed(blocks), reversed(kept), strict=True)):
        held = block.sizes["e"] if block.index or shape.family in POSITIONS else 0  # of the first pass alone
        there = (
            state * (1 - above) - ended - state
        )  # gradient; inputs of blocks above are gone; its own is counted twice
        moments.append(there + block.on_the_way_up() - held)
        moments.append(there + block.attention_on_the_way_down())
        moments.append(there + own + (state if block.first <= 1 else 0) + block.on_the_way_down())
    n_below = shape.layers - len(blocks)
    first = Block(shape, step, shape.layers - 1, NOTHING, False).on_the_way_up()  # without a gradient
    moments.append(first - final - state - (0 if n_below == shape.layers else state))
    return max(0, *moments)


def _loss(shape: Shape, step: Step) -> int:
    """Three tensors of logits in float32: their log-softmax, its gradient, and their own.

    A masked model's head keeps the inputs of its activation and of its norm besides.
    """
    if step.classes:
        return 12 * step.rows * step.classes
    inputs = 2 * DTYPE_BYTES[step.compute] * (shape.embedding or shape.hidden) if shape.masked else 0
    return lm_tokens(shape, step) * (12 * shape.vocab + inputs)


def _state(shape: Shape, step: Step) -> int:
    """Bytes of N d in the compute dtype."""
    return step.n_tokens * shape.hidden * DTYPE_BYTES[step.compute]
