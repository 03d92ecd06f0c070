"""The tensors of one block in training: what it keeps for its backward pass, and what is alive besides for a moment.

Sizes are bytes by name of tensor, so that what has two uses is counted once. Names, in forward order:

    x            the block's input          q k v        query, key, value     raw       before rotary encoding
    h            input of query, key, value weights      of eager attention    out       mix of values
    x1           input of the second half   h1           input of gate and up  y         output of the block's last matrix
    gate silu up m    feed-forward part: m is the input of down; without gate, up and what the activation writes out
    s1 s2        inputs of BERT's two norms, which come after the halves; there h is x, and h1 is x1

`memory.py` has the formulas in words.
"""

from __future__ import annotations

from functools import cached_property

from fedpeft.planner.cost import WHOLE, Shape, Step, ranked

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_INPUTS = {"query": "h", "key": "h", "value": "h", "output": "out", "gate": "h1", "up": "h1", "down": "m"}


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
        self.trained = {w: r for w, r in ranked(shape, step.trained) if w.block == index}
        self.frozen = {w: r for w, r in ranked(shape, step.frozen) if w.block == index}

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
        return self.named("up", *self._written_out) if up else {}

    @property
    def _written_out(self) -> list[str]:
        """What an activation function that is not fused keeps beside its input."""
        return ["tanh", "half", "one"][: self.shape.activation_copies - 1]

    def _adapters(self) -> dict[str, int]:
        """Inputs of trained adapters, what lies between the factors, and copies of factors in the compute dtype."""
        found: dict[str, int] = {}
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

    def on_the_way_up(self) -> list[dict[str, int]]:
        """What is alive in the forward pass beside what is kept, where that is most.

        `e` are the embeddings, which transformers' models hold until the last block is done.
        """
        held = ("e", "x") if self.index else ("x",)
        scores = ("weights", "weights", "weights") if self.step.eager else ()
        del scores
        if self.shape.mlp_matrices == 3:
            return [
                self.named(*held, "x1", "h1", "silu", "up", "m"),
                self.named(*held, "h", "raw", "q", "k") | {"rotated": 2 * self.sizes["q"]},
            ]
        if self.shape.pre_norm:  # GPT-2 holds attention's output too
            whole = self.named(*held, "x1", "h1", "up", *self._written_out) | {"attended": self.sizes["y"]}
            return [whole | ({} if self._written_out else self.named("m"))]
        return [
            self.named(*held, "x1", "m", "y", "s2") | {"o": self.sizes["y"]},
            self.named(*held, "x1", "up", "m"),
        ]

    def on_the_way_down(self) -> int:
        """Bytes of gradients in the feed-forward part beside that of the block's output, where they are most."""
        if self.first >= 3:
            return 0
        kinds = {w.kind for w in self.trained}
        adapted = "down" in kinds | {w.kind for w in self.frozen}  # two gradients of m, and their sum
        if self.shape.mlp_matrices == 3:
            both = self.first < 2 or {"gate", "up"} <= kinds
            return (3 if both or adapted else 2) * self.sizes["m"]
        return (3 if self._written_out or adapted else 2) * self.sizes["m"]
