"""How well LoRA fine-tuning of the demo model solves the demo task: a plain PyTorch loop, independent of the library.

Rank 8 on the query and value projections of every block, a linear head on the mean of the last hidden states over the
real tokens, texts cut at 32 tokens. The base model stays frozen.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer

from fedpeft.data.demo import LABELS, DemoTask, Row

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Protocol:
    """The numbers of the evaluation; the federated ones are the project's bounds, word for word."""

    length: int = 32  # tokens
    rank: int = 8
    alpha: float = 16.0
    batch: int = 16
    lr: float = 5e-3
    weight_decay: float = 0.01
    epochs: int = 3  # centralised
    clients: int = 24
    cohort: int = 8
    rounds: int = 10
    local_steps: int = 8
    dirichlet: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """Token ids and mask (rows, length) and label numbers (rows,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def take(self, rows: Sequence[int] | np.ndarray) -> "Encoded":
        """Some rows, cut to the longest of them."""
        index = torch.as_tensor(np.asarray(rows))
        longest = int(self.mask[index].sum(1).max())
        return Encoded(self.ids[index, :longest], self.mask[index, :longest], self.labels[index])


class LoraLinear(nn.Module):
    """y = W x + b + alpha / r B A x, with W and b frozen (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


class Classifier(nn.Module):
    """A frozen encoder with LoRA on query and value, mean pooling, and one linear layer."""

    def __init__(self, encoder: nn.Module, protocol: Protocol) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        for block in self.encoder.encoder.layer:
            attention = block.attention.self
            attention.query = LoraLinear(attention.query, protocol.rank, protocol.alpha)
            attention.value = LoraLinear(attention.value, protocol.rank, protocol.alpha)
        self.head = nn.Linear(encoder.config.hidden_size, len(LABELS))

    def forward(self, rows: Encoded) -> Tensor:
        hidden = self.encoder(input_ids=rows.ids, attention_mask=rows.mask).last_hidden_state
        weights = rows.mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))

    def adapter(self) -> Weights:
        """A copy of the trainable parameters."""
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    def set_adapter(self, weights: Weights) -> None:
        """Copy `weights` into the trainable parameters."""
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.requires_grad:
                    p.copy_(weights[name])


def load_encoder(folder: Path) -> nn.Module:
    """The encoder of the saved masked language model, in float32."""
    return AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval().base_model


def randomize(encoder: nn.Module, seed: int) -> nn.Module:
    """A copy whose every tensor is drawn anew with the same mean (zero for matrices) and standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for p in other.parameters():
            centre = 0.0 if p.dim() > 1 else p.mean().item()
            p.copy_(torch.randn(p.shape, generator=generator) * p.std() + centre)
    return other


def encode_rows(rows: Sequence[Row], folder: Path, length: int) -> Encoded:
    """Tokenise rows, padded to `length` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [row["text"] for row in rows]
    out = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    labels = torch.tensor([LABELS.index(row["label"]) for row in rows])
    return Encoded(out["input_ids"], out["attention_mask"], labels)


def accuracy(model: Classifier, data: Encoded) -> float:
    """Share of rows that the model labels rightly."""
    with torch.no_grad():
        hits = [model(part).argmax(1) == part.labels for part in _parts(data)]
    return torch.cat(hits).float().mean().item()


def _parts(data: Encoded, size: int = 256) -> list[Encoded]:
    return [data.take(range(i, min(i + size, len(data.labels)))) for i in range(0, len(data.labels), size)]


def train_batches(
    model: Classifier, data: Encoded, batches: Sequence[np.ndarray], protocol: Protocol, decay: bool = False
) -> None:
    """AdamW over the given batches of row numbers; `decay` lowers the rate linearly to zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=protocol.lr, weight_decay=protocol.weight_decay)
    for step, rows in enumerate(batches):
        if decay:
            optimizer.param_groups[0]["lr"] = protocol.lr * (1 - step / len(batches))
        part = data.take(rows)
        F.cross_entropy(model(part), part.labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def run_centralised(encoder: nn.Module, train: Encoded, seed: int, protocol: Protocol) -> Classifier:
    """LoRA on the pooled training data."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Classifier(copy.deepcopy(encoder), protocol)
    order = np.concatenate([rng.permutation(len(train.labels)) for _ in range(protocol.epochs)])
    train_batches(model, train, np.array_split(order, len(order) // protocol.batch), protocol, decay=True)
    return model


def run_federated(encoder: nn.Module, train: Encoded, seed: int, protocol: Protocol) -> Classifier:
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629) of LoRA and head, weighted by the clients' rows."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Classifier(copy.deepcopy(encoder), protocol)
    clients = split_dirichlet(train.labels.numpy(), protocol, rng)
    weights = model.adapter()
    for _ in range(protocol.rounds):
        answers = []
        cohort = rng.choice(len(clients), size=protocol.cohort, replace=False)
        for rows in (clients[c] for c in cohort):
            model.set_adapter(weights)
            n_wanted = protocol.local_steps * protocol.batch
            order = np.concatenate([rng.permutation(rows) for _ in range(n_wanted // len(rows) + 1)])[:n_wanted]
            train_batches(model, train, order.reshape(protocol.local_steps, protocol.batch), protocol)
            answers.append((model.adapter(), len(rows)))
        total = sum(n for _, n in answers)
        weights = {name: sum((w[name] * (n / total) for w, n in answers), torch.zeros(())) for name in weights}
    model.set_adapter(weights)
    return model


def split_dirichlet(labels: np.ndarray, protocol: Protocol, rng: np.random.Generator) -> list[np.ndarray]:
    """Row numbers per client: sizes from Dirichlet(5), a client's label shares from Dirichlet(`protocol.dirichlet`).

    Rows are dealt one by one, to a random client that is not full and from a label of its shares that is not used up
    (the process of the library's `dirichlet` partition, written independently).
    """
    classes = np.unique(labels)
    left = [list(rng.permutation(np.flatnonzero(labels == label))) for label in classes]
    shares = rng.dirichlet([protocol.dirichlet] * len(classes), size=protocol.clients)
    sizes = np.floor(rng.dirichlet([5.0] * protocol.clients) * len(labels)).astype(int)
    sizes[: len(labels) - sizes.sum()] += 1
    clients: list[list[int]] = [[] for _ in sizes]
    while any(left):
        client = rng.choice([c for c, rows in enumerate(clients) if len(rows) < sizes[c]])
        stock = np.array([len(rows) for rows in left])
        odds = np.where(stock > 0, shares[client], 0)
        odds = stock if odds.sum() < 1e-12 else odds
        clients[client].append(left[rng.choice(len(classes), p=odds / odds.sum())].pop())
    return [np.array(rows) for rows in clients]


def evaluate(
    folder: Path, task: DemoTask, seeds: Sequence[int] = (0, 1, 2), part: str = "test"
) -> dict[str, list[float]]:
    """Accuracy by experiment, one number per seed."""
    protocol = Protocol()
    train = encode_rows(task.train, folder, protocol.length)
    held_out = encode_rows(getattr(task, part), folder, protocol.length)
    encoder = load_encoder(folder)
    scores: dict[str, list[float]] = {"centralised": [], "centralised, random weights": [], "federated": []}
    for seed in seeds:
        scores["centralised"].append(accuracy(run_centralised(encoder, train, seed, protocol), held_out))
        noise = randomize(encoder, seed)
        scores["centralised, random weights"].append(accuracy(run_centralised(noise, train, seed, protocol), held_out))
        scores["federated"].append(accuracy(run_federated(encoder, train, seed, protocol), held_out))
    return scores


def score_baselines(task: DemoTask) -> dict[str, float]:
    """Test accuracy without a neural network: the most frequent training label, and TF-IDF (words and pairs of words
    of the full texts) with logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, labels = [row["text"] for row in task.train], [row["label"] for row in task.train]
    truth = [row["label"] for row in task.test]
    majority = Counter(labels).most_common(1)[0][0]
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    linear = make_pipeline(words, LogisticRegression(C=10, max_iter=2000)).fit(texts, labels)
    return {
        "most frequent training label": truth.count(majority) / len(truth),
        "TF-IDF and logistic regression": float(linear.score([row["text"] for row in task.test], truth)),
    }
