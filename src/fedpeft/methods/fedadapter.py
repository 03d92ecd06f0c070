"""FedAdapter: bottlenecks that grow from the top of the model downwards, and wider, as far as that pays.

Cai, Wu, Wang, Lin, Xu: FedAdapter: Efficient Federated Learning for Modern NLP (also AutoFedNLP), MobiCom 2023,
arXiv 2205.10162; constants of the authors' `trial_error.py`.

Paper to code

| paper | here |
|---|---|
| depth D, how many top layers have adapters, and their width W | `Branch`; from 0 and `width` on |
| side trials: (D, W), (D + 1, W) and (D, W + 8) train apart, on groups of clients | `begin`; `State.groups` |
| D = 1 is skipped, D + 1 at most all layers, W at most 64 | `begin`; `adapter` says the largest W |
| training of a branch: FedAvg over adapters and head, 5 clients, 1 epoch, batch 4 | `train`, `average` |
| the branch with the best accuracy is taken over by all | `judge`, `choose` |
| a trial lasts threshold (4 D + 1) seconds | `window`, `expand` |

Departures: a method here has no clock, so a trial lasts `window` (`expand` D + 1) rounds, the same number for all
branches. In the paper a round takes longer the deeper a branch is, so deep branches have fewer rounds, and counted in
rounds trials grow less; `expand: 0` makes all equally long. What a device keeps of its frozen layers' outputs (the
activation cache) is not modelled. Clients score the branches on validation rows of their own; where nobody has any, the
training loss decides. Ties go to the smaller loss. New neurons and new layers change no output at first. Bottlenecks
stand behind both halves of a block. The layer norms stay frozen: depth and width are those of bottlenecks, and a norm
has no width. AdamW with our rates in place of SGD. A task format without a head has nothing to train at depth 0 and
starts at 2. The horizon ends the last trial early. Until a trial ends, the result is its first branch.

Traffic per client and round: down = its branch (`params`) and the candidates (`branches`); up = its branch (`params`)

(The candidates are all branches; they go to the clients that score them, in the last round of a trial.)
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, Bottleneck
from fedpeft.core.averaging import Tuning
from fedpeft.core.cohort import sample
from fedpeft.core.errors import ConfigError, RecordError
from fedpeft.core.exchange import (
    LARGEST_LOSS,
    MOST_EXAMPLES,
    ClientEnv,
    ClientId,
    Exchange,
    Nothing,
    ServerEnv,
    Update,
    Weights,
)
from fedpeft.core.fit import Fit, Fitted
from fedpeft.core.method import check_ranges, mean_loss, ordinary_fit
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params, block_of

WIDTH_IN = {"down.weight": 0, "down.bias": 0, "up.weight": 1}  # which dimension of a bottleneck's parameter is W


@dataclass(frozen=True)
class Branch:
    """One size that is tried."""

    depth: int  # D: how many of the top blocks have bottlenecks
    width: int  # W
    params: Params
    loss: float | None = None  # mean training loss of its last cohort; None before the first


@dataclass(frozen=True)
class Trial:
    """How a trial ended."""

    round: int
    sizes: tuple[tuple[int, int], ...]  # (D, W) of every branch
    scores: tuple[float, ...]  # accuracy of each; minus the training loss where nobody has validation rows
    validated: bool
    chosen: int  # place of the winner


@dataclass(frozen=True)
class State:
    """What the server knows."""

    branches: tuple[Branch, ...]  # the size so far, the wider one, the deeper one
    groups: Mapping[str, int]  # place of every client's branch in this trial
    ends: int  # the last round of this trial
    due: bool = False  # whether it has ended and is to be judged
    trials: tuple[Trial, ...] = ()
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Candidates:
    """What the server sends to be scored."""

    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Scores:
    """How a client's validation rows fare with each branch."""

    rows: int
    correct: tuple[int, ...] = field(default=())
    losses: tuple[float, ...] = field(default=())  # sums over the rows


@dataclass(frozen=True)
class FedAdapter(Tuning):
    """FedAdapter (Cai et al. 2023): bottlenecks of progressive depth and width."""

    cohort: int = 5  # clients per branch and round; 0: the branch's whole group
    batch_size: int = 4  # rows per step
    width: int = 8  # W at first
    width_step: int = 8  # how much wider the wider branch is
    window: float = 1.0  # rounds of a trial at depth 0
    expand: float = 4.0  # a trial at depth D is this many times D longer, plus one
    judges: int = 10  # clients that score the branches at the end of a trial; 0: all

    plans_by_rounds: ClassVar[bool] = True
    state: ClassVar[type[State]] = State

    def __post_init__(self) -> None:
        check_ranges(self, at_least={"width": 1, "width_step": 1, "expand": 0, "judges": 0}, above={"window": 0})

    def adapter(self) -> AdapterSpec:
        """Bottlenecks of width 64 at most, in every block at most."""
        return Bottleneck(size=64, norms=False)

    # --- the server: trials ---

    def init(self, env: ServerEnv) -> State:
        """The head alone, or with two blocks where there is no head, and the first trial."""
        fresh = env.initial()
        depth = 0 if any(block_of(name) is None for name in fresh) else deeper(0, len(blocks_of(fresh)))
        width = min(self.width, most_width(fresh))
        return self.begin(Branch(depth, width, grown({}, fresh, depth, width)), env, ())

    def begin(self, winner: Branch, env: ServerEnv, trials: tuple[Trial, ...]) -> State:
        """A new trial around a size: branches that start from its weights, and a group of clients for each.

        Raises:
            ConfigError: fewer clients than branches.
        """
        fresh, depth, width = env.initial(), winner.depth, winner.width
        sizes = (
            (depth, width),
            (depth, min(most_width(fresh), width + self.width_step)),
            (deeper(depth, len(blocks_of(fresh))), width),
        )
        branches = tuple(Branch(d, w, grown(winner.params, fresh, d, w)) for d, w in dict.fromkeys(sizes))
        if len(env.clients) < len(branches):
            raise ConfigError(
                [
                    f"method fedadapter tries {len(branches)} branches on groups of clients, and there are "
                    f"{len(env.clients)} clients; use more clients, or method adapter"
                ]
            )
        order = env.rng("groups").permutation(len(env.clients))
        groups = {env.clients[client]: place % len(branches) for place, client in enumerate(order)}
        lasts = math.ceil(self.window * (self.expand * depth + 1))
        return State(branches, groups, env.round + lasts, trials=trials)

    # --- one round ---

    def round(self) -> tuple[Exchange, ...]:
        """Every branch trains; in the last round of a trial they are scored, and one is chosen."""
        return (
            Exchange("train", Weights, Update, self.pick, self.send, self.train, self.average),
            Exchange("judge", Candidates, Scores, self.pick_judges, self.ask, self.judge, self.choose, countable),
        )

    def pick(self, state: State, clients: Sequence[ClientId], rng: Rng) -> list[ClientId]:
        """A cohort of every branch's group."""
        groups = [[c for c in clients if place_of(state, c) == place] for place in range(len(state.branches))]
        return [client for group in groups for client in sample(self.cohort)(state, group, rng)]

    def send(self, state: State, client: ClientId) -> Weights:
        """The client's own branch."""
        return Weights(state.branches[place_of(state, client)].params)

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Train the branch on the client's own rows."""
        fitted = yield ordinary_fit(self, down.params, env)
        return Update(fitted.params, len(env.data), fitted.loss), memory

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """The mean of every branch's answers, weighted by examples; a branch without any stays."""
        branches = []
        for place, branch in enumerate(state.branches):
            own = [client for client in ups if place_of(state, client) == place]
            if own:
                mean = tree.mean((up.params, up.examples) for up in map(ups.__getitem__, own))
                branch = replace(branch, params=mean, loss=mean_loss(ups[client] for client in own))
            branches.append(branch)
        due = env.round >= min(state.ends, env.rounds)
        return replace(state, branches=tuple(branches), due=due, loss=mean_loss(ups.values()))

    # --- the end of a trial ---

    def pick_judges(self, state: State, clients: Sequence[ClientId], rng: Rng) -> Sequence[ClientId]:
        """Nobody until the trial has ended."""
        return sample(self.judges)(state, clients, rng) if state.due else []

    def ask(self, state: State, client: ClientId) -> Candidates:
        """All branches."""
        return Candidates(state.branches)

    def judge(self, down: Candidates, memory: Nothing, env: ClientEnv) -> tuple[Scores, Nothing]:
        """Score every branch on the client's validation rows."""
        data, count = env.splits.get("validation"), len(down.branches)
        if data is None or not len(data):
            return Scores(0, (0,) * count, (0.0,) * count), memory
        sums = [env.model.score(branch.params, data) for branch in down.branches]
        correct = tuple(int(own["confusion"].diagonal().sum()) if "confusion" in own else 0 for own in sums)
        return Scores(len(data), correct, tuple(float(own["loss"]) for own in sums)), memory

    def choose(self, state: State, ups: Mapping[ClientId, Scores], env: ServerEnv) -> State:
        """The best branch is where the next trial starts."""
        told, places = list(ups.values()), range(len(state.branches))
        rows = sum(up.rows for up in told)
        losses = [math.inf if branch.loss is None else branch.loss for branch in state.branches]
        scores = [-min(loss, LARGEST_LOSS) for loss in losses]
        if rows:
            losses = [math.fsum(up.losses[place] for up in told) / rows for place in places]
            scores = [sum(up.correct[place] for up in told) / rows for place in places]
        best = min(places, key=lambda place: (-scores[place], losses[place], place))
        sizes = tuple((branch.depth, branch.width) for branch in state.branches)
        trial = Trial(env.round, sizes, tuple(scores), bool(rows), best)
        return replace(self.begin(state.branches[best], env, (*state.trials, trial)), loss=state.loss)

    # --- results ---

    def result(self, state: State) -> Params:
        """The size so far."""
        return state.branches[0].params

    def choices(self, state: State) -> dict[str, Any]:
        """Depth and width now, and how every trial ended."""
        now = state.branches[0]
        return {"depth": now.depth, "width": now.width, "trials": [told(trial) for trial in state.trials]}


def told(trial: Trial) -> dict[str, Any]:
    """A trial as plain data."""
    measure = "accuracy" if trial.validated else "minus_training_loss"
    pairs = zip(trial.sizes, trial.scores, strict=True)
    tried = [{"depth": depth, "width": width, measure: score} for (depth, width), score in pairs]
    depth, width = trial.sizes[trial.chosen]
    return {"round": trial.round, "depth": depth, "width": width, "tried": tried}


def place_of(state: State, client: ClientId) -> int:
    """The branch of a client; a newcomer of this trial trains the first."""
    return state.groups.get(client, 0)


def deeper(depth: int, blocks: int) -> int:
    """The next depth: one alone is skipped."""
    return min(blocks, 2 if depth == 0 else depth + 1)


def blocks_of(params: Params) -> list[int]:
    """The blocks that parameters act in, lowest first."""
    return sorted({block for name in params if (block := block_of(name)) is not None})


def most_width(fresh: Params) -> int:
    """W of the adapter that the configuration describes."""
    return max((len(t) for name, t in fresh.items() if name.endswith("down.weight")), default=1)


def grown(params: Params, fresh: Params, depth: int, width: int) -> dict[str, Tensor]:
    """Parameters of a size: those that are there, and fresh ones in new layers and neurons that give nothing yet.

    Args:
        params: of a size that is nowhere larger; empty: everything is fresh.
        fresh: the adapter at full size.
    """
    top = blocks_of(fresh)[::-1][:depth]
    chosen = {name: t for name, t in fresh.items() if block_of(name) in (None, *top)}
    return {name: _widened(name, params.get(name), t, width) for name, t in chosen.items()}


def _widened(name: str, own: Tensor | None, fresh: Tensor, width: int) -> Tensor:
    side = ".".join(name.split(".")[-2:])
    start = torch.zeros_like(fresh) if side.startswith("up.") else fresh
    if side not in WIDTH_IN:
        return start if own is None else own
    dim = WIDTH_IN[side]
    before = 0 if own is None else own.shape[dim]
    new = start.narrow(dim, before, width - before)
    return new.clone() if own is None else torch.cat([own, new], dim=dim)


def countable(down: Candidates, up: Scores) -> None:
    """Raise RecordError unless there is a count and a sum of losses for every branch that rows can give."""
    branches = len(down.branches)
    if not 0 <= up.rows <= MOST_EXAMPLES or len(up.correct) != branches or len(up.losses) != branches:
        raise RecordError(f"scores of {up.rows} rows and {len(up.correct)} branches came for {branches} branches")
    if any(not 0 <= count <= up.rows for count in up.correct):
        raise RecordError(f"of {up.rows} rows {max(up.correct)} are said to be right")
    if any(not 0 <= loss <= LARGEST_LOSS * up.rows for loss in up.losses):
        raise RecordError(f"the losses of {up.rows} rows are said to be {max(up.losses)}")


METHOD = FedAdapter
