"""What people do with a run that is there, and with a configuration that was not run yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedpeft.app.federation import Federation, batching, build, task_spec
from fedpeft.app.running import best_params
from fedpeft.app.scoring import GLOBAL, LABEL_PRIOR, MAJORITY
from fedpeft.app.scoring import evaluate as score_split
from fedpeft.config import load_config
from fedpeft.config.load import Source
from fedpeft.core import records, tree
from fedpeft.core.errors import RequestError
from fedpeft.core.exchange import ClientEnv, Meter, Weights
from fedpeft.core.tree import Params
from fedpeft.data.tasks import load_task, read_texts
from fedpeft.data.tokens import tokenise
from fedpeft.models.export import export_adapter, export_merged
from fedpeft.planner.cost import forward_flops, train_flops
from fedpeft.runs.files import write_file
from fedpeft.runs.metrics import metrics_of
from fedpeft.runs.store import RunFolder


def _opened(folder: Path | str) -> tuple[RunFolder, Federation]:
    opened = RunFolder.open(Path(folder))
    return opened, build(load_config(opened.path / "config.yaml"), opened.partition() or None)


def _params(opened: RunFolder, fed: Federation, client: str | None) -> Params:
    """The best-validated global parameters, or those of a client's own model at the newest state."""
    if client is None:
        return best_params(fed, opened)
    if client not in fed.data:
        shown = f"{fed.clients[0]} to {fed.clients[-1]}"
        raise RequestError(f"client {client!r} does not exist in this run; it has {len(fed.data)} clients, {shown}")
    checkpoint = opened.load_checkpoint(fed.method.state)
    if checkpoint is None:
        raise RequestError(f"{opened.path} has no state yet; run it first: fedpeft resume {opened.path}")
    version = checkpoint.versions.get(client)
    if version is None:
        run = fed.config.run
        env = ClientEnv(client, fed.model, fed.data[client], run.seed, run.rounds, meter=Meter())
        memory = fed.method.init_client(env)
    else:
        memory = opened.memories().load(client, version, fed.method.memory)
    return fed.method.personal(fed.method.result(checkpoint.state), memory)


def evaluate(folder: Path | str, data: Path | str | None = None) -> dict[str, Any]:
    """Scores of a run's best-validated parameters, on its own validation and test rows or on a file's.

    Args:
        data: rows with labels, in the columns of the run's task.

    Returns:
        by split ("data" for a file), by who predicts, the metrics.
    """
    opened, fed = _opened(folder)
    params = best_params(fed, opened)
    if data is not None:
        spec = replace(task_spec(fed.config), test=str(data))
        table = load_task(spec).test
        assert table is not None, "a test file gives test rows"
        rows = tokenise(table, fed.base.tokenizer, fed.config.task.max_length)
        return {"data": {GLOBAL: metrics_of(fed.model.score(params, rows), fed.metric)}}
    checkpoint = opened.load_checkpoint(fed.method.state)
    assert checkpoint is not None, "best_params has found a state"
    found = {}
    for split in ("validation", "test"):
        scored = score_split(
            fed,
            params,
            split,
            memories=opened.memories(),
            versions=checkpoint.versions,
            number=checkpoint.number,
            round=max(checkpoint.round, 0),
        )
        if scored is not None:
            found[split] = scored.metrics
    return found


def predict(
    folder: Path | str, data: Path | str, out: Path | str | None = None, client: str | None = None
) -> list[dict[str, Any]]:
    """Labels with probabilities for the rows of a file, which needs no label column.

    Args:
        out: where the predictions go as JSON lines, too.
        client: predict with this client's own model instead of the global one.

    Returns:
        per row: `label` and `probabilities` by label.
    """
    opened, fed = _opened(folder)
    table = read_texts(task_spec(fed.config), data)
    rows = tokenise(table, fed.base.tokenizer, fed.config.task.max_length)
    shares = torch.softmax(fed.model.logits(_params(opened, fed, client), rows), dim=1)
    names = fed.task.labels
    found = [
        {"label": names[int(row.argmax())], "probabilities": dict(zip(names, row.tolist(), strict=True))}
        for row in shares
    ]
    if out is not None:
        write_file(Path(out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found).encode())
    return found


def export(folder: Path | str, to: Path | str, client: str | None = None, merge: bool = False) -> Path:
    """Write a PEFT adapter that plain peft loads, or with `merge` a model that plain transformers loads.

    Args:
        to: a new folder.
        client: export this client's own model instead of the global one.
    """
    opened, fed = _opened(folder)
    params = _params(opened, fed, client)
    manifest = opened.manifest()
    card = {
        "base_model": fed.config.model.name,
        "task": fed.config.task.name,
        "method": fed.config.method.name,
        "rounds": manifest.get("rounds_done"),
        "clients": len(fed.clients),
        "metrics": manifest.get("metrics", {}).get("best", {}) if client is None else {},
    }
    write = export_merged if merge else export_adapter
    return write(fed.model, params, Path(to), labels=fed.task.labels, card=card)


def check(config: Source, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that can be known without training: the partition's statistics, and what the run would cost.

    Bytes are those of one encoded record of the adapter; time is that of the clients' devices for a mean client, whose
    work is counted in operations. Both are estimates: a method may send less or more, and the slowest client decides.
    """
    fed = build(load_config(config, overrides))
    run, method = fed.config.run, fed.method
    sizes = [len(fed.data[c]["train"]) for c in fed.clients]
    shares = [_top_share(fed.data[c]["train"].labels) for c in fed.clients]
    train = fed.whole("train")
    cohort = min(int(getattr(method, "cohort", 0)) or len(sizes), len(sizes))
    epochs = int(getattr(method, "epochs", 1))
    rows = getattr(method, "steps", None)
    share = (rows * method.batch_size / len(train)) if rows else epochs / len(sizes)  # type: ignore[attr-defined]
    tokens, pairs = (int(share * int((train.lengths**power).sum())) for power in (1, 2))
    flops = train_flops(fed.shape, tokens, pairs, fed.model.lowest_block(fed.initial))
    sent = len(records.encode(Weights(fed.initial)))
    device = next(iter(fed.resources.values()))
    seconds = 2 * device.latency_s + sent / device.down_bytes_per_s + sent / device.up_bytes_per_s
    base_bytes = sum(p.numel() * p.element_size() for p in fed.base.module.parameters())
    own_bytes = tree.count(fed.initial) * 4
    return {
        "task": {
            "name": fed.config.task.name,
            "labels": list(fed.task.labels),
            "metric": fed.metric,
            "rows": {split: len(fed.whole(split)) for split in ("train", "validation", "test")},
            "majority": float(_top_share(train.labels)),
            "tokens_per_row": float(train.lengths.mean()),
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
            "parameters": sum(p.numel() for p in fed.base.module.parameters()),
            "trainable_parameters": tree.count(fed.initial),
            "device": str(fed.base.device),
        },
        "estimate": {
            "clients_trained_together": batching(fed.config),
            "bytes_per_client_and_round": 2 * sent,
            "bytes": 2 * sent * cohort * run.rounds,
            "flops_per_client_and_round": flops,
            "simulated_seconds": run.rounds * (seconds + flops / device.flops_per_s),
            "memory_bytes": base_bytes + 6 * own_bytes * batching(fed.config) + _activation_bytes(fed),
            "forward_flops_per_row": forward_flops(fed.shape, tokens, pairs) // max(1, round(share * len(train))),
        },
    }


def _activation_bytes(fed: Federation) -> int:
    """Roughly what the backward pass keeps of one part: some 34 numbers per token, block and channel (float32)."""
    shape, config = fed.shape, fed.config
    return 34 * 4 * shape.hidden * shape.layers * config.run.token_budget // 2


def _top_share(labels: Any) -> float:
    return max(int((labels == k).sum()) for k in set(labels.tolist())) / len(labels) if len(labels) else 0.0


__all__ = ["GLOBAL", "LABEL_PRIOR", "MAJORITY", "check", "evaluate", "export", "predict"]
