"""What a run of fedpt cost beside the same federation over the large model, from its folder and two configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from fedpeft.app.federation import Federation
from fedpeft.app.planning import read_config
from fedpeft.app.room import row_lengths
from fedpeft.core import records, wire
from fedpeft.core.errors import ModelError
from fedpeft.core.exchange import Weights
from fedpeft.core.fit import Data
from fedpeft.planner.cost import Shape, all_weights, shape_of
from fedpeft.planner.proxy_costs import Model, Texts, Work, bill_of_direct, bill_of_proxy, break_even_tokens

ELSEWHERE = "://"  # in the name of a large model of which no configuration can be read


def compare_costs(
    fed: Federation, exchanges: Sequence[Mapping[str, Any]], public: Data | None = None
) -> dict[str, Any] | None:
    """Both ways' costs as plain data, for the manifest; None where the large model or the adapter's kind is unknown.

    Counted are bytes, turns, tokens and pairs of the run. Computed are operations and memory, and all of direct tuning.

    Args:
        exchanges: lines of `exchanges.jsonl`.
        public: texts that the server distilled on; without them distillation is left out, which `lacks` says.

    Returns:
        `large`, `requests` (tokens of a mean prompt and answer), `counted` (clients, turns, tokens), `proxy` and
        `direct` (fields of `planner.proxy_costs.Bill`), `break_even_tokens`, `lacks`.
    """
    name = fed.config.proxy.large
    turns = [line for line in exchanges if line.get("steps")]
    small = small_model(fed)
    if name is None or ELSEWHERE in name or fed.format.of != "text" or small is None or not turns:
        return None
    try:
        large = large_model(fed, small, shape_of(read_config(name), lm_head=True))
    except ModelError:  # opened by name alone, or of a form that cannot be counted
        return None
    work = work_of(fed, turns, public)
    distils = bool(getattr(fed.method, "distil", False)) and fed.config.proxy.public is not None
    lacks = ["the server's distillation"] if distils and public is None else []
    if fed.config.proxy.alpha == "auto" and fed.config.proxy.select != "nll":
        lacks.append("the answers by which alpha was chosen")
    if fed.config.proxy.expert_prompt is not None:
        lacks.append("the expert prompt")
    sent = sum(line["bytes_down"] + line["bytes_up"] for line in turns)
    proxy = bill_of_proxy(small, large, work, sent)
    direct = bill_of_direct(large, work, 2 * len(turns) * message_bytes(large, fed.config.run.wire))
    return {
        "large": name,
        "requests": {"prompt_tokens": work.prompt, "answer_tokens": work.answer},
        "counted": {"clients": work.clients, "turns": work.turns, "tokens": work.trained.tokens},
        "proxy": asdict(proxy),
        "direct": asdict(direct),
        "break_even_tokens": break_even_tokens(proxy, direct),
        "lacks": " and ".join(lacks) or None,
    }


def small_model(fed: Federation) -> Model | None:
    """The run's own model; None where it trains something else than LoRA on named weights."""
    ranks = {name.removesuffix(".A"): len(t) for name, t in fed.initial.items() if name.endswith(".A")}
    known = {w.name for w in all_weights(fed.shape)}
    if not ranks or not ranks.keys() <= known or 2 * len(ranks) != len(fed.initial):
        return None
    dtype = str(fed.base.dtype).removeprefix("torch.")
    return Model(fed.shape, ranks, fed.base.quantized.partition(":")[0] or dtype, dtype)


def large_model(fed: Federation, small: Model, shape: Shape) -> Model:
    """The large one with the same rank on the same kinds of weights in all blocks; on all where the small has all."""
    rank = max(small.ranks.values())
    kinds = {name.rpartition(".")[2] for name in small.ranks}
    every = kinds == {w.kind for w in all_weights(small.shape)}
    ranks = {w.name: rank for w in all_weights(shape) if every or w.kind in kinds}
    return Model(shape, ranks, small.base, small.compute)


def work_of(fed: Federation, turns: Sequence[Mapping[str, Any]], public: Data | None) -> Work:
    """What the run did."""
    share = fed.shape.lm_share
    lengths = row_lengths(fed)
    longest = int(lengths.max())
    rows = min(int(getattr(fed.method, "batch_size", 1)), fed.config.run.token_budget // longest)
    prompt, answer = _request(fed)
    validation = fed.whole("validation")
    distilled = max(line["round"] for line in turns) if public is not None else 0
    return Work(
        clients=len({line["client"] for line in turns}),
        turns=len(turns),
        trained=Texts(sum(line["tokens"] for line in turns), sum(line["pairs"] for line in turns), share),
        rows=max(1, rows),
        longest=longest,
        prompt=prompt,
        answer=answer,
        validation=_texts(validation, share) if len(validation) else None,
        public=None if public is None else _texts(public, share),
        choices=choices_of_alpha(fed, distilled),
        distilled=distilled,
        distil_epochs=int(getattr(fed.method, "distil_epochs", 1)),
    )


def choices_of_alpha(fed: Federation, distilled: int) -> int:
    """How often alpha was chosen by a curve: for every teacher, and for what is served unless that is the same.

    Args:
        distilled: rounds with a teacher.
    """
    if fed.config.proxy.alpha != "auto":
        return 0
    return distilled if distilled and getattr(fed.method, "serve", "pre") == "pre" else distilled + 1


def _texts(data: Data, share: float) -> Texts:
    lengths = np.asarray(data.lengths, dtype=np.int64)
    return Texts(int(lengths.sum()), int((lengths**2).sum()), share)


def _request(fed: Federation) -> tuple[int, int]:
    """Tokens of a mean prompt and a mean answer, of the test rows where there are any."""
    data = next(rows for split in ("test", "validation", "train") if len(rows := fed.whole(split)))
    assert data.starts is not None, "rows of the format generate have answers"
    prompt, whole = float(data.starts.mean()), float(data.lengths.mean())
    return max(1, round(prompt)), max(1, round(whole - prompt))


def message_bytes(model: Model, name: str) -> int:
    """Encoded bytes of one message with the model's adapter: those of one and of two blocks, carried on to all."""
    ranks: dict[str, int] = {}
    for weight, rank in model.ranks.items():
        ranks[weight.split(".")[2]] = rank

    def of(blocks: int) -> int:
        params = {}
        for w in all_weights(replace(model.shape, layers=blocks)):
            if w.kind in ranks:
                params[f"{w.name}.A"] = torch.zeros(ranks[w.kind], w.d_in)
                params[f"{w.name}.B"] = torch.zeros(w.d_out, ranks[w.kind])
        record = Weights(params)
        return len(records.encode(record if name == "float32" else wire.pack(record, name)))

    one = of(1)
    return one + (model.shape.layers - 1) * (of(2) - one)
