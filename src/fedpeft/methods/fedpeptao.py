"""FedPepTAO: prompts in the layers that matter, adaptive optimisation on the device, drift control on the server.

Che, Liu, Zhou, Ren, Zhou, Sheng, Dai, Dou: Federated Learning of Large Language Models with Parameter-Efficient Prompt
Tuning and Adaptive Optimization, EMNLP 2023, arXiv 2310.15080.

Paper to code

| paper | here |
|---|---|
| prompts of layer l | parameters of block l: a prefix, trainable keys and values |
| score of a layer | `score_layers`, `rank_layers`; `maths.layers` |
| eigenvalues, Lipschitz constant and ratio of a device | `measure_ratio`, `choose_ratio`; `maths.spectrum` |
| how many layers, and which | `State.layers`, from `layers_by`, `ratio_rule`, `ratio` |
| Adam on the device | `train`; its moments start from zero (`device_state: reset`) |
| momentum and drift control on the server, never sent | `update`; `State.momentum`, `State.controls`; `maths.drift` |
| prompts that stay at the device | `Memory.local`, as `unselected` says |

Set-up, unless the options make it needless: `warmup_rounds` rounds of plain averaging over prompts in all layers, only
to calibrate (training starts from fresh prompts unless `keep_warmup`); every client scores the layers of the frozen
base; a cohort measures the share of large eigenvalues of its Hessian. The last of these chooses the layers.

Departures: the body of the paper was not at hand. Certain are the parts (a layer score, a ratio from each device, Adam
on the device, momentum and drift control on the server, moments not sent) and, in the authors' code, its arithmetic and
example settings. Reconstructed by us are the server's equations (`server: peptao`; `reference` is the code's loop as it
is written, which depends on the order of visits, takes the head's steps for steps of `lr`, and diverged where we tried
it), moments that start from zero, the form
of the eigengap rule and what happens where it gives no usable number (half of the layers, said in the report), zeroed
padding and the mean over samples in the score, the head's own rate. No table of the paper is reproduced.

Traffic per client and round: down = params of the shared layers; up = params of the shared layers
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, Prefix
from fedpeft.core.cohort import sample
from fedpeft.core.errors import DivergedError, RecordError
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, ServerEnv, matching
from fedpeft.core.fit import Fit, Fitted, Moments
from fedpeft.core.method import Defaults, check_ranges, mean_loss, ordinary_fit
from fedpeft.core.tree import Params, block_of
from fedpeft.maths import drift, spectrum
from fedpeft.maths.layers import choose_layers, layer_count, layer_score

USABLE_SHARE = 0.5  # of the examples must stand behind usable ratios, else `ratio` counts


@dataclass(frozen=True)
class State:
    """What the server knows. The layout of prompts, momentum and control is that of the shared layers and the head."""

    start: Params  # P0, all layers; where no prompt is shared, the global model has these
    prompts: Params  # w: during the set-up those of all layers
    layers: tuple[int, ...] = ()  # the shared ones; empty until they are chosen
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))  # (blocks,) of the layers
    ratio: float = 1.0  # share of the layers that are shared, as measured or given
    ratio_from: str = "fixed"  # fixed, eigengap, plateau or fallback
    note: str = ""  # how usable the measured ratios were
    measured: Mapping[str, Ratio] = field(default_factory=dict)  # every device's ratio
    client_scores: Mapping[str, Scores] = field(default_factory=dict)  # every client's layer scores
    momentum: drift.Momentum = field(default_factory=drift.Momentum)  # v, c, the last pseudo-gradient, eta_s
    controls: drift.Controls = field(default_factory=dict)  # c_i of every device seen so far
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Memory:
    """What a client keeps between its turns; nothing of it travels."""

    local: Params = field(default_factory=dict)  # its prompts in the layers that are not shared
    moments: Moments = field(default_factory=Moments)  # of Adam, where `device_state` is `persist`


@dataclass(frozen=True)
class Prompts:
    """Prompts on the way down."""

    prompts: Params


@dataclass(frozen=True)
class Answer:
    """Prompts on the way up."""

    prompts: Params
    examples: int
    steps: int  # K_i, local steps
    loss: float


@dataclass(frozen=True)
class Ask:
    """Asks for the scores of so many layers."""

    layers: int


@dataclass(frozen=True)
class Scores:
    """A client's layer scores, from `used` different rows."""

    scores: Tensor  # (layers,) float32
    used: int
    examples: int


@dataclass(frozen=True)
class Ratio:
    """A client's share of large eigenvalues, whether it means something, and what it was made of."""

    ratio: float
    usable: bool
    lipschitz: float
    low: float  # eigenvalues at the two ends of the gap
    high: float
    examples: int


@dataclass(frozen=True)
class FedPepTAO(Defaults):
    """FedPepTAO (Che et al. 2023): prompts in the layers that matter, drift control on the server."""

    cohort: int = 10  # m: clients per round; 0: all
    epochs: int = 2  # E: passes over a client's rows per round
    batch_size: int = 8  # B: rows per step
    lr: float = 4e-2  # eta: the device's learning rate
    head_lr: float | None = 3e-3  # rate of the classification head; null: lr, which is far too high for a head
    weight_decay: float = 0.1  # decay of the device's AdamW
    clip: float | None = 1.0  # bound on the gradient's norm at every step; null: none
    steps: int | None = None  # local steps per round, instead of whole epochs
    server: Literal["peptao", "fedavg", "fedavgm", "reference"] = "peptao"  # the server's optimizer
    server_lr: float | None = None  # its rate at round 1; null: .05, and 1 for fedavgm, which keeps it constant
    beta: float = 0.9  # momentum of the server
    drift_weight: float = 1.0  # of the correction by control variates (peptao)
    control: Literal["server", "off"] = "server"  # where control variates are kept; off: no state per device
    momentum_input: Literal["delta", "difference"] = "delta"  # what enters the momentum: the step, or its change
    device_state: Literal["reset", "persist"] = "reset"  # Adam's moments: fresh in every round, or kept on the device
    unselected: Literal["local", "off", "frozen"] = "local"  # other layers: own prompts, none, or the fresh ones
    layers_by: Literal["score", "random", "first", "last", "middle"] = "score"  # which layers are shared
    candidate_last: bool = True  # whether the last layer may be shared
    ratio_rule: Literal["eigengap", "plateau", "fixed"] = "eigengap"  # how the share of shared layers is found
    ratio: float = 0.5  # the share of layers, for `fixed` and where the rule gives nothing usable
    warmup_rounds: int = 10  # rounds before the calibration; 0: it is made at the fresh prompts
    keep_warmup: bool = False  # whether training starts from the warmed-up prompts
    calibration_cohort: int = 10  # clients that measure a ratio; 0: all
    score_cohort: int = 0  # clients that score the layers; 0: all
    score_batch: int = 8  # different rows per client for the scores
    lanczos_steps: int = 30  # k: products with the Hessian for its spectrum, per probe
    lanczos_probes: int = 1  # random vectors that the spectrum is averaged over
    power_steps: int = 8  # products for the Lipschitz constant

    state: ClassVar[type[State]] = State
    memory: ClassVar[type[Memory]] = Memory

    def __post_init__(self) -> None:
        least = {"calibration_cohort": 0, "score_cohort": 0, "warmup_rounds": 0, "server_lr": 0, "beta": 0}
        least |= {"drift_weight": 0, "score_batch": 2, "lanczos_steps": 2, "lanczos_probes": 1, "power_steps": 1}
        check_ranges(self, at_least=least, above={"ratio": 0}, below={"beta": 1}, at_most={"ratio": 1})

    def adapter(self) -> AdapterSpec:
        """A prefix of 20 tokens in every layer."""
        return Prefix()

    def accepts(self, spec: AdapterSpec) -> str | None:
        """Prefixes alone: other adapters have no layer that could be left out at no cost."""
        if isinstance(spec, Prefix):
            return None
        return f"method fedpeptao tunes prefixes, not adapter.kind {spec.kind!r}; use prefix, or leave adapter.kind out"

    @property
    def personalised(self) -> bool:
        """Whether clients have prompts of their own."""
        return self.unselected == "local"

    # --- set-up: which layers ---

    def init(self, env: ServerEnv) -> State:
        """P0, and the layers where nothing has to be asked for."""
        start = env.initial()
        state = State(start, start, scores=torch.zeros(env.model.blocks), ratio=self.ratio)
        return state if self.setup() else self.chosen(state, env)

    def init_client(self, env: ClientEnv) -> Memory:
        """No prompts of its own yet: those of P0 count."""
        return Memory()

    def setup(self) -> tuple[Exchange, ...]:
        """Warm-up, scores and ratio, as far as the options need them."""
        calibrate = self.ratio_rule != "fixed"
        names = [f"warmup {i + 1}" for i in range(self.warmup_rounds if calibrate else 0)]
        steps = [
            Exchange(name, Prompts, Answer, sample(self.cohort), self.send, self.warm_up, self.average, counted)
            for name in names
        ]
        if self.layers_by == "score":
            pick = sample(self.score_cohort)
            steps.append(Exchange("score", Ask, Scores, pick, self.ask, self.score_layers, self.rank_layers, scored))
        if calibrate:
            pick = sample(self.calibration_cohort)
            steps.append(
                Exchange("ratio", Prompts, Ratio, pick, self.send, self.measure_ratio, self.choose_ratio, self.credible)
            )
        return tuple(steps)

    def warm_up(self, down: Prompts, memory: Memory, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Answer, Memory]]:
        """Ordinary training of the prompts of all layers."""
        fitted = yield ordinary_fit(self, down.prompts, env)
        return Answer(fitted.params, len(env.data), fitted.steps, fitted.loss), memory

    def average(self, state: State, ups: Mapping[ClientId, Answer], env: ServerEnv) -> State:
        """sum_i p_i prompts_i."""
        prompts = tree.mean((up.prompts, up.examples) for up in ups.values())
        return replace(state, prompts=prompts, loss=mean_loss(ups.values()))

    def ask(self, state: State, client: ClientId) -> Ask:
        """The number of layers of the base; those without prompts are scored too, and never chosen."""
        return Ask(len(state.scores))

    def score_layers(self, down: Ask, memory: Memory, env: ClientEnv) -> tuple[Scores, Memory]:
        """zeta of every block's output over the client's first different rows; the base alone, without prompts."""
        rows = env.data.distinct(self.score_batch)
        scores = torch.zeros(down.layers)
        if len(rows) >= 2:
            outputs = env.model.hidden(None, env.data, rows)
            scores = torch.tensor([layer_score(own.flatten(1)) for own in outputs], dtype=torch.float32)
        return Scores(scores, len(rows), len(env.data)), memory

    def rank_layers(self, state: State, ups: Mapping[ClientId, Scores], env: ServerEnv) -> State:
        """sum_i n_i zeta_i / sum_i n_i over the clients that had two rows to compare."""
        parts = [({"zeta": up.scores.double()}, up.examples) for up in ups.values() if up.used >= 2]
        scores = tree.mean(parts)["zeta"].float() if parts else torch.zeros_like(state.scores)
        state = replace(state, scores=scores, client_scores=dict(ups))
        return state if self.ratio_rule != "fixed" else self.chosen(state, env)

    def measure_ratio(
        self, down: Prompts, memory: Memory, env: ClientEnv
    ) -> Generator[Fit, Fitted, tuple[Ratio, Memory]]:
        """The spectrum of the Hessian at w, and how much it changes on the way to where one epoch leads.

        A device whose epoch diverges, or whose Hessian is not finite, has no usable ratio. The head moves in that epoch
        too, and is part of how much the Hessian over the prompts changes.
        """
        nothing = Ratio(0.0, False, 0.0, 0.0, 0.0, len(env.data))
        try:
            fitted = yield ordinary_fit(
                self, down.prompts, env, batches=env.data.epochs(1, self.batch_size, env.rng("epoch"))
            )
        except DivergedError:
            return nothing, memory
        rows = env.data.epochs(1, self.batch_size, env.rng("batch"))[0]
        names = sorted(name for name in down.prompts if block_of(name) is not None)
        here, there = (_operator(env, params, rows, names) for params in (down.prompts, fitted.params))
        size = sum(down.prompts[name].numel() for name in names)
        rng = env.rng("probe")
        theta, omega = spectrum.lanczos(here, size, self.lanczos_steps, rng, self.lanczos_probes)
        lipschitz = spectrum.largest(lambda v: there(v) - here(v), size, self.power_steps, rng)
        if not math.isfinite(lipschitz):
            return nothing, memory
        gap = (
            spectrum.eigengap(theta, omega, lipschitz)
            if self.ratio_rule == "eigengap"
            else spectrum.plateau(theta, omega)
        )
        return Ratio(gap.ratio, gap.usable, lipschitz, gap.low, gap.high, len(env.data)), memory

    def credible(self, down: Prompts, up: Ratio) -> None:
        """Raise RecordError unless the ratio is a share, and one that its rule can give where it is called usable."""
        shares(down, up)
        least, most = spectrum.USABLE if self.ratio_rule == "eigengap" else (0.0, 1.0)
        if up.usable and not least <= up.ratio <= most:
            raise RecordError(f"a usable ratio is {up.ratio}; the rule {self.ratio_rule} gives {least} to {most}")

    def choose_ratio(self, state: State, ups: Mapping[ClientId, Ratio], env: ServerEnv) -> State:
        """The mean of the usable ratios, or `ratio` where they stand for less than half of the examples."""
        usable = [up for up in ups.values() if up.usable]
        behind, total = (sum(up.examples for up in some) for some in (usable, ups.values()))
        ratio, source = self.ratio, "fallback"
        if usable and behind >= USABLE_SHARE * total:
            ratio, source = sum(up.ratio * up.examples for up in usable) / behind, self.ratio_rule
        said = f"{self.ratio_rule} usable on {len(usable)} of {len(ups)} devices ({behind / total:.0%} of examples)"
        note = f"layer ratio: {said}; using {ratio:.3g}"
        return self.chosen(replace(state, ratio=ratio, ratio_from=source, note=note, measured=dict(ups)), env)

    def chosen(self, state: State, env: ServerEnv) -> State:
        """The state with its layers; everything that is shared is cut down to them."""
        every = tree.blocks_of(state.start)
        candidates = every if self.candidate_last or len(every) == 1 else every[:-1]
        count = layer_count(state.ratio, len(every), len(candidates))
        layers = choose_layers(state.scores, count, self.layers_by, candidates, env.rng("layers"))
        prompts = shared(state.prompts if self.keep_warmup else state.start, layers)
        rate = (1.0 if self.server == "fedavgm" else 0.05) if self.server_lr is None else self.server_lr
        return replace(state, prompts=prompts, layers=layers, momentum=drift.Momentum(rate=rate))

    # --- rounds ---

    def round(self) -> tuple[Exchange, ...]:
        """One round over the shared layers."""
        return (Exchange("train", Prompts, Answer, sample(self.cohort), self.send, self.train, self.update, counted),)

    def send(self, state: State, client: ClientId) -> Prompts:
        """w."""
        return Prompts(state.prompts)

    def train(self, down: Prompts, memory: Memory, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Answer, Memory]]:
        """Adam on the shared prompts, and on the client's own in the other layers where it has some."""
        params, trained = dict(down.prompts), None
        if self.unselected != "off":
            others = {name: t for name, t in env.initial().items() if name not in down.prompts}
            params |= tree.overlay(others, memory.local if self.unselected == "local" else {})
        if self.unselected == "frozen":
            trained = frozenset(down.prompts)
        moments = memory.moments if self.device_state == "persist" else None
        fitted = yield ordinary_fit(self, params, env, train=trained, moments=moments)
        mine, rest = split(fitted.params, down.prompts)
        kept = Memory(
            rest if self.unselected == "local" else {},
            fitted.moments if self.device_state == "persist" else Moments(),
        )
        return Answer(mine, len(env.data), fitted.steps, fitted.loss), kept

    def update(self, state: State, ups: Mapping[ClientId, Answer], env: ServerEnv) -> State:
        """One step of the server's optimizer on the shared prompts."""
        steps = {client: drift.Step(up.prompts, up.examples, up.steps) for client, up in ups.items()}
        w, momentum, controls = state.prompts, state.momentum, state.controls
        keep = self.control == "server"
        if self.server == "fedavg":
            prompts: Params = drift.average(steps)
        elif self.server == "fedavgm":
            prompts, momentum = drift.damped_momentum(w, steps, momentum, self.beta)
        elif self.server == "peptao":
            prompts, momentum, controls = drift.peptao(
                w,
                steps,
                momentum,
                controls,
                beta=self.beta,
                drift_weight=self.drift_weight,
                difference=self.momentum_input == "difference",
                keep_controls=keep,
            )
        else:
            share = len(env.cohort) / len(env.clients)
            prompts, momentum, controls = drift.reference(
                w, steps, momentum, controls, lr=self.lr, share=share, keep_controls=keep
            )
        return replace(state, prompts=prompts, momentum=momentum, controls=controls, loss=mean_loss(ups.values()))

    # --- models, and what is told about the choice ---

    def result(self, state: State) -> Params:
        """What a device that joins today would use: P0 where no prompt is shared, nothing there with `off`."""
        if self.unselected == "off" and state.layers:
            return state.prompts
        return tree.overlay(state.start, state.prompts)

    def personal(self, params: Params, memory: Memory) -> Params:
        """The client's own prompts beside the shared ones."""
        return tree.overlay(params, memory.local)

    def choices(self, state: State) -> dict[str, Any]:
        """The layers, their scores, and how the ratio came about."""
        ratios = {client: vars(own) for client, own in state.measured.items()}
        told: dict[str, Any] = {
            "layers": list(state.layers),
            "of_layers": len(state.scores),
            "layers_by": self.layers_by,
            "layer_scores": state.scores.tolist(),
            "scores_mean": "The score is large where a layer hardly tells samples apart; FedPepTAO shares the layers "
            "with the largest scores and leaves the others to the devices.",
            "ratio": state.ratio,
            "ratio_from": state.ratio_from,
            "ratios": ratios,
            "client_scores": {client: own.scores.tolist() for client, own in state.client_scores.items()},
        }
        warnings = [state.note] if state.ratio_from == "fallback" else []
        if state.client_scores and all(own.used < 2 for own in state.client_scores.values()):
            warnings.append("no client has two different rows to score the layers by; using the first layers")
        return told | ({"warning": "; ".join(warnings)} if warnings else {})


def shared(params: Params, layers: tuple[int, ...]) -> dict[str, Tensor]:
    """What travels: the prompts of the chosen layers, and what belongs to no layer (a head)."""
    return tree.in_blocks(params, (None, *layers))


def split(params: Params, like: Params) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The params with the names of `like`, and the others."""
    return tree.select(params, lambda name: name in like), tree.select(params, lambda name: name not in like)


def counted(down: Prompts, up: Answer) -> None:
    """Raise RecordError unless the prompts fit to those sent and the steps can be divided by."""
    matching(down, up)
    if not 1 <= up.steps <= 2**53:
        raise RecordError(f"an answer counts {up.steps} steps; a count lies between 1 and 2^53")


def scored(down: Ask, up: Scores) -> None:
    """Raise RecordError unless there is a score per layer and a count of rows that fits to it."""
    matching(down, up)
    if up.scores.shape != (down.layers,) or up.scores.dtype != torch.float32:
        raise RecordError(f"scores have shape {tuple(up.scores.shape)}; {down.layers} float32 were asked for")
    if not (0 <= up.used <= up.examples and (up.used < 2 or up.examples)):
        raise RecordError(f"scores come from {up.used} rows of {up.examples}")


def shares(down: Prompts, up: Ratio) -> None:
    """Raise RecordError unless the ratio is a share."""
    matching(down, up)
    if not 0 <= up.ratio <= 1:
        raise RecordError(f"a ratio is {up.ratio}; it must lie between 0 and 1")


def _operator(env: ClientEnv, params: Params, rows: Sequence[int], names: Sequence[str]) -> spectrum.Operator:
    """v -> H v on flat float64 vectors over the named parameters."""
    return tree.flat(env.model.hessian(params, env.data, rows, names), {name: params[name] for name in names})


METHOD = FedPepTAO
