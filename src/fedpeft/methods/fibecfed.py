"""FibecFed: a curriculum by Fisher information, layers that everybody shares, sparse updates of those that stay.

Liu, Ren, Jin, Zhang, Zhou, Valduriez, Dou: Fisher Information-based Efficient Curriculum Federated Learning with Large
Language Models, EMNLP 2024, arXiv 2410.00131.

Paper to code

| paper | here |
|---|---|
| difficulty of an example: trace of the diagonal Fisher information | `ordered`; `core.difficulty` |
| easy ones first, more of them every round | `in_use`; `maths.curriculum.pace` |
| importance of a layer: its answer to perturbed inputs | `score`; `Model.sensitivity` |
| global aggregation layers (GAL), the N most important ones | `choose`; `State.layers` |
| local update: neurons with much Fisher information, with momentum over rounds | `mask`; `Memory.fisher` |
| aggregation of the GAL | `average` |

Departures: the body of the paper was not at hand. Certain are the parts and what each is made of (the table). Ours are
the warm-up rounds, in which all layers are averaged so that a fresh head does not make difficulties noise; the pacing
and its constants; that difficulty counts LoRA's factors alone, and how an answer of several tokens is counted
(`token_norm`); the norm of the perturbation and the form of the layer score; the rule for N, of which `eigengap` and
`plateau` come from FedPepTAO (arXiv 2310.15080), by the same group; the share of rows and every default; that examples
are ranked, not batches formed by chance, whose means hide most of the order; that nobody is asked only to score
(`initialise: lazy`); and that the momentum of a layer's rows ends where the layer joins the shared ones. No table of
the paper is reproduced.

Before the first round: in each of `warmup_rounds` rounds, params both ways (nothing where there is no head); for the
layers a number for each and two more up, and down params after a warm-up, else nothing. Layers that are chosen anew
(`reselect_every`) cost the same, with params down.

Traffic per client and round: down = params of the shared layers and what it lacks of the others (`rest`); up = params \
of the shared layers
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedpeft.core import pairs, tree
from fedpeft.core.averaging import Tuning
from fedpeft.core.cohort import everyone, sample
from fedpeft.core.counts import round_up
from fedpeft.core.difficulty import Difficulty, difficulties
from fedpeft.core.errors import ConfigError, RecordError
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, ServerEnv, Steps, Update, Weights, matching
from fedpeft.core.fit import SGD, Fit, Fitted
from fedpeft.core.method import check_ranges, local_batches, mean_loss, ordinary_fit
from fedpeft.core.model import Fisher, FisherProbe, Perturbation, TokenNorm
from fedpeft.core.rng import Rng
from fedpeft.core.tree import Params
from fedpeft.maths import curriculum, spectrum
from fedpeft.maths.curriculum import Pacing, RowRule
from fedpeft.maths.layers import choose_layers, layer_count, relative_changes

LANCZOS_STEPS, LANCZOS_PROBES = 50, 4  # of the spectrum, for gal_count eigengap and plateau
OF_LAYERS = ("gal_count", "gal_ratio", "eta", "reselect_every", "rho", "rho_rule", "gamma", "fisher_samples")
SCORING = ("layer_score", "perturbation", "gamma_eps", "score_samples")
ORDERING = ("difficulty", "stratify_labels", "rescore_every")
DISPLACEMENTS, DISPLACEMENT = 4, 1e-2  # random steps for the Lipschitz constant, and their length over ||A||


@dataclass(frozen=True)
class State:
    """What the server knows."""

    start: Params  # of every layer: what a client begins with in a layer that it has not trained
    shared: Params  # of the shared layers, and the head
    layers: tuple[int, ...] = ()  # G, ascending; empty until they are chosen
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))  # (blocks,)
    ratio: float | None = None  # the mean measured share of layers, where gal_count measures one
    first: tuple[str, ...] = ()  # the clients that scored and train first (`initialise: lazy`)
    rounds: int = 0  # that are over
    version: int = 0  # how often `start` changed
    since: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # version of each layer's start
    known: Mapping[str, int] = field(default_factory=dict)  # the version that a client has seen
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Memory:
    """What a client keeps between its turns; nothing of it travels."""

    local: Params = field(default_factory=dict)  # its own parameters in the layers that are not shared
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # its examples in their order
    ends: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # where batches end among the rows
    fisher: Params = field(default_factory=dict)  # per factor of the local layers, (rows of the matrix,)
    visits: int = 0  # since the order was made


@dataclass(frozen=True)
class Probe:
    """Asks for scores of the layers."""

    params: Params | None  # where; None: at the fresh adapter, which every client can draw
    layers: int  # how many there are


@dataclass(frozen=True)
class Scores:
    """A client's scores of the layers, and the share of them that its spectrum suggests."""

    layers: Tensor  # (blocks,) float32
    ratio: float | None
    examples: int


@dataclass(frozen=True)
class Task:
    """What a client trains."""

    shared: Params
    rest: Params | None  # what it lacks of the other layers
    layers: tuple[int, ...]  # G


@dataclass(frozen=True)
class FibecFed(Tuning):
    """FibecFed (Liu et al. 2024): Fisher curriculum, shared layers, sparse local updates."""

    epochs: int = 2  # E: passes over the examples in use per round
    lr: float = 5e-4  # local learning rate of AdamW, whose moments start from zero in every round
    initialise: Literal["lazy", "cohort", "all"] = "lazy"  # who scores layers: those that train first, a cohort, all
    warmup_rounds: int = 1  # plain rounds over all layers before; none where there is no head to warm up
    beta: float = 0.6  # share of the examples in use at first; 1: no curriculum
    alpha_pace: float = 0.8  # share of the rounds after which all examples are in use
    pacing: Pacing = "linear"  # how the share grows
    batching: Literal["sorted_samples", "fixed_random", "sorted_batches"] = "sorted_samples"  # what is ordered
    difficulty: Difficulty = "fisher"  # of an example
    stratify_labels: bool = False  # whether every beginning of the order has the client's own shares of labels
    rescore_every: int = 0  # visits after which a client orders its examples anew; 0: never
    layer_score: Literal["output", "amplification"] = "output"  # a layer's own change, or over that of its input
    perturbation: Perturbation = "l2"  # of the embeddings
    gamma_eps: float = 1e-2  # its size, over the mean norm of the embeddings
    score_samples: int = 32  # examples that a client scores layers with
    gal_count: Literal["ratio", "energy", "plateau", "eigengap"] = "ratio"  # how many layers are shared
    gal_ratio: float = 0.5  # their share, for `ratio` and where a rule gives nothing
    eta: float = 0.9  # share of the scores' sum (gal_count) or of a matrix's information (rho_rule), for `energy`
    layers_by: Literal["score", "random", "first", "last", "all"] = "score"  # which layers are shared
    reselect_every: int = 0  # rounds after which the layers are chosen anew; 0: never
    gamma: float = 0.9  # momentum of the Fisher information of rows
    rho: float = 0.5  # share of rows that are updated in local layers; 1: all
    rho_rule: RowRule = "fixed"  # how many rows: that share, or the fewest with enough information
    fisher_samples: int = 64  # examples that the rows' information is taken from, per visit
    head: Literal["shared", "local"] = "shared"  # whether the classification head travels
    token_norm: TokenNorm = "sqrt"  # how gradients of several answer tokens are added: sum / sqrt(n), mean, sum

    plans_by_rounds: ClassVar[bool] = True
    chooses_rows: ClassVar[bool] = True
    state: ClassVar[type[State]] = State
    memory: ClassVar[type[Memory]] = Memory

    def __post_init__(self) -> None:
        least = {"warmup_rounds": 0, "rescore_every": 0, "reselect_every": 0, "score_samples": 1, "fisher_samples": 1}
        above = dict.fromkeys(("beta", "alpha_pace", "gamma_eps", "gal_ratio", "eta", "rho"), 0)
        most = dict.fromkeys(("beta", "alpha_pace", "gal_ratio", "eta", "rho"), 1)
        check_ranges(self, at_least={**least, "gamma": 0}, above=above, below={"gamma": 1}, at_most=most)
        if self.stratify_labels and self.batching == "fixed_random":
            told = "method.stratify_labels is of rows, and method.batching fixed_random ranks batches of chance"
            raise ConfigError([f"{told}; leave one of them out"])

    def accepts_schedule(self, kind: str) -> str | None:
        """No other one: the method has its own curriculum."""
        return "method fibecfed has a curriculum of its own: method.difficulty, beta, alpha_pace, pacing, batching"

    def idle(self) -> dict[str, str]:
        """What a choice of layers without scores, all data from the start, or no mask leave without effect."""
        whole, in_order = self.layers_by == "all", self.batching == "sorted_samples"
        unmasked, energies = self.rho_rule == "fixed" and self.rho == 1, {self.gal_count, self.rho_rule}
        rules: tuple[tuple[bool, str, tuple[str, ...]], ...] = (
            (unmasked, "method.rho 1 updates all rows", ("gamma", "fisher_samples")),
            (self.rho_rule == "energy", "method.rho_rule energy counts the rows", ("rho",)),
            (self.gal_count == "energy", "method.gal_count energy counts the layers", ("gal_ratio",)),
            ("energy" not in energies, "neither method.gal_count nor method.rho_rule is energy", ("eta",)),
            (not self.scores_count, "layers are not chosen by scores", SCORING),
            (not self.reselects, "the same layers would be chosen again", ("reselect_every",)),
            (whole, "method.layers_by all shares every layer", OF_LAYERS),
            (self.beta == 1, "method.beta 1 uses all examples", ("pacing", "alpha_pace")),
            (self.beta == 1 and in_order, "method.beta 1 uses all examples", ORDERING),
        )
        return {name: why for holds, why, names in rules if holds for name in names}

    # --- set-up: which layers ---

    @property
    def scores_count(self) -> bool:
        """Whether the choice of layers depends on their scores."""
        return self.layers_by == "score" or (self.layers_by != "all" and self.gal_count == "energy")

    @property
    def ratio_counts(self) -> bool:
        """Whether it depends on the clients' spectra."""
        return self.layers_by != "all" and self.gal_count in ("plateau", "eigengap")

    @property
    def reselects(self) -> bool:
        """Whether a later choice of layers can differ."""
        return self.scores_count or self.ratio_counts or self.layers_by == "random"

    @property
    def asks(self) -> bool:
        """Whether anybody has to be asked before the layers are chosen."""
        return self.scores_count or self.ratio_counts or self.initialise == "all"

    def init(self, env: ServerEnv) -> State:
        """P0, everywhere; the layers where nothing has to be asked for."""
        start, blocks = env.initial(), env.model.blocks
        state = State(start, start, scores=torch.zeros(blocks), since=torch.zeros(blocks, dtype=torch.int64))
        return state if self.asks or self.warmed_up(state) else self.divided(state, env)

    def init_client(self, env: ClientEnv) -> Memory:
        """Nothing of its own yet."""
        return Memory()

    def setup(self) -> tuple[Exchange, ...]:
        """Warm-up, so that a fresh head does not make difficulties noise; then scores."""
        warm = [
            Exchange(f"warmup {i + 1}", Weights, Update, self.warm_cohort, self.send_all, self.warm_up, self.warmed)
            for i in range(self.warmup_rounds)
        ]
        if not self.asks:
            return tuple(warm)
        pick = everyone if self.initialise == "all" else sample(self.cohort)
        return (*warm, Exchange("layers", Probe, Scores, pick, self.ask, self.score, self.choose, self.scored))

    def warm_cohort(self, state: State, clients: Sequence[ClientId], rng: Rng) -> Sequence[ClientId]:
        """A cohort; nobody where there is no head."""
        return sample(self.cohort)(state, clients, rng) if headed(state.start) else ()

    def send_all(self, state: State, client: ClientId) -> Weights:
        """The parameters of all layers."""
        return Weights(state.shared)

    def warm_up(self, down: Weights, memory: Memory, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Memory]]:
        """Ordinary training of all layers."""
        fitted = yield ordinary_fit(self, down.params, env)
        return Update(fitted.params, len(env.data), fitted.loss), memory

    def warmed(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """The mean, which is what everybody starts from."""
        mean = tree.mean((up.params, up.examples) for up in ups.values())
        state = replace(state, start=mean, shared=mean, loss=mean_loss(ups.values()))
        last = env.exchange == f"warmup {self.warmup_rounds}"
        return self.divided(state, env) if last and not self.asks else state

    def ask(self, state: State, client: ClientId) -> Probe:
        """Where the layers are to be scored."""
        fresh = not state.layers and not self.warmed_up(state)
        needless = state.layers and not (self.scores_count or self.ratio_counts)
        return Probe(None if fresh or needless else tree.overlay(state.start, state.shared), len(state.scores))

    def warmed_up(self, state: State) -> bool:
        """Whether there was a warm-up, whose result clients cannot draw by themselves."""
        return self.warmup_rounds > 0 and headed(state.start)

    def score(self, down: Probe, memory: Memory, env: ClientEnv) -> Steps:
        """What the choice needs of a client; with `initialise: all` its examples' order too."""
        params = env.initial() if down.params is None else down.params
        scores = self.sensitivities(params, env) if self.scores_count else torch.zeros(env.model.blocks)
        ratio = (yield from self.measure(params, env)) if self.ratio_counts else None
        if self.initialise == "all" and not env.round:
            memory = yield from self.ordered(params, memory, env)
        return Scores(scores, ratio, len(env.data)), memory

    def sensitivities(self, params: Params, env: ClientEnv) -> Tensor:
        """(blocks,) the mean relative change of every block's output."""
        rows = curriculum.some_of(range(len(env.data)), self.score_samples, env.rng("samples"))
        found = env.model.sensitivity(
            params, env.data, rows, self.perturbation, self.gamma_eps, env.rng("perturbation")
        )
        return relative_changes(*found, of_input=self.layer_score == "amplification")

    def measure(self, params: Params, env: ClientEnv) -> Generator[Fit, Fitted, float | None]:
        """The share of large eigenvalues of the Hessian over the factors B, None where the rule gives nothing."""
        rows = env.data.epochs(1, self.batch_size, env.rng("batch"))[0]
        names = sorted(pairs.factors(params, "B"))
        like = {name: params[name] for name in names}
        operator = tree.flat(env.model.hessian(params, env.data, rows, names), like)
        size, rng = tree.count(like), env.rng("probe")
        theta, omega = spectrum.lanczos(operator, size, LANCZOS_STEPS, rng, LANCZOS_PROBES)
        if self.gal_count == "plateau":
            return spectrum.plateau_of_sizes(theta, omega)
        length, rest = DISPLACEMENT * tree.norm(pairs.factors(params, "A")), []
        for _ in range(DISPLACEMENTS):
            step = torch.from_numpy(rng.standard_normal(size))
            step *= length / step.norm()
            moved = tree.overlay(params, tree.add(like, tree.unflatten(step, like)))
            fitted = yield Fit(moved, env.data, [rows], SGD(1.0), train=frozenset(names))
            gradient = tree.flatten({name: moved[name] - fitted.params[name] for name in names})
            rest.append((step, operator(step) - gradient))
        return spectrum.first_gap(theta.abs().sort().values, spectrum.steepest(rest))

    def scored(self, down: Probe, up: Scores) -> None:
        """Raise RecordError unless every layer has a score, examples stand behind it, and the ratio is a share."""
        matching(down, up)
        if up.layers.shape != (down.layers,) or up.layers.dtype != torch.float32 or bool((up.layers < 0).any()):
            shape = tuple(up.layers.shape)
            raise RecordError(f"scores have shape {shape}; {down.layers} of float32, at least 0, were asked for")
        if up.examples < 1:
            raise RecordError(f"scores come from {up.examples} examples; at least one has to stand behind them")
        if up.ratio is not None and not 0 <= up.ratio <= 1:
            raise RecordError(f"a ratio is {up.ratio}; it must lie between 0 and 1")

    def choose(self, state: State, ups: Mapping[ClientId, Scores], env: ServerEnv) -> State:
        """G: the N layers of the largest mean score; who scored trains first, where nobody else is to be asked."""
        scores = tree.mean(({"I": up.layers.double()}, up.examples) for up in ups.values())["I"].float()
        told = [(up.ratio, up.examples) for up in ups.values() if up.ratio is not None]
        ratio = sum(r * n for r, n in told) / sum(n for _, n in told) if told else None
        first = tuple(ups) if not state.layers and self.initialise == "lazy" else ()
        return self.divided(replace(state, scores=scores, ratio=ratio, first=first), env)

    def divided(self, state: State, env: ServerEnv) -> State:
        """The layers, shared and not. One that ceases to be shared starts where it ended, and the reverse."""
        layers = self.chosen(state.scores, state.ratio, tree.blocks_of(state.start), env)
        now = tree.overlay(state.start, state.shared)  # of all layers, as they are
        gone = [layer for layer in state.layers if layer not in layers]
        since, version = state.since.clone(), state.version + 1
        since[gone] = version
        if not state.layers and self.warmed_up(state):
            since[:] = version
        shared = self.travelling(now, layers)
        return replace(state, start=now, shared=shared, layers=layers, version=version, since=since)

    def chosen(
        self, scores: Tensor, ratio: float | None, candidates: tuple[int, ...], env: ServerEnv
    ) -> tuple[int, ...]:
        """The layers by the options, ascending."""
        if self.layers_by == "all":
            return candidates
        count = layer_count(self.gal_ratio if ratio is None else ratio, len(candidates), len(candidates))
        if self.gal_count == "energy":
            descending = sorted((float(scores[layer]) for layer in candidates), reverse=True)
            count = curriculum.enough(descending, self.eta)
        return choose_layers(scores, count, self.layers_by, candidates, env.rng("layers"))

    def travelling(self, params: Params, layers: tuple[int, ...]) -> dict[str, Tensor]:
        """The parameters of the layers, and the head unless it is local."""
        heads = (None,) if self.head == "shared" else ()
        return tree.in_blocks(params, (*heads, *layers))

    # --- rounds ---

    def round(self) -> tuple[Exchange, ...]:
        """One round over the shared layers, and from time to time a new choice of them."""
        again = sample(self.cohort)
        train = Exchange("train", Task, Update, self.pick, self.send, self.train, self.average, self.fits, again)
        if not self.reselect_every or not self.reselects:
            return (train,)
        anew = Exchange("reselect", Probe, Scores, self.due, self.ask, self.score, self.choose, self.scored)
        return (anew, train)

    def pick(self, state: State, clients: Sequence[ClientId], rng: Rng) -> Sequence[ClientId]:
        """The clients that scored, in the first round of `lazy`; else a cohort, also where too few of them answer."""
        first = () if state.rounds else [client for client in state.first if client in clients]
        return first or sample(self.cohort)(state, clients, rng)

    def due(self, state: State, clients: Sequence[ClientId], rng: Rng) -> Sequence[ClientId]:
        """A cohort after every `reselect_every` rounds, else nobody."""
        due = state.rounds and state.rounds % self.reselect_every == 0
        return sample(self.cohort)(state, clients, rng) if due else ()

    def send(self, state: State, client: ClientId) -> Task:
        """The shared layers, and the others as far as the client does not have their start."""
        seen = state.known.get(client, 0)
        lacks = [
            layer for layer, since in enumerate(state.since.tolist()) if since > seen and layer not in state.layers
        ]
        own_head = self.head == "local" and self.warmed_up(state) and client not in state.known
        rest = tree.in_blocks(state.start, (*lacks, None) if own_head else lacks)
        return Task(state.shared, rest or None, state.layers)

    def train(self, down: Task, memory: Memory, env: ClientEnv) -> Steps:
        """Train on the easier examples: shared layers in whole, the client's own in the rows that matter."""
        local = tree.overlay(env.initial(), memory.local, down.rest or {})
        local = tree.select(local, lambda name: name not in down.shared)
        params = tree.overlay(local, down.shared)
        due = self.rescore_every and memory.visits >= self.rescore_every
        if due or not len(memory.rows):
            memory = yield from self.ordered(params, memory, env)
        batches = self.in_use(memory, env)
        fisher = yield from self.information(params, local, memory, batches, env)
        fitted = yield ordinary_fit(self, params, env, batches=batches, mask=self.mask(params, fisher) or None)
        shared = {name: fitted.params[name] for name in down.shared}
        own = {name: fitted.params[name] for name in local}
        kept = replace(memory, local=own, fisher=fisher, visits=memory.visits + 1)
        return Update(shared, len(env.data), fitted.loss), kept

    def fits(self, down: Task, up: Update) -> None:
        """Raise RecordError unless the answer has the layout of the shared layers."""
        matching(Weights(down.shared), up)

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """sum_k p_k of the shared layers, A and B apart."""
        shared = tree.mean((up.params, up.examples) for up in ups.values())
        known = {**state.known, **dict.fromkeys(ups, state.version)}
        return replace(state, shared=shared, rounds=state.rounds + 1, known=known, loss=mean_loss(ups.values()))

    # --- curriculum ---

    def ordered(self, params: Params, memory: Memory, env: ClientEnv) -> Generator[FisherProbe, Fisher, Memory]:
        """The memory with the examples, or batches of them, from easy to hard; as they are where all are in use."""
        rows, ends = list(range(len(env.data))), curriculum.ends(len(env.data), self.batch_size)
        if self.beta < 1 or self.batching != "sorted_samples":
            difficulty = yield from difficulties(self.difficulty, params, env, self.token_norm)
            rows = curriculum.easy_first(difficulty)
            if self.batching == "fixed_random":
                batches = env.data.epochs(1, self.batch_size, env.rng("order"))
                rows, ends = curriculum.ranked_batches(batches, difficulty)
            elif self.stratify_labels:
                rows = curriculum.stratified(rows, env.data.labels.tolist())
        return replace(memory, rows=torch.tensor(rows), ends=torch.tensor(ends), visits=0)

    def in_use(self, memory: Memory, env: ClientEnv) -> Sequence[Sequence[int]]:
        """The batches of a round: examples up to the pace, in fresh batches; or whole batches in fresh order."""
        ends = memory.ends.tolist()
        n = curriculum.pace(env.round - 1, env.rounds, len(ends), self.pacing, self.beta, self.alpha_pace)
        rows = memory.rows.tolist()
        if self.batching == "sorted_samples":
            return local_batches(self, env, among=rows[: ends[n - 1]])
        return curriculum.whole_batches(rows, ends[:n], self.epochs, self.steps, env.rng("batches"))

    # --- sparse local updates ---

    def information(
        self, params: Params, local: Params, memory: Memory, batches: Sequence[Sequence[int]], env: ClientEnv
    ) -> Generator[FisherProbe, Fisher, Params]:
        """gamma F + (1 - gamma) of this visit's, per row of the local factors; nothing where all rows are updated."""
        names = pairs.factors(local).keys()
        if not names or (self.rho_rule == "fixed" and self.rho == 1):
            return {}
        used = sorted({row for batch in batches for row in batch})
        some = curriculum.some_of(used, self.fisher_samples, env.rng("fisher"))
        found = yield FisherProbe(params, env.data, some, self.token_norm)
        return curriculum.blended(memory.fisher, {name: found.rows[name] for name in sorted(names)}, self.gamma)

    def mask(self, params: Params, fisher: Params) -> dict[str, Tensor]:
        """1 in the rows of local factors with most information; everything else may change."""
        return curriculum.row_masks(params, fisher, self.rho, self.rho_rule, self.eta)

    # --- models, and what is told about the choice ---

    def result(self, state: State) -> Params:
        """The shared layers, and in the others what a client that joins today would start with."""
        return tree.overlay(state.start, state.shared)

    def personal(self, params: Params, memory: Memory) -> Params:
        """The client's own layers beside the shared ones."""
        return tree.overlay(params, memory.local)

    def choices(self, state: State) -> dict[str, Any]:
        """The layers and their scores."""
        told: dict[str, Any] = {
            "layers": list(state.layers),
            "of_layers": len(state.scores),
            "layers_by": self.layers_by,
        }
        if self.scores_count:
            told["layer_scores"] = state.scores.tolist()
            taken = (
                "FibecFed shares the layers with the largest scores and leaves the others to the clients."
                if self.layers_by == "score"
                else f"here it counts the shared layers; method.layers_by {self.layers_by} says which these are."
            )
            told["scores_mean"] = f"The score is how much a layer's output changes when its input is perturbed; {taken}"
        if state.ratio is not None:
            told |= {"ratio": state.ratio, "ratio_from": self.gal_count}
        if not (self.ratio_counts and state.layers):
            return told
        if state.ratio is None:
            said = f"gave no client a usable share of layers; using method.gal_ratio, {self.gal_ratio:g}"
            return told | {"warning": f"method.gal_count {self.gal_count} {said}"}
        if not round_up(state.ratio * len(tree.blocks_of(state.start))):
            return told | {"warning": f"a share of {state.ratio:.3g} of the layers is none; sharing one"}
        return told

    def shared_names(self, state: State) -> tuple[str, ...]:
        """The shared layers: a client that has not trained since one joined them still remembers its own."""
        return tuple(sorted(state.shared))


def headed(params: Params) -> bool:
    """Whether there is a classification head, which starts from chance."""
    return any(name.startswith("head.") for name in params)


METHOD = FibecFed
