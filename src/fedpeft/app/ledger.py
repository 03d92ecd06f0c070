"""What a run has cost and reached so far: plain data in the checkpoint, so that a resumed run counts on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fedpeft.core.federate import Done
from fedpeft.core.metrics import better
from fedpeft.core.tree import Params
from fedpeft.runs.clock import slowest
from fedpeft.runs.stopping import Limits, Standing, look

COSTS = ("bytes_down", "bytes_up", "seconds", "simulated_seconds")  # what a line of metrics.jsonl gives a share of


@dataclass
class Ledger:
    """Totals of the run and of the round that is going on, and the best parameters seen.

    Attributes:
        round: the newest finished round; -1 before the set-up.
        answered, lost: of the round that is going on.
        marks: totals when the newest finished round ended, to get a round's own share.
        stopped: why the run ended before its last round, under these `limits`.
        best: the best-validated parameters; not part of `plain`, the checkpoint stores them apart.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    simulated_seconds: float = 0.0
    evaluation_bytes: int = 0
    round: int = -1
    answered: int = 0
    lost: int = 0
    marks: dict[str, float] = field(default_factory=dict)
    best_value: float | None = None
    best_round: int | None = None
    best_scores: dict[str, Any] | None = None
    standing: dict[str, Any] = field(default_factory=dict)
    stopped: str | None = None
    limits: dict[str, Any] = field(default_factory=dict)
    best: Params | None = None

    @classmethod
    def of(cls, plain: Mapping[str, Any], best: Params | None) -> Ledger:
        """From what `plain` wrote."""
        return cls(**plain, best=best)

    def plain(self) -> dict[str, Any]:
        """As data that JSON can carry."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "best"}

    def totals(self) -> dict[str, Any]:
        """The manifest's totals."""
        return {name: getattr(self, name) for name in (*COSTS, "evaluation_bytes")}

    def count(self, done: Done, seconds: float) -> None:
        """Add one exchange.

        Args:
            seconds: of the whole run by now.
        """
        self.bytes_down += sum(r.bytes_down for r in done.receipts)
        self.bytes_up += sum(r.bytes_up for r in done.receipts)
        self.simulated_seconds += slowest(done.receipts)
        self.seconds = seconds
        self.answered += len(done.answered)
        self.lost += sum(r.lost is not None for r in done.receipts)

    def spent(self, limits: Limits) -> str | None:
        """Why the run is to end whatever it scores (None: its budget lasts)."""
        return self._look(limits, None)[1]

    def judge(self, params: Params, value: float | None, round: int, limits: Limits, scores: Any = None) -> None:
        """Keep the parameters if they are the best validated ones, and decide whether the run is to end.

        Args:
            value: the validation score that selects; None where the round was not evaluated.
            scores: all validation metrics of the round.
        """
        if value is not None and better(limits.metric, value, self.best_value):
            self.best_value, self.best_round, self.best, self.best_scores = value, round, params, scores
        standing, self.stopped = self._look(limits, value)
        self.standing, self.limits = standing.plain(), asdict(limits)

    def reopen(self, limits: Limits) -> None:
        """Let a stopped run go on if other limits hold by now; the next round is judged by these."""
        if self.limits != asdict(limits):
            self.stopped = None

    def _look(self, limits: Limits, value: float | None) -> tuple[Standing, str | None]:
        traffic = self.bytes_down + self.bytes_up
        return look(limits, Standing.of(self.standing), score=value, bytes=traffic, seconds=self.seconds)

    def line(self, round: int, loss: float | None, seconds: float) -> dict[str, Any]:
        """The round's line of metrics.jsonl; the next round starts from these totals.

        Args:
            loss: mean training loss of the round.
            seconds: of the whole run by now.
        """
        self.seconds = seconds
        own = {name: getattr(self, name) - self.marks.get(name, 0) for name in COSTS}
        line = {"round": round, "train_loss": loss, **own, "clients": self.answered, "lost_clients": self.lost}
        self.marks = {name: getattr(self, name) for name in COSTS}
        self.round, self.answered, self.lost = round, 0, 0
        return line
