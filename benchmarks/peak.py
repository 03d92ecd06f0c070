"""Peak memory of local training against what the planner predicts, each setting in a process of its own.

    python -m benchmarks.peak

One client with LoRA trains two steps on a transformer with random weights. Predicted is what training needs over the
loaded base (`planner/memory.py`); measured is the peak of the process less what it held before, with the base and the
data loaded and one tiny step done. glibc keeps what it has freed unless it is told otherwise, so every process is told
(MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_); without, resident memory can be far more than what is alive.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import record
from benchmarks.memory import peak_bytes
from fedpeft.planner.cost import Shape

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
CLASSES = 6


class Setting(NamedTuple):
    """What is trained."""

    family: str
    kinds: str
    lowest: int  # block
    rank: int
    rows: int
    tokens: int
    language_model: bool = False
    base: str = ""  # precision
    checkpointing: bool = False


SETTINGS = {
    "bert": Setting("bert", "query value", 0, 8, 16, 128),
    "bert, upper half, all matrices": Setting("bert", "query key value output up down", 3, 8, 16, 128),
    "gpt2, language model": Setting("gpt2", "query key value output", 0, 4, 8, 256, True),
    "gpt2, last two blocks": Setting("gpt2", "query value", 4, 16, 8, 256),
    "llama": Setting("llama", "query value", 0, 8, 4, 512),
    "llama, language model": Setting("llama", "query key value output gate up down", 0, 16, 4, 512, True),
    "llama, last block's down": Setting("llama", "down", 5, 8, 4, 512),
    "bert, int8": Setting("bert", "query value", 0, 8, 4, 128, base="int8"),
    "bert, nf4, one row": Setting("bert", "query value", 0, 8, 1, 128, base="nf4"),
    "bert, checkpointing": Setting("bert", "query key value output", 0, 8, 16, 128, checkpointing=True),
    "llama, language model, nf4, checkpointing": Setting(
        "llama", "query value", 0, 8, 4, 512, True, base="nf4", checkpointing=True
    ),
}


def one(options: argparse.Namespace, name: str) -> dict[str, int]:
    """Predicted and measured bytes over the loaded base."""
    command = [sys.executable, "-m", "benchmarks.peak", "--inside", name]
    for key in ("width", "layers", "vocabulary", "shrink", "threads"):
        command += [f"--{key}", str(getattr(options, key))]
    folder = record.RESULTS.parents[1]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env={**os.environ, **MALLOC})
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def inside(options: argparse.Namespace, name: str) -> dict[str, int]:
    """Train here."""
    from benchmarks import workload
    from fedpeft.core.fit import AdamW, Fit
    from fedpeft.core.rng import rng_for
    from fedpeft.planner.cost import Step
    from fedpeft.planner.memory import peak_memory

    workload.use_threads(options.threads)
    model, data, tiny, shape, trained = prepared(options, SETTINGS[name])
    own, optimizer = SETTINGS[name], AdamW(1e-3)
    how: dict[str, Any] = {"base": own.base, "checkpointing": own.checkpointing}
    model.fit(Fit(model.init(rng_for(0, "adapter")), tiny, [[0]], optimizer, **how))  # what is made once
    gc.collect()
    before = _forget_peak()
    rows, classes = len(data), None if own.language_model else CLASSES
    model.fit(Fit(model.init(rng_for(0, "adapter")), data, [list(range(rows))] * 2, optimizer, **how))
    how["base"] = own.base or "float32"
    found = peak_memory(shape, Step(rows, tokens_of(options, own), trained, classes=classes, **how))
    return {"base": found.base, "predicted": found.peak - found.base, "measured": peak_bytes() - before}


def tokens_of(options: argparse.Namespace, setting: Setting) -> int:
    """Of a row, as far as the options leave them."""
    return max(4, setting.tokens // int(options.shrink))


def prepared(options: argparse.Namespace, setting: Setting) -> tuple[Any, Any, Any, Shape, dict[str, int]]:
    """A model with random weights, its rows, a tiny row, and for the planner the shape and the ranks that train."""
    from dataclasses import replace

    from benchmarks import workload
    from fedpeft.core.adapter import Lora
    from fedpeft.models.hf import HFModel
    from fedpeft.models.lm_head import lm_head_of
    from fedpeft.models.readouts.verbalizer import VerbalizerReadout
    from fedpeft.planner.cost import shape_of, weights

    family, targets, lowest, rank, rows, _, language_model, *_ = setting
    tokens, kinds = tokens_of(options, setting), tuple(targets.split())
    lowest = min(lowest, options.layers - 1)
    whole, base = transformer(options, family)
    readout = VerbalizerReadout(lm_head_of(whole, base), [[7] * (tokens - 1)]) if language_model else None
    blocks = tuple(range(lowest, options.layers))
    model = HFModel(base, Lora(rank, 2.0 * rank, targets=kinds, blocks=blocks), CLASSES, rows * tokens, readout)
    data = workload.random_rows("client", rows, 1 if language_model else tokens, options.vocabulary)
    tiny = workload.random_rows("tiny", 1, 1, options.vocabulary)
    if language_model:
        data = replace(data, labels=data.labels * 0)
    shape = replace(shape_of(base.config, language_model), lm_share=(tokens - 1) / tokens if language_model else 1.0)
    trained = {w.name: rank for w in weights(shape, kinds) if w.block >= lowest}
    return model, data, replace(tiny, labels=tiny.labels * 0), shape, trained


def transformer(options: argparse.Namespace, family: str) -> tuple[Any, Any]:
    """A language model with random weights, and the frozen transformer in it."""
    import torch
    import transformers

    from fedpeft.models.load import freeze

    config = configuration(options, family)
    kind: Any = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    whole = kind.from_config(config)
    return whole, freeze(whole.base_model, None, family, torch.device("cpu"))


def configuration(options: argparse.Namespace, family: str) -> Any:
    """Of the transformer, as transformers has it."""
    import transformers

    d, layers = options.width, options.layers
    sizes = {"hidden_size": d, "num_hidden_layers": layers, "intermediate_size": 4 * d, "num_attention_heads": d // 16}
    if family == "gpt2":
        sizes = {"n_embd": d, "n_layer": layers, "n_inner": 4 * d, "n_head": d // 16, "bos_token_id": 1}
        sizes["eos_token_id"] = 2
    if family == "llama":
        sizes |= {"num_key_value_heads": d // 32, "intermediate_size": 11 * d // 4}
    return transformers.AutoConfig.for_model(family, vocab_size=options.vocabulary, **sizes)


def _forget_peak() -> int:
    """Resident bytes now; on Linux the recorded peak starts from here."""
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        pass
    return peak_bytes()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    parser.add_argument("--width", type=int, default=384, help="d; a head has 16, and Llama half as many for keys")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--shrink", type=int, default=1, help="divides the tokens of a row")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--inside", help="train this setting in this process and print its bytes")
    options = parser.parse_args(arguments)
    if options.inside:
        measured = inside(options, options.inside)
        print(json.dumps(measured))
        return dict(measured)
    result: dict[str, Any] = {}
    for name in options.settings:
        found = one(options, name)
        result[name] = {**found, "error": found["predicted"] / found["measured"] - 1}
    head = ["setting", "base, MB", "predicted, MB", "measured, MB", "error"]
    rows = [
        [n, *(round(m[k] / 1e6, 1) for k in ("base", "predicted", "measured")), m["error"]] for n, m in result.items()
    ]
    record.show([head, *rows])
    return record.keep("peak", options, result)


if __name__ == "__main__":
    main()
