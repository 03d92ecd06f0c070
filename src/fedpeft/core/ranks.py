"""Unequal ranks: how large each client's LoRA is.

A device profile says it (`rank`), or the method's field `ranks` deals ranks out by chance, the same for a client in
every round. The adapter's own rank is the largest; alpha / rank of the adapter scales everybody's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedpeft.core import pairs, tree
from fedpeft.core.adapter import Lora
from fedpeft.core.averaging import Tuning
from fedpeft.core.cohort import sample
from fedpeft.core.errors import ConfigError
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Update, Weights
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import check_ranges, mean_loss, ordinary_fit
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class Ranked(Tuning):
    """The fields of local training, and the clients' ranks."""

    ranks: tuple[int, ...] = ()  # dealt to the clients by chance; empty: the devices file's, else the adapter's

    def __post_init__(self) -> None:
        check_ranges(self)
        if any(rank < 1 for rank in self.ranks):
            raise ConfigError([f"method.ranks is {list(self.ranks)}; every rank must be at least 1"])

    def choices(self, state: Any) -> dict[str, Any]:
        """Who has which rank."""
        given: Mapping[ClientId, int] = state.ranks
        return {
            "clients_by_rank": {str(r): sorted(c for c in given if given[c] == r) for r in sorted({*given.values()})}
        }


@dataclass(frozen=True)
class RankedState:
    """What the server knows."""

    params: Params  # of the largest rank, and the head
    ranks: Mapping[str, int] = field(default_factory=dict)  # r_k of every client
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class RankedAveraging(Ranked, ABC):
    """Every client trains the first r_k rows of A and columns of B; a subclass says how the server combines them."""

    state: ClassVar[type[RankedState]] = RankedState

    def init(self, env: ServerEnv) -> RankedState:
        """The fresh adapter, and everybody's rank."""
        return RankedState(env.initial(), client_ranks(self, env))

    def round(self) -> tuple[Exchange, ...]:
        """One round."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.train, self.average),)

    def send(self, state: RankedState, client: ClientId) -> Weights:
        """The first r_k rows of A and columns of B, and the head."""
        return Weights(pairs.cut(state.params, rank_for(state.ranks, client)))

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train LoRA of the client's own rank."""
        fitted = yield ordinary_fit(self, down.params, env)
        return Update(fitted.params, len(env.data), fitted.loss), memory

    def average(self, state: RankedState, ups: Mapping[ClientId, Update], env: ServerEnv) -> RankedState:
        """Factors as the method combines them, slot by slot, and the mean of the head by examples."""
        updates = list(ups.values())
        examples = [up.examples for up in updates]
        mean = tree.mean((pairs.others(up.params), up.examples) for up in updates)
        factors = pairs.combined(
            [up.params for up in updates], lambda own, before: self.combine(own, examples, before), state.params
        )
        return RankedState(tree.overlay(mean, factors), client_ranks(self, env), mean_loss(updates))

    @abstractmethod
    def combine(self, own: Sequence[pairs.Pair], examples: Sequence[int], before: pairs.Pair) -> pairs.Pair:
        """One pair from a slot's pairs of unequal rank: what the method is about.

        Args:
            own: (B, A) of every client that answered, (d_out, r_k) and (r_k, d_in).
            examples: of these clients.
            before: the server's own pair, of the largest rank.
        """

    def result(self, state: RankedState) -> Params:
        """The factors of the largest rank."""
        return state.params


def client_ranks(method: Ranked, env: ServerEnv) -> dict[ClientId, int]:
    """The rank of every client.

    Raises:
        ConfigError: a rank above the adapter's.
    """
    most = env.model.spec.rank if isinstance(env.model.spec, Lora) else 1
    found = {client: _own(method, env, client) or most for client in env.clients}
    if too_large := {client: rank for client, rank in found.items() if rank > most}:
        client, rank = min(too_large.items())
        source = "method.ranks" if method.ranks else f"the device of {client}"
        raise ConfigError([f"{source} gives rank {rank}, and adapter.rank is {most}; raise adapter.rank to {rank}"])
    return found


def _own(method: Ranked, env: ServerEnv, client: ClientId) -> int:
    if method.ranks:
        return method.ranks[int(rng_for(env.seed, "rank", client=client).integers(len(method.ranks)))]
    return int(getattr(env.resources.get(client), "rank", 0))


def rank_for(ranks: Mapping[ClientId, int], client: ClientId) -> int:
    """The rank of a client; of one that came after the last answer, the largest."""
    return ranks.get(client) or max(ranks.values())
