"""Pre-train the embedded pair, `demo-small` and `demo-large`: two causal models that share a tokenizer.

    OMP_NUM_THREADS=1 python scripts/train_demo_pair.py                # writes src/fedpeft/assets/demo-pair
    OMP_NUM_THREADS=1 python scripts/train_demo_pair.py --only small   # one of the two

Run it with Python 3.11 of a full distribution: the text of the standard library is training data. A run that was
interrupted goes on from its checkpoint in --work. Same machine type, library versions and thread count give the same
weights.
"""

import argparse
import os
from pathlib import Path

import torch
from demo_pair import corpus, pretraining

ROOT = Path(__file__).resolve().parents[1]


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(pretraining.SIZES), help="train one of the two models")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "src" / "fedpeft" / "assets" / "demo-pair", help="where both models go"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo-pair", help="folder of the checkpoints")
    default = Path(os.environ.get("FEDPEFT_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--text", type=Path, default=default, help="folder with classic_books (default: $FEDPEFT_DATA)")
    return parser.parse_args()


def main() -> None:
    """Text, tokenizer, then one model after the other."""
    arguments = read_arguments()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recipe = pretraining.Recipe()
    print(pretraining.describe(recipe))
    texts, books = corpus.read_prose(), corpus.read_books(arguments.text)
    tokenizer = pretraining.train_tokenizer(texts, recipe)
    prose, more = pretraining.stream(tokenizer, texts), pretraining.stream(tokenizer, books)
    print(f"{len(prose):,} tokens of prose, {len(more):,} of books", flush=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for name in [arguments.only] if arguments.only else pretraining.SIZES:
        checkpoint = arguments.work / f"{name}.pt"
        model = pretraining.pretrain(pretraining.SIZES[name], recipe, prose, more, checkpoint, report)
        pretraining.save_model(model, tokenizer, arguments.folder / name, recipe)
        print(f"{name}: {model.num_parameters():,} parameters, saved in {arguments.folder / name}", flush=True)


def report(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
