"""One run: from a configuration to a run folder, and on from where it stopped."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedpeft.app.facts import describe_environment, peak_memory_bytes
from fedpeft.app.federation import Federation, build
from fedpeft.app.ledger import Ledger
from fedpeft.app.scoring import evaluate
from fedpeft.config import RunConfig, default_folder, load_config, resolved
from fedpeft.config.load import Source
from fedpeft.core import tree
from fedpeft.core.errors import RequestError
from fedpeft.core.federate import Done, Start, federate, schedule
from fedpeft.models.export import export_adapter, merge
from fedpeft.progress import Listener, Progress
from fedpeft.runs.report import write_report
from fedpeft.runs.stopping import Limits
from fedpeft.runs.store import Checkpoint, RunFolder
from fedpeft.runs.trackers import Tracker, open_trackers

log = logging.getLogger("fedpeft")


@dataclass(frozen=True)
class Run:
    """A run that came to its end."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """Scores of the final and of the best-validated parameters."""
        found: dict[str, Any] = self.manifest.get("metrics", {})
        return found

    def load_model(self) -> Any:
        """A transformers model with the best-validated adapter folded into its weights.

        It is a token classifier: pool its logits over the real tokens of a text (the mean for encoders, the last one
        for decoders) to get the text's class.
        """
        fed = build(load_config(self.folder / "config.yaml"), RunFolder.open(self.folder).partition())
        return merge(fed.model, best_params(fed, RunFolder.open(self.folder)))


def best_params(fed: Federation, folder: RunFolder) -> tree.Params:
    """The best-validated global parameters of a run; those of its newest state where nothing was validated."""
    checkpoint = folder.load_checkpoint(fed.method.state)
    if checkpoint is None:
        raise RequestError(f"{folder.path} has no state yet; run it first: fedpeft resume {folder.path}")
    return checkpoint.best if checkpoint.best is not None else fed.method.result(checkpoint.state)


def run(
    config: Source,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: Path | str | None = None,
    progress: Listener | None = None,
    label: str | None = None,
) -> Run:
    """Run a configuration from its first exchange to its last.

    Args:
        config: a YAML file, a nested mapping or a RunConfig.
        overrides: values by dotted key, such as `{"method.lr": 1e-3}`.
        out: the run folder, new or empty; None makes `runs/METHOD-TASK-TIME`.
        progress: told after every exchange.
        label: what tables call the run; None: its method.

    Raises:
        RequestError: the request is wrong or cannot be met.
        RunError: the run failed; `resume` goes on with it.
    """
    wanted = load_config(config, overrides)
    fed = build(wanted)
    with RunFolder.create(Path(out) if out is not None else default_folder(wanted)) as folder:
        folder.save_config(resolved(fed.config))
        folder.save_partition(_partition_of(fed))
        folder.update_manifest(**_identity(fed, label), status="running", rounds_done=0)
        return _go(folder, fed, progress)


def resume(folder: Path | str, overrides: Mapping[str, Any] | None = None, *, progress: Listener | None = None) -> Run:
    """Go on where a run stopped, with the same bits as if it had never stopped.

    Args:
        overrides: only `run.rounds`, `run.stop...`, `run.evaluate_every` and `run.trackers` may change.

    Raises:
        RequestError: an override that would make it another run.
    """
    with RunFolder.open(Path(folder)) as opened:
        stuck = [
            k for k in overrides or {} if not k.startswith(("run.rounds", "run.stop", "run.evaluate_every", "run.tr"))
        ]
        if stuck:
            raise RequestError(
                f"{stuck[0]} cannot change in a run that has begun; run.rounds, run.stop, run.evaluate_every and "
                f"run.trackers can. Start a new run, with run.init_from={folder} to begin from its adapter"
            )
        config = load_config(opened.path / "config.yaml", overrides)
        opened.lock()
        fed = build(config, opened.partition() or None)
        opened.save_config(resolved(fed.config))
        if not opened.partition():
            opened.save_partition(_partition_of(fed))
        opened.update_manifest(**_identity(fed, None), status="running")
        return _go(opened, fed, progress)


def _partition_of(fed: Federation) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(fed.partition.to_json())
    return found


def _identity(fed: Federation, label: str | None) -> dict[str, Any]:
    named = {} if label is None else {"label": label}
    return named | {
        **describe_environment(),
        "seed": fed.config.run.seed,
        "metric": fed.metric,
        "labels": list(fed.task.labels),
        "data_sha256": fed.task.sha256,
        "model_sha256": fed.base.sha256,
        "partition_sha256": fed.partition.sha256,
        "trainable_parameters": tree.count(fed.initial),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _go(folder: RunFolder, fed: Federation, progress: Listener | None) -> Run:
    """The rest of a run, whatever was done of it before; the manifest says how it ended."""
    with _logging_to(folder.log):
        try:
            _train(folder, fed, progress or (lambda _: None))
        except KeyboardInterrupt:
            folder.update_manifest(status="interrupted")
            log.info("interrupted; the newest complete exchange is saved")
            raise
        except BaseException as error:
            log.error("the run failed: %s\n%s", error, traceback.format_exc())
            folder.update_manifest(status="failed", error=" ".join(str(error).split()))
            raise
        finally:
            write_report([folder.path], folder.report)
    return Run(folder.path, folder.manifest())


def _train(folder: RunFolder, fed: Federation, tell: Listener) -> None:
    saved = folder.load_checkpoint(fed.method.state)
    folder.truncate_after(saved.round if saved else -1, saved.number if saved else 0)
    start = saved.start if saved else fed.start()
    ledger = Ledger.of(saved.progress if saved else {}, saved.best if saved else None)
    watch = _Watch(ledger.seconds)
    journal = _Journal(folder, fed, ledger, watch, tell, _trackers(folder, fed, saved))
    try:
        if saved is None and next(schedule(fed.method, 0), None) is None:
            journal.finish_round(Done(0, 0, "", True, start.state, {}, (), (), ()))
        if ledger.stopped is None:
            _exchanges(journal, start)
        journal.finish_run()
    finally:
        for tracker in journal.trackers:
            tracker.close()


def _exchanges(journal: _Journal, start: Start) -> None:
    fed, run = journal.fed, journal.fed.config.run
    loop = federate(
        fed.method,
        fed.transport(journal.folder.memories()),
        fed.model,
        rounds=run.rounds,
        seed=run.seed,
        resources=fed.resources,
        start=start,
        quorum=run.quorum,
    )
    for done in loop:
        journal.count(done)
        if done.last:
            journal.finish_round(done)
        journal.save(done)
        if journal.ledger.stopped is not None:
            journal.say(journal.ledger.stopped)
            break


class _Watch:
    """Seconds of the run, earlier parts included."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._start


@dataclass
class _Journal:
    """What happens after an exchange, a round and a run: count, evaluate, write down, tell."""

    folder: RunFolder
    fed: Federation
    ledger: Ledger
    watch: _Watch
    tell: Listener
    trackers: list[Tracker]

    def count(self, done: Done) -> None:
        """Add up what the exchange cost and write its lines."""
        self.ledger.count(done, self.watch.seconds())
        self.folder.append_exchanges(_exchange_lines(done))
        for receipt in done.receipts:
            if receipt.lost is not None:
                log.warning("round %d, %s: lost client %s: %s", done.round, done.exchange, receipt.client, receipt.lost)
        self._progress(done.round - (0 if done.last else 1), done.state, None)

    def finish_round(self, done: Done) -> None:
        """Evaluate where it is due, decide whether to stop, and write the round's line."""
        run = self.fed.config.run
        params = self.fed.method.result(done.state)
        due = done.round == 0 or done.round % run.evaluate_every == 0 or done.round == run.rounds
        scored = self._evaluate(params, "validation", done) if due else None
        value = None if scored is None else scored.selected(self.fed.metric)
        limits = Limits(**run.stop.model_dump())
        self.ledger.judge(params, value, done.round, limits, None if scored is None else scored.metrics)
        line = self.ledger.line(done.round, getattr(done.state, "loss", None), self.watch.seconds())
        if scored is not None:
            line["metrics"] = {"validation": scored.metrics}
        ended = done.round == run.rounds or self.ledger.stopped is not None
        if ended:
            line["metrics"] = line.get("metrics", {}) | self._last_scores(params, scored, done)
        self.folder.append_metrics(line)
        for tracker in self.trackers:
            tracker.log(done.round, line)
        if done.number == 0:
            self.save(done)
        self._progress(done.round, done.state, line.get("metrics"))
        self.folder.update_manifest(rounds_done=done.round, **self.ledger.totals())

    def _evaluate(self, params: tree.Params, split: str, done: Done) -> Any:
        scored = evaluate(
            self.fed,
            params,
            split,
            memories=self.folder.memories(),
            versions=done.versions,
            number=done.number,
            round=done.round,
        )
        if scored is not None:
            self.ledger.evaluation_bytes += scored.bytes_down + scored.bytes_up
        return scored

    def _last_scores(self, params: tree.Params, scored: Any, done: Done) -> dict[str, Any]:
        """Test scores of the final and of the best-validated parameters, taken once, and each client's own."""
        found: dict[str, Any] = {}
        final = {} if scored is None else {"validation": scored.metrics}
        best: dict[str, Any] = {"round": self.ledger.best_round}
        if self.ledger.best_scores is not None:
            best["validation"] = self.ledger.best_scores
        tested = self._evaluate(params, "test", done)
        if tested is not None:
            found["test"] = final["test"] = tested.metrics
            best["test"] = tested.metrics
            if self.ledger.best is not params and self.ledger.best_round != done.round:
                best["test"] = self._evaluate(self.ledger.best or params, "test", done).metrics
        self.folder.update_manifest(metrics={"final": final, "best": best})
        self._save_clients(tested or scored)
        return found

    def _save_clients(self, scored: Any) -> None:
        lost: dict[str, int] = {}
        for line in self.folder.exchanges():
            if line["lost"] is not None:
                lost[line["client"]] = lost.get(line["client"], 0) + 1
        entries = {}
        for client in self.fed.clients:
            labels = self.fed.data[client]["train"].labels
            counts = [int((labels == k).sum()) for k in range(len(self.fed.task.labels))]
            own = {} if scored is None else scored.clients.get(client, {})
            entries[client] = {"rows": len(labels), "label_counts": counts, "lost": lost.get(client, 0), **own}
        self.folder.save_clients(entries)

    def save(self, done: Done) -> None:
        """The newest complete state, so that a kill at any moment loses at most one exchange."""
        self.ledger.seconds = self.watch.seconds()
        self.folder.save_checkpoint(
            Checkpoint(done.number, self.ledger.round, done.state, done.versions, self.ledger.plain(), self.ledger.best)
        )

    def finish_run(self) -> None:
        """The adapter's folder, the final hash, and the totals."""
        checkpoint = self.folder.load_checkpoint(self.fed.method.state)
        assert checkpoint is not None, "a finished run has a checkpoint"
        final = self.fed.method.result(checkpoint.state)
        best = checkpoint.best if checkpoint.best is not None else final
        export_adapter(
            self.fed.model, best, self.folder.adapter, labels=self.fed.task.labels, card=self._card(), replace=True
        )
        self.folder.update_manifest(
            status="finished",
            error=None,
            stopped=self.ledger.stopped,
            params_sha256=tree.sha256(final),
            peak_memory_bytes=peak_memory_bytes(),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            **self.ledger.totals(),
        )

    def _card(self) -> dict[str, Any]:
        config, manifest = self.fed.config, self.folder.manifest()
        return {
            "base_model": config.model.name,
            "task": config.task.name or "demo",
            "method": config.method.name,
            "rounds": self.ledger.best_round,
            "clients": len(self.fed.clients),
            "metrics": manifest.get("metrics", {}).get("best", {}),
        }

    def say(self, message: str) -> None:
        """One line for the log and for people."""
        log.info(message)
        self._progress(self.ledger.round, None, None, message)

    def _progress(self, round: int, state: Any, metrics: Any, message: str | None = None) -> None:
        ledger = self.ledger
        rounds = self.fed.config.run.rounds
        loss = getattr(state, "loss", None)
        seconds = self.watch.seconds()
        self.tell(Progress(max(round, 0), rounds, loss, ledger.bytes_down, ledger.bytes_up, seconds, metrics, message))


def _exchange_lines(done: Done) -> Iterator[dict[str, Any]]:
    for receipt in done.receipts:
        yield {
            "number": done.number,
            "round": done.round,
            "exchange": done.exchange,
            "client": receipt.client,
            "bytes_down": receipt.bytes_down,
            "bytes_up": receipt.bytes_up,
            "steps": receipt.meter.steps,
            "examples": receipt.meter.examples,
            "tokens": receipt.meter.trained_tokens + receipt.meter.forward_tokens,
            "seconds": receipt.seconds,
            "simulated_seconds": receipt.simulated_seconds,
            "lost": receipt.lost,
        }


def _trackers(folder: RunFolder, fed: Federation, saved: Checkpoint | None) -> list[Tracker]:
    first = 0 if saved is None else saved.round + 1
    return open_trackers(fed.config.run.trackers, folder.path, resolved(fed.config), first)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        handler.close()


__all__ = ["Run", "RunConfig", "best_params", "resume", "run"]
