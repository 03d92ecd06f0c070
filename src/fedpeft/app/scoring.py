"""Scores of a federation: the global model, every client's own model, and what a model must beat."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedpeft.app.federation import Federation
from fedpeft.core.evaluate import Question
from fedpeft.core.exchange import ClientId
from fedpeft.core.memories import Memories
from fedpeft.core.tree import Params
from fedpeft.runs.history import BASE, EMULATOR, GLOBAL, LABEL_PRIOR, MAJORITY, PERSONALIZED, decisive
from fedpeft.runs.metrics import Score, label_prior, majority, metrics_of, pool

log = logging.getLogger("fedpeft")


@dataclass(frozen=True)
class Scored:
    """One evaluation: pooled metrics by who predicts, each client's own, and what asking the clients cost."""

    metrics: dict[str, dict[str, float]]
    clients: dict[ClientId, dict[str, dict[str, float]]] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0

    def selected(self, metric: str) -> float:
        """The score that selects (`decisive`)."""
        return self.metrics[decisive(self.metrics)][metric]


def score_global(fed: Federation, params: Params, split: str) -> dict[ClientId, Score]:
    """Sums of the global model by client, from one pass over all rows of the split."""
    outcomes = fed.model.outcomes(params, fed.whole(split))
    held = [fed.data[c][split] for c in fed.clients]
    parts = torch.split(outcomes, [len(rows) for rows in held])
    sums = fed.model.readout.sums
    return {c: sums(part, rows) for c, part, rows in zip(fed.clients, parts, held, strict=True)}


def bars(fed: Federation, split: str) -> dict[str, dict[str, float]]:
    """What a model must beat: two guesses of labels, or the base without an adapter where text is predicted."""
    if fed.format.of == "text":
        if split not in fed.untrained:
            sums = fed.model.readout.sums(fed.model.outcomes({}, fed.whole(split)), fed.whole(split))
            fed.untrained[split] = metrics_of(sums, fed.metric)
        return {BASE: dict(fed.untrained[split])}
    train, labels, classes = fed.labels("train"), fed.labels(split), len(fed.task.labels)
    return {
        MAJORITY: majority(fed.whole("train").labels, fed.whole(split).labels, classes, fed.metric),
        LABEL_PRIOR: label_prior(train, labels, classes, fed.metric),
    }


def emulated(fed: Federation, params: Params, split: str) -> dict[str, dict[str, float]]:
    """What the global params score on the part of the model that clients have, where it is a part."""
    part, rows = fed.method.trains_on(fed.model.blocks), fed.whole(split)
    if not part:
        return {}
    model = fed.model.on(part)
    return {EMULATOR: metrics_of(model.score(params, rows), fed.metric)}


def evaluate(
    fed: Federation,
    params: Params,
    split: str,
    *,
    memories: Memories,
    versions: Mapping[ClientId, int],
    number: int,
    round: int,
    personal: bool = True,
    shared: Sequence[str] = (),
) -> Scored | None:
    """Score the split; None where it has no rows.

    Args:
        params: the global model.
        memories, versions: every client's committed memory, for the personal models.
        number, round: how far the run is.
        personal: whether to score the personal models, where the method makes them.
        shared: names of params that no client has of its own (`Method.shared_names`).
    """
    if not len(fed.whole(split)):
        return None
    by_client: dict[str, dict[ClientId, Any]] = {GLOBAL: score_global(fed, params, split)}
    down = up = 0
    if personal and fed.method.personalised:
        call = fed.evaluation(number, round, versions)
        question = Question(params, split, tuple(shared), personal_alone=True)
        holders = [c for c in fed.clients if len(fed.data[c][split])]
        answers = fed.bare_engine(memories).exchange(call, dict.fromkeys(holders, question))
        for receipt in answers.receipts:
            if receipt.lost is not None:
                log.warning("round %d: client %s has no %s score: %s", round, receipt.client, split, receipt.lost)
        by_client[PERSONALIZED] = {c: answers.ups[c].personal for c in holders if c in answers.ups}
        down, up = (sum(getattr(r, key) for r in answers.receipts) for key in ("bytes_down", "bytes_up"))
    metrics = {who: metrics_of(pool(sums.values()), fed.metric) for who, sums in by_client.items()}
    metrics |= emulated(fed, params, split) | bars(fed, split)
    clients: dict[ClientId, dict[str, dict[str, float]]] = {}
    for who, sums in by_client.items():
        for client, own in sums.items():
            if int(own["n"]):
                clients.setdefault(client, {})[who] = metrics_of(own, fed.metric)
    return Scored(metrics, clients, down, up)
