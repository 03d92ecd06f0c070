"""Unequal ranks: how large each client's LoRA is.

A device profile says it (`rank`), or the method's field `ranks` deals ranks out by chance, the same for a client in
every round. The adapter's own rank is the largest; alpha / rank of the adapter scales everybody's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedpeft.core.adapter import Lora
from fedpeft.core.averaging import Tuning
from fedpeft.core.errors import ConfigError
from fedpeft.core.exchange import ClientId, ServerEnv
from fedpeft.core.method import check_ranges
from fedpeft.core.rng import rng_for


@dataclass(frozen=True)
class Ranked(Tuning):
    """The fields of local training, and the clients' ranks."""

    ranks: tuple[int, ...] = ()  # dealt to the clients by chance; empty: the devices file's, else the adapter's

    def __post_init__(self) -> None:
        check_ranges(self)
        if any(rank < 1 for rank in self.ranks):
            raise ConfigError([f"method.ranks is {list(self.ranks)}; every rank must be at least 1"])


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
