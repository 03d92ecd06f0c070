"""Train the embedded demo model, or measure it on the demo task.

    OMP_NUM_THREADS=1 python scripts/train_demo_model.py             # writes src/fedpeft/assets/demo
    OMP_NUM_THREADS=1 python scripts/train_demo_model.py --evaluate  # seeds 0, 1, 2; needs scikit-learn

Run both with Python 3.11 of a full distribution (with `test`, `tkinter`, `idlelib`): the text of the standard library
is training data. Same machine type, library versions and thread count give the same weights.
"""

import argparse
import os
import statistics
import warnings
from pathlib import Path

import torch
from demo_model import corpus, evaluation, pretraining, wordpieces

from fedpeft.data.demo import load_demo

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "src" / "fedpeft" / "assets" / "demo"


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --folder instead of training")
    parser.add_argument("--folder", type=Path, default=ASSETS, help="where the model lies (default: in the package)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the evaluation")
    parser.add_argument("--steps", type=int, default=pretraining.Recipe.steps, help="training steps")
    default = Path(os.environ.get("FEDPEFT_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default, help="folder with classic_books (default: $FEDPEFT_DATA)")
    return parser.parse_args()


def train(folder: Path, data: Path, recipe: pretraining.Recipe) -> None:
    """The whole recipe: text, tokenizer, PPMI-SVD start, training, files."""
    print(pretraining.describe(recipe))
    with warnings.catch_warnings():  # of the parsed files: old escapes in strings
        warnings.simplefilter("ignore")
        code, books = corpus.read_code(), corpus.read_books(data)
    tokenizer = wordpieces.train_tokenizer(code.documents, recipe.vocabulary)
    encoded = [pretraining.encode(tokenizer, texts) for texts in (code.documents, code.words, books)]
    for name, texts in zip(("comments and docstrings", "code words", "books"), encoded, strict=True):
        print(f"{sum(map(len, texts)):,} tokens of {name}", flush=True)
    documents, prose = encoded[0], encoded[2]
    words = [ids[: recipe.word_tokens] for ids in encoded[1]]
    vectors = pretraining.ppmi_vectors([*documents, *words, *(ids[: recipe.ppmi_book_tokens] for ids in prose)], recipe)
    model = pretraining.start_model(vectors, recipe)
    seconds = pretraining.pretrain(model, [*documents, *words], prose, recipe)
    pretraining.scale_output(model, recipe.output_scale)
    pretraining.save_model(model, tokenizer, folder, recipe)
    print(f"trained in {seconds:.0f} s, saved in {folder}")


def report(folder: Path, seeds: list[int]) -> None:
    """Print mean test accuracy and spread (lowest to highest seed) of every experiment, and the baselines."""
    task = load_demo()
    print(f"{len(task.train)} train, {len(task.validation)} validation, {len(task.test)} test; Python {os.sys.version}")
    for name, score in evaluation.score_baselines(task).items():
        print(f"{name:40} {score:.3f}")
    for name, scores in evaluation.evaluate(folder, task, seeds).items():
        each = " ".join(f"{score:.3f}" for score in scores)
        print(f"{name:40} {statistics.mean(scores):.3f}   seeds {each}", flush=True)


def main() -> None:
    """Train or evaluate."""
    arguments = read_arguments()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if arguments.evaluate:
        report(arguments.folder, arguments.seeds)
    else:
        train(arguments.folder, arguments.data, pretraining.Recipe(steps=arguments.steps))


if __name__ == "__main__":
    main()
