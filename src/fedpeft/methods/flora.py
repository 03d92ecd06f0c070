"""FLoRA: everybody's factors are stacked and folded into the base; the next round starts from fresh ones.

Wang, Shen, He, Sun, Wang, Lyu, Li: FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations, NeurIPS 2024, arXiv 2409.05976.

Paper to code

| paper | here |
|---|---|
| rank r_k of client k | `ranks`, or the devices file; `State.ranks` |
| stacked B_s = [p_1 B_1 ..], A_s = [A_1; ..], without error | `stack`; the weight sits on one factor alone |
| stacked factors sent to the clients, who add them to the base | `send`, `train`: the base delta, applied and frozen |
| fresh adapters in every round | `train`: A of the client and the round, B = 0 |

Departures: the base itself is never changed; its delta acts beside it, as factors or dense, whichever is smaller. A
client that missed rounds gets what it missed, or the whole delta where that is smaller. The head is averaged.

Traffic per client and round: down = head and the changes that it missed (`news`); up = params
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from fedpeft.core import changes, pairs, tree
from fedpeft.core.changes import Changed, Copy, News
from fedpeft.core.cohort import sample
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, ServerEnv, Update, Weights, matching
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import mean_loss, ordinary_fit
from fedpeft.core.ranks import Ranked, client_ranks, rank_for
from fedpeft.core.tree import Params
from fedpeft.maths import lowrank


@dataclass(frozen=True)
class State:
    """What the server knows."""

    head: Params  # what is no factor
    widths: Mapping[str, tuple[int, int]]  # (d_out, d_in) of every slot
    changed: Changed = field(default_factory=Changed)  # the base's delta
    ranks: Mapping[str, int] = field(default_factory=dict)  # r_k of every client
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Broadcast:
    """What the server sends."""

    head: Params
    news: News  # of the base's delta
    rank: int  # r_k
    widths: Mapping[str, tuple[int, int]]  # (d_out, d_in) of every slot


@dataclass(frozen=True)
class FLora(Ranked):
    """FLoRA (Wang et al. 2024): stacked factors, folded into the base."""

    state: ClassVar[type[State]] = State
    memory: ClassVar[type[Copy]] = Copy

    def init(self, env: ServerEnv) -> State:
        """The head, and no delta; an adapter that the run starts from is the first of it."""
        start = env.initial()
        changed = Changed()
        if pairs.learnt(start):
            changed = changes.advanced(changed, changes.as_delta(start, pairs.scale_of(env.model.spec)), ())
        return State(pairs.others(start), pairs.widths(start), changed, client_ranks(self, env))

    def init_client(self, env: ClientEnv) -> Copy:
        """No delta yet."""
        return Copy()

    def round(self) -> tuple[Exchange, ...]:
        """One round."""
        return (Exchange("train", Broadcast, Update, sample(self.cohort), self.send, self.train, self.stack, stacked),)

    def send(self, state: State, client: ClientId) -> Broadcast:
        """The head, and what the client lacks of the delta."""
        news = changes.news_for(state.changed, client)
        return Broadcast(state.head, news, rank_for(state.ranks, client), state.widths)

    def train(self, down: Broadcast, memory: Copy, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Copy]]:
        """Train a fresh adapter of the client's rank over the base and its delta."""
        copy = changes.kept_up(memory, down.news)
        fresh = pairs.fresh_a(pairs.fresh_b(pairs.cut(env.initial(), down.rank)), env.rng("adapter"))
        params = tree.overlay(pairs.factors(fresh), down.head)
        fitted = yield ordinary_fit(self, params, env, also=(copy.total,) if copy.total else ())
        return Update(fitted.params, len(env.data), fitted.loss), copy

    def stack(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """B_s A_s joins the delta; the head is averaged."""
        updates = list(ups.values())
        weights = lowrank.shares([up.examples for up in updates])
        step = changes.as_delta(lowrank.joined([up.params for up in updates], weights), pairs.scale_of(env.model.spec))
        head = tree.mean((pairs.others(up.params), up.examples) for up in updates)
        changed = changes.advanced(state.changed, step, ups)
        return State(head, state.widths, changed, client_ranks(self, env), mean_loss(updates))

    def result(self, state: State) -> Params:
        """The delta and the head; a fresh adapter would change nothing."""
        return tree.overlay(state.changed.total, state.head)


def stacked(down: Broadcast, up: Update) -> None:
    """Raise RecordError unless the answer has the head's layout, and factors of the client's rank in every slot."""
    matching(Weights(down.head), Update(pairs.others(up.params), up.examples, up.loss))
    train = {stem: (down.rank, d_out, d_in) for stem, (d_out, d_in) in down.widths.items()}
    pairs.check(up.params, train, down.head)


METHOD = FLora
