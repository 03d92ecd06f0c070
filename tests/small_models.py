"""Small random transformers with LoRA on some weights, and the same as what the planner counts."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers

from fedpeft.core.adapter import Lora
from fedpeft.core.examples import Examples
from fedpeft.core.fit import AdamW, Fit, Fitted
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params
from fedpeft.models.families import KINDS
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import lm_head_of
from fedpeft.models.load import freeze
from fedpeft.models.readouts.verbalizer import VerbalizerReadout
from fedpeft.planner.cost import Shape, Step, shape_of, weight_of

CLASSES = 3


@dataclass(frozen=True)
class Case:
    """A model, what it is to train, and the same for the planner.

    Attributes:
        params: adapters and perhaps a head; those not in `trained` are applied frozen.
    """

    model: HFModel
    params: Params
    trained: frozenset[str]
    data: Examples
    shape: Shape
    step: Step
    name: str

    def fit(self, steps: int = 1, **how: Any) -> Fitted:
        """Train so many steps of all rows; `how` are further fields of the Fit."""
        batches = [list(range(len(self.data)))] * steps
        return self.model.fit(Fit(self.params, self.data, batches, AdamW(1e-3), train=self.trained, **how))

    def head_tensors(self) -> list[torch.Tensor]:
        """The frozen parts of the language model's head."""
        lm = getattr(self.model.readout, "lm", None)
        if lm is None:
            return []
        transform, weight, bias = lm._parts[self.model.base.dtype]
        return [t for t in (weight, bias, *(transform.parameters() if transform else ())) if t is not None]

    def __repr__(self) -> str:
        return f"{self.name} {self.step}"


def config_of(family: str, eager: bool = False, **sizes: Any) -> Any:
    """A configuration of transformers: d, layers, heads, kv, f, vocabulary."""
    given = {"d": 32, "layers": 3, "heads": 4, "kv": 2, "f": 48, "vocabulary": 60} | sizes
    more = {"attn_implementation": "eager" if eager else "sdpa", "vocab_size": given["vocabulary"]}
    if family == "gpt2":
        more |= {"n_embd": given["d"], "n_layer": given["layers"], "n_head": given["heads"], "n_inner": given["f"]}
        return transformers.GPT2Config(n_positions=600, bos_token_id=1, eos_token_id=2, **more)
    more |= {"hidden_size": given["d"], "num_hidden_layers": given["layers"], "intermediate_size": given["f"]}
    more |= {"num_attention_heads": given["heads"], "max_position_embeddings": 600}
    if family in ("opt", "opt, norms behind"):
        more |= {"do_layer_norm_before": family == "opt"}
        more |= {"ffn_dim": given["f"], "word_embed_proj_dim": given["d"], "dropout": 0.0}
        return transformers.OPTConfig(**more)
    if family == "llama":
        return transformers.LlamaConfig(num_key_value_heads=given["kv"], **more)
    return (transformers.BertConfig if family == "bert" else transformers.RobertaConfig)(**more)


def build(
    family: str,
    trained: dict[str, int],
    frozen: dict[str, int] | None = None,
    rows: int = 4,
    tokens: int = 32,
    language_model: bool = False,
    eager: bool = False,
    **sizes: Any,
) -> Case:
    """A case with these ranks; a weight is either trained or frozen here."""
    config, frozen, rng = config_of(family, eager, **sizes), frozen or {}, rng_for(0, "small")
    language_model_of = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = language_model_of.from_config(config)
    base = freeze(whole.base_model, None, f"small-{family}", torch.device("cpu"))
    readout, context = None, tokens
    if language_model:  # one answer, of which the first token is the context
        readout, context = VerbalizerReadout(lm_head_of(whole, base), [[7] * (tokens - 1)]), 1
    model = HFModel(base, Lora(2, 4.0, targets=("query",)), 1 if language_model else CLASSES, 10**6, readout)
    ids = tuple(rng.integers(5, config.vocab_size, size=context).astype(np.int32) for _ in range(rows))
    shape = replace(shape_of(base.config, language_model), lm_share=(tokens - 1) / tokens if language_model else 1.0)
    params = model.readout.init(rng)
    names = set(params)
    for slot, rank in {**frozen, **trained}.items():
        weight = weight_of(shape, slot)
        for side, size in (("A", (rank, weight.d_in)), ("B", (weight.d_out, rank))):
            params[f"{slot}.{side}"] = torch.from_numpy(rng.normal(0, 0.1, size=size).astype(np.float32))
            names |= {f"{slot}.{side}"} if slot in trained else set()
    step = Step(rows, tokens, trained, frozen, classes=None if language_model else CLASSES, eager=eager)
    data = Examples(ids, np.zeros(rows, dtype=np.int64))
    return Case(model, params, frozenset(names), data, shape, step, f"{family} {sizes}")


def draw(family: str, language_model: bool, rng: random.Random, eager: bool) -> Case:
    """A random case: sizes, rows, which weights are adapted from which block on, and which of them are frozen."""
    layers, kinds = rng.randint(1, 4), [kind for kind in KINDS if kind != "gate" or family == "llama"]
    sizes = {"layers": layers, "heads": 4, "kv": rng.choice([1, 2, 4]), "d": rng.choice([16, 32])}
    sizes |= {"f": rng.choice([24, 40]), "vocabulary": rng.randint(30, 80)}
    chosen, lowest = rng.sample(kinds, rng.randint(1, len(kinds))), rng.randrange(layers)
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for block in range(layers):
        for kind in chosen:
            where = trained if block >= lowest and rng.random() < 0.7 else frozen
            where[f"block.{block}.{kind}"] = rng.randint(1, 6)
    trained |= {} if trained else {f"block.{layers - 1}.down": 2}
    frozen = {name: rank for name, rank in frozen.items() if name not in trained}
    return build(family, trained, frozen, rng.randint(1, 4), rng.randint(3, 20), language_model, eager, **sizes)
