"""The tensors of one block in training: what it keeps for its backward pass, and what is alive besides for a moment.

Sizes are bytes by name of tensor, so that what has two uses is counted once. Names, in forward order:

    x      the block's input            h      input of query, key, value       raw    those before rotary encoding
    q k v  query, key, value            out    mix of values                    weights, scores  of eager attention
    x1     input of the second half     h1     input of gate and up             m, y   input and output of down
    gate silu up                        of the feed-forward part; without a gate, up and what the activation writes out
    s1 s2  inputs of BERT's two norms, which come after the halves; there h is x, and h1 is x1

`memory.py` has the formulas in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from fedpeft.core.packing import format_of
from fedpeft.planner.cost import NOTHING, WHOLE, Shape, Step, all_weights, ranked

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
POSITIONS = ("gpt2", "opt")  # families that add positions to the embeddings
_ORDER = ("x", "h", "raw", "q", "k", "v", "weights", "logsumexp", "out", "s1", "x1", "h1", "gate", "silu", "up", "tanh",
          "half", "one", "m", "y", "s2")  # fmt: skip
_INPUTS = {"query": "h", "key": "h", "value": "h", "output": "out", "gate": "h1", "up": "h1", "down": "m"}


@dataclass(frozen=True)
class Unpacked:
    """Bytes of a block's largest matrix while it is unpacked from a quantised base, and while its product runs."""

    making: int = 0
    used: int = 0


def unpacked(shape: Shape, step: Step) -> Unpacked:
    """4 bits: codes as int32, two to a number, then float32; int8: float32 at once; a copy in a narrower dtype."""
    form = None if step.base in DTYPE_BYTES else format_of(step.base)
    if form is None or form.simulated:
        return Unpacked()
    sizes = [w.d_in * w.d_out for w in all_weights(replace(shape, layers=1))]
    largest = max([*sizes, sum(sizes[:3]) if shape.family == "gpt2" else 0])  # query, key and value are one matrix
    width = DTYPE_BYTES[step.compute]
    return Unpacked(largest * max(6 if form.normal else 4, 4 + width % 4), largest * width)


class Block:
    """A block whose gradient ends at its input of place `first` (see `cost.first_input`).

    Args:
        index: which block.
        own_dtype: adapters are float32 and take copies of their inputs where the compute dtype is another (a plain
            loop); else they compute in the compute dtype, from copies of themselves.
    """

    def __init__(self, shape: Shape, step: Step, index: int, first: int, own_dtype: bool) -> None:
        self.shape = shape
        self.step = step
        self.index = index
        self.first = first
        self.own_dtype = own_dtype
        self.wide = DTYPE_BYTES[step.compute]
        self.trained = dict(ranked(shape, self._own(step.trained)))
        self.frozen = dict(ranked(shape, self._own(step.frozen)))
        self.unpacked = unpacked(shape, step)

    def _own(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Those of this block's weights."""
        stem = f"block.{self.index}."
        return {name: rank for name, rank in ranks.items() if name.startswith(stem)}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor, whether it is kept or not."""
        shape, n = self.shape, self.step.n_tokens
        unit = n * self.wide
        attention, shared = shape.heads * shape.head_size * unit, shape.kv_heads * shape.head_size * unit
        repeated = attention if self.step.eager else shared  # keys and values of grouped queries, written out
        found = dict.fromkeys(("x", "h", "x1", "h1", "y", "s1", "s2", "e"), shape.hidden * unit)
        found |= dict.fromkeys(("gate", "silu", "up", "m", "tanh", "half", "one"), shape.intermediate * unit)
        found |= {"q": attention, "out": attention, "k": repeated, "v": repeated, "raw": attention + 2 * shared}
        if shape.family in POSITIONS:
            rows = 1 if shape.family == "gpt2" else self.step.rows
            found["e"] += rows * self.step.tokens * shape.hidden * self.wide  # those of the positions
        found["logsumexp"] = 4 * self.step.rows * shape.heads * self.step.tokens
        found["weights"] = n * self.step.tokens * shape.heads * self.wide
        return found

    def named(self, *names: str) -> dict[str, int]:
        """Some tensors."""
        return {self.alias(name): self.sizes[name] for name in names}

    def alias(self, name: str) -> str:
        """After BERT's norms a tensor is both a residual and the next input."""
        return name if self.shape.pre_norm else {"h": "x", "h1": "x1"}.get(name, name)

    def kept(self) -> dict[str, int]:
        """What the backward pass through the block will use, but parameters."""
        return self._norms() | self._attention() | self._feed_forward() | self._adapters()

    def _norms(self) -> dict[str, int]:
        if self.first >= NOTHING:
            return {}
        if not self.shape.pre_norm:
            return self.named("s2") | (self.named("s1") if self.first <= 1 else {})
        inputs = ["x"] * (self.first == WHOLE) + ["x1"] * (self.first <= 1)
        if self.shape.family == "llama" and self.wide < 4:  # RMSNorm computes in float32 and keeps that copy
            return {f"{name} in float32": 4 * self.sizes[name] // self.wide for name in inputs}
        return self.named(*inputs)

    def _attention(self) -> dict[str, int]:
        if self.first > 0:
            return {}
        if not self.step.eager:
            return self.named("q", "k", "v", "out", "logsumexp")
        whole = self.first == WHOLE or self.shape.family == "gpt2"  # GPT-2's fused matrix has one output
        kinds = {w.kind for w in self.trained}
        query, key, value = (whole or kind in kinds for kind in ("query", "key", "value"))
        names = ["q"] * key + ["k"] * query + ["v"] * (query or key) + ["weights"] * (query or key or value)
        return self.named(*names)

    def _feed_forward(self) -> dict[str, int]:
        kinds = {w.kind for w in self.trained}
        gate, up = (self.first < 2 or (self.first == 2 and kind in kinds) for kind in ("gate", "up"))
        if self.shape.mlp_matrices == 3:
            return self.named(*["gate", "up"] * gate, *["silu"] * up)
        kept = "up" if self.shape.activation_copies else "m"
        return self.named(kept, *self._written_out) if up else {}

    @property
    def _written_out(self) -> list[str]:
        """What an activation function that is not fused keeps beside its input."""
        return ["tanh", "half", "one"][: max(0, self.shape.activation_copies - 1)]

    def _adapters(self) -> dict[str, int]:
        """Inputs of trained adapters, what lies between the factors, and copies of factors in the compute dtype."""
        found: dict[str, int] = {}
        if self.first >= NOTHING:
            return found
        wide = 4 if self.own_dtype else self.wide
        for weight, rank in self.trained.items():
            if wide == self.wide:
                name = _INPUTS.get(weight.kind, "h")
                found |= self.named(name)
            else:
                found[f"copy for {weight.name}"] = wide * self.step.n_tokens * weight.d_in
            found[f"between {weight.name}"] = wide * self.step.n_tokens * rank
        if wide < 4:
            for weight, rank in (*self.trained.items(), *self.frozen.items()):
                found[f"factors {weight.name} {rank}"] = wide * rank * (weight.d_in + weight.d_out)
        return found

    # --- moments ---

    def on_the_way_up(self) -> int:
        """Bytes alive in the forward pass, what is kept of the block included, where they are most."""
        return max(sum(self._before(*moment).values()) for moment in self.moments())

    def _before(self, alive: dict[str, int], last: str) -> dict[str, int]:
        """What is alive, and what is kept of the tensors up to the last one that there is."""
        later = {self.alias(name) for name in _ORDER[_ORDER.index(last) + 1 :]} - {self.alias("h"), self.alias("h1")}
        return {name: size for name, size in self.kept().items() if name not in later} | alive

    def moments(self) -> list[tuple[dict[str, int], str]]:
        """What is alive at the moments at which that may be most, kept or not, and the last tensor that there is.

        `e` are the embeddings, which transformers' models hold until the last block is done; GPT-2 and OPT add
        positions to them, so they are not the first block's input. An adapter's moment is its sum: what the matrix
        gave, the change, and both together.
        """
        held = ("e", "x", "x1", "h1") if self.index or self.shape.family in POSITIONS else ("x", "x1", "h1")
        f, d = self.sizes["m"], self.sizes["y"]
        adapted = {w.kind for w in (*self.trained, *self.frozen)}
        if self.shape.mlp_matrices == 3:
            rotary = self.named("x", "h", "raw", "q", "k") | {"rotated": 2 * self.sizes["q"]}
            found = [(self.named(*held, "silu", "up", "m"), "m"), (rotary, "v")]
            found += [(self.named(*held, "silu", "up") | {"change": 2 * f}, "up")] * ("up" in adapted)
        elif self.shape.pre_norm:  # GPT-2 holds attention's output too
            more = {"attended": d} if self.shape.family == "gpt2" else {}
            found = [(self.named(*held, "up", "tanh", "half", "one") | more, "one")] * bool(self._written_out)
            found += [(self.named(*held, "up", *self._written_out[1:], "m") | more, "m")]
            found += [(self.named(*held, "up") | more | {"change": 2 * f}, "up")] * ("up" in adapted)
        else:
            found = [(self.named(*held, "m", "y", "s2") | {"o": d}, "s2"), (self.named(*held, "up", "m"), "m")]
            found += [(self.named(*held, "up") | {"change": 2 * f}, "up")] * ("up" in adapted)
        found += [(self.named(*held, "m", "y") | {"change": 2 * d}, "y")] * ("down" in adapted)
        if self.unpacked.making:
            used = {"unpacked": self.unpacked.used}
            found += [(self.named(*held, "m") | {"unpacked": self.unpacked.making}, "m")]
            found += [(self.named(*held, "m", "y") | used, "y"), (self.named(*held, "up") | used, "up")]
        first = (*held[:-2], "h")
        if self.shape.family == "gpt2" and adapted & {"query", "key", "value"}:  # changes are as wide as all three
            found.append((self.named(*first, "raw") | {"change": 2 * self.sizes["raw"] + self.sizes["q"]}, "raw"))
        if self.step.eager:  # scores, and the same scaled or after the softmax
            found.append((self.named(*first, "q", "k", "v", "weights") | {"scores": self.sizes["weights"]}, "weights"))
        return found

    def attention_on_the_way_down(self) -> int:
        """Bytes alive in attention's backward pass, what is kept until then included."""
        if self.first > 0:
            return 0
        of_inputs = self.sizes["v"] + (
            2 * self.sizes["weights"] if self.step.eager else self.sizes["q"] + self.sizes["k"]
        )
        residual = self.sizes["x"] if self.first == WHOLE else 0
        return sum(self._before({}, "out").values()) + of_inputs + residual

    def on_the_way_down(self) -> int:
        """Bytes of gradients in the feed-forward part beside that of the block's output, where they are most.

        Less the input of down's adapter, which is done before the others' gradients are computed, unless a ReLU still
        needs it. Where down has an adapter, its input has two gradients, and their sum.
        """
        if self.first >= 3:
            return 0
        kinds = {w.kind for w in self.trained}
        done = "down" in kinds
        summed = 3 if done or "down" in {w.kind for w in self.frozen} else 0
        inner = 2
        if self.shape.mlp_matrices == 3:
            inner = 3 if self.first < 2 or {"gate", "up"} <= kinds else 2
        elif self._written_out:
            inner = 3
        m, y, own = self.sizes["m"], self.sizes["y"], self.unpacked
        kept = m * (not (done and self.shape.activation_copies))  # of m, by then
        gradients = max(summed, inner) * m - (m - kept)
        return max(gradients, kept + own.making, kept + own.used + y, own.used + m) if own.making else gradients
