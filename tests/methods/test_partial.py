"""Methods that train a part of what there is: personal layers (FedAlt, FedSim) and sparse weights (SLoRA)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from fedpeft.core import pairs, tree
from fedpeft.core.adapter import Lora, Prefix
from fedpeft.core.errors import ConfigError
from fedpeft.core.exchange import ClientEnv, ServerEnv, Update, Weights
from fedpeft.core.federate import Done, federate
from fedpeft.core.tree import block_of
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.fedalt import FedAlt, Memory
from fedpeft.methods.slora import SLora, State, scattered, under_mask
from turns import turn

SAME: dict[str, Any] = {"cohort": 3, "epochs": 1, "batch_size": 4, "lr": 5e-3}


def run(method: Any, rounds: int = 4, spec: Any = None) -> tuple[list[Done], InProcess, Any]:
    model = tiny.model("bert", spec or Lora(rank=4, alpha=6.0), "float32")
    data = {f"c{i}": {"train": tiny.examples(tiny.place(i), 9 + i)} for i in range(5)}
    engine = InProcess(lambda: method, model, data, 0)
    return list(federate(method, engine, model, rounds=rounds, seed=0)), engine, model


# --- FedAlt and FedSim ------------------------------------------------------------------------------------------------


def test_lower_blocks_travel_and_upper_ones_stay() -> None:
    """Of three blocks the lowest is shared; `personal_from` moves the border."""
    method = FedAlt(**SAME)
    done, engine, model = run(method)
    state, start = done[-1].state, model.init(tiny.rng_for(0, "adapter"))
    assert state.layers == (0,) and {block_of(name) for name in state.shared} == {0, None}
    for client, version in done[-1].versions.items():
        memory = engine.memories.load(client, version, Memory)
        assert {block_of(name) for name in memory.local} == {1, 2}
        own = method.personal(method.result(state), memory)
        assert own.keys() == start.keys() and all(torch.equal(own[n], t) for n, t in memory.local.items())
    fresh = {name: t for name, t in method.result(state).items() if block_of(name) in (1, 2)}
    assert all(torch.equal(t, start[name]) for name, t in fresh.items())
    env = ServerEnv(model, ("a",), 0, 1)
    assert FedAlt(personal_from=2).init(env).layers == (0, 1) and FedAlt(personal_from=0).init(env).layers == ()
    with pytest.raises(ConfigError, match=r"method\.personal_from is -1"):
        FedAlt(personal_from=-1)
    with pytest.raises(ConfigError, match=r"method\.personal_from is 3; it must be at most 2: .* nothing would be"):
        FedAlt(personal_from=3).init(env)
    assert method.personalised and "not prefix" in str(method.accepts(Prefix()))


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_whose_turn_it_is(updates: Any) -> None:
    """Alternating: first the client's own with the shared ones frozen, then the reverse; simultaneous: all at once."""
    method = FedAlt(**SAME, updates=updates)
    model = tiny.model("bert", Lora(rank=4), "float32")
    here = ClientEnv("a", model, {"train": tiny.examples(tiny.place(1), 9)}, 0, 3, 1, "train")
    down = method.send(method.init(ServerEnv(model, ("a",), 0, 3)), "a")
    fits, up, memory = turn(method, down, here)
    assert isinstance(down, Weights) and up.params.keys() == down.params.keys()
    own = here.initial().keys() - down.params.keys()
    names = [set(fit.trained) for fit in fits]
    assert names == ([set(own), set(down.params)] if updates == "alternating" else [set(here.initial())])
    if updates == "alternating":
        assert fits[0].batches != fits[1].batches
        assert all(torch.equal(fits[1].params[name], memory.local[name]) for name in own)
    later = turn(method, down, here, memory).fits[0].params
    assert all(torch.equal(later[name], memory.local[name]) for name in own), "its own layers go on where they were"
    assert all(torch.equal(later[name], t) for name, t in down.params.items())


@pytest.mark.parametrize(
    ("method", "round", "parts"),
    [
        (FedAlt(), 1, ("shared",)),
        (SLora(stage_rounds=2), 1, ("values", "params")),
        (SLora(stage_rounds=2), 3, ("params",)),
    ],
    ids=["fedalt", "slora-1", "slora-2"],
)
def test_every_mean_is_weighted_by_examples(method: Any, round: int, parts: tuple[str, ...]) -> None:
    """Of clients with 1 and 3 rows the numbers 2 and 6 give 5, whatever it is that travels."""
    env = ServerEnv(tiny.model("bert", dtype="float32"), ("a", "b"), 0, 4, round=round)
    state = method.init(env)
    if round == 3:
        state = replace(state, values={})
    sent = method.send(state, "a").params
    told = (("a", 2.0, 1), ("b", 6.0, 3))
    ups = {c: Update({name: torch.full_like(t, x) for name, t in sent.items()}, n, 1.0) for c, x, n in told}
    found = tree.overlay(*(getattr(method.average(state, ups, env), part) for part in parts))
    assert all(bool((found[name] == 5).all()) for name in sent)


# --- SLoRA ------------------------------------------------------------------------------------------------------------


def test_stage_one_trains_a_common_sparse_part_and_sends_its_numbers() -> None:
    method = SLora(**SAME, stage_rounds=2, density=0.02, stage_lr=1e-2)
    done, _, model = run(method)
    count = math.ceil(0.02 * tiny.WIDTH**2)
    first = done[0].state
    assert {len(t) for t in first.values.values()} == {count} and len(first.values) == 2 * tiny.BLOCKS
    numbers = 2 * tiny.BLOCKS * count + 3 * tiny.WIDTH + 3
    for receipt in done[0].receipts:
        assert 4 * numbers < receipt.bytes_down < 4 * numbers + 1500 > receipt.bytes_up - 4 * numbers
    delta = {name: t for name, t in method.result(first).items() if name.startswith("delta.")}
    for stem in pairs.stems(model.init(tiny.place())):
        places = under_mask(0, stem, (tiny.WIDTH, tiny.WIDTH), 0.02)
        flat = delta[f"delta.{stem}.dense"].flatten()
        assert bool(flat[places].any()) and not np.delete(flat.numpy(), places.numpy()).any()
    assert not done[1].state.values, "the second round is the last of stage 1"
    assert done[-1].state.params.keys() == model.init(tiny.place()).keys()
    assert done[-1].state.loss < done[0].state.loss


def test_a_stage_has_its_own_rate_and_goes_on_from_what_was_sent() -> None:
    """In stage 1 the numbers under the mask start at the server's, and they and the head alone may change."""
    method = SLora(**SAME, stage_rounds=2, density=0.02, stage_lr=0.25)
    model = tiny.model("bert", Lora(rank=4, alpha=6.0), "float32")
    here = ClientEnv("a", model, {"train": tiny.examples(tiny.place(1), 9)}, 0, 8, 2, "train")
    state = method.init(ServerEnv(model, ("a",), 0, 8))
    drawn = {name: 0.01 * torch.arange(1.0, len(t) + 1) for name, t in state.values.items()}
    down = method.send(replace(state, values=drawn), "a")
    (fit,), up, _ = turn(method, down, here)
    assert fit.optimizer.lr == 0.25 and not fit.rates
    for stem in state.widths:
        places = under_mask(0, stem, (tiny.WIDTH, tiny.WIDTH), 0.02)
        change, mask = fit.params[f"delta.{stem}.dense"].flatten(), (fit.mask or {})[f"delta.{stem}.dense"].flatten()
        assert torch.equal(change[places], drawn[f"values.{stem}"]) and int((change != 0).sum()) == len(places)
        assert bool((mask[places] == 1).all()) and int(mask.sum()) == len(places)
    assert fit.params.keys() - {f"delta.{stem}.dense" for stem in state.widths} == pairs.others(state.params).keys()
    assert up.params.keys() == down.params.keys()
    (later,), _, _ = turn(method, method.send(replace(state, values={}), "a"), here)
    assert later.optimizer.lr == SAME["lr"] and later.mask is None and later.params.keys() == state.params.keys()


def test_components_that_the_change_does_not_have_stay_as_they_were_drawn() -> None:
    """Where there is no singular value, B is zero and A fresh: rows of zeros on both sides would never train."""
    model = tiny.model("bert", Lora(rank=4, alpha=6.0), "float32")
    env = ServerEnv(model, ("a",), 0, 8, round=4)
    method = SLora(stage_rounds=4, density=0.05)
    state = method.init(env)
    nothing = Update({**state.values, **pairs.others(state.params)}, 5, 1.0)
    end = method.average(state, {"a": nothing}, env)
    for stem in state.widths:
        assert torch.equal(end.params[f"{stem}.A"], state.params[f"{stem}.A"]) and not end.params[f"{stem}.B"].any()


def test_factors_start_from_the_best_approximation_of_the_change() -> None:
    """At full rank the model is the same; at a lower one the error is the tail of the singular values."""
    for rank in (4, 32):
        spec = Lora(rank=rank, alpha=1.5 * rank, targets=("query",), blocks=(0,))
        model = tiny.model("bert", spec, "float32")
        env = ServerEnv(model, ("a",), 3, 8, round=4)
        method = SLora(stage_rounds=4, density=0.2)
        state = method.init(env)
        (name,) = state.values
        draw = torch.from_numpy(tiny.place(2).normal(size=state.values[name].shape)).float()
        answer = Update({name: draw, **pairs.others(state.params)}, 5, 1.0)
        sparse = method.result(State(state.params, {name: draw}, state.widths, 3))
        end = method.average(state, {"a": answer}, env)
        assert not end.values
        change = sparse["delta.block.0.query.dense"].double().numpy()
        b, a = (end.params[f"block.0.query.{side}"].double().numpy() for side in "BA")
        tail = np.linalg.svd(change, compute_uv=False)[rank:]
        assert np.linalg.norm(1.5 * b @ a - change) == pytest.approx(np.linalg.norm(tail), abs=1e-4)
        assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a), rel=1e-4), "they share the singular values"
        if rank == 32:
            data = tiny.examples(tiny.place(1), 5)
            same = model.logits(method.result(end), data)
            assert torch.allclose(same, model.logits(sparse, data), atol=1e-4)


def test_when_stage_one_ends() -> None:
    assert [SLora(stage_rounds=10).last_sparse(rounds) for rounds in (1, 2, 9, 40)] == [0, 1, 4, 10]
    model = tiny.model("bert", dtype="float32")
    assert not SLora().init(ServerEnv(model, ("a",), 0, 1)).values, "a single round is stage 2"
    warm = tiny.model("bert", dtype="float32")
    warm.warm_start({name: t.float() for name, t in tiny.params(warm, tiny.place()).items()})
    assert not SLora().init(ServerEnv(warm, ("a",), 0, 9)).values, "an adapter that has learnt needs no start"
    with pytest.raises(ConfigError, match=r"method\.density is 2"):
        SLora(density=2.0)


def test_masks_are_of_their_seed_and_place() -> None:
    one, same, other = (under_mask(seed, "block.0.query", (8, 9), 0.1) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and len(one.unique()) == math.ceil(7.2)
    dense = scattered(torch.tensor([1.0, 2.0]), torch.tensor([0, 5]), (2, 3))
    assert dense.tolist() == [[1, 0, 0], [0, 0, 2]] and tree.count({"a": dense}) == 6
