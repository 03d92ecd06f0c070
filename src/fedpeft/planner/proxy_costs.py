"""What proxy-tuning costs beside tuning the large model itself: clients, server, and every token that is served.

Both are federated LoRA of the same kinds of weights with the same rank, on the same rows in the same rounds; the models
share a tokenizer, so tokens are the same too. Proxy-tuning trains the small model and pays in use: each token is scored
by the large model and twice by the small one (T with its adapter, B without). The break-even is the number of served
tokens after which what training saved is spent.

| what | operations |
|---|---|
| training | `cost.train_flops` of tokens and pairs; of LoRA 2 r (d_in + d_out) a weight and token forward, 4 back |
| alpha | L and B read the validation texts, T at every choice of alpha |
| distillation | L reads the public texts once; in a round T and B read them, and T trains E_d times on them |
| an answer of a tokens | a prompt of p tokens, then a - 1 tokens one by one: p² + (a - 1) p + a (a - 1) / 2 pairs |

Not counted: what combining scores costs (5 operations per token of the vocabulary), norms, activations, embeddings, and
the server's evaluations for the record of the run. Formulas: this project's specification of FedPT, section 8, with
attention and the head instead of 2 P per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedpeft.core.errors import ModelError
from fedpeft.planner.activations import DTYPE_BYTES
from fedpeft.planner.cost import Shape, Step, forward_flops, ranked, train_flops, update_bytes
from fedpeft.planner.memory import base_bytes, peak_memory


@dataclass(frozen=True)
class Texts:
    """Rows that a model reads: their tokens, and the sum of their squared lengths.

    Attributes:
        share: of the tokens whose states go through the language model's head.
    """

    tokens: int
    pairs: int
    share: float = 1.0


@dataclass(frozen=True)
class Model:
    """A language model with LoRA.

    Attributes:
        shape: with the language model's head.
        ranks: of the adapted weights by name.
        base, compute: precisions, as in `cost.Step`.
    """

    shape: Shape
    ranks: Mapping[str, int]
    base: str = "float32"
    compute: str = "float32"

    @property
    def adapter_numbers(self) -> int:
        """|A|, sum of r (d_in + d_out)."""
        return update_bytes((w for w, _ in ranked(self.shape, self.ranks)), self.ranks) // 4

    @property
    def weight_bytes(self) -> int:
        """Of the frozen model, the language model's head included."""
        return base_bytes(self.shape, self.base, self.compute)

    @property
    def lowest(self) -> int:
        """The lowest block that has an adapter."""
        return min((w.block for w, _ in ranked(self.shape, self.ranks)), default=self.shape.layers)

    def read(self, texts: Texts, adapted: bool = False) -> int:
        """Operations of one forward pass over the texts."""
        shape = replace(self.shape, lm_share=texts.share)
        own = 2 * self.adapter_numbers * texts.tokens if adapted else 0
        return forward_flops(shape, texts.tokens, texts.pairs) + own

    def train(self, texts: Texts) -> int:
        """Operations of training once on the texts."""
        shape = replace(self.shape, lm_share=texts.share)
        return train_flops(shape, texts.tokens, texts.pairs, self.lowest) + 6 * self.adapter_numbers * texts.tokens

    def answer(self, prompt: int, tokens: int, adapted: bool = False) -> int:
        """Operations of an answer of so many tokens to a prompt, with keys and values kept.

        Raises:
            ModelError: a prompt or an answer without tokens.
        """
        if prompt < 1 or tokens < 1:
            raise ModelError(f"an answer of {tokens} tokens to a prompt of {prompt} costs nothing; both need one")
        read = prompt + tokens - 1  # the last token is not read any more
        pairs = prompt**2 + (tokens - 1) * prompt + tokens * (tokens - 1) // 2
        head = 2 * self.shape.hidden * self.shape.vocab * tokens
        body = forward_flops(replace(self.shape, lm_head=False), read, pairs)
        return body + head + (2 * self.adapter_numbers * read if adapted else 0)

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of a text of so many tokens."""
        shape = self.shape
        return 2 * shape.layers * shape.kv_heads * shape.head_size * tokens * DTYPE_BYTES[self.compute]


@dataclass(frozen=True)
class Work:
    """What a run did and is for.

    Attributes:
        clients: that took part.
        turns: of all of them in all rounds.
        trained: all rows of all turns, repeats counted.
        rows, longest: of the largest part of a client's step, rows and tokens of each.
        prompt, answer: tokens of a mean request.
        validation, public: texts of the server; None: it has none.
        choices: how often alpha was chosen on the validation texts.
        distilled: rounds in which it distilled, over the public texts `distil_epochs` times.
    """

    clients: int
    turns: int
    trained: Texts
    rows: int
    longest: int
    prompt: int
    answer: int
    validation: Texts | None = None
    public: Texts | None = None
    choices: int = 0
    distilled: int = 0
    distil_epochs: int = 1


@dataclass(frozen=True)
class Bill:
    """One way's costs.

    Attributes:
        once_bytes: the frozen model that each client must have before round 1.
        adapter_bytes: down and up together, of all turns.
        client_memory_bytes: the most that a client needs at a time.
        client_flops: of all turns.
        server_flops: in training.
        token_flops: of a served token, its share of reading the prompt included.
        serving_bytes: weights, adapter, and keys and values of one request.
    """

    once_bytes: int
    adapter_bytes: int
    client_memory_bytes: int
    client_flops: int
    server_flops: int
    token_flops: float
    serving_bytes: int

    @property
    def training_flops(self) -> int:
        """Of clients and server."""
        return self.client_flops + self.server_flops


def bill_of_proxy(small: Model, large: Model, work: Work, adapter_bytes: int) -> Bill:
    """Costs of tuning the small model and steering the large one, whose clients never see it.

    Args:
        large: at the server, with its full weights; its ranks are not used.
        adapter_bytes: counted.
    """
    large = replace(large, base=large.compute)
    answered = large.answer(work.prompt, work.answer)
    answered += small.answer(work.prompt, work.answer, adapted=True) + small.answer(work.prompt, work.answer)
    read = work.prompt + work.answer - 1
    caches = large.cache_bytes(read) + 2 * small.cache_bytes(read)
    return Bill(
        small.weight_bytes,
        adapter_bytes,
        _client_memory(small, work),
        small.train(work.trained),
        _server_flops(small, large, work),
        answered / work.answer,
        large.weight_bytes + small.weight_bytes + 4 * small.adapter_numbers + caches,
    )


def bill_of_direct(large: Model, work: Work, adapter_bytes: int) -> Bill:
    """Costs of the same federation over the large model, whose adapter is merged into its full weights for use."""
    read = work.prompt + work.answer - 1
    served = replace(large, base=large.compute)
    return Bill(
        large.weight_bytes,
        adapter_bytes,
        _client_memory(large, work),
        large.train(work.trained),
        0,
        large.answer(work.prompt, work.answer) / work.answer,
        served.weight_bytes + served.cache_bytes(read),
    )


def break_even_tokens(proxy: Bill, direct: Bill) -> float | None:
    """Served tokens until the proxy has cost as many operations as direct tuning; None: it costs more from the start.

    A token always costs more with the proxy, which asks two models more.
    """
    saved = direct.training_flops - proxy.training_flops
    return None if saved <= 0 else saved / (proxy.token_flops - direct.token_flops)


def _client_memory(model: Model, work: Work) -> int:
    step = Step(work.rows, work.longest, model.ranks, base=model.base, compute=model.compute)
    return peak_memory(replace(model.shape, lm_share=work.trained.share), step).peak


def _server_flops(small: Model, large: Model, work: Work) -> int:
    total = 0
    if work.validation is not None and work.choices:
        curve = small.read(work.validation) + small.read(work.validation, adapted=True)
        total += large.read(work.validation) + work.choices * curve
    if work.public is not None and work.distilled:
        own = small.read(work.public) + small.read(work.public, adapted=True)
        total += large.read(work.public) + work.distilled * (own + work.distil_epochs * small.train(work.public))
    return total
