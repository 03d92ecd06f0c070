"""What happens around the exchanges of a run: count, evaluate, decide, write down, tell."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fedpeft.app.facts import peak_memory_bytes
from fedpeft.app.federation import Federation
from fedpeft.app.generating import speak, with_texts
from fedpeft.app.holding import Holding, curve_facts, proxy_facts, voices
from fedpeft.app.ledger import Ledger
from fedpeft.app.proxy_costs import compare_costs
from fedpeft.app.proxying import artefact_files
from fedpeft.app.scoring import Scored, evaluate
from fedpeft.core import tree
from fedpeft.core.errors import ModelError
from fedpeft.core.federate import Done
from fedpeft.models.export import export_adapter, export_merged
from fedpeft.models.load import Base
from fedpeft.progress import Listener, Progress
from fedpeft.runs.history import PERSONALIZED, decisive
from fedpeft.runs.stopping import Limits
from fedpeft.runs.store import Checkpoint, RunFolder
from fedpeft.runs.trackers import Tracker

log = logging.getLogger("fedpeft")


def now() -> str:
    """The time as manifests have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Watch:
    """Seconds of the run, earlier parts included."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """By now."""
        return self._before + time.perf_counter() - self._start


@dataclass
class Journal:
    """One run's book.

    Attributes:
        ledger: what the run has cost and reached; the checkpoint has it.
        tell: hears every sign of life.
    """

    folder: RunFolder
    fed: Federation
    ledger: Ledger
    tell: Listener
    trackers: list[Tracker]
    held: Holding | None = None  # what the server alone holds
    watch: Watch = field(init=False)
    set_up_seconds: float = field(default=0.0, init=False)  # as far as this process made the set-up

    def __post_init__(self) -> None:
        self.watch = Watch(self.ledger.seconds)

    @property
    def limits(self) -> Limits:
        """Where the run may end early."""
        return Limits(**self.fed.config.run.stop.model_dump(), metric=self.fed.metric)

    # --- after an exchange, after a round ---

    def count(self, done: Done) -> None:
        """Add up what the exchange cost and write its lines."""
        self._write(done)
        if not done.round:
            self.set_up_seconds = self.watch.seconds()
        self._progress(done.round - (0 if done.last else 1), done.state, exchange=None if done.round else done.exchange)

    def give_up(self, done: Done) -> None:
        """Tell what an exchange cost that stayed below its quorum; a resumed run begins the exchange anew."""
        self._write(done)
        self.folder.update_manifest(**self.ledger.totals())

    def _write(self, done: Done) -> None:
        self.ledger.count(done, self.watch.seconds())
        self.folder.append_exchanges(exchange_lines(done))
        for receipt in done.receipts:
            if receipt.lost is not None:
                log.warning("round %d, %s: lost client %s: %s", done.round, done.exchange, receipt.client, receipt.lost)

    def finish_round(self, done: Done) -> None:
        """Evaluate where it is due, decide whether to stop, and write the round's line."""
        run, ledger = self.fed.config.run, self.ledger
        params = self.fed.method.result(done.state)
        ledger.seconds = self.watch.seconds()
        ending = done.round == run.rounds or ledger.spent(self.limits) is not None
        due = ending or done.round % run.evaluate_every == 0
        scored = self._evaluate(params, "validation", done) if due else None
        value = None if scored is None else scored.selected(self.fed.metric)
        metrics: dict[str, Any] = {} if scored is None else {"validation": scored.metrics}
        ledger.judge(params, value, done.round, self.limits, metrics.get("validation"))
        if ending or ledger.stopped is not None:
            metrics |= self._last_scores(params, scored, done)
        line = ledger.line(done.round, getattr(done.state, "loss", None), self.watch.seconds())
        if metrics:
            line["metrics"] = metrics
        if self.held is not None and scored is not None and self.held.scorable:
            line["alpha_curve"] = curve_facts(self.held.curve(params))
        self.folder.append_metrics(line)
        scores = "; ".join(
            f"{split} {who} {v[self.fed.metric]:.4f}"
            for split, by in metrics.items()
            for who, v in by.items()
            if self.fed.metric in v
        )
        log.info(
            "round %d of %d: %d answered, %d lost; %s",
            done.round,
            run.rounds,
            line["clients"],
            line["lost_clients"],
            scores or "not evaluated",
        )
        for tracker in self.trackers:
            tracker.log(done.round, line)
        if not done.round:
            self.set_up_seconds = self.watch.seconds()  # with its evaluation
        self._progress(done.round, done.state, metrics or None)
        self.folder.update_manifest(rounds_done=done.round, **self._choices(done), **ledger.totals())

    def _choices(self, done: Done) -> dict[str, Any]:
        """What the method decided by itself, for the manifest; its warning is said once."""
        told = dict(self.fed.method.choices(done.state))
        if "warning" in told and done.round == 0:
            self.say(f"warning: {told['warning']}")
        return {"choices": told} if told else {}

    def save(self, done: Done) -> None:
        """The newest complete state, so that a kill at any moment loses at most one exchange."""
        ledger = self.ledger
        self.folder.save_checkpoint(
            Checkpoint(done.number, ledger.round, done.state, done.versions, ledger.plain(), ledger.best)
        )

    # --- scores ---

    def _evaluate(self, params: tree.Params, split: str, done: Done, personal: bool = True) -> Scored | None:
        scored = evaluate(
            self.fed,
            params,
            split,
            memories=self.folder.memories(),
            versions=done.versions,
            number=done.number,
            round=done.round,
            personal=personal,
            shared=self.fed.method.shared_names(done.state),
        )
        if scored is not None:
            self.ledger.evaluation_bytes += scored.bytes_down + scored.bytes_up
            if self.held is not None and self.held.scorable:
                choose = self.held.best_alpha if split == "validation" else self.held.chosen
                scored.metrics.update(self.held.scores(params, choose(params), split))
        return scored

    def _last_scores(self, params: tree.Params, scored: Scored | None, done: Done) -> dict[str, Any]:
        """Scores on the test rows, and the manifest's summary of the final and of the best-validated parameters.

        The best parameters of an earlier round have no personal scores: the memories of that round are gone.
        """
        ledger = self.ledger
        tested = self._evaluate(params, "test", done)
        found = {} if tested is None else {"test": tested.metrics}
        final = ({} if scored is None else {"validation": scored.metrics}) | found
        best: dict[str, Any] = {"round": done.round, **final}
        if ledger.best is not None and ledger.best_round != done.round:
            best = {"round": ledger.best_round, "validation": ledger.best_scores}
            earlier = self._evaluate(ledger.best, "test", done, personal=False)
            if earlier is not None:
                best["test"] = earlier.metrics
        chosen = params if ledger.best is None else ledger.best
        if spoken := speak(self.fed, chosen, voices(self.held, chosen)):
            self.folder.save_samples(spoken.samples)
            if best.get("test") is found.get("test"):  # the best parameters are the final ones
                final["test"] = found["test"] = with_texts(found["test"], spoken)
            best["test"] = with_texts(best["test"], spoken)
        self.folder.update_manifest(metrics={"final": final, "best": best}, **proxy_facts(self.held, chosen))
        self._save_clients(tested or scored)
        return found

    def _save_clients(self, scored: Scored | None) -> None:
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

    # --- the end ---

    def finish_run(self) -> None:
        """The adapter's folder, the final hash, and the totals."""
        checkpoint = self.folder.load_checkpoint(self.fed.method.state)
        assert checkpoint is not None, "a finished run has a checkpoint"
        told = self.folder.manifest().get("proxy", {}).get("curve") or {}
        if told.get("advice"):
            self.say(f"warning: {told['advice']}")
        final = self.fed.method.result(checkpoint.state)
        self._export(checkpoint.best if checkpoint.best is not None else final)
        public = None if self.held is None else self.held.public
        costs = compare_costs(self.fed, self.folder.exchanges(), public)
        self.folder.update_manifest(
            **({} if costs is None else {"proxy_costs": costs}),
            status="finished",
            stopped=self.ledger.stopped,
            params_sha256=tree.sha256(final),
            peak_memory_bytes=peak_memory_bytes(),
            finished=now(),
            **self.ledger.totals(),
        )

    def _export(self, best: tree.Params) -> None:
        """Write `adapter/`; PEFT cannot hold a head alone, so that is written as a whole model."""
        model = self.fed.model
        write = export_merged if best.keys() <= model.readout.params else export_adapter
        summary = self.folder.manifest().get("metrics", {}).get("best", {})
        card = global_facts(self.fed, summary, summary.get("round"))
        try:
            beside = artefact_files(self.fed, best, self.held, summary.get("round"))
            write(model, best, self.folder.adapter, labels=self.fed.classes, card=card, replace=True, beside=beside)
        except ModelError as error:  # a family that PEFT or transformers has no classifier for: the run is right
            self.say(f"there is no folder adapter/: {error}")

    def say(self, message: str) -> None:
        """One line for the log and for people."""
        log.info(message)
        self._progress(self.ledger.round, None, message=message)

    def _progress(self, round: int, state: Any, metrics: Any = None, **more: Any) -> None:
        ledger = self.ledger
        sign = Progress(
            max(round, 0),
            self.fed.config.run.rounds,
            getattr(state, "loss", None),
            ledger.bytes_down,
            ledger.bytes_up,
            self.watch.seconds(),
            metrics,
            set_up_seconds=self.set_up_seconds,
            **more,
        )
        self.tell(sign)


def card_facts(fed: Federation, rounds: int | None, metrics: Any) -> dict[str, Any]:
    """What a model card says about the run.

    Args:
        rounds: after how many the parameters were taken.
        metrics: their scores, by split and by who predicts.
    """
    return {
        "base_model": fed.config.model.name,
        **({"base_in_training": trained_on(fed.base)} if fed.base.quantized else {}),
        "task": fed.config.task.name,
        "method": fed.config.method.name,
        "rounds": rounds,
        "clients": len(fed.clients),
        "max_length": fed.config.task.max_length,
        **({} if fed.format.prompting is None else fed.format.prompting.facts),
        "metrics": metrics,
    }


def global_facts(fed: Federation, summary: Mapping[str, Any], rounds: int | None) -> dict[str, Any]:
    """What a card says of the best-validated global parameters: their own scores, and by whose they were selected.

    Args:
        summary: `best` of the manifest's metrics; empty: nothing is known.
        rounds: after how many the parameters were taken.
    """
    scores = {
        split: {who: values for who, values in by.items() if who != PERSONALIZED}
        for split, by in summary.items()
        if split != "round"
    }
    facts = card_facts(fed, rounds, scores)
    if validation := summary.get("validation"):
        facts["selected_by"] = f"{decisive(validation)} validation {fed.metric}"
    return facts


def trained_on(base: Base) -> str:
    """What a model card says of a quantised base."""
    return f"its blocks' weights rounded to {base.quantized}; a merged model has the full ones"


def exchange_lines(done: Done) -> Iterator[dict[str, Any]]:
    """The lines of exchanges.jsonl for one exchange: one for everybody who was asked, in every attempt."""
    for receipt in done.receipts:
        yield {
            "number": done.number,
            "round": done.round,
            "exchange": done.exchange,
            "attempt": receipt.attempt,
            "client": receipt.client,
            "bytes_down": receipt.bytes_down,
            "bytes_up": receipt.bytes_up,
            "steps": receipt.meter.steps,
            "examples": receipt.meter.examples,
            "tokens": receipt.meter.trained_tokens + receipt.meter.forward_tokens,
            "pairs": receipt.meter.trained_pairs + receipt.meter.forward_pairs,
            "labels": [receipt.meter.labels[k] for k in range(1 + max(receipt.meter.labels, default=-1))],
            "seconds": receipt.seconds,
            "simulated_seconds": receipt.simulated_seconds,
            "lost": receipt.lost,
        }
