"""The loop: run a method over a transport, one exchange at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedpeft.core.counts import round_up
from fedpeft.core.errors import QuorumError
from fedpeft.core.exchange import Answers, Call, ClientId, Exchange, Method, Receipt, Record, ServerEnv, Transport
from fedpeft.core.model import Model

ATTEMPTS = 4  # the first one and three repetitions, each with a new cohort


@dataclass(frozen=True)
class Start:
    """Where to go on: how many exchanges are done, the state after them, and every client's committed memory."""

    number: int
    state: Record
    versions: Mapping[ClientId, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """One finished exchange."""

    number: int  # exchanges done so far, this one included: the `number` to resume from
    round: int  # 0 = set-up
    exchange: str
    last: bool  # the last exchange of its round (or of the set-up)
    state: Record
    versions: Mapping[ClientId, int]
    cohort: Sequence[ClientId]
    answered: tuple[ClientId, ...]
    receipts: tuple[Receipt, ...]  # of every attempt

    @property
    def start(self) -> Start:
        """What `federate` needs to go on from here."""
        return Start(self.number, self.state, self.versions)


def schedule(method: Method, rounds: int) -> Iterator[tuple[int, Exchange, bool]]:
    """Every exchange of a run in order: (round, exchange, whether it is the last of its round)."""
    for round in range(rounds + 1):
        exchanges = method.round() if round else method.setup()
        for i, exchange in enumerate(exchanges):
            yield round, exchange, i == len(exchanges) - 1


def federate(
    method: Method,
    transport: Transport,
    model: Model,
    *,
    rounds: int,
    seed: int,
    resources: Mapping[ClientId, Any] | None = None,
    start: Start | None = None,
    quorum: float = 0.5,
    held: Any = None,
    clients: Sequence[ClientId] | None = None,
) -> Iterator[Done]:
    """Run a method; yield after every exchange. The caller saves, evaluates, plots, stops.

    A client's new memory counts from the moment when its answer is folded; until then its old one stands. Answers are
    folded in cohort order, whatever order they came in.

    Args:
        rounds: the horizon; `env.rounds` for every function of the method.
        resources: device profile per client, handed on in `ServerEnv`.
        start: where to go on; None starts with `method.init`.
        quorum: share of the cohort that must answer, in (0, 1]; below it the exchange is repeated with a new cohort.
            An exchange may have one of its own (`Exchange.quorum`).
        held: what the server alone holds, handed on in `ServerEnv`.
        clients: who may be asked; None: everybody whom the transport reaches.

    Raises:
        QuorumError: an exchange stayed below the quorum in all attempts; it carries their receipts.
    """
    clients = tuple(transport.clients() if clients is None else clients)
    env = ServerEnv(model, clients, seed, rounds, resources=resources or {}, held=held)
    start = start or Start(0, method.init(env))
    state, versions = start.state, dict(start.versions)
    for number, (round, exchange, last) in enumerate(schedule(method, rounds)):
        if number < start.number:
            continue
        receipts: list[Receipt] = []
        for attempt in range(ATTEMPTS):
            env = replace(env, round=round, exchange=exchange.name, attempt=attempt)
            pick = exchange.again if attempt and exchange.again else exchange.pick
            cohort = tuple(dict.fromkeys(pick(state, clients, env.rng("pick"))))
            call = Call(exchange, number, round, rounds, attempt, dict(versions))
            answers = transport.exchange(call, {c: exchange.send(state, c) for c in cohort})
            receipts += answers.receipts
            answered = tuple(c for c in cohort if c in answers.ups)
            share = quorum if exchange.quorum is None else exchange.quorum
            if len(answered) >= round_up(share * len(cohort)) and (answered or not cohort or not share):
                break
        else:
            failed = Done(number + 1, round, exchange.name, last, state, versions, cohort, (), tuple(receipts))
            raise QuorumError(_too_few(exchange.name, round, share, cohort, answers), failed)
        if answered:
            state = exchange.fold(state, Ordered(answered, answers.ups), replace(env, cohort=cohort))
            versions.update((r.client, call.version) for r in answers.receipts if r.staged and r.client in answers.ups)
        yield Done(number + 1, round, exchange.name, last, state, dict(versions), cohort, answered, tuple(receipts))


class Ordered(Mapping[ClientId, Record]):
    """A view of a mapping in a given order of keys; values are fetched when they are asked for."""

    def __init__(self, order: Sequence[ClientId], values: Mapping[ClientId, Record]) -> None:
        self._order = order
        self._values = values

    def __getitem__(self, client: ClientId) -> Record:
        return self._values[client]

    def __contains__(self, client: object) -> bool:
        return client in self._order

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


def _too_few(exchange: str, round: int, quorum: float, cohort: Sequence[ClientId], answers: Answers) -> str:
    reasons = sorted({f"{r.client}: {r.lost}" for r in answers.receipts if r.lost})
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    return (
        f"round {round}, exchange {exchange!r}: {len(answers.ups)} of {len(cohort)} clients answered in the last of "
        f"{ATTEMPTS} attempts, below the quorum of {quorum:g} ({shown or 'no reason given'}). "
        f"Lower run.quorum, raise run.deadline_s or mend the clients, then resume the run."
    )
