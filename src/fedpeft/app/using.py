"""What people do with a run that is there: score it, predict with it, export it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedpeft.app.federation import Federation, build, computing, task_spec
from fedpeft.app.generating import say
from fedpeft.app.journal import card_facts, global_facts
from fedpeft.app.proxy_scores import steering
from fedpeft.app.proxying import FILE
from fedpeft.app.running import best_params, newest
from fedpeft.app.scoring import evaluate as score_split
from fedpeft.config import load_config
from fedpeft.core.errors import RequestError
from fedpeft.core.evaluate import own_model
from fedpeft.core.exchange import ClientEnv, Meter
from fedpeft.core.tree import Params
from fedpeft.core.turn import initial_memory
from fedpeft.data.tasks import Table, load_task, read_texts
from fedpeft.models.export import export_adapter, export_merged
from fedpeft.models.peft_folder import read_json
from fedpeft.runs.files import make_folder, write_file
from fedpeft.runs.history import ENSEMBLE, GLOBAL, OWN_PROXIES, PERSONALIZED, PROXY
from fedpeft.runs.metrics import metrics_of
from fedpeft.runs.store import Checkpoint, RunFolder
from fedpeft.runs.units import count_text


def evaluate(
    folder: Path | str, data: Path | str | None = None, *, large: bool = True, own_proxies: bool = False
) -> dict[str, Any]:
    """Scores of a run: of its best-validated global parameters, and of its clients' own models as they are now.

    Args:
        data: a file of rows with labels, in the columns of the run's task; None takes the run's own validation and
            test rows.
        large: whether to ask the run's large model, if it had one: steered with the run's alpha, and alone.
        own_proxies: whether to let every client's own model steer it, too; told is the mean over clients.

    Returns:
        by split ("data" for a file), by who predicts, the metrics; `rounds`, by who predicts, after which round the
        parameters were taken: the global ones where they were best validated, own models where the run is now; and
        `not_scored`, by who predicts, why not, where anybody could not be scored.

    Raises:
        RequestError: the run has no state yet, a row, a column or a label of the file is not the task's, own proxies
            of what has none, or a large model that does not answer or is another one.
    """
    opened, fed = _opened(folder, large)
    if own_proxies:
        _check_own_proxies(fed, data)
    with computing(fed.config):
        params, checkpoint = best_params(fed, opened), newest(fed, opened)
        own = partial(_own_params, opened, fed, checkpoint) if own_proxies else None
        asked = steering(fed, opened, params, own)
        rounds = {GLOBAL: checkpoint.best_round}
        voices = {PROXY: checkpoint.best_round}
        if own_proxies:
            voices |= dict.fromkeys((OWN_PROXIES, ENSEMBLE), max(checkpoint.round, 0))
        rest: dict[str, Any] = {"rounds": rounds}
        if asked is not None and asked.missing is None:
            rounds |= voices
        elif asked is not None:
            rest["not_scored"] = dict.fromkeys(voices, asked.missing)
        if data is not None:
            rows = fed.format.tokens(_labelled(fed, data))
            told = {GLOBAL: metrics_of(fed.model.score(params, rows), fed.metric)}
            return {"data": told if asked is None else told | asked.scores_of(rows), **rest}
        found = _split_scores(opened, fed, params, checkpoint, rounds)
        if asked is not None:
            for split, metrics in found.items():
                metrics.update(asked.scores(split))
        return {**found, **rest}


def _split_scores(
    opened: RunFolder, fed: Federation, params: Params, checkpoint: Checkpoint, rounds: dict[str, int]
) -> dict[str, dict[str, dict[str, float]]]:
    """By split, the scores of the models that the clients have; own models' round is added to `rounds`."""
    state: dict[str, Any] = {
        "memories": opened.memories(),
        "versions": checkpoint.versions,
        "number": checkpoint.number,
        "round": max(checkpoint.round, 0),
        "shared": fed.method.shared_names(checkpoint.state),
    }
    found = {}
    for split in ("validation", "test"):
        best = score_split(fed, params, split, personal=False, **state)
        if best is None:
            continue
        found[split] = best.metrics
        if fed.method.personalised:  # own models stand on the newest global one
            current = score_split(fed, fed.method.result(checkpoint.state), split, **state)
            assert current is not None, "a split with rows has a score"
            found[split] = current.metrics | {GLOBAL: best.metrics[GLOBAL]}
            rounds[PERSONALIZED] = max(checkpoint.round, 0)
    return found


def _check_own_proxies(fed: Federation, data: Path | str | None) -> None:
    """Raise RequestError where there are no own proxies."""
    name = fed.config.method.name
    if not fed.method.personalised:
        raise RequestError(f"clients of {name} have no models of their own to steer with; leave out --own-proxies")
    if fed.config.proxy.large is None:
        raise RequestError("own proxies steer the run's large model, and there is none here; leave out --own-proxies")
    if data is not None:
        raise RequestError(f"own proxies are scored on the run's own rows, not on {data}; leave out one of the two")


def predict(
    folder: Path | str, data: Path | str, out: Path | str | None = None, client: str | None = None
) -> list[dict[str, Any]]:
    """Labels with probabilities, or texts in the format generate, for the rows of a file, which needs no labels.

    Args:
        out: where the predictions go as JSON lines, too.
        client: predict with this client's own model, as it is now, instead of the best-validated global one.

    Returns:
        per row: `label` and `probabilities` by label; or `text`, what the model says.

    Raises:
        RequestError: the run has no state yet, there is no such client, clients have no models of their own, or the
            file lacks the task's columns.
    """
    opened, fed = _opened(folder)
    client = _own(fed, client)
    table, params = read_texts(fed.task, data), _params(opened, fed, client)
    with computing(fed.config):
        if fed.format.of == "text":
            found: list[dict[str, Any]] = [{"text": said} for said in say(fed, params, table)]
        else:
            found = _labels(fed, params, table)
    if out is not None:
        make_folder(Path(out).absolute().parent)
        write_file(Path(out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found).encode())
    return found


def _labels(fed: Federation, params: Params, table: Table) -> list[dict[str, Any]]:
    shares = torch.softmax(fed.model.logits(params, fed.format.tokens(table)), dim=1)
    names = fed.task.labels
    return [
        {"label": names[int(row.argmax())], "probabilities": dict(zip(names, row.tolist(), strict=True))}
        for row in shares
    ]


def export(
    folder: Path | str,
    to: Path | str,
    client: str | None = None,
    merge: bool = False,
    replace: bool = False,
    rank: int | None = None,
) -> Path:
    """Write a PEFT adapter that plain peft loads, or with `merge` a model that plain transformers loads.

    Args:
        to: a folder that is new or empty, or holds an earlier export of the same parameters in the same form.
        client: export this client's own model, as it is now, instead of the best-validated global one.
        replace: let an earlier export of something else go.
        rank: write the nearest LoRA of this rank, which plain peft loads, in the place of what was trained: a change
            of the base, AdaLoRA's triplets, or a LoRA of another rank.

    Raises:
        RequestError: the run has no state yet, there is no such client, clients have no models of their own, the
            folder holds something else, `merge` with a rank, or PEFT cannot hold what was trained.
    """
    if merge and rank is not None:
        raise RequestError("a merged model has no rank; give --merge or --rank, not both")
    opened, fed = _opened(folder)
    client = _own(fed, client)
    if fed.model.weights and fed.model.readout.params and not merge:  # a format without a head has no merged model
        raise RequestError("adapter.kind full trains weights of the model itself and has no adapter; add --merge")
    params = _params(opened, fed, client)
    own = opened.adapter / FILE
    whole = client is None and not merge and rank is None
    beside = {FILE: read_json(own)} if whole and own.is_file() else None
    card = _global_card(opened, fed) if client is None else _own_card(opened, fed, client)
    write = export_merged if merge else partial(export_adapter, rank=rank)
    return write(fed.model, params, Path(to), labels=fed.classes, card=card, replace=replace, beside=beside)


def _global_card(opened: RunFolder, fed: Federation) -> dict[str, Any]:
    manifest = opened.manifest()
    summary: Mapping[str, Any] = manifest.get("metrics", {}).get("best", {})
    return global_facts(fed, summary, summary.get("round", manifest.get("rounds_done")))


def _own_card(opened: RunFolder, fed: Federation, client: str) -> dict[str, Any]:
    """What a card says of a client's own model; its scores are known when the run has come to its end."""
    manifest, scores = opened.manifest(), {}
    own = opened.clients().get(client, {}).get(PERSONALIZED)
    if manifest.get("status") == "finished" and own is not None:
        split = "test" if "test" in manifest["metrics"]["final"] else "validation"
        scores = {split: {PERSONALIZED: own}}
    return card_facts(fed, manifest.get("rounds_done"), scores) | {"client": client}


def _opened(folder: Path | str, large: bool = False) -> tuple[RunFolder, Federation]:
    """A run and its federation, with the large model of its configuration or as if it named none."""
    opened = RunFolder.open(Path(folder))
    without = {} if large else {"proxy.large": None, "proxy.public": None}
    return opened, build(load_config(opened.path / "config.yaml", without), opened.partition() or None)


def _labelled(fed: Federation, data: Path | str) -> Table:
    """The rows of a file with the task's labels."""
    spec = task_spec(fed.config)
    if spec.train is not None or spec.name == "demo":
        table = load_task(replace(spec, test=str(data))).test
        assert table is not None, "a test file gives test rows"
        return table
    names = fed.task.labels  # a hub data set: its name must not make the file a split of the hub
    return load_task(replace(spec, train=str(data), validation=None, test=None, labels=names, classes=None)).train


def _params(opened: RunFolder, fed: Federation, client: str | None) -> Params:
    """The best-validated global parameters, or those of a client's own model at the newest state."""
    if client is None:
        return best_params(fed, opened)
    return next(_own_params(opened, fed, newest(fed, opened), (client,)))


def _own_params(
    opened: RunFolder, fed: Federation, checkpoint: Checkpoint, clients: Sequence[str] | None = None
) -> Iterator[Params]:
    """The parameters of clients' own models; None: of all clients, in the order of their ids."""
    run, method, state = fed.config.run, fed.method, checkpoint.state
    for client in fed.clients if clients is None else clients:
        version = checkpoint.versions.get(client)
        if version is None:
            env = ClientEnv(client, fed.model, fed.data[client], run.seed, run.rounds, meter=Meter())
            memory = initial_memory(method, env)
        else:
            memory = opened.memories().load(client, version, method.memory)
        yield own_model(method, method.result(state), memory, method.shared_names(state))


def _own(fed: Federation, client: str | None) -> str | None:
    """The id of the client that is meant, who has a model of its own; its number may lack zeros in front."""
    if client is None:
        return None
    same = [held for held in fed.clients if held.isdecimal() and client.isdecimal() and int(held) == int(client)]
    meant = client if client in fed.data else same[0] if len(same) == 1 else None
    if meant is None:
        held = f"{count_text(len(fed.data), 'client')}, {fed.clients[0]} to {fed.clients[-1]}"
        raise RequestError(f"client {client!r} does not exist in this run; it has {held}")
    if not fed.method.personalised:
        name = fed.config.method.name
        raise RequestError(
            f"clients of {name} have no models of their own, but share the global one; leave out --client"
        )
    return meant
