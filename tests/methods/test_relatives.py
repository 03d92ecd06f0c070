"""Nine methods around FedPepTAO: the adapter that each brings, averaging by hand, and the two with momentum."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny
import toy
from fedpeft import methods
from fedpeft.config.load import adapter_spec, load_config
from fedpeft.core import tree
from fedpeft.core.adapter import (
    ADAPTERS,
    AdapterSpec,
    Bottleneck,
    InstancePrompt,
    LatePrompt,
    MixedPrompt,
    Prefix,
    Prompt,
)
from fedpeft.core.averaging import Averaging
from fedpeft.core.errors import ConfigError, ModelError
from fedpeft.core.exchange import Method, ServerEnv, Update
from fedpeft.core.federate import Done, federate
from fedpeft.engines.inprocess import InProcess
from fedpeft.maths import drift
from fedpeft.methods.adapter import Adapter
from fedpeft.methods.attempt import Attempt
from fedpeft.methods.fedavg import FedAvg
from fedpeft.methods.fedpeptao import FedPepTAO
from fedpeft.methods.fedprompt import FedPrompt
from fedpeft.methods.momd import MomD
from fedpeft.methods.moms_adamd import Memory, MomSAdamD, State
from fedpeft.methods.prompt_tuning import PromptTuning
from fedpeft.methods.ptuning_v2 import PTuningV2

OWN: dict[str, AdapterSpec] = {
    "prompt_tuning": Prompt(length=20, start="vocabulary"),
    "fedprompt": Prompt(length=20, start="normal"),
    "ptuning_v2": Prefix(length=20, blocks=None),
    "adapter": Bottleneck(size=64, norms=True),
    "idpg": InstancePrompt(),
    "attempt": MixedPrompt(length=20, sources=()),
    "lpt": LatePrompt(size=256, block=None),
    "momd": Prefix(length=20, blocks=None),
    "moms_adamd": Prefix(length=20, blocks=None),
}
PARAMETERS = {
    "prompt": {"prompt.tokens"},
    "prefix": {"prefix.0", "prefix.1", "prefix.2"},
    "bottleneck": {
        f"block.{block}.{half}.{part}"
        for block in range(tiny.BLOCKS)
        for half in ("attention", "ffn")
        for part in ("down.weight", "down.bias", "up.weight", "up.bias", "norm.gain", "norm.shift")
    },
    "idpg": {"prompt.down.weight", "prompt.down.bias", "prompt.up.weight", "prompt.up.bias"},
    "attempt": {"prompt.tokens", "prompt.down", "prompt.up", "prompt.norm.weight", "prompt.norm.bias"},
    "lpt": {"late.1.down.weight", "late.1.down.bias", "late.1.up.weight", "late.1.up.bias"},
}  # of a BERT of three blocks, beside the head's
HEAD = {"head.weight", "head.bias"}

A = toy.points((1, 2, 3))
B = toy.points((5, -2, 3), (5, -2, 3), (5, -2, 3))
every = pytest.mark.parametrize("name", list(OWN))


def small(method: Method, spec: AdapterSpec, rounds: int = 2) -> list[Done]:
    """A run over a tiny BERT in float32 with four clients."""
    model = tiny.model("bert", spec, dtype="float32")
    data = {f"c{i}": {"train": tiny.examples(tiny.place(i), 5 + i)} for i in range(4)}
    return list(federate(method, InProcess(lambda: method, model, data, 0), model, rounds=rounds, seed=0))


# --- the adapter of each ---------------------------------------------------------------------------------------------


@every
def test_one_line_of_configuration_gives_the_adapter(name: str) -> None:
    config = load_config({"model": {"name": "demo"}, "task": {"name": "demo"}, "method": {"name": name}})
    assert adapter_spec(config) == OWN[name] == methods.build(name, {}).adapter()


@every
def test_other_kinds_are_refused_with_what_to_use(name: str) -> None:
    method, own = methods.build(name, {}), OWN[name].kind
    assert method.accepts(OWN[name]) is None
    for kind in ADAPTERS.keys() - {own}:
        assert method.accepts(ADAPTERS[kind]()) == (
            f"method {name} trains adapter.kind {own}, not {kind}; leave adapter.kind out, or use method fedavg"
        )


def test_other_sizes_of_its_own_kind_are_accepted_and_leave_the_rest_as_it_was() -> None:
    """FedPrompt stays FedPrompt: a shorter prompt still starts from a normal distribution."""
    config = load_config(
        {"model": {"name": "demo"}, "task": {"name": "demo"}, "method": {"name": "fedprompt"}, "adapter": {"length": 5}}
    )
    assert adapter_spec(config) == Prompt(length=5, start="normal")


@every
def test_what_travels_on_a_bert(name: str, tmp_path: Path) -> None:
    """The parameters that the docstrings name and the head, and all of them are trained."""
    sources = [str(prompt_folder(tmp_path / str(i), seed=i)) for i in range(2)] if name == "attempt" else []
    method = methods.build(name, {"cohort": 2, "steps": 2, **({"sources": sources} if sources else {})})
    done = small(method, method.adapter(), rounds=1)
    start = method.init(fresh(method.adapter())).params
    end = method.result(done[-1].state)
    assert end.keys() == PARAMETERS[OWN[name].kind] | HEAD
    still = {n for n in end if torch.equal(end[n], start[n])}
    assert not still and math.isfinite(done[-1].state.loss)


def fresh(spec: AdapterSpec) -> ServerEnv:
    return ServerEnv(tiny.model("bert", spec, dtype="float32"), ("c0",), 0, 1)


def prompt_folder(folder: Path, seed: int) -> Path:
    """What a run of prompt_tuning leaves behind."""
    folder.mkdir()
    prompt = torch.from_numpy(tiny.place(seed).normal(size=(20, tiny.WIDTH)).astype(np.float32))
    save_file({"prompt_embeddings": prompt}, folder / "adapter_model.safetensors")
    return folder


def test_attempt_needs_sources() -> None:
    assert Attempt(sources=("runs/a", "runs/b")).adapter() == MixedPrompt(sources=("runs/a", "runs/b"))
    with pytest.raises(ModelError, match=r"was given none; train prompts on other tasks .* in method\.sources"):
        tiny.model("bert", Attempt().adapter())


# --- averaging -------------------------------------------------------------------------------------------------------

AVERAGING = [name for name in OWN if issubclass(methods.load(name), Averaging)]


def test_all_but_the_last_share_averaging() -> None:
    assert set(AVERAGING) == OWN.keys() - {"moms_adamd"}


@pytest.mark.parametrize("name", [name for name in AVERAGING if name != "momd"])
def test_the_first_round_by_hand_at_the_rates_of_each(name: str) -> None:
    """AdamW's first step is the sign of the gradient, whatever the clip, and decay has nothing to act on at 0.

    From 0, a with one row at (1, 2, 3) goes to (lr, lr, head_lr), b with three at (5, -2, 3) to (lr, -lr, head_lr):
        w = (lr, (lr - 3 lr) / 4, head_lr)
        loss: a 1/2 (1 + 4 + 9) = 7, b 1/2 (25 + 4 + 9) = 19, together (7 + 3 * 19) / 4 = 16
    """
    method = methods.build(name, {})
    assert isinstance(method, Averaging) and method.head_lr is not None
    done, _ = toy.run(method, {"a": A, "b": B})
    assert toy.vector(done[0].state.params) == pytest.approx([method.lr, -method.lr / 2, method.head_lr], rel=1e-6)
    assert done[0].state.loss == 16.0


def test_it_is_the_averaging_of_fedavg_bit_for_bit() -> None:
    """Cohorts of two of three clients, several batches, decay and clip: the algorithm written out does the same."""
    fields: dict[str, Any] = {"cohort": 2, "epochs": 2, "batch_size": 2, "lr": 0.1, "head_lr": 0.02}
    fields |= {"weight_decay": 0.1, "clip": 1.0}
    data = {"a": A, "b": B, "c": toy.points((0, 0, 8), (1, 1, 1))}
    ours, _ = toy.run(Adapter(**fields), data, rounds=3)
    theirs, _ = toy.run(FedAvg(**fields), data, rounds=3)
    assert [step.cohort for step in ours] == [step.cohort for step in theirs]
    assert toy.vector(ours[-1].state.params) == toy.vector(theirs[-1].state.params)
    assert ours[-1].state.loss == theirs[-1].state.loss


def test_fedprompt_is_prompt_tuning_but_for_the_start() -> None:
    """The adapters differ in one field; from equal numbers both go the same way."""
    ends = [toy.run(method, {"a": A, "b": B}, rounds=2)[0] for method in (FedPrompt(), PromptTuning())]
    assert toy.vector(ends[0][-1].state.params) == toy.vector(ends[1][-1].state.params)
    one, other = vars(FedPrompt().adapter()), vars(PromptTuning().adapter())
    assert [key for key in one if one[key] != other[key]] == ["start"]


@pytest.mark.parametrize("method", [PTuningV2(), MomSAdamD()])
def test_the_device_is_that_of_fedpeptao(method: PTuningV2 | MomSAdamD) -> None:
    """As the docstrings say."""
    for field in ("lr", "head_lr", "weight_decay", "clip"):
        assert getattr(method, field) == getattr(FedPepTAO(), field)


def test_p_tuning_v2_is_fedpeptao_with_all_layers_and_averaging_bit_for_bit() -> None:
    """At the defaults of both, dropout included; only the epochs are made equal."""
    options: dict[str, Any] = {"cohort": 3, "epochs": 2, "batch_size": 4}
    everything = FedPepTAO(**options, ratio_rule="fixed", ratio=1.0, layers_by="first", server="fedavg")
    theirs = everything.result(small(everything, Prefix())[-1].state)
    ours = small(PTuningV2(**options), Prefix())[-1].state.params
    assert ours.keys() == PARAMETERS["prefix"] | HEAD
    assert tree.sha256(ours) == tree.sha256(theirs)


# --- momentum on the device ------------------------------------------------------------------------------------------


def test_momentum_on_the_device_starts_anew_in_every_round() -> None:
    """One client at (1, 2, 3), two steps a round, lr 1/2, on the head 1/4: b <- b/2 + g, w <- w - lr b.

    Round 1: g = (-1, -2, -3), b = g, w = (1/2, 1, 3/4); g = (-1/2, -1, -9/4), b = (-1, -2, -15/4), w = (1, 2, 27/16)
    Round 2, of which the body is at its optimum: b = 0 there, so it stays; it would move had b lived on.
        head: g = -21/16, b = g, w = 27/16 + 21/64 = 129/64; g = -63/64, b = -21/32 - 63/64 = -105/64,
        w = 129/64 + 105/256 = 621/256
    """
    method = MomD(lr=0.5, head_lr=0.25, momentum=0.5, clip=None, steps=2)
    done, _ = toy.run(method, {"a": A}, rounds=2)
    assert toy.vector(done[0].state.params) == [1.0, 2.0, 27 / 16]
    assert toy.vector(done[1].state.params) == [1.0, 2.0, 621 / 256]


def test_momentum_on_the_device_is_averaged_by_examples() -> None:
    """One step from 0, in which momentum has no part: a (1/2, 1, 3/2), b (5/2, -1, 3/2), (a + 3 b) / 4."""
    done, _ = toy.run(MomD(lr=0.5, head_lr=None, clip=None), {"a": A, "b": B})
    assert toy.vector(done[0].state.params) == [2.0, -0.5, 1.5]


def test_decay_and_clip_of_momentum_on_the_device() -> None:
    """Norm 13 clipped to 6.5, as in test_fedavg; from (10, 0, 0) at its optimum decay 1/5 takes 1/2 * 2 away."""
    done, _ = toy.run(MomD(lr=0.5, head_lr=0.25, clip=6.5), {"a": toy.points((3, 4, 12))})
    assert toy.vector(done[0].state.params) == pytest.approx([0.75, 1.0, 1.5], rel=1e-6)
    decayed, _ = toy.run(MomD(lr=0.5, clip=None, weight_decay=0.2), {"a": toy.points((10, 0, 0))}, 1, (10, 0, 0))
    assert toy.vector(decayed[0].state.params) == pytest.approx([9.0, 0.0, 0.0])


@pytest.mark.parametrize("value", [1.0, -0.1, math.nan])
def test_momentum_has_its_range(value: float) -> None:
    with pytest.raises(ConfigError, match=re.escape("method.momentum is ")):
        MomD(momentum=value)


# --- momentum on the server, Adam on the device ----------------------------------------------------------------------


def scalar(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value], dtype=torch.float64)}


def test_two_rounds_of_the_servers_momentum() -> None:
    """v <- .9 v + .1 (w - wbar), w <- w - v.

    Round 1 from w = 1: wbar = (3 * .6 + 1 * .2) / 4 = .5, v = .1 * .5 = .05, w = .95; loss (3 * 1 + 1 * 5) / 4 = 2
    Round 2, a alone at .75: v = .9 * .05 + .1 * .2 = .065, w = .885
    """
    method, env = MomSAdamD(), ServerEnv(toy.ToyModel(), ("a", "b"), 0, 2)
    state = State(scalar(1.0), drift.Momentum(rate=method.server_lr))
    ups: Mapping[str, Update] = {"a": Update(scalar(0.6), 3, 1.0), "b": Update(scalar(0.2), 1, 5.0)}
    state = method.update(state, ups, env)
    assert (float(state.params["w"]), float(state.momentum.v["w"])) == pytest.approx((0.95, 0.05))
    assert state.loss == 2.0
    state = method.update(state, {"a": Update(scalar(0.75), 3, 0.0)}, env)
    assert (float(state.params["w"]), float(state.momentum.v["w"])) == pytest.approx((0.885, 0.065))


class Device:
    """Adam with decoupled decay (Loshchilov & Hutter 2019, Algorithm 2), whose m, v and t live on."""

    def __init__(self, row: Sequence[float]) -> None:
        self.row = np.array(row, dtype=np.float64)
        self.t, self.m, self.v = 0, np.zeros(3), np.zeros(3)

    def turn(self, w: np.ndarray, steps: int, rates: np.ndarray, decay: float, clip: float) -> np.ndarray:
        for _ in range(steps):
            g = w - self.row
            g = g * min(1.0, clip / (float(np.linalg.norm(g)) + 1e-6))
            self.t += 1
            self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
            step = (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
            w = w - rates * decay * w - rates * step
        return w


def test_three_rounds_with_moments_that_stay_on_the_device() -> None:
    """Against numpy: both clients in every round, two steps each, another rate for the head, clip and decay at work."""
    method = MomSAdamD(server_lr=0.5, beta=0.8, lr=0.1, head_lr=0.3, weight_decay=0.1, clip=2.0, steps=2)
    done, engine = toy.run(method, {"a": A, "b": B}, rounds=3)
    devices = {"a": Device((1, 2, 3)), "b": Device((5, -2, 3))}
    w, momentum, rates = np.zeros(3), np.zeros(3), np.array([0.1, 0.1, 0.3])
    for step in done:
        answers = {client: device.turn(w, 2, rates, 0.1, 2.0) for client, device in devices.items()}
        momentum = 0.8 * momentum + 0.2 * (w - (answers["a"] + 3 * answers["b"]) / 4)
        w = w - 0.5 * momentum
        assert toy.vector(step.state.params) == pytest.approx(w, abs=1e-12)
        assert toy.vector(step.state.momentum.v) == pytest.approx(momentum, abs=1e-12)
    for client, device in devices.items():
        moments = engine.memories.load(client, done[-1].versions[client], Memory).moments
        assert moments.step == device.t == 6
        assert toy.vector(moments.first) == pytest.approx(device.m, abs=1e-12)
        assert toy.vector(moments.second) == pytest.approx(device.v, abs=1e-12)


def test_moments_count_a_clients_own_turns() -> None:
    """Cohorts of one of two clients: three steps a turn, and nobody has a memory before the first."""
    done, engine = toy.run(MomSAdamD(cohort=1, steps=3), {"a": A, "b": B}, rounds=5)
    turns = [client for step in done for client in step.cohort]
    assert set(turns) == {"a", "b"} and len(turns) == 5
    for client in set(turns):
        memory = engine.memories.load(client, done[-1].versions[client], Memory)
        assert memory.moments.step == 3 * turns.count(client)
    assert done[0].versions.keys() == set(done[0].cohort)


def test_without_momentum_the_server_averages() -> None:
    """beta 0 and rate 1: w - (w - wbar), which is the mean to rounding; in round 1 moments are fresh, as in FedAvg."""
    ours, _ = toy.run(MomSAdamD(beta=0.0), {"a": A, "b": B})
    theirs, _ = toy.run(PTuningV2(), {"a": A, "b": B})
    assert toy.vector(ours[0].state.params) == pytest.approx(toy.vector(theirs[0].state.params), abs=1e-15)


def test_ranges_of_the_server() -> None:
    with pytest.raises(ConfigError) as caught:
        MomSAdamD(beta=1.0, server_lr=0.0)
    assert list(caught.value.problems) == [
        "method.beta is 1.0; it must be at least 0 and below 1",
        "method.server_lr is 0.0; it must be finite and above 0",
    ]
