"""FedPipe: every machine trains the weights, ranks, batch and bits that a planner finds for it.

Fang, Lin, Chen, Chen, Gao, Fang: Automated Federated Pipeline for Parameter-Efficient Fine-Tuning of Large Language
Models, 2024, arXiv 2404.06448.

Paper to code

| paper | here |
|---|---|
| importance of a weight, from adapters in SVD form and their sensitivity | `warm_up`; `maths.importance` |
| which weights, which rank, which batch for each edge server; under-training rate | `meet`, `weigh`; `planner.fleet` |
| the LLM quantised to what each edge server's memory holds | `Plan.bits`; `Fit.base` |
| local training of the chosen adapters | `train` |
| aggregation of adapters of unequal rank | `average`, `combined`; `maths.lowrank` |

Departures: structure from the paper, formulas ours: its body was not at hand. Certain are the parts (importance first,
then ranks and batch within each machine's resources; quantisation; aggregation; no added inference latency). Ours are
the score of a matrix, the value of a rank, the objective and its search, the costs, the deadline, the aggregation and
every default. Components that a machine does not train act on it, frozen (`tail`): where they are cut off, machines
undo what they cannot carry. A warm-up step is a Fit of its own, whose gradient is taken from Adam's first moment.
Of two settings less than 1 % apart the planner takes the one with more bits and the larger batch. Importance is
measured before there are plans, so the deadline of a round does not bound it: `warmup_seconds` does; who has no room or
time for it is planned for with the others' scores.

Traffic per client and round: down = head at first, head and the weights ever trained later; up = head and the weights \
of its plan
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedpeft.core import changes, pairs, tree
from fedpeft.core.adapter import AdapterSpec, Lora
from fedpeft.core.averaging import only
from fedpeft.core.cohort import Pick, everyone
from fedpeft.core.errors import ClientError, ConfigError, RecordError, RequestError, out_of_memory
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, ServerEnv, matching
from fedpeft.core.fit import AdamW, Fit, Fitted, Moments
from fedpeft.core.method import Defaults, check_ranges, mean_loss, stream_batches
from fedpeft.core.rng import Rng, rng_for
from fedpeft.core.tree import Params
from fedpeft.maths import importance, lowrank
from fedpeft.planner.candidates import job_of
from fedpeft.planner.device import DEFAULT, Profile, check_profile
from fedpeft.planner.fleet import Search, scores_of
from fedpeft.planner.plan import BATCHES, DEPTHS, RANKS, Choices
from fedpeft.planner.prices import Costs
from fedpeft.planner.roster import Demands, Report, Roster, check_report
from fedpeft.planner.warmup import WarmUp, warm_up_room

ANYBODY = 1e-9  # quorum of who measures importance: one answer is enough, who gives none has the others' scores
Aggregation = Literal["svd_product", "factor_partial", "zero_pad", "stack_exact"]


@dataclass(frozen=True)
class Ask:
    """Asks what a machine is."""


@dataclass(frozen=True)
class Warmup:
    """Asks for the importance of the candidates."""

    how: WarmUp
    candidates: int  # how many there are
    params: Params  # the global adapters, applied frozen; empty before the first round
    stack: Params  # what was folded away, applied frozen


@dataclass(frozen=True)
class Scores:
    """What a client found the candidates to be worth."""

    scores: Tensor  # (candidates,) float32, summing to 1
    seen: Tensor  # (candidates,) bool
    examples: int


@dataclass(frozen=True)
class Broadcast:
    """A client's plan, and the adapters that act on it."""

    params: Params  # of every weight that was ever trained, and the head
    stack: Params  # what was folded away, with aggregation stack_exact
    train: Mapping[str, tuple[int, int, int]]  # rank, d_out and d_in of the weights to train
    bits: str
    batch: int
    steps: int
    checkpointing: bool


@dataclass(frozen=True)
class Trained:
    """What a client answers."""

    params: Params  # the components that it trained, and the head; empty where it failed
    examples: int
    loss: float
    profile: Profile | None = None  # where the machine is not what it was
    failure: str = ""  # "memory": it ran out of it


@dataclass(frozen=True)
class Memory:
    """What a client keeps between its turns."""

    cursor: int = 0  # place in its endless stream of shuffled examples
    profile: Profile | None = None  # as it was told last
    moments: Moments | None = None  # with keep_moments


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # A (r_max, d_in) and B (d_out, r_max) of every candidate, and the head
    roster: Roster  # machines and plans; its job has the scores S_m as soon as there are any
    scale: float  # alpha / rank, the same at every rank
    union: tuple[str, ...] = ()  # the weights that were ever trained
    stack: Params = field(default_factory=dict)  # factors folded away, with aggregation stack_exact
    rounds: int = 0  # that are over
    warning: str = ""
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class FedPipe(Defaults):
    """FedPipe (Fang et al. 2024): a plan for every machine."""

    cohort: int = 0  # clients per round; 0: all that have a plan
    epochs: int = 1  # E: passes over a client's rows per round, as far as the deadline allows
    lr: float = 2e-4  # local learning rate of AdamW, whose moments start from zero in every round
    head_lr: float | None = 3e-3  # local learning rate of the classification head; null: lr
    weight_decay: float = 0.01  # decay of the local optimizer
    clip: float | None = 1.0  # bound on the gradient's norm at every local step; null: none
    score: Literal["sensitivity", "sum_lambda", "uniform", "random"] = "sensitivity"  # importance of a weight
    beta1: float = 0.85  # momentum of the sensitivity
    beta2: float = 0.85  # momentum of its uncertainty
    warmup_steps: int = 150  # K_w: steps that the importance is measured over
    warmup_seconds: float | None = None  # time that it may take on any machine; those with less do fewer; null: any
    warmup_rank: int = 4  # r0: triplets per weight in the warm-up
    warmup_batch: int = 8  # rows per warm-up step, fewer where memory is short
    warmup_lr: float = 3e-3  # learning rate of the warm-up
    orth: float = 0.1  # weight of the orthogonality of P and Q in the warm-up
    refresh_every: int = 0  # rounds after which importance is measured and planned again; 0: once
    ranks: tuple[int, ...] = RANKS  # R; those above adapter.rank are left out
    batches: tuple[int, ...] = BATCHES  # B: rows per step to choose from; lr is the same for all of them
    depths: tuple[float, ...] = DEPTHS  # shares of the blocks below the lowest trained one
    bits: Literal["largest", "search", "full"] = "largest"  # of the base: the most that fit, any, or as it is loaded
    simulate: bool = False  # a quantised base is rounded and kept in its own type: no memory is saved, steps are faster
    kappa: float = 0.1  # what the error of a quantised base costs the planner, with bits search
    search: Search = "greedy"  # how the planner chooses ranks
    cover: int = 0  # how many of the best weights somebody must train
    rank_mode: Literal["per_weight", "per_client", "uniform"] = "per_weight"  # uniform: one configuration for all
    top_k: int | None = None  # only the best weights are candidates; null: all
    round_seconds: float | None = None  # T: deadline of a round; null: the median machine's time for all its examples
    headroom: float = 0.1  # share of the memory that the planner keeps free
    checkpointing: Literal["auto", "on", "off"] = "auto"  # activations are computed again instead of kept
    aggregation: Aggregation = "svd_product"  # how the server combines unequal adapters
    tail: Literal["frozen", "drop"] = "frozen"  # components that a client does not train: applied frozen, or cut off
    weight_by: Literal["examples", "processed"] = "examples"  # what the server weights answers by
    stack_cap: int = 256  # largest rank of what is folded away, with stack_exact; the planner does not count it
    keep_moments: bool = False  # Adam's moments are kept from round to round, with factor_partial and zero_pad

    plans_memory: ClassVar[bool] = True
    state: ClassVar[type[State]] = State
    memory: ClassVar[type[Memory]] = Memory

    def __post_init__(self) -> None:
        counts = {"warmup_steps": 1, "warmup_rank": 1, "warmup_batch": 1, "stack_cap": 1}
        zero = dict.fromkeys(("refresh_every", "cover", "orth", "kappa", "headroom", "beta1", "beta2"), 0)
        check_ranges(
            self,
            at_least={**counts, **zero, "top_k": 1},
            above={"warmup_lr": 0, "warmup_seconds": 0, "round_seconds": 0},
            below=dict.fromkeys(("headroom", "beta1", "beta2"), 1),
        )
        if self.keep_moments and self.aggregation in ("svd_product", "stack_exact"):
            told = f"method.keep_moments does not go with method.aggregation {self.aggregation}, which turns the basis"
            raise ConfigError([f"{told} in every round; use factor_partial or zero_pad, or leave it out"])
        self.choose_among(self.ranks)

    def adapter(self) -> AdapterSpec:
        """LoRA of the largest rank on all candidates: the four projections of attention."""
        return Lora(16, 32.0, ("query", "key", "value", "output"))

    def accepts(self, spec: AdapterSpec) -> str | None:
        """LoRA whose rank is at least the smallest that may be chosen."""
        if refusal := only(self, spec):
            return refusal
        assert isinstance(spec, Lora), "only() lets LoRA pass"
        if spec.dropout:
            return f"method fedpipe plans memory without dropout masks; adapter.dropout is {spec.dropout}, set it to 0"
        if not any(rank <= spec.rank for rank in self.ranks):
            return f"method.ranks is {list(self.ranks)}, and adapter.rank is {spec.rank}; raise adapter.rank"
        return None

    def accepts_schedule(self, kind: str) -> str | None:
        """None: a plan says how many rows there is time for, and they follow one another from round to round."""
        return "method fedpipe has plans for the rows of a round; use method.round_seconds, batches and epochs"

    def init(self, env: ServerEnv) -> State:
        """The fresh adapter on every candidate; nobody has a plan. What was learnt before acts for everybody."""
        params, spec = env.initial(), env.model.spec
        ranks = tuple(rank for rank in self.ranks if not isinstance(spec, Lora) or rank <= spec.rank)
        job, scale = job_of(env.model.config, params, self.choose_among(ranks)), pairs.scale_of(spec)
        if not pairs.learnt(params):
            return State(params, Roster(job), scale)
        if self.aggregation == "stack_exact":
            return State(pairs.fresh_b(params), Roster(job), scale, stack=pairs.factors(params))
        return State(params, Roster(job), scale, pairs.stems(params))

    def choose_among(self, ranks: tuple[int, ...]) -> Choices:
        """The fields, as the planner reads them."""
        return Choices(
            ranks=ranks,
            batches=self.batches,
            depths=self.depths,
            checkpointing={"auto": (False, True), "on": (True,), "off": (False,)}[self.checkpointing],
            bits=self.bits,
            penalty=self.kappa,
            epochs=self.epochs,
            headroom=self.headroom,
            per_weight=self.rank_mode == "per_weight",
            applied=self.tail == "frozen",
        )

    def init_client(self, env: ClientEnv) -> Memory:
        """At the beginning of its stream."""
        return Memory()

    @property
    def demands(self) -> Demands:
        """The fields that all plans together have to meet."""
        return Demands(self.round_seconds, self.search, self.cover, self.rank_mode == "uniform", self.top_k)

    @property
    def measures(self) -> bool:
        """Whether the importance of weights is measured."""
        return self.score in ("sensitivity", "sum_lambda") and self.rank_mode != "uniform"

    def setup(self) -> tuple[Exchange, ...]:
        """Profiles, then importance; plans follow from both."""
        profile = Exchange("profile", Ask, Report, everyone, self.ask, self.report, self.meet, sound)
        return (profile, self.importance("importance", self.able)) if self.measures else (profile,)

    def round(self) -> tuple[Exchange, ...]:
        """One round: who has no plan tells what it is, importance again where that is due, training."""
        join = Exchange("join", Ask, Report, self.planless, self.ask, self.report, self.meet, sound, quorum=0.0)
        train = Exchange("train", Broadcast, Trained, self.pick, self.send, self.train, self.average, fits)
        again = (self.importance("refresh", self.due),) if self.measures and self.refresh_every else ()
        return (join, *again, train)

    def importance(self, name: str, who: Pick[State]) -> Exchange:
        """The warm-up."""
        return Exchange(name, Warmup, Scores, who, self.ask_scores, self.warm_up, self.weigh, scored, quorum=ANYBODY)

    # --- who -----------------------------------------------------------------------------------------------------

    def able(self, state: State, clients: Sequence[ClientId], rng: Rng) -> list[ClientId]:
        """Everybody known who has room and time for the warm-up."""
        return [c for c in clients if c in state.roster.machines and self.room(state, c)]

    def planless(self, state: State, clients: Sequence[ClientId], rng: Rng) -> list[ClientId]:
        """Everybody who never told what it is, or had no room or time: its machine may be another one by now."""
        return [c for c in clients if c not in state.roster.plans]

    def due(self, state: State, clients: Sequence[ClientId], rng: Rng) -> list[ClientId]:
        """All of these, every so many rounds."""
        due = state.rounds > 0 and state.rounds % self.refresh_every == 0
        return self.able(state, clients, rng) if due else []

    def pick(self, state: State, clients: Sequence[ClientId], rng: Rng) -> list[ClientId]:
        """A cohort of those who have a plan."""
        able = [c for c in clients if c in state.roster.plans]
        if not able:
            reasons = "; ".join(f"{c} {no.reason}" for c, no in list(state.roster.excluded.items())[:5])
            raise RequestError(f"no client can take part: {reasons or 'none has told what it is'}")
        size = min(self.cohort or len(able), len(able))
        return [able[i] for i in rng.choice(len(able), size=size, replace=False)]

    # --- profiles ------------------------------------------------------------------------------------------------

    def ask(self, state: State, client: ClientId) -> Ask:
        """What are you?"""
        return Ask()

    def report(self, down: Ask, memory: Memory, env: ClientEnv) -> tuple[Report, Memory]:
        """The declared profile; the default one where there is none."""
        profile = env.resources if isinstance(env.resources, Profile) else DEFAULT
        lengths = env.data.lengths
        longest, mean = (int(lengths.max()), float(lengths.mean())) if len(lengths) else (1, 1.0)
        return Report(profile, len(env.data), longest, mean), replace(memory, profile=profile)

    def meet(self, state: State, ups: Mapping[ClientId, Report], env: ServerEnv) -> State:
        """Remember them, and plan as soon as there are scores; who comes late is planned for by itself."""
        news = state.roster.news(ups)
        if state.roster.decided and not news:
            return state
        roster = state.roster.met(news)
        if roster.decided:
            return replace(state, roster=roster.planned(self.demands, tuple(news)))
        if not self.measures:
            return self.with_scores(replace(state, roster=roster), self.given_scores(state, env))
        met = replace(state, roster=roster)
        able = any(self.room(met, c) for c in roster.machines)
        return met if able else self.weigh(met, {}, env)  # nobody can measure anything

    def with_scores(self, state: State, scores: Mapping[str, float]) -> State:
        """Plans for everybody, from these scores."""
        roster = replace(state.roster, job=replace(state.roster.job, scores=scores))
        return replace(state, roster=roster.planned(self.demands))

    def given_scores(self, state: State, env: ServerEnv) -> dict[str, float]:
        """Equal scores, or random ones."""
        stems = pairs.stems(state.params)
        drawn = env.rng("scores").random(len(stems)) if self.score == "random" else np.ones(len(stems))
        return dict(zip(stems, (drawn / drawn.sum()).tolist(), strict=True))

    # --- importance ----------------------------------------------------------------------------------------------

    def ask_scores(self, state: State, client: ClientId) -> Warmup:
        """As the machine has room and time for; beside what was learnt, frozen."""
        how = self.room(state, client)
        assert how is not None, "only who is able is asked"
        return Warmup(how, len(state.roster.job.weights), self.learnt(state), state.stack)

    def learnt(self, state: State) -> Params:
        """The factors of the weights that were ever trained."""
        return pairs.factors(pairs.of(state.params, state.union))

    def room(self, state: State, client: ClientId) -> WarmUp | None:
        """The warm-up that a machine has room and time for, beside what is sent along; None: none."""
        roster, learnt = state.roster, self.learnt(state)
        frozen = Counter({stem: len(learnt[f"{stem}.A"]) for stem in pairs.stems(learnt)})
        frozen.update({stem: len(state.stack[f"{stem}.A"]) for stem in pairs.stems(state.stack)})
        costs = Costs(roster.whole_job, roster.machine(client), roster.machines[client].examples, frozen)
        return warm_up_room(costs, self.warmup_rank, self.warmup_batch, self.warmup_steps, self.warmup_seconds)

    def warm_up(self, down: Warmup, memory: Memory, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Scores, Memory]]:
        """Score the candidates, group by group; nothing of what was trained for it is kept."""
        stems, found = pairs.stems(env.initial()), dict[str, float]()
        try:
            for first in range(down.how.groups if len(env.data) else 0):
                found |= yield from self.measured(stems[first :: down.how.groups], down, env)
        except ClientError as error:  # the others' scores hold for it too
            if not out_of_memory(error):
                raise
            found.clear()
        scores, total = torch.tensor([found.get(stem, 0.0) for stem in stems], dtype=torch.float64), sum(found.values())
        seen = torch.full((len(stems),), total > 0)
        return Scores((scores / (total or 1.0)).float(), seen, len(env.data)), memory

    def measured(self, group: Sequence[str], down: Warmup, env: ClientEnv) -> Generator[Fit, Fitted, dict[str, float]]:
        """Train triplets on some candidates for a while, beside a fresh head, and score them."""
        fresh = env.initial()
        sizes, dtype = pairs.widths(fresh), fresh[f"{group[0]}.A"].dtype
        triplets = importance.fresh_triplets(env.seed, {s: sizes[s] for s in group}, self.warmup_rank, dtype)
        params: Params = {**triplets, **pairs.others(fresh)}
        moments, smoothed, optimizer = Moments(), importance.Smoothed(), AdamW(self.warmup_lr)
        for batch in stream_batches(env, 0, down.how.steps, down.how.batch):
            fitted = yield Fit(
                params,
                env.data,
                [batch],
                optimizer,
                also=tuple(layer for layer in (down.params, down.stack) if layer),
                base=self.base(down.how.bits),
                penalty=importance.Orthonormal(self.orth),
                moments=moments,
            )
            change = importance.products(params, fitted.moments, moments, optimizer)
            smoothed = smoothed.after(change, self.beta1, self.beta2)
            params, moments = fitted.params, fitted.moments
        if self.score == "sum_lambda":
            return {stem: float(params[f"{stem}.E"].abs().sum()) for stem in group}
        return importance.matrix_scores(smoothed.scores)

    def weigh(self, state: State, ups: Mapping[ClientId, Scores], env: ServerEnv) -> State:
        """S_m = sum_i p_i S_im over those who have seen m, and the plans that follow."""
        stems = pairs.stems(state.params)
        parts = [(float(up.examples), up.scores.double().numpy(), up.seen.numpy()) for up in ups.values()]
        seen = any(up.examples and bool(up.seen.any()) for up in ups.values())
        warning = "" if seen else "no client could measure the importance of weights; all count the same"
        return self.with_scores(replace(state, warning=warning), scores_of(parts, stems))

    # --- plans ---------------------------------------------------------------------------------------------------

    def base(self, bits: str) -> str:
        """The name of a precision in a Fit."""
        if bits == "full":
            return ""
        return f"{bits}:simulated" if self.simulate else bits

    # --- training ------------------------------------------------------------------------------------------------

    def send(self, state: State, client: ClientId) -> Broadcast:
        """The plan; of the weights that were ever trained all components, or with `tail: drop` those to be trained."""
        plan = state.roster.plans[client]
        sizes = {w.name: (w.d_out, w.d_in) for w in state.roster.job.weights}
        params = pairs.of(state.params, state.union)
        if self.tail == "drop":
            params = pairs.cut_each(pairs.of(params, plan.ranks), plan.ranks)
        train = {name: (rank, *sizes[name]) for name, rank in plan.ranks.items()}
        return Broadcast(params, state.stack, train, plan.bits, plan.batch, plan.steps, plan.checkpointing)

    def train(self, down: Broadcast, memory: Memory, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Trained, Memory]]:
        """Train the first components of the chosen weights and the head; everything else that was sent acts, frozen."""
        ranks = {stem: rank for stem, (rank, _, _) in down.train.items()}
        own = pairs.cut_each(pairs.of({**self.fresh(env, ranks), **down.params}, ranks), ranks)
        rest = pairs.rest_of(pairs.factors(down.params), ranks)
        now = env.resources if isinstance(env.resources, Profile) else DEFAULT
        changed = now if now != memory.profile else None
        fit = Fit(
            own,
            env.data,
            stream_batches(env, memory.cursor, down.steps, down.batch),
            AdamW(self.lr, weight_decay=self.weight_decay),
            also=tuple(layer for layer in (rest, down.stack) if layer),
            base=self.base(down.bits),
            clip=self.clip,
            moments=memory.moments if suits(memory.moments, own) else None,
            rates={} if self.head_lr is None else {"head.": self.head_lr},
            checkpointing=down.checkpointing,
        )
        try:
            fitted = yield fit
        except ClientError as error:
            if not out_of_memory(error):
                raise
            return Trained({}, len(env.data), 0.0, changed, "memory"), replace(memory, profile=now)
        kept = fitted.moments if self.keep_moments else None
        moved = Memory(memory.cursor + down.steps * down.batch, now, kept)
        return Trained(fitted.params, len(env.data), fitted.loss, changed), moved

    def fresh(self, env: ClientEnv, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """The adapter that nobody has trained yet; what was folded away leaves a new A behind in every round."""
        made = pairs.factors(env.initial())
        if self.aggregation == "stack_exact":
            made = pairs.fresh_b(made)
            for stem in ranks:
                made[f"{stem}.A"] = drawn_a(env.seed, stem, env.round, made[f"{stem}.A"])
        return made

    def average(self, state: State, ups: Mapping[ClientId, Trained], env: ServerEnv) -> State:
        """Combine what came, weight by weight; plan again for those whose machine is not what it was thought to be."""
        good = {c: up for c, up in ups.items() if not up.failure}
        counts = {c: up.examples * self.used(state, c) for c, up in good.items()}
        params, stack, union = dict(state.params), dict(state.stack), set(state.union)
        for stem in pairs.stems(state.params):
            who = [c for c, up in good.items() if f"{stem}.A" in up.params]
            if not who:
                continue
            own, weights = [pairs.pair(good[c].params, stem) for c in who], lowrank.shares([counts[c] for c in who])
            if self.aggregation == "stack_exact":
                stack |= self.stacked(stack, stem, own, weights)
            else:
                params |= self.combined(pairs.pair(params, stem), own, weights, env, stem)
                union.add(stem)
        if good:
            params |= tree.mean((pairs.others(up.params), counts[c]) for c, up in good.items())
        profiles = {c: up.profile for c, up in ups.items() if up.profile is not None}
        failed = [c for c, up in ups.items() if up.failure]
        moved = replace(
            state,
            roster=state.roster.adjusted(profiles, failed, self.demands),
            params=params,
            stack=stack,
            union=tuple(sorted(union)),
            rounds=state.rounds + 1,
        )
        return replace(moved, loss=mean_loss(good.values()) if good else state.loss)

    def used(self, state: State, client: ClientId) -> float:
        """What a client's number of examples counts for: all, or the share that its plan had time for."""
        if self.weight_by == "examples" or client not in state.roster.plans:
            return 1.0
        return 1 - state.roster.plans[client].predicted.under_training

    def combined(
        self, before: pairs.Pair, own: Sequence[pairs.Pair], weights: Sequence[float], env: ServerEnv, stem: str
    ) -> dict[str, Tensor]:
        """One pair of the largest rank from pairs of unequal rank; what a client did not train counts as applied."""
        like = before[1]
        old = before if self.tail == "frozen" else (torch.zeros_like(before[0]), torch.zeros_like(like))
        if self.aggregation == "factor_partial":
            b, a = lowrank.slices(own, weights, before)
        elif self.aggregation == "zero_pad":
            b, a = lowrank.mean([lowrank.filled(pair, old) for pair in own], weights)
        else:
            tail = lowrank.tail(old, [len(pair[1]) for pair in own], weights)
            b, a = lowrank.halves(lowrank.stack([*own, tail], [*weights, 1.0]), len(like))
        unused = ~(a.any(dim=1) | b.any(dim=0))[:, None]  # a component of two zeros has no gradient for ever
        a = torch.where(unused, drawn_a(env.seed, stem, env.round, like).double(), a)
        return {f"{stem}.B": b.to(like.dtype), f"{stem}.A": a.to(like.dtype)}

    def stacked(
        self, stack: Params, stem: str, own: Sequence[pairs.Pair], weights: Sequence[float]
    ) -> dict[str, Tensor]:
        """The weight's stack with the mean of the products, exactly, as long as its rank stays under the cap."""
        before = [pairs.pair(stack, stem)] if f"{stem}.A" in stack else []
        whole = lowrank.stack([*before, *own], [*(1.0 for _ in before), *weights])
        b, a = lowrank.compressed(whole, self.stack_cap)
        return {f"{stem}.B": b.to(own[0][0].dtype), f"{stem}.A": a.to(own[0][1].dtype)}

    def result(self, state: State) -> Params:
        """The adapters of the weights that were ever trained, or what was folded away; and the head."""
        if state.stack:
            return {**pairs.others(state.params), **changes.as_delta(state.stack, state.scale)}
        return pairs.of(state.params, state.union or pairs.stems(state.params))

    def choices(self, state: State) -> dict[str, Any]:
        """Everybody's plan, why, and what it was expected to cost; the scores; who could not take part."""
        told = state.roster.told() if state.roster.decided else {}
        warnings = [words for words in (state.warning, told.get("warning")) if words]
        return {**told, "warning": "; ".join(warnings)} if warnings else told


def suits(moments: Moments | None, params: Params) -> bool:
    """Whether moments are those of these very params."""
    return moments is not None and {n: t.shape for n, t in moments.first.items()} == {
        n: t.shape for n, t in params.items()
    }


def drawn_a(seed: int, stem: str, round: int, like: Tensor) -> Tensor:
    """A fresh A of a round, the same for everybody."""
    return pairs.drawn_a(rng_for(seed, "lora", round=round, client=stem), like)


def sound(down: Ask, up: Report) -> None:
    """See `check_report`."""
    check_report(up)


def scored(down: Warmup, up: Scores) -> None:
    """Raise RecordError unless the scores are shares."""
    matching(down, up)
    if not up.scores.shape == up.seen.shape == (down.candidates,) or up.seen.dtype != torch.bool:
        raise RecordError(f"{tuple(up.scores.shape)} scores came for {down.candidates} candidates")
    if bool((up.scores < 0).any()) or float(up.scores.sum()) > 1 + 1e-3:
        raise RecordError("scores are not shares of one")


def fits(down: Broadcast, up: Trained) -> None:
    """Raise RecordError unless the answer holds the components that were to be trained and the head, or a failure."""
    if up.profile is not None:
        check_profile(up.profile)
    if up.failure:
        if up.failure != "memory" or up.params:
            raise RecordError(f"a failure {up.failure!r} with {len(up.params)} params is none that is known")
        return
    matching(Ask(), up)
    if up.examples < 1:
        raise RecordError("an answer with params counts no example")
    pairs.check(up.params, down.train, pairs.others(down.params))


METHOD = FedPipe
