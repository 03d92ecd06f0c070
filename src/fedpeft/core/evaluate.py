"""Evaluation as one more exchange, so that it works where data and memories stay at their sites."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.cohort import everyone
from fedpeft.core.errors import RecordError
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Method, Record, ServerEnv
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class Question:
    """Which part of the client's own rows to score, with which global model."""

    params: Params
    split: str  # "train", "validation" or "test"
    shared: tuple[str, ...] = ()  # names of params that are everybody's, whatever a memory has; see `own_model`
    personal_alone: bool = False  # the global model is scored elsewhere, and its sums stay empty


@dataclass(frozen=True)
class Scores:
    """Sums as `Model.score` gives them, of the global and of the client's own model.

    Both are empty where it has no rows, those of the global model where it was not asked for them.
    """

    shared: Mapping[str, Tensor]
    personal: Mapping[str, Tensor]


def countable(down: Question, up: Scores) -> None:
    """Raise RecordError unless the scores can be added to those of others: equal names and shapes, nothing negative."""
    for sums in (up.shared, up.personal):
        for name, value in sums.items():
            if bool((value < 0).any()):
                raise RecordError(f"a score's {name!r} is negative")
        confusion = sums.get("confusion")
        if confusion is not None and not (confusion.dim() == 2 and confusion.shape[0] == confusion.shape[1]):
            raise RecordError(f"a confusion matrix has the shape {tuple(confusion.shape)}; it must be square")
    if up.shared and up.personal:
        tree.same_layout(up.shared, up.personal)


def own_model(method: Method, params: Params, memory: Record, shared: Collection[str]) -> Params:
    """A client's own model.

    Args:
        params: the global model.
        shared: names that are everybody's (`Method.shared_names`), though the client, which was not asked since, may
            remember own params by that name.
    """
    own = method.personal(params, memory)
    return tree.overlay(own, tree.select(params, lambda name: name in shared)) if shared else own


@dataclass(frozen=True)
class Evaluate:
    """Score the global and every client's own model on the client's own rows; memories stay as they are."""

    method: Method

    def exchange(self) -> Exchange:
        """The exchange; its fold gives the answers by client."""
        return Exchange("evaluate", Question, Scores, everyone, self.send, self.work, self.collect, countable)

    def send(self, state: Question, client: ClientId) -> Question:
        """The same question for everybody: here the state is the question."""
        return state

    def work(self, down: Question, memory: Record, env: ClientEnv) -> tuple[Scores, Record]:
        """Score both models; a method without personal models scores one and reports it twice."""
        data = env.splits.get(down.split)
        if data is None or not len(data):
            return Scores({}, {}), memory
        if not self.method.personalised:
            both = env.model.score(down.params, data)
            return Scores(both, both), memory
        shared = {} if down.personal_alone else env.model.score(down.params, data)
        own = own_model(self.method, down.params, memory, down.shared)
        return Scores(shared, env.model.score(own, data)), memory

    def collect(self, state: Question, ups: Mapping[ClientId, Scores], env: ServerEnv) -> dict[ClientId, Scores]:
        """Every client's sums, as they came."""
        return dict(ups)
