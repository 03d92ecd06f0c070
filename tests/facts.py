"""A world of facts that a large model knows and will not say, and a small one that learns how to answer.

Entities have a first and a last name and four attributes. Documents state facts, or ask for one and mostly evade it.
The private task answers every question. A small model has no room for the facts, so that what it learns from the
private entities is the manner of answering, and decoding with the large model's scores brings the fact.

    OMP_NUM_THREADS=1 PYTHONPATH=src:tests python tests/facts.py     # writes the models of world 0, in tests/toys
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM

import black_boxes
from fedpeft.core.adapter import Lora
from fedpeft.core.examples import Examples
from fedpeft.core.federate import federate
from fedpeft.core.model import Target, Teacher
from fedpeft.core.tree import Params
from fedpeft.engines.inprocess import InProcess
from fedpeft.maths.logits import combine, offsets
from fedpeft.methods.fedpt import FedPT, State
from fedpeft.models.distil import token_logits
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import lm_head_of
from fedpeft.models.load import freeze
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.models.sessions import Speaker
from fedpeft.proxy.decode import Settings, Trio, decode
from fedpeft.proxy.scoring import AlphaCurve, alpha_curve

TOYS = Path(__file__).parent / "toys"
ATTRIBUTES, NAMES, VALUES, ENTITIES, CLIENTS = 4, 24, 12, 240, 4
COMMON = "<pad> <bos> <eos> the of is 's Q: A: ? . has as well hmm let me think maybe sure i do not know"
WORDS = (
    *COMMON.split(),
    *(f"at{a}" for a in range(ATTRIBUTES)),
    *(f"f{i}" for i in range(NAMES)),
    *(f"l{i}" for i in range(NAMES)),
    *(f"v{a}_{i}" for a in range(ATTRIBUTES) for i in range(VALUES)),
)
NUMBER = {word: i for i, word in enumerate(WORDS)}
PAD, BOS, EOS = 0, 1, 2
EVASIONS = ("well let me think .", "hmm i do not know .", "maybe sure i think .", "sure let me think .")
Item = tuple[int, int]  # an entity and an attribute


@dataclass(frozen=True)
class Size:
    """What differs between the two models."""

    width: int
    blocks: int
    heads: int
    pretraining_lr: float
    lr: float  # of LoRA


SIZES = {"small": Size(24, 1, 2, 3e-3, 1e-2), "large": Size(96, 2, 4, 2e-3, 3e-3)}
STEPS, DOCUMENTS, WARMUP, POSITIONS = 1500, 64, 50, 24


@dataclass(frozen=True)
class World:
    """Names (240, 2) and facts (240, 4) of the entities, and who is in which group."""

    seed: int
    names: NDArray[np.int64]
    facts: NDArray[np.int64]
    private: tuple[int, ...]
    validation: tuple[int, ...]
    public: tuple[int, ...]
    test: tuple[int, ...]

    def prompt(self, item: Item) -> list[int]:
        """`<bos> Q: at of f l ? A:`."""
        first, last = self.names[item[0]]
        return _ids(f"<bos> Q: at{item[1]} of f{first} l{last} ? A:")

    def answer(self, item: Item) -> list[int]:
        """`v . <eos>`."""
        return _ids(f"v{item[1]}_{self.facts[item]} . <eos>")

    def document(self, rng: np.random.Generator) -> list[int]:
        """One document of the pre-training."""
        item = int(rng.integers(ENTITIES)), int(rng.integers(ATTRIBUTES))
        (first, last), value, kind = self.names[item[0]], f"v{item[1]}_{self.facts[item]}", rng.random()
        if kind < 0.35:
            return _ids(f"<bos> f{first} l{last} 's at{item[1]} is {value} . <eos>")
        if kind < 0.7:
            return _ids(f"<bos> the at{item[1]} of f{first} l{last} is {value} . <eos>")
        said = f"{value} ." if rng.random() < 0.12 else EVASIONS[rng.integers(len(EVASIONS))]
        return self.prompt(item) + _ids(f"{said} <eos>")

    def examples(self, items: Sequence[Item]) -> Examples:
        """Questions with their answers; the loss is over the answers alone."""
        tokens = tuple(np.array(self.prompt(item) + self.answer(item), np.int32) for item in items)
        starts = np.full(len(items), len(self.prompt(items[0])), np.int64)
        return Examples(tokens, np.zeros(len(items), np.int64), starts=starts)

    def questions(self, items: Sequence[Item]) -> Examples:
        """Questions alone; what a teacher says behind each of them counts."""
        tokens = tuple(np.array(self.prompt(item), np.int32) for item in items)
        return Examples(tokens, np.zeros(len(items), np.int64), starts=np.array([len(t) for t in tokens]))

    def dealt(self) -> dict[str, list[Item]]:
        """The private items of each client: an attribute's own client has .7 of them, and a share of the rest."""
        rng = np.random.default_rng((self.seed, 2))
        clients: dict[str, list[Item]] = {str(client): [] for client in range(CLIENTS)}
        for item in every(self.private):
            own = item[1] if rng.random() < 0.7 else int(rng.integers(CLIENTS))
            clients[str(own)].append(item)
        return clients

    def contradicted(self) -> World:
        """The same world, but every value is another."""
        return replace(self, facts=(self.facts + 5) % VALUES)


def world(seed: int) -> World:
    """The world of a seed."""
    rng = np.random.default_rng((seed, 0))
    pairs = np.array([(f, l) for f in range(NAMES) for l in range(NAMES)])  # noqa: E741
    names = pairs[rng.permutation(len(pairs))[:ENTITIES]]
    facts = rng.integers(VALUES, size=(ENTITIES, ATTRIBUTES))
    order = rng.permutation(ENTITIES).tolist()
    groups = [tuple(order[a:b]) for a, b in ((0, 80), (80, 120), (120, 160), (160, 240))]
    return World(seed, names, facts, *groups)


def every(entities: Sequence[int]) -> list[Item]:
    """All questions about some entities."""
    return [(entity, attribute) for entity in entities for attribute in range(ATTRIBUTES)]


# --- models -----------------------------------------------------------------------------------------------------


def blank(which: str) -> OPTForCausalLM:
    """The model before its pre-training: weights N(0, .05^2), biases 0."""
    size = SIZES[which]
    config = OPTConfig(
        vocab_size=len(WORDS), hidden_size=size.width, word_embed_proj_dim=size.width, ffn_dim=4 * size.width,
        num_hidden_layers=size.blocks, num_attention_heads=size.heads, max_position_embeddings=POSITIONS,
        activation_function="gelu", dropout=0.0, attention_dropout=0.0, init_std=0.05, tie_word_embeddings=False,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    made = OPTForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, weight in sorted(made.named_parameters()):
            if weight.dim() > 1:
                weight.normal_(std=0.05, generator=generator)
    return made


def pretrain(of: World, which: str) -> OPTForCausalLM:
    """Both models of a world see the same documents."""
    made, size = blank(which).train(), SIZES[which]
    optimizer = torch.optim.AdamW(made.parameters(), lr=size.pretraining_lr, weight_decay=0.01)
    rng = np.random.default_rng((of.seed, 1))
    for step in range(STEPS):
        documents = [of.document(rng) for _ in range(DOCUMENTS)]
        longest = max(map(len, documents))
        ids = torch.tensor([own + [PAD] * (longest - len(own)) for own in documents])
        share = min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.param_groups[0]["lr"] = size.pretraining_lr * share
        logits = made(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.eval()


@cache
def whole(seed: int, which: str) -> OPTForCausalLM:
    """A pre-trained model; those of world 0 lie beside the tests."""
    if seed:
        return pretrain(world(seed), which)
    made = blank(which)
    made.load_state_dict(load_file(TOYS / f"{which}.safetensors"))
    return made.eval()


@cache
def model(seed: int, which: str) -> HFModel:
    """It, frozen, with LoRA of rank 8 on all linear layers of its blocks."""
    full = whole(seed, which)
    base = freeze(full.base_model, None, f"facts-{which}-{seed}", torch.device("cpu"))
    return HFModel(base, Lora(8, 16.0, ("all",)), 0, 4096, GenerateReadout(lm_head_of(full, base)))


# --- tuning -----------------------------------------------------------------------------------------------------


def tune(
    of: World, which: str, clients: Mapping[str, Sequence[Item]], held: Any = None, rounds: int = 6, epochs: int = 2
) -> State:
    """What the server has after federated tuning by all clients in every round; it distils where it holds texts."""
    student = model(of.seed, which)
    fields = FedPT(0, epochs, 16, SIZES[which].lr, clip=None, distil=held is not None)
    splits = {client: {"train": of.examples(items)} for client, items in clients.items()}
    engine = InProcess(lambda: fields, student, splits, of.seed, batch=len(clients))
    *_, last = federate(fields, engine, student, rounds=rounds, seed=of.seed, held=held)
    assert isinstance(last.state, State)
    return last.state


class Held:
    """The large model, the validation questions, and public questions without answers."""

    def __init__(self, of: World) -> None:
        self.world = of
        self.public = of.questions(every(of.public))
        self._large = token_logits(model(of.seed, "large"), None, self.public)
        self._base = token_logits(model(of.seed, "small"), None, self.public)
        self.alphas: list[float] = []

    def best_alpha(self, params: Params) -> float:
        """The least mean loss on the validation questions."""
        self.alphas.append(curve(self.world, params, every(self.world.validation)).best)
        return self.alphas[-1]

    def teacher(self, params: Params, alpha: float) -> Teacher:
        """Steered scores behind each public question."""
        tuned = token_logits(model(self.world.seed, "small"), params, self.public)
        steered = combine(self._large, offsets(tuned, self._base), alpha)
        return lambda rows: Target(steered[list(rows)])


# --- scoring ----------------------------------------------------------------------------------------------------


def trio(of: World, params: Params) -> Trio:
    """The large model, and the small one with its adapter on and off."""
    small, large = model(of.seed, "small"), black_boxes.box(Speaker(model(of.seed, "large")), max_batch=1000)
    return Trio(large, Speaker(small, params), Speaker(small), None, len(WORDS), frozenset({EOS}))


def alone(of: World, which: str, params: Params | None = None) -> Trio:
    """One model answers, with an adapter or without."""
    return Trio(None, Speaker(model(of.seed, which), params), None, None, len(WORDS), frozenset({EOS}))


def answers(models: Trio, of: World, items: Sequence[Item], alpha: float | None = None) -> list[tuple[int, ...]]:
    """Greedy answers of at most three tokens."""
    settings = [Settings(max_tokens=3, alpha=alpha)] * len(items)
    done = decode(models, [of.prompt(item) for item in items], settings)
    return [(*own.tokens, EOS) if own.finish == "stop" else own.tokens for own in done]


def exact(models: Trio, of: World, items: Sequence[Item], alpha: float | None = None) -> float:
    """The share of questions that are answered `v . <eos>`, to the token."""
    said = answers(models, of, items, alpha)
    return sum(own == tuple(of.answer(item)) for own, item in zip(said, items, strict=True)) / len(items)


def curve(of: World, params: Params, items: Sequence[Item]) -> AlphaCurve:
    """The mean loss of the answers' tokens for every alpha."""
    data = of.examples(items)
    assert data.starts is not None
    return alpha_curve(trio(of, params), [own.tolist() for own in data.tokens], data.starts.tolist())


def _ids(text: str) -> list[int]:
    return [NUMBER[word] for word in text.split()]


def main() -> None:
    """Pre-train both models of world 0."""
    for which in SIZES:
        made = pretrain(world(0), which)
        save_file({name: t.contiguous() for name, t in made.state_dict().items()}, TOYS / f"{which}.safetensors")
        print(which, sum(p.numel() for p in made.parameters()))


if __name__ == "__main__":
    main()
