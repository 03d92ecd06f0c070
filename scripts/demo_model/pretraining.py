"""Tokenizer, starting point and training of the demo model."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from demo_model.wordpieces import SPECIAL

PAD, CLS, SEP, MASK = 0, 2, 3, 4


@dataclass(frozen=True)
class Recipe:
    """Every number of the recipe; lengths count tokens."""

    seed: int = 0
    vocabulary: int = 4096
    width: int = 128
    blocks: int = 2
    heads: int = 4
    feed_forward: int = 512
    positions: int = 128
    ppmi_window: int = 16  # tokens on either side
    word_tokens: int = 9_000  # of the code words of one file that are used
    ppmi_book_tokens: int = 10_000  # of each book that are counted, so that prose does not drown code text
    word_scale: float = 0.3  # standard deviation of a word embedding's entries
    position_scale: float = 0.2
    steps: int = 1500
    pairs: int = 96  # windows and their neighbours per step
    shortest: int = 6  # windows have between `shortest` and `longest` tokens, [CLS] and [SEP] not counted
    longest: int = 30
    code_share: float = 0.9  # of the steps; the others read books
    mask_share: float = 0.15
    temperature: float = 0.07
    contrast: float = 2.0  # weight of the contrastive loss beside the MLM loss
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    output_scale: float = 2.0  # of the last hidden states, after training


def encode(tokenizer: BertWordPieceTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, without special tokens."""
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(e.ids, dtype=np.int64) for e in encoded]


def ppmi_vectors(documents: Sequence[np.ndarray], recipe: Recipe) -> Tensor:
    """Word vectors (vocabulary, width): SVD of the positive pointwise mutual information of co-occurrence.

    Reference: Levy and Goldberg 2014, "Neural word embedding as implicit matrix factorization"; contexts smoothed by
    the power .75 (Levy, Goldberg and Dagan 2015), singular values by the power .5.
    """
    size = recipe.vocabulary
    counts = np.zeros(size * size, dtype=np.float64)
    for ids in documents:
        for distance in range(1, min(recipe.ppmi_window + 1, len(ids))):
            cells, times = np.unique(ids[:-distance] * size + ids[distance:], return_counts=True)
            counts[cells] += times
    pairs = counts.reshape(size, size)
    pairs = pairs + pairs.T
    words = pairs.sum(1)
    contexts = words**0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        mutual = np.log(pairs * contexts.sum() / np.outer(words, contexts))
    ppmi = torch.from_numpy(np.where(np.isfinite(mutual), np.maximum(mutual, 0), 0)).float()
    torch.manual_seed(recipe.seed)
    left, values, _ = torch.svd_lowrank(ppmi, q=recipe.width + 32, niter=4)
    vectors = left[:, : recipe.width] * values[: recipe.width].sqrt()
    return vectors


def start_model(vectors: Tensor, recipe: Recipe) -> BertForMaskedLM:
    """The model before training: random blocks, embeddings from `vectors` at the recipe's scales."""
    torch.manual_seed(recipe.seed)
    config = BertConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.feed_forward,
        max_position_embeddings=recipe.positions,
        type_vocab_size=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
    )
    model = BertForMaskedLM(config)
    embeddings = model.bert.embeddings
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(vectors / vectors.std() * recipe.word_scale)
        embeddings.word_embeddings.weight[PAD] = 0
        embeddings.position_embeddings.weight.normal_(std=recipe.position_scale)
    return model


def scale_output(model: BertForMaskedLM, factor: float) -> None:
    """Multiply the last hidden states by `factor` and divide the head's first matrix by it: the logits stay the same.

    A linear classifier on larger features learns in fewer steps.
    """
    norm = model.bert.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)
        model.cls.predictions.transform.dense.weight.div_(factor)


class Windows:
    """Draws windows and their right-hand neighbours from documents, long documents in proportion to their length."""

    def __init__(self, documents: Sequence[np.ndarray], recipe: Recipe, rng: np.random.Generator) -> None:
        self.recipe, self.rng = recipe, rng
        self.documents = [ids for ids in documents if len(ids) >= 2 * recipe.longest]
        sizes = np.array([len(ids) for ids in self.documents], dtype=float)
        self.odds = sizes / sizes.sum()

    def draw(self, n_pairs: int) -> tuple[Tensor, Tensor]:
        """Token ids (2 n_pairs, length + 2) with row i and row n_pairs + i adjacent, and their attention mask.

        All windows of one draw have the same random length, so nothing is padded.
        """
        length = int(self.rng.integers(self.recipe.shortest, self.recipe.longest + 1))
        ids = np.empty((2 * n_pairs, length + 2), dtype=np.int64)
        ids[:, 0], ids[:, -1] = CLS, SEP
        for row, which in enumerate(self.rng.choice(len(self.documents), size=n_pairs, p=self.odds)):
            document = self.documents[which]
            start = self.rng.integers(0, len(document) - 2 * length + 1)
            ids[row, 1:-1] = document[start : start + length]
            ids[n_pairs + row, 1:-1] = document[start + length : start + 2 * length]
        tensor = torch.from_numpy(ids)
        return tensor, torch.ones_like(tensor)


def mask_tokens(ids: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BERT's corruption (of the chosen, 80 % [MASK], 10 % a random word, 10 % kept), and which tokens were chosen."""
    chosen = (torch.rand(ids.shape, generator=generator) < recipe.mask_share) & (ids > MASK)
    fate = torch.rand(ids.shape, generator=generator)
    random_words = torch.randint(len(SPECIAL), recipe.vocabulary, ids.shape, generator=generator)
    corrupted = torch.where(chosen & (fate < 0.8), MASK, ids)
    return torch.where(chosen & (fate >= 0.9), random_words, corrupted), chosen


def losses_of(
    model: BertForMaskedLM, windows: tuple[Tensor, Tensor], recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """MLM loss (nats per masked token) and contrastive loss (InfoNCE between neighbours, both ways; nats)."""
    ids, mask = windows
    corrupted, chosen = mask_tokens(ids, recipe, generator)
    hidden = model.bert(input_ids=corrupted, attention_mask=mask).last_hidden_state  # (2 pairs, length, width)
    mlm = F.cross_entropy(model.cls(hidden[chosen]), ids[chosen])
    left, right = F.normalize(mean_pool(hidden, mask), dim=-1).chunk(2)
    similar = left @ right.T / recipe.temperature
    target = torch.arange(len(similar))
    return mlm, (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)) / 2


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of (rows, length, width) over the real tokens: (rows, width)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def pretrain(model: BertForMaskedLM, code: Sequence[np.ndarray], books: Sequence[np.ndarray], recipe: Recipe) -> float:
    """Train in place; returns the seconds it took."""
    rng = np.random.default_rng(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    sources = [Windows(documents, recipe, rng) for documents in (code, books) if documents]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    begun, mean = time.perf_counter(), np.zeros(2)
    model.train()
    for step in range(recipe.steps):
        source = sources[0 if rng.random() < recipe.code_share else -1]
        mlm, contrast = losses_of(model, source.draw(recipe.pairs), recipe, generator)
        (mlm + recipe.contrast * contrast).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * learning_rate_share(step, recipe)
        optimizer.step()
        optimizer.zero_grad()
        mean += [mlm.item(), contrast.item()]
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - begun
            print(
                f"step {step + 1:5d}  mlm {mean[0] / 100:.3f}  contrast {mean[1] / 100:.3f}  {seconds:.0f} s",
                flush=True,
            )
            mean[:] = 0
    model.eval()
    return time.perf_counter() - begun


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)))


def save_model(model: BertForMaskedLM, tokenizer: BertWordPieceTokenizer, folder: Path, recipe: Recipe) -> None:
    """Write config.json, model.safetensors (float32, tied head once), tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    fast = BertTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, model_max_length=recipe.positions, do_lower_case=True
    )
    fast.save_pretrained(folder)


def describe(recipe: Recipe) -> str:
    """The recipe as one line per number, for the log."""
    return "\n".join(f"{name} = {value}" for name, value in asdict(recipe).items())
