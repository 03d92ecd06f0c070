"""Prompts computed the plain way: one row at a time, without padding, masks or a client axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from cohorts import BATCHES, STEPS
from fedpeft.core.examples import Examples
from fedpeft.core.fit import Fit, Optimizer
from fedpeft.core.rng import Rng
from fedpeft.core.train import stack_params
from fedpeft.core.tree import Params
from fedpeft.models.hf import HFModel

Weights = Mapping[str, Tensor]
Late = tuple[int, Callable[[Tensor], Tensor]]  # the block, and the prompt (P, d) made of the states (tokens, d)


def plain(
    module: Any, tokens: Sequence[int], segments: Sequence[int] | None, prompt: Tensor | None, late: Late | None = None
) -> Tensor:
    """(tokens, d) last hidden states of one row's text behind a prompt (P, d)."""
    w: Weights = module.state_dict()
    config, family = module.config, module.config.model_type
    ids = torch.tensor([int(t) for t in tokens])
    words = module.get_input_embeddings().weight[ids]
    count = 0 if prompt is None else len(prompt)
    x = words if prompt is None else torch.cat([prompt, words])
    places = torch.arange(len(x))
    if family in ("bert", "roberta"):
        types = torch.tensor([0] * count + [int(s) for s in segments or [0] * len(ids)])
        places = places + (config.pad_token_id + 1 if family == "roberta" else 0)
        x = x + w["embeddings.position_embeddings.weight"][places] + w["embeddings.token_type_embeddings.weight"][types]
        x = _norm(x, w, "embeddings.LayerNorm", config.layer_norm_eps)
    if family == "gpt2":
        x = x + w["wpe.weight"][places]
    if family == "opt":
        x = x + w["decoder.embed_positions.weight"][places + 2]
    for block in range(tiny.BLOCKS):
        if late is not None and block == late[0]:
            made = late[1](x)
            x, places = torch.cat([made, x]), torch.cat([torch.zeros(len(made), dtype=torch.int64), places])
        x = _BLOCKS[family](x, w, config, block, places)
    if family == "gpt2":
        x = _norm(x, w, "ln_f", config.layer_norm_epsilon)
    if family == "opt":
        x = _norm(x, w, "decoder.final_layer_norm", 1e-5)
    if family == "llama":
        x = _rms(x, w, "norm", config.rms_norm_eps)
    return x[len(x) - len(ids) :]


def _norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _rms(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]


def _dense(x: Tensor, w: Weights, name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    size = q.shape[1] // heads
    shared = heads // (k.shape[1] // size)
    out = []
    for head in range(heads):
        own, other = slice(head * size, (head + 1) * size), head // shared
        kept = slice(other * size, (other + 1) * size)
        scores = q[:, own] @ k[:, kept].T / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        out.append(scores.softmax(-1) @ v[:, kept])
    return torch.cat(out, dim=1)


def _bert(x: Tensor, w: Weights, config: Any, block: int, places: Tensor) -> Tensor:
    at = f"encoder.layer.{block}."
    q, k, v = (_dense(x, w, f"{at}attention.self.{name}") for name in ("query", "key", "value"))
    seen = _dense(_attend(q, k, v, config.num_attention_heads, False), w, f"{at}attention.output.dense")
    x = _norm(x + seen, w, f"{at}attention.output.LayerNorm", config.layer_norm_eps)
    high = F.gelu(_dense(x, w, f"{at}intermediate.dense"))
    return _norm(x + _dense(high, w, f"{at}output.dense"), w, f"{at}output.LayerNorm", config.layer_norm_eps)


def _gpt2(x: Tensor, w: Weights, config: Any, block: int, places: Tensor) -> Tensor:
    at = f"h.{block}."

    def turned(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{at}{name}.weight"] + w[f"{at}{name}.bias"]

    q, k, v = turned(_norm(x, w, f"{at}ln_1", config.layer_norm_epsilon), "attn.c_attn").chunk(3, dim=1)
    x = x + turned(_attend(q, k, v, config.n_head, True), "attn.c_proj")
    high = F.gelu(turned(_norm(x, w, f"{at}ln_2", config.layer_norm_epsilon), "mlp.c_fc"), approximate="tanh")
    return x + turned(high, "mlp.c_proj")


def _llama(x: Tensor, w: Weights, config: Any, block: int, places: Tensor) -> Tensor:
    at = f"layers.{block}."
    size = config.hidden_size // config.num_attention_heads
    rates = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = places[:, None].float() * rates  # transformers has them in float32
    cos, sin = (f(torch.cat([angles, angles], dim=1)).to(x.dtype) for f in (torch.cos, torch.sin))

    def rotated(y: Tensor) -> Tensor:
        heads = y.view(len(y), -1, size)
        first, second = heads.chunk(2, dim=2)
        return (heads * cos[:, None] + torch.cat([-second, first], dim=2) * sin[:, None]).reshape(y.shape)

    low = _rms(x, w, f"{at}input_layernorm", config.rms_norm_eps)
    q, k, v = (_dense(low, w, f"{at}self_attn.{name}_proj") for name in "qkv")
    seen = _attend(rotated(q), rotated(k), v, config.num_attention_heads, True)
    x = x + _dense(seen, w, f"{at}self_attn.o_proj")
    low = _rms(x, w, f"{at}post_attention_layernorm", config.rms_norm_eps)
    high = F.silu(_dense(low, w, f"{at}mlp.gate_proj")) * _dense(low, w, f"{at}mlp.up_proj")
    return x + _dense(high, w, f"{at}mlp.down_proj")


def _opt(x: Tensor, w: Weights, config: Any, block: int, places: Tensor) -> Tensor:
    at = f"decoder.layers.{block}."
    low = _norm(x, w, f"{at}self_attn_layer_norm", 1e-5)
    q, k, v = (_dense(low, w, f"{at}self_attn.{name}_proj") for name in "qkv")
    x = x + _dense(_attend(q, k, v, config.num_attention_heads, True), w, f"{at}self_attn.out_proj")
    return x + _dense(F.gelu(_dense(_norm(x, w, f"{at}final_layer_norm", 1e-5), w, f"{at}fc1")), w, f"{at}fc2")


_BLOCKS = {"bert": _bert, "roberta": _bert, "gpt2": _gpt2, "llama": _llama, "opt": _opt}


def tolerance(family: str) -> float:
    """Llama's norms are computed in float32, whatever the precision of the model."""
    return 1e-6 if family == "llama" else 1e-9


def row(data: Examples, index: int) -> tuple[list[int], list[int] | None]:
    """Token ids and token types of a row."""
    return data.tokens[index].tolist(), None if data.segments is None else data.segments[index].tolist()


def drawn(model: HFModel, rng: Rng, scale: float = 0.3) -> dict[str, Tensor]:
    """Adapter and head of the model's own shapes whose every number matters, in the dtype of the base."""
    shapes = {name: tuple(t.shape) for name, t in model.init(rng).items()}
    return {n: torch.from_numpy(rng.normal(0, scale, size=s)).to(model.base.dtype) for n, s in shapes.items()}


def hidden(model: HFModel, clients: Sequence[Params], data: Examples) -> dict[tuple[int, int], Tensor]:
    """(tokens, d) of every row with every client's adapter, all in one pass, by client and row."""
    stack = stack_params(clients, tiny.CPU)
    items = [model.readout.predicting(c, data, r)[0] for r in range(len(data)) for c in range(len(clients))]
    with torch.no_grad(), model.seen(model.base, stack, items, 0) as seen:
        lengths = [len(data.tokens[item.row]) for item in items]
        return {
            (item.client, item.row): seen.hidden[i, :n] for i, (item, n) in enumerate(zip(items, lengths, strict=True))
        }


def fits(clients: Sequence[Params], optimizer: Optimizer, rng: Rng, segments: bool) -> list[Fit]:
    """Clients with ragged numbers of steps, batches and rows."""
    made = []
    for params, steps, batch in zip(clients, STEPS, BATCHES, strict=True):
        data = tiny.examples(rng, 9, segments=segments)
        batches = [rng.choice(9, size=batch, replace=False).tolist() for _ in range(steps)]
        made.append(Fit(params, data, batches, optimizer))
    return made
