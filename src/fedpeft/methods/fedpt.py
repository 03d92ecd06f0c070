"""FedPT: a small model is tuned federatedly, and steers a large one that nobody can open.

FedPT: Federated Proxy-Tuning of Large Language Models on Resource-Constrained Edge Devices, arXiv 2410.00362, on
proxy-tuning (Liu et al. 2024, arXiv 2401.08565). Only the outline of its algorithm could be confirmed from what is
public; what is marked *ours* in this table or under the departures is our choice, and no figure here is FedPT's.

Paper to code

| paper | here |
|---|---|
| the small model that is broadcast | `State.params`, an adapter of the frozen base that every client has |
| 1: broadcast to a random subset of the devices | `send` to `cohort` clients |
| 2: local fine-tuning, several epochs | `train`: `epochs`, `batch_size`, `lr`; loss on the response's tokens alone |
| 3: aggregation | `average`: A and B each a mean, by `weights` (n_k: *ours*) |
| 4: the proxy-tuned large model, z_L + alpha (z_T - z_B) | the teacher in `distilled`; B is the pre-trained model |
| 5: its distillation into the small one | `distilled`: `temperature`, `share`, `distil_epochs`, `distil_lr` (*ours*) |
| what is served | `result`: the aggregate before distillation, unless `serve: post` |

The large model appears in decoding alone (`fedpeft generate`, `fedpeft serve`) and in steps 4 and 5, which need texts
that the server holds (`proxy.public`); without them, or with `distil: false`, this is federated LoRA of the small
model. Clients never see the large model, nor the server their texts.

Departures: the aggregate before distillation is served, since a distilled T already has part of L and z_T - z_B would
count it twice. alpha is chosen on validation texts of the server in every round that distils, never a constant.
A client whose base has another hash than the server's answers with an error and counts as lost.

Traffic per client and round: down = params; up = params
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec, Lora
from fedpeft.core.cohort import sample
from fedpeft.core.errors import ClientError
from fedpeft.core.exchange import ClientEnv, ClientId, Exchange, Nothing, ServerEnv, Update
from fedpeft.core.fit import AdamW, Data, Fit, Fitted
from fedpeft.core.method import Defaults, check_ranges, mean_loss, ordinary_fit
from fedpeft.core.model import Teacher
from fedpeft.core.tree import Params

KINDS = ("lora", "full")  # of adapters whose model can be asked token by token


class Held(Protocol):
    """What the server alone holds: a black box L, validation texts, and perhaps public texts to distil on."""

    @property
    def public(self) -> Data | None:
        """The public texts; None: there are none."""
        ...

    def best_alpha(self, params: Params) -> float:
        """The alpha with which the adapter steers L best on the validation texts."""
        ...

    def teacher(self, params: Params, alpha: float) -> Teacher:
        """z_L + alpha (z_T - z_B) on the public texts, T being the small model with this adapter."""
        ...


@dataclass(frozen=True)
class State:
    """What the server knows."""

    params: Params  # broadcast next
    served: Params  # the aggregate before distillation
    base: str  # sha256 of the small model's frozen weights
    alpha: float | None = None  # of the last teacher; None: nothing was distilled
    loss: float | None = None  # mean training loss of the last cohort; None before the first


@dataclass(frozen=True)
class Weights:
    """The adapter, and the weights that it is for."""

    params: Params
    base: str


@dataclass(frozen=True)
class FedPT(Defaults):
    """Federated proxy-tuning: tune a small model, steer a large one with the difference (arXiv 2410.00362)."""

    cohort: int = 10  # clients per round; 0: all
    epochs: int = 2  # E: passes over a client's rows per round
    batch_size: int = 8  # b: rows per step, of the server's too
    lr: float = 3e-4  # local learning rate of AdamW, whose moments start from zero in every round
    head_lr: float | None = None  # local learning rate of a classification head, where there is one; null: lr
    weight_decay: float = 0.0  # decay of the local optimizer
    clip: float | None = 1.0  # bound on the gradient's norm at every step; null: none
    steps: int | None = None  # local steps per round, instead of whole epochs
    weights: Literal["examples", "uniform"] = "examples"  # of the clients in the mean
    distil: bool = True  # whether the server distils, where it has public texts (proxy.public)
    share: float = 1.0  # lambda: of the teacher in the loss; the rest is the cross-entropy of the public responses
    temperature: float = 1.0  # tau: softens teacher and student alike
    distil_epochs: int = 1  # E_d: passes over the public texts per round
    distil_lr: float | None = None  # lr_d: the server's learning rate; null: a third of lr
    serve: Literal["pre", "post"] = "pre"  # the aggregate before distillation, or what it gave

    state: ClassVar[type[State]] = State

    def __post_init__(self) -> None:
        at_least = {"share": 0, "distil_epochs": 1}
        check_ranges(self, at_least, above={"temperature": 0, "distil_lr": 0}, at_most={"share": 1})

    def adapter(self) -> AdapterSpec:
        """LoRA of rank 8 on all linear layers of the blocks."""
        return Lora(targets=("all",))

    def accepts(self, spec: AdapterSpec) -> str | None:
        """LoRA, or all weights of the small model."""
        if spec.kind in KINDS:
            return None
        return f"method fedpt trains adapter.kind {' or '.join(KINDS)}, not {spec.kind}; leave adapter.kind out"

    def init(self, env: ServerEnv) -> State:
        """The fresh adapter."""
        return State(start := env.initial(), start, env.model.sha256)

    def round(self) -> tuple[Exchange, ...]:
        """One pass of the server's loop."""
        return (Exchange("train", Weights, Update, sample(self.cohort), self.send, self.train, self.average),)

    def send(self, state: State, client: ClientId) -> Weights:
        """Step 1: the adapter."""
        return Weights(state.params, state.base)

    def train(self, down: Weights, memory: Nothing, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Nothing]]:
        """Step 2: local fine-tuning."""
        if down.base != (own := env.model.sha256):
            raise ClientError(
                f"the adapter is for a base with sha256 {down.base[:12]}, and this client has {own[:12]}; give it the "
                "server's model"
            )
        fitted = yield ordinary_fit(self, down.params, env)
        return Update(fitted.params, len(env.data), fitted.loss), memory

    def average(self, state: State, ups: Mapping[ClientId, Update], env: ServerEnv) -> State:
        """Step 3: the mean P = sum_k n_k P_k / sum_k n_k; then steps 4 and 5 where there is something to distil on."""
        even = self.weights == "uniform"
        mean = tree.mean((up.params, 1 if even else up.examples) for up in ups.values())
        found = replace(state, params=mean, served=mean, alpha=None, loss=mean_loss(ups.values()))
        held: Held | None = env.held
        if not self.distil or held is None or held.public is None:
            return found
        alpha = held.best_alpha(mean)
        return replace(found, params=self.distilled(mean, alpha, held, env), alpha=alpha)

    def distilled(self, mean: Params, alpha: float, held: Held, env: ServerEnv) -> Params:
        """Steps 4 and 5: the student begins at P, the teacher has P fixed."""
        public = held.public
        assert public is not None, "there is something to distil on"
        batches = public.epochs(self.distil_epochs, self.batch_size, env.rng("distil"))
        optimizer = AdamW(self.lr / 3 if self.distil_lr is None else self.distil_lr)
        fit = Fit(mean, public, batches, optimizer, clip=self.clip, seed=env.seed_for("distil dropout"))
        return env.model.distil(fit, held.teacher(mean, alpha), self.temperature, self.share).params

    def result(self, state: State) -> Params:
        """The adapter that steers the large model."""
        return state.served if self.serve == "pre" else state.params

    def choices(self, state: State) -> Mapping[str, float]:
        """The alpha of the last teacher."""
        return {} if state.alpha is None else {"teacher_alpha": state.alpha}


METHOD = FedPT
