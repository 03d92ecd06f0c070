"""What can be known of a configuration without training: who holds what, and what the run would cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.app.federation import Federation, batching, build, computing
from fedpeft.app.holding import Holding, hold
from fedpeft.app.rehearsal import rehearse
from fedpeft.app.room import memory_bytes, row_lengths
from fedpeft.config import load_config
from fedpeft.config.load import Source, naming_defaults
from fedpeft.core import records, tree, wire
from fedpeft.core.exchange import Weights
from fedpeft.core.fit import SGD, Fit
from fedpeft.data.answers import cut_answers
from fedpeft.planner.cost import train_flops


def check(config: Source, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that can be known without training: the partition's statistics, and an estimate of the costs.

    Bytes and simulated time are those of a run whose clients train nothing (see `rehearsal`). Where that cannot be
    played they are estimates: bytes those of the first round's records, encoded, and as many back; time that of the
    first client's device for a mean client, whose work is counted in operations.

    Raises:
        RequestError: whatever cannot be met, with what to change.
    """
    wanted = load_config(config, overrides)
    with computing(wanted), naming_defaults(wanted):
        fed = build(wanted)
        fed.start()  # the method's own look at model and devices
        held = hold(fed)
    sizes = [len(fed.data[c]["train"]) for c in fed.clients]
    shares = [_top_share(fed.data[c]["train"].labels) for c in fed.clients]
    train = fed.whole("train")
    return {
        "task": {
            "name": fed.config.task.name,
            "labels": list(fed.task.labels),
            "metric": fed.metric,
            "rows": {split: len(fed.whole(split)) for split in ("train", "validation", "test")},
            "majority": _top_share(train.labels),
            "tokens_per_row": float(row_lengths(fed).mean()),
            **_answers(fed),
        },
        "partition": {
            "clients": len(sizes),
            "rows_smallest": min(sizes),
            "rows_mean": sum(sizes) / len(sizes),
            "rows_largest": max(sizes),
            "top_label_share_mean": sum(shares) / len(shares),
            "sha256": fed.partition.sha256,
        },
        "model": {
            "name": fed.config.model.name,
            "precision": fed.base.precision,
            "parameters": fed.base.weights,
            "base_bytes": fed.base.weight_bytes,
            "trainable_parameters": tree.count(fed.initial),
            "device": str(fed.base.device),
        },
        "estimate": _estimate(fed),
        **({} if held is None else {"proxy": _proxy(held)}),
        **({"warnings": fed.warnings} if fed.warnings else {}),
    }


def _proxy(held: Holding) -> dict[str, Any]:
    """What is known of the large model, and what a run will ask of it."""
    caps = held.large.caps
    return {
        "large": caps.identity,
        "vocab": held.vocab,
        "scores": "of all tokens" if caps.full else f"of the {caps.top_k} likeliest tokens",
        "several_positions_a_call": caps.block,
        "max_context": caps.max_context,
        **{f"kept_{name}_bytes": size for name, size in held.kept_bytes.items()},
    }


def _answers(fed: Federation) -> dict[str, Any]:
    """What is known of answers, where the format has any of different lengths: their tokens, and how many were cut."""
    prompting, train = fed.format.prompting, fed.whole("train")
    if prompting is None or train.starts is None:
        return {}
    return {
        "tokens_per_answer": float((train.lengths - train.starts).mean()),
        "rows_with_cut_answer": cut_answers(train, prompting.end),
    }


def _estimate(fed: Federation) -> dict[str, Any]:
    rounds, cohort = fed.config.run.rounds, fed.cohort
    together = min(cohort, batching(fed.config))
    played = rehearse(fed)
    costs = _by_the_first_round(fed, cohort) if played is None else {
        **({"assuming_that": f"rounds after {played.rounds} are like those before"} if played.rounds < rounds else {}),
        "rows_per_client_and_round": played.rows * played.turns / (cohort * rounds),
        "bytes_per_client_and_round": round((played.bytes_down + played.bytes_up) / (cohort * rounds)),
        "bytes": round(played.bytes_down + played.bytes_up),
        "flops_per_client_and_round": round(played.flops * played.turns / (cohort * rounds)),
        "simulated_seconds": played.simulated_seconds,
    }  # fmt: skip
    memory = memory_bytes(fed, together)
    assumed = {key: costs.pop(key) for key in ("assuming_that",) if key in costs}
    return {**assumed, "clients_trained_together": together, **costs, "memory_bytes": memory}


def _by_the_first_round(fed: Federation, cohort: int) -> dict[str, Any]:
    """Costs of methods that do more than training, from what the first round sends, and as much back."""
    rounds, train = fed.config.run.rounds, fed.whole("train")
    passes = rows_per_client(fed) / len(train)  # a client's rows of one round, as a share of all rows
    whole = fed.model.cost(Fit(fed.initial, train, [range(len(train))], SGD(0.0)))
    tokens, pairs, products = (int(passes * count) for count in whole)
    flops = train_flops(fed.shape, tokens, pairs, fed.model.lowest_block(fed.initial)) + 2 * products
    sent = bytes_down(fed)
    device = next(iter(fed.resources.values()))
    seconds = device.latency_s + sent / device.down_bytes_per_s + sent / device.up_bytes_per_s
    return {
        "assuming_that": "all parameters travel and train in every round, and the set-up is not counted; a run may "
        "cost more or less"
        if fed.method.setup()
        else "every round sends what the first one does, as much back, and clients do nothing but train on all rows",
        "rows_per_client_and_round": rows_per_client(fed),
        "bytes_per_client_and_round": 2 * sent,
        "bytes": 2 * sent * cohort * rounds,
        "flops_per_client_and_round": flops,
        "simulated_seconds": rounds * (seconds + flops / device.flops_per_s),
    }


def rows_per_client(fed: Federation) -> float:
    """Rows that a mean client trains on in one round, repeats counted."""
    return float(fed.method.rows_of_round(len(fed.whole("train")) / len(fed.clients)))


def bytes_down(fed: Federation) -> int:
    """Encoded bytes that a client gets in the first round; those of the adapter where a set-up comes before it."""
    method, name = fed.method, fed.config.run.wire
    if method.setup():
        sent: list[Any] = [Weights(fed.initial)]
    else:
        state, client = fed.start().state, fed.clients[0]
        sent = [exchange.send(state, client) for exchange in method.round()]
    packed = sent if name == "float32" else [wire.pack(record, name) for record in sent]
    return sum(len(records.encode(record)) for record in packed)


def _top_share(labels: NDArray[np.int64]) -> float:
    return float(np.bincount(labels).max() / len(labels)) if len(labels) else 0.0
