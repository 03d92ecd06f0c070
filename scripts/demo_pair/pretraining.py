"""Tokenizer, starting point and training of the embedded pair; every number is a field of `Recipe` or `Size`."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

PAD, END = 0, 1
SPECIAL = ("<pad>", "</s>")
SAVE_EVERY = 100  # steps between two checkpoints


@dataclass(frozen=True)
class Recipe:
    """What both models have in common."""

    seed: int = 0
    vocabulary: int = 1024
    context: int = 128
    heads: int = 4
    rows: int = 16  # windows of a step
    book_rows: int = 4  # of them that are read from books
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: int = 30
    clip: float = 1.0


@dataclass(frozen=True)
class Size:
    """What differs."""

    width: int
    blocks: int
    std: float  # of all weights at the start; of the output and down projections divided by sqrt(2 blocks)
    steps: int
    lr: float


SIZES = {"small": Size(40, 2, 0.03, 1200, 5e-3), "large": Size(128, 3, 0.02, 1400, 2e-3)}


def train_tokenizer(texts: Sequence[str], recipe: Recipe) -> Tokenizer:
    """A byte-level BPE; every text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def stream(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int64]:
    """All texts behind each other, the end token behind each."""
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.fromiter((i for text in encoded for i in (*text.ids, END)), np.int64)


def start_model(size: Size, recipe: Recipe) -> OPTForCausalLM:
    """The model before training."""
    config = OPTConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=size.width,
        word_embed_proj_dim=size.width,
        ffn_dim=4 * size.width,
        num_hidden_layers=size.blocks,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        activation_function="gelu",
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        init_std=size.std,
        pad_token_id=PAD,
        bos_token_id=END,
        eos_token_id=END,
        tie_word_embeddings=True,
    )
    model = OPTForCausalLM(config)
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                narrow = math.sqrt(2 * size.blocks) if ".out_proj." in name or ".fc2." in name else 1.0
                weight.normal_(std=size.std / narrow, generator=generator)
    return model


def draw(prose: NDArray[np.int64], books: NDArray[np.int64], step: int, recipe: Recipe) -> torch.Tensor:
    """(rows, context + 1) windows of a step, which depend on its number alone; those of books last."""
    rng = np.random.default_rng((recipe.seed, step))
    n_books = recipe.book_rows if len(books) > recipe.context else 0
    rows = []
    for text, n in ((prose, recipe.rows - n_books), (books, n_books)):
        starts = rng.integers(0, len(text) - recipe.context, size=n) if n else ()
        rows += [text[start : start + recipe.context + 1] for start in starts]
    return torch.from_numpy(np.stack(rows))


def pretrain(
    size: Size,
    recipe: Recipe,
    prose: NDArray[np.int64],
    books: NDArray[np.int64],
    checkpoint: Path,
    say: Callable[[str], None] = print,
) -> OPTForCausalLM:
    """Train from the start, or go on from the checkpoint; the same weights either way."""
    model = start_model(size, recipe).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    done, seconds = 0, 0.0
    if checkpoint.exists():
        kept: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        if kept["recipe"] != stamp(size, recipe):
            raise SystemExit(f"{checkpoint} is of another recipe; move it away")
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        done, seconds = kept["steps"], kept["seconds"]
    begun, total = time.perf_counter() - seconds, 0.0
    for step in range(done, size.steps):
        windows = draw(prose, books, step, recipe)
        logits = model(input_ids=windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = size.lr * learning_rate_share(step, size, recipe)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == size.steps:
            seconds = time.perf_counter() - begun
            say(f"step {step + 1:5d}  loss {total / SAVE_EVERY:.3f}  {seconds:.0f} s")
            total = 0.0
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"steps": step + 1, "seconds": seconds, "recipe": stamp(size, recipe)}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    return model.eval()


def stamp(size: Size, recipe: Recipe) -> str:
    """What a checkpoint belongs to."""
    return repr((size, recipe))


def learning_rate_share(step: int, size: Size, recipe: Recipe) -> float:
    """Linear warm-up times a cosine from one to zero."""
    return min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * step / size.steps))


def save_model(model: OPTForCausalLM, tokenizer: Tokenizer, folder: Path, recipe: Recipe) -> None:
    """Write config.json, model.safetensors (float32, the tied head once) and the tokenizer's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=recipe.context,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[END],
        eos_token=SPECIAL[END],
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


def describe(recipe: Recipe) -> str:
    """The recipe as one line per number, for the log."""
    shared = [f"{name} = {value}" for name, value in asdict(recipe).items()]
    return "\n".join([*shared, *(f"{name}: {size}" for name, size in SIZES.items())])
