"""What is trained in the benchmarks: base models and clients' data."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft.core.adapter import Lora
from fedpeft.core.examples import Examples
from fedpeft.core.rng import rng_for
from fedpeft.models.load import DTYPES, Base, freeze, load_base, resolve_device

DATA = Path(os.environ.get("FEDPEFT_DATA", Path(__file__).parents[2] / "shared" / "data"))
RANDOM_MODELS = ("tiny", "roberta-large")  # architectures with random weights: what speed needs, and no download
FEDERATION = 100  # clients that the real data is divided among; a cohort is drawn from them


def add_options(parser: argparse.ArgumentParser, clients: int) -> None:
    """The options that say what is trained."""
    parser.add_argument("--model", default="minilm", help=f"minilm, demo, a folder, or {', '.join(RANDOM_MODELS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES), help="of the base")
    parser.add_argument("--clients", type=int, default=clients, help="in the cohort")
    parser.add_argument("--batch", type=int, default=8, help="rows per client and step")
    parser.add_argument("--steps", type=int, help="per client; default: one epoch (random data: 4)")
    parser.add_argument("--data", default="trec", help="trec, mr, ... in FEDPEFT_DATA, or random")
    parser.add_argument("--length", type=int, default=64, help="most tokens per row; random data: all rows have it")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--token-budget", type=int, default=2048)


def make_base(name: str, dtype: str, device: str) -> Base:
    """The frozen base model."""
    if name not in RANDOM_MODELS:
        return load_base(name, dtype, device)
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

    module: Any
    if name == "tiny":
        sizes = _sizes(width=32, layers=2, heads=2)
        module = BertModel(BertConfig(vocab_size=1000, **sizes), add_pooling_layer=False)
    else:
        sizes = _sizes(width=1024, layers=24, heads=16) | {"max_position_embeddings": 514, "type_vocab_size": 1}
        module = RobertaModel(RobertaConfig(vocab_size=50265, **sizes), add_pooling_layer=False)
    return freeze(module.to(DTYPES[dtype]), None, name, resolve_device(device))


def _sizes(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


def lora(rank: int) -> Lora:
    """LoRA on query and value, alpha twice the rank."""
    return Lora(rank, 2.0 * rank)


def make_data(options: argparse.Namespace, base: Base) -> tuple[dict[str, Examples], int]:
    """The cohort's training rows by client, and the number of classes."""
    if options.data == "random":
        rows = options.batch * (options.steps or 4)
        vocabulary = int(base.config["vocab_size"])
        return {c: random_rows(c, rows, options.length, vocabulary) for c in _names(options.clients)}, 6
    from fedpeft.data.partition import PartitionSpec, partition
    from fedpeft.data.tasks import TaskSpec, load_task
    from fedpeft.data.tokens import tokenise

    task = load_task(TaskSpec(train=str(DATA / options.data / "train.jsonl.gz")))
    parts = partition(PartitionSpec("dirichlet", clients=FEDERATION), task)
    rows = tokenise(task.train, base.tokenizer, options.length)
    drawn = rng_for(0, "benchmark").choice(FEDERATION, size=options.clients, replace=False)
    chosen = sorted(parts.clients[i] for i in drawn)
    return {client: rows.take(parts.train[client]) for client in chosen}, len(task.labels)


def random_rows(client: str, rows: int, length: int, vocabulary: int, shortest: int | None = None) -> Examples:
    """Random tokens: rows of equal length, or of random lengths from `shortest` on."""
    rng = rng_for(0, "benchmark", client=client)
    lengths = rng.integers(shortest or length, length + 1, size=rows)
    tokens = tuple(rng.integers(10, vocabulary, size=n, dtype=np.int32) for n in lengths)
    return Examples(tokens, rng.integers(0, 6, size=rows))


def _names(clients: int) -> list[str]:
    return [f"client-{i:04d}" for i in range(clients)]


def use_threads(threads: int) -> None:
    """As many CPU threads as asked for."""
    torch.set_num_threads(threads)
