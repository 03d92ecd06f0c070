"""One run: from a configuration to a run folder, and on from where it stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpeft.app.facts import describe_environment
from fedpeft.app.federation import Federation, build, computing
from fedpeft.app.holding import Holding, hold
from fedpeft.app.journal import Journal, log, now
from fedpeft.app.ledger import Ledger
from fedpeft.config import RunConfig, default_folder, load_config, resolved
from fedpeft.config.load import Source, naming_defaults
from fedpeft.core import tree
from fedpeft.core.errors import QuorumError, RequestError, RunError, StoreError
from fedpeft.core.federate import Done, Start, federate, schedule
from fedpeft.models.export import merge
from fedpeft.progress import Listener
from fedpeft.runs.report import write_report
from fedpeft.runs.store import Checkpoint, RunFolder
from fedpeft.runs.trackers import Tracker, open_trackers
from fedpeft.runs.units import count_text

# What may change when a run is resumed; everything else would make it another run.
CHANGEABLE = ("run.rounds", "run.stop", "run.evaluate_every", "run.quorum", "run.deadline_s", "run.trackers")
FIXED = {"data_sha256": "data", "model_sha256": "base model", "initial_sha256": "adapter that it started from"}
OPEN = {"status": "running", "error": None, "stopped": None, "params_sha256": None, "finished": None}


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
        for decoders) to get the text's class. Where text is predicted it is a causal language model.
        """
        opened = RunFolder.open(self.folder)
        fed = build(load_config(self.folder / "config.yaml"), opened.partition() or None)
        return merge(fed.model, best_params(fed, opened), fed.classes)


def best_params(fed: Federation, folder: RunFolder) -> tree.Params:
    """The best-validated global parameters of a run; those of its newest state where nothing was validated."""
    checkpoint = newest(fed, folder)
    return checkpoint.best if checkpoint.best is not None else fed.method.result(checkpoint.state)


def newest(fed: Federation, folder: RunFolder) -> Checkpoint:
    """The newest complete state of a run. Raises RequestError where there is none yet."""
    checkpoint = folder.load_checkpoint(fed.method.state)
    if checkpoint is None:
        raise RequestError(f"{folder.path} has no state yet; run it first: fedpeft resume {folder.path}")
    return checkpoint


def run(
    config: Source,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: Path | str | None = None,
    progress: Listener | None = None,
    label: str | None = None,
    begun: Callable[[Path], None] | None = None,
) -> Run:
    """Run a configuration from its first exchange to its last.

    Args:
        config: a YAML file, a nested mapping or a RunConfig.
        overrides: values by dotted key, such as `{"method.lr": 1e-3}`.
        out: the run folder, new or empty; None makes `runs/METHOD-TASK-TIME`.
        progress: told after every exchange.
        label: what tables call the run; None: its method.
        begun: told the run's folder as soon as it is there, which is after the request was found to be met.

    Raises:
        RequestError: the request is wrong or cannot be met.
        RunError: the run failed; `resume` goes on with it.
    """
    wanted = load_config(config, overrides)
    with computing(wanted):
        with naming_defaults(wanted):
            fed = build(wanted)
            fed.start()  # a method that finds something wrong with model or devices says so before there is a folder
            held = hold(fed)
        with RunFolder.create(Path(out) if out is not None else default_folder(wanted)) as folder:
            named = {} if label is None else {"label": label}
            folder.update_manifest(**named, **_identity(fed, held), **OPEN, rounds_done=0, started=now())
            folder.save_partition(json.loads(fed.partition.to_json()))
            folder.save_config(resolved(fed.config))  # last: a folder with a configuration is a run
            if begun is not None:
                begun(folder.path)
            with _logging_to(folder.log):
                log.info("run of %s on %s, seed %d", wanted.method.name, wanted.task.name, wanted.run.seed)
                return _go(folder, fed, progress, held)


def resume(folder: Path | str, overrides: Mapping[str, Any] | None = None, *, progress: Listener | None = None) -> Run:
    """Go on where a run stopped, with the same bits as if it had never stopped; a finished run stays as it is.

    Args:
        overrides: only `run.rounds`, `run.stop...`, `run.evaluate_every`, `run.quorum` and `run.trackers` may change.

    Raises:
        RequestError: an override that would make it another run; other data, or another model, than it began with.
        RunError: the run failed again.
    """
    _check_changeable(overrides or {}, Path(folder))
    with RunFolder.open(Path(folder)) as opened:
        before = load_config(opened.path / "config.yaml")
        config = load_config(opened.path / "config.yaml", overrides)
        manifest = opened.manifest()
        if manifest.get("status") == "finished" and config == before:
            if not _reported(opened):
                _report(opened)
            return Run(opened.path, manifest)
        opened.lock()
        with computing(config), _logging_to(opened.log):
            fed = build(config, opened.partition() or None)
            held = hold(fed)
            identity = _identity(fed, held)
            _check_same(manifest, identity, opened.path)
            log.info("resumed")
            saved = opened.load_checkpoint(fed.method.state)
            if saved is not None and config.run.rounds < before.run.rounds and config.run.rounds <= saved.round:
                done = f"{count_text(saved.round, 'round')} {'is' if saved.round == 1 else 'are'} done"
                raise RequestError(f"run.rounds is {config.run.rounds}, and {done}; give a larger number")
            if not opened.partition():
                opened.save_partition(json.loads(fed.partition.to_json()))
            opened.save_config(resolved(fed.config))
            opened.update_manifest(**identity, **OPEN, resumed=now())
            notes = _replanned(before, fed) if saved is not None and saved.number else ()
            if notes:
                opened.update_manifest(replanned=True)
            return _go(opened, fed, progress, held, notes)


def _replanned(before: RunConfig, fed: Federation) -> tuple[str, ...]:
    """What to say where another number of rounds makes it another run than one that had it from its start."""
    old, new, method = before.run.rounds, fed.config.run.rounds, fed.config.method
    if old == new or not fed.method.plans_by_rounds:
        return ()
    by = "method.schedule" if method.fields.get("schedule") is not None else method.name
    own = f"a run that has {count_text(new, 'round')} from its start"
    return (f"run.rounds was {old}, and {by} plans by it; from here on it plans by {new}, and {own} may end otherwise",)


def _check_changeable(overrides: Mapping[str, Any], folder: Path) -> None:
    for key in overrides:
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE):
            raise RequestError(
                f"{key} cannot change in a run that has begun; {', '.join(CHANGEABLE[:-1])} and {CHANGEABLE[-1]} can. "
                f"Start a new run, with run.init_from={folder} to begin from its adapter"
            )


def _check_same(manifest: Mapping[str, Any], identity: Mapping[str, Any], folder: Path) -> None:
    """Raise RequestError where the run began with something else, and log what may change its last bits."""
    for key, what in FIXED.items():
        if key in manifest and manifest[key] != identity[key]:
            raise RequestError(
                f"the {what} of {folder} has changed since the run began (sha256 {manifest[key][:12]}, now "
                f"{identity[key][:12]}); restore it, or start a new run"
            )
    if (before := manifest.get("large_identity")) != (now := identity.get("large_identity")):
        raise RequestError(
            f"the large model of {folder} was {before} when the run began, and is {now} now; restore it, or start a "
            "new run"
        )
    for key in ("versions", "machine"):
        if key in manifest and manifest[key] != identity[key]:
            log.warning("the %s changed since the run began, from %s to %s", key, manifest[key], identity[key])


def _identity(fed: Federation, held: Holding | None) -> dict[str, Any]:
    return {
        **describe_environment(),
        "seed": fed.config.run.seed,
        "metric": fed.metric,
        "labels": list(fed.task.labels),
        "data_sha256": fed.task.sha256,
        "model_sha256": fed.base.sha256,
        "model_precision": fed.base.precision,
        "initial_sha256": tree.sha256(fed.initial),
        "partition_sha256": fed.partition.sha256,
        "trainable_parameters": tree.count(fed.initial),
        "chooses_rows": fed.method.chooses_rows,
        **({} if held is None else {"large_identity": held.large.caps.identity}),
    }


def _go(
    folder: RunFolder, fed: Federation, progress: Listener | None, held: Holding | None, notes: Sequence[str] = ()
) -> Run:
    """The rest of a run, whatever was done of it before; the manifest says how it ended."""
    try:
        _train(folder, fed, progress or (lambda _: None), held, (*fed.warnings, *notes))
    except BaseException as error:
        _record_end(folder, error)
        raise
    finally:
        _report(folder)
    return Run(folder.path, folder.manifest())


def _record_end(folder: RunFolder, error: BaseException) -> None:
    """Say in log and manifest why the run ended early, as far as the disk lets us: the error itself must get out."""
    if isinstance(error, KeyboardInterrupt):
        log.info("interrupted; the newest complete exchange is saved")
        figures: dict[str, Any] = {"status": "interrupted"}
    else:
        text = " ".join(str(error).split()) or type(error).__name__
        log.error("the run failed: %s", text, exc_info=error)
        figures = {"status": "failed", "error": text}
    try:
        folder.update_manifest(**figures)
    except StoreError as further:
        log.error("the manifest cannot say so: %s", further)


def _reported(folder: RunFolder) -> bool:
    """Whether the page is newer than what it tells of; it is the last thing that a run writes."""
    manifest = folder.path / "manifest.json"
    return folder.report.is_file() and folder.report.stat().st_mtime_ns >= manifest.stat().st_mtime_ns


def _report(folder: RunFolder) -> None:
    """Write the page; a run is not wrong because its page cannot be written, and an error must not hide another."""
    try:
        write_report([folder.path], folder.report)
    except Exception:
        log.error("the report was not written; try again: fedpeft report %s", folder.path, exc_info=True)


def _train(folder: RunFolder, fed: Federation, tell: Listener, held: Holding | None, warnings: Sequence[str]) -> None:
    saved = folder.load_checkpoint(fed.method.state)
    folder.truncate_after(saved.round if saved else -1, saved.number if saved else 0)
    start = saved.start if saved else fed.start()
    ledger = Ledger.of(saved.progress if saved else {}, saved.best if saved else None)
    if held is not None:
        held = replace(held, folder=folder.path)
    journal = Journal(folder, fed, ledger, tell, _trackers(folder, fed, saved), held)
    try:
        for warning in warnings:
            journal.say(f"warning: {warning}")
        ledger.reopen(journal.limits)
        if saved is None and next(schedule(fed.method, 0), None) is None:
            done = Done(0, 0, "", True, start.state, {}, (), (), ())  # a set-up without exchanges
            journal.finish_round(done)
            journal.save(done)
        if ledger.stopped is None:
            _exchanges(journal, start)
        if ledger.stopped is not None:
            journal.say(ledger.stopped)
        journal.finish_run()
    except RequestError as error:  # the request was right to start: what cannot be met now may be met when it goes on
        raise RunError(str(error)) from error
    finally:
        for tracker in journal.trackers:
            tracker.close()


def _exchanges(journal: Journal, start: Start) -> None:
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
        held=journal.held,
        clients=fed.invited,
    )
    try:
        for done in loop:
            journal.count(done)
            if done.last:
                journal.finish_round(done)
            journal.save(done)
            if journal.ledger.stopped is not None:
                break
    except QuorumError as error:
        if error.done is not None:
            journal.give_up(error.done)
        raise


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


__all__ = ["Run", "best_params", "newest", "resume", "run"]
