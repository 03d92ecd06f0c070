"""The federated LoRA family: what each method trains, sends and combines, with the specification's golden values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from fedpeft import methods
from fedpeft.core import pairs, tree
from fedpeft.core.adapter import Lora, Prefix
from fedpeft.core.changes import Copy
from fedpeft.core.errors import ConfigError, RecordError
from fedpeft.core.exchange import ClientEnv, Method, ServerEnv, Update
from fedpeft.core.federate import Done, federate
from fedpeft.core.tree import Params
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.fedavg import FedAvg
from fedpeft.methods.fedex_lora import FedExLora
from fedpeft.methods.fedsa_lora import FedSALora, Memory
from fedpeft.methods.ffa_lora import FFALora
from fedpeft.methods.flexlora import FlexLora
from fedpeft.methods.flora import Broadcast, FLora, stacked
from fedpeft.methods.hetlora import HetLora
from fedpeft.methods.lora_fair import LoraFair
from fedpeft.methods.rolora import RoLora
from fedpeft.planner.device import Profile
from turns import turn

SLOT, OWN = "block.0.query", {"head.weight": torch.zeros(1, 1), "head.bias": torch.zeros(1)}
SPEC = Lora(rank=4, alpha=6.0)
C = 1.5  # alpha / rank
FAMILY = ("ffa_lora", "fedsa_lora", "rolora", "flora", "flexlora", "hetlora", "fedex_lora", "lora_fair")


class Bound:
    """Enough of a model for a server: an adapter of rank 4 on one slot of 6 x 5."""

    spec = SPEC
    blocks = 1

    def init(self, rng: Any) -> dict[str, Tensor]:
        return {f"{SLOT}.A": torch.ones(4, 5).double(), f"{SLOT}.B": torch.zeros(6, 4).double(), **OWN}


def golden(ranks: tuple[int, ...] = (2, 2, 2)) -> dict[str, Update]:
    """Answers of clients with 1, 2 and 5 examples."""
    ups = {}
    for k, (rank, n) in enumerate(zip(ranks, (1, 2, 5), strict=True)):
        a = [[((3 * i * i + 7 * j + 5 * k * (i + 1) + 1) % 11) / 10 - 0.5 for j in range(5)] for i in range(rank)]
        b = [[((2 * i * i + 5 * j + 3 * k * (i + 1) + 4) % 13) / 12 - 0.5 for j in range(rank)] for i in range(6)]
        factors = {f"{SLOT}.A": torch.tensor(a).double(), f"{SLOT}.B": torch.tensor(b).double()}
        ups[f"c{k}"] = Update({**factors, **OWN}, n, 1.0)
    return ups


def product(params: Params) -> Any:
    """B A as numpy has it."""
    return params[f"{SLOT}.B"].numpy() @ params[f"{SLOT}.A"].numpy()


def target(ups: Mapping[str, Update]) -> Any:
    return sum(up.examples / 8 * product(up.params) for up in ups.values())


def error(got: Any, wanted: Any) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def env(**more: Any) -> ServerEnv:
    return ServerEnv(Bound(), ("c0", "c1", "c2"), 0, 10, **more)  # type: ignore[arg-type]


def ranked(rank: int) -> ServerEnv:
    class Other(Bound):
        spec = replace(SPEC, rank=rank, alpha=C * rank)

        def init(self, rng: Any) -> dict[str, Tensor]:
            return {f"{SLOT}.A": torch.ones(rank, 5).double(), f"{SLOT}.B": torch.zeros(6, rank).double(), **OWN}

    return replace(env(), model=Other())  # type: ignore[arg-type]


# --- servers ----------------------------------------------------------------------------------------------------------


def test_golden_errors_of_the_servers() -> None:
    """Relative distance to the mean of the products, of what each server makes of the same answers."""
    ups, wanted = golden(), target(golden())
    fedit = FedAvg().average(FedAvg().init(ranked(2)), ups, env()).params
    assert error(product(fedit), wanted) == pytest.approx(0.7276248, abs=1e-6)
    for ridge, expected in {0.0: 0.4757494, 0.01: 0.4764938, 0.1: 0.5098814, 1.0: 0.6579703}.items():
        fair = LoraFair(ridge=ridge).average(LoraFair().init(ranked(2)), ups, env()).params
        assert error(product(fair), wanted) == pytest.approx(expected, abs=1e-6) and expected < 0.7276248
        assert torch.equal(fair[f"{SLOT}.A"], fedit[f"{SLOT}.A"])
    for rank, expected in {1: 0.4909673, 2: 0.2239416, 4: 0.0419312, 5: 0.0}.items():
        flex = FlexLora().average(FlexLora().init(ranked(rank)), ups, ranked(rank)).params
        assert error(product(flex), wanted) == pytest.approx(expected, abs=1e-6)


def test_lora_fair_by_the_papers_objective() -> None:
    """The angle to M is the least that B can reach over the same Ā; the length of M is not kept."""
    ups, wanted = golden(), target(golden())
    means = {kind: LoraFair(objective=kind, ridge=0.0) for kind in ("squared", "cosine")}  # type: ignore[arg-type]
    done = {kind: method.average(method.init(ranked(2)), ups, env()).params for kind, method in means.items()}
    plain = product(FedAvg().average(FedAvg().init(ranked(2)), ups, env()).params)
    angle = {kind: cosine(product(params), wanted) for kind, params in done.items()}
    assert angle["cosine"] == pytest.approx(angle["squared"], abs=1e-6), "the nearest product has the least angle"
    assert angle["cosine"] > cosine(plain, wanted) + 0.1
    assert torch.equal(done["cosine"][f"{SLOT}.A"], done["squared"][f"{SLOT}.A"])
    assert not np.allclose(product(done["cosine"]), product(done["squared"]), rtol=0.01)
    small = LoraFair(objective="cosine", ridge=0.1)
    kept = small.average(small.init(ranked(2)), ups, env()).params
    moved = [float((p[f"{SLOT}.B"] - tree_mean(ups)).norm()) for p in (kept, done["cosine"])]
    assert 0 < moved[0] < moved[1]


def tree_mean(ups: Mapping[str, Update]) -> Tensor:
    """B̄."""
    return tree.mean((up.params, up.examples) for up in ups.values())[f"{SLOT}.B"]


def cosine(x: Any, y: Any) -> float:
    return float((x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y)))


def test_golden_norms_of_hetlora() -> None:
    ups = golden((1, 2, 4))
    state = HetLora().average(HetLora().init(env()), ups, env())
    weights = np.array([0.1998183, 0.3528530, 0.4473286])
    own = sum(w * product(up.params) for w, up in zip(weights, ups.values(), strict=True))
    assert error(product(state.params), own) == pytest.approx(0.7596213, abs=1e-6)


def test_hetlora_with_equal_norms_is_a_plain_mean_and_keeps_rows_that_nobody_trained() -> None:
    up = golden()["c0"].params
    turned = {name: -t if name.endswith("A") else t for name, t in up.items()}
    both = {"a": Update(up, 1, 0.0), "b": Update(turned, 7, 0.0)}
    state = HetLora().average(HetLora().init(env()), both, env())
    a, b = state.params[f"{SLOT}.A"], state.params[f"{SLOT}.B"]
    assert not a[:2].any() and torch.allclose(b[:, :2], up[f"{SLOT}.B"]), "halves, not eighths"
    assert torch.equal(a[2:], torch.ones(2, 5).double()) and not b[:, 2:].any()


def test_stacked_factors_and_residuals_are_exact() -> None:
    """FLoRA: c B_s A_s = c M, of the summed rank. FedEx-LoRA: the change and c B̄ Ā together are c M."""
    ups, wanted = golden((1, 2, 4)), target(golden((1, 2, 4)))
    flora = FLora().stack(FLora().init(env()), ups, env())
    delta = FLora().result(flora)
    left, right = (flora.changed.total.get(f"delta.{SLOT}.{side}") for side in ("left", "right"))
    assert left is None and right is None, "rank 7 of a 6 x 5 matrix is dense"
    assert np.allclose(delta[f"delta.{SLOT}.dense"].numpy(), C * wanted, atol=1e-12)
    assert delta.keys() == {f"delta.{SLOT}.dense", *OWN}
    two = golden()
    ex = FedExLora().average(FedExLora().init(ranked(2)), two, ranked(2))
    change = ex.changed.total[f"delta.{SLOT}.dense"].numpy()
    assert np.allclose(change + C * product(ex.params), C * target(two), atol=1e-12)
    alone = FedExLora().average(FedExLora().init(ranked(2)), {"c0": two["c0"]}, ranked(2))
    step = FedExLora().result(alone)
    parts = step.get(f"delta.{SLOT}.dense", torch.zeros(6, 5).double()).numpy()
    if f"delta.{SLOT}.left" in step:
        parts = step[f"delta.{SLOT}.left"].numpy() @ step[f"delta.{SLOT}.right"].numpy()
    assert np.allclose(parts, 0, atol=1e-12), "one client has no residual"


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "fedsa_lora"])
def test_the_head_is_the_mean_by_examples(name: str) -> None:
    """Of clients with 1, 2 and 5 examples the heads 1, 2 and 4 give 25 / 8."""
    method: Any = methods.load(name)()
    (exchange,), state, ups = method.round(), method.init(ranked(2)), {}
    sides = "B" if name in ("ffa_lora", "rolora") else "AB"
    for (client, up), value in zip(golden().items(), (1.0, 2.0, 4.0), strict=True):
        head = {own: torch.full_like(t, value) for own, t in OWN.items()}
        ups[client] = replace(up, params={**pairs.factors(up.params, sides), **head})
    result = method.result(exchange.fold(state, ups, ranked(2)))
    assert [result[own].item() for own in OWN] == [25 / 8, 25 / 8]


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_come_from_the_method_from_devices_or_from_the_adapter() -> None:
    assert FlexLora().init(env()).ranks == {"c0": 4, "c1": 4, "c2": 4}
    devices = {"c0": Profile(rank=1), "c1": Profile()}
    assert FlexLora().init(env(resources=devices)).ranks == {"c0": 1, "c1": 4, "c2": 4}
    dealt = FlexLora(ranks=(1, 2)).init(replace(env(resources=devices), clients=tuple(map(str, range(40))))).ranks
    assert set(dealt.values()) == {1, 2} and 10 < list(dealt.values()).count(1) < 30
    more = FlexLora(ranks=(1, 2)).init(replace(env(), clients=tuple(map(str, range(41))))).ranks
    assert all(more[client] == rank for client, rank in dealt.items()), "a newcomer changes nobody's rank"
    with pytest.raises(ConfigError, match=r"method.ranks gives rank 9, and adapter.rank is 4; raise adapter.rank to 9"):
        HetLora(ranks=(9,)).init(env())
    with pytest.raises(ConfigError, match="device of c1 gives rank 8"):
        FLora().init(env(resources={"c1": Profile(rank=8)}))
    with pytest.raises(ConfigError, match="every rank must be at least 1"):
        HetLora(ranks=(2, 0))


@pytest.mark.parametrize("method", [FlexLora(ranks=(1, 3)), HetLora(ranks=(1, 3)), FLora(ranks=(1, 3))])
def test_clients_train_their_own_rank(method: Any) -> None:
    done, engine, _ = small(method)
    ranks = done[-1].state.ranks
    assert set(ranks.values()) == {1, 3}
    for call in engine.calls:
        for client, up in call.items():
            assert set(pairs.ranks(up.params).values()) == {ranks[client]}


# --- runs over a tiny BERT --------------------------------------------------------------------------------------------


class Watched(InProcess):
    """Keeps what clients answered."""

    calls: list[dict[str, Any]]

    def exchange(self, call: Any, downs: Any) -> Any:
        answers = super().exchange(call, downs)
        self.__dict__.setdefault("calls", []).append(dict(answers.ups))
        return answers


def small(method: Method, rounds: int = 3, dtype: str = "float32") -> tuple[list[Done], Any, Any]:
    model = tiny.model("bert", SPEC, dtype)
    data = {f"c{i}": {"train": tiny.examples(tiny.place(i), 5 + i)} for i in range(6)}
    engine = Watched(lambda: method, model, data, 0)
    return list(federate(method, engine, model, rounds=rounds, seed=0)), engine, model


def mean_product(ups: Mapping[str, Update], stem: str) -> Tensor:
    total = sum(up.examples for up in ups.values())
    parts = [
        up.examples / total * up.params[f"{stem}.B"].double() @ up.params[f"{stem}.A"].double() for up in ups.values()
    ]
    return torch.stack(parts).sum(dim=0)


def test_ffa_lora_means_are_exact_and_a_never_moves() -> None:
    done, engine, model = small(FFALora(cohort=3, lr=0.01))
    start = model.init(tiny.rng_for(0, "adapter"))
    for step, ups in zip(done, engine.calls, strict=True):
        assert all(name.endswith(".B") or name.startswith("head") for up in ups.values() for name in up.params)
        for stem in pairs.stems(start):
            a = start[f"{stem}.A"]
            assert torch.equal(step.state.params[f"{stem}.A"], a)
            whole = {c: replace(up, params={**up.params, f"{stem}.A": a}) for c, up in ups.items()}
            got = step.state.params[f"{stem}.B"].double() @ a.double()
            assert torch.allclose(got, mean_product(whole, stem), atol=1e-6)
    assert tree.count(pairs.factors(start, "B")) * 2 == tree.count(pairs.factors(start))


def test_rolora_takes_turns_and_every_mean_is_exact() -> None:
    done, engine, model = small(RoLora(cohort=3, lr=0.01), rounds=4)
    before = model.init(tiny.rng_for(0, "adapter"))
    for number, (step, ups) in enumerate(zip(done, engine.calls, strict=True)):
        side, other = ("B", "A") if number % 2 == 0 else ("A", "B")
        assert step.state.side == other
        for stem in pairs.stems(before):
            fixed = before[f"{stem}.{other}"]
            assert torch.equal(step.state.params[f"{stem}.{other}"], fixed)
            assert not torch.equal(step.state.params[f"{stem}.{side}"], before[f"{stem}.{side}"])
            whole = {c: replace(up, params={**up.params, f"{stem}.{other}": fixed}) for c, up in ups.items()}
            own = step.state.params
            got = own[f"{stem}.B"].double() @ own[f"{stem}.A"].double()
            assert torch.allclose(got, mean_product(whole, stem), atol=1e-6)
        before = step.state.params


def test_fedsa_lora_sends_a_and_keeps_the_rest() -> None:
    method = FedSALora(cohort=3, lr=0.01)
    done, engine, model = small(method)
    assert all(name.endswith(".A") for ups in engine.calls for up in ups.values() for name in up.params)
    result, start = method.result(done[-1].state), model.init(tiny.rng_for(0, "adapter"))
    assert not any(t.any() for name, t in result.items() if name.endswith(".B")), "the global model is the base"
    for client, version in done[-1].versions.items():
        memory = engine.memories.load(client, version, Memory)
        assert memory.local.keys() == pairs.others(start, "A").keys()
        own = method.personal(result, memory)
        assert own.keys() == start.keys() and all(t.any() for name, t in own.items() if name.endswith(".B"))
    assert method.personalised and not FFALora().personalised


@pytest.mark.parametrize("method", [FLora(cohort=3, lr=0.01, head_lr=3e-3), FedExLora(cohort=3, lr=0.01, head_lr=3e-3)])
def test_every_client_has_the_servers_delta_to_the_bit(method: Any) -> None:
    """Whoever answered in the last round has what the server had before it."""
    done, engine, _ = small(method, rounds=5)
    for client in engine.calls[-1]:
        copy = engine.memories.load(client, done[-1].versions[client], Copy)
        assert copy.version == 4 and tree.sha256(copy.total) == tree.sha256(done[-2].state.changed.total)
    assert done[-1].state.changed.version == 5
    assert done[-1].state.loss < done[0].state.loss


@pytest.mark.parametrize("method", [FLora(cohort=0, lr=0.01), FedExLora(cohort=0, lr=0.01)])
def test_the_global_model_is_the_mean_of_the_clients_models(method: Any) -> None:
    """W + delta + c B A, slot by slot, from what the clients sent: exact to rounding, in every round."""
    done, engine, model = small(method, rounds=3, dtype="float64")
    total = {stem: torch.zeros(tiny.WIDTH, tiny.WIDTH).double() for stem in pairs.stems(model.init(tiny.place()))}
    for step, ups in zip(done, engine.calls, strict=True):
        result = method.result(step.state)
        for stem in total:
            expected = total[stem] + C * mean_product(ups, stem)
            got = result.get(f"delta.{stem}.dense", torch.zeros(()).double()).double()
            if f"delta.{stem}.left" in result:
                got = got + result[f"delta.{stem}.left"].double() @ result[f"delta.{stem}.right"].double()
            own = torch.zeros(()).double()
            if f"{stem}.A" in result:
                own = C * result[f"{stem}.B"].double() @ result[f"{stem}.A"].double()
            assert torch.allclose(got + own, expected, atol=1e-5)
            total[stem] = expected if isinstance(method, FLora) else expected - own
    assert any(name.endswith("dense") for name in done[-1].state.changed.total), "the factors became a matrix"


def here(model: Any, client: str = "a", round: int = 1) -> ClientEnv:
    return ClientEnv(client, model, {"train": tiny.examples(tiny.place(ord(client)), 6)}, 0, 3, round, "train")


@pytest.mark.parametrize("method", [FLora(lr=0.01), FedExLora(lr=0.01)])
def test_clients_train_over_what_was_folded_into_the_base(method: Any) -> None:
    """Nothing in the first round; in the second the delta that the server made of both clients' answers."""
    model = tiny.model("bert", SPEC, "float32")
    server = ServerEnv(model, ("a", "b"), 0, 3, round=1)
    state = method.init(server)
    first = {client: turn(method, method.send(state, client), here(model, client)) for client in "ab"}
    assert all(fit.also == () for own in first.values() for fit in own.fits)
    fold = method.round()[0].fold
    after = fold(state, {client: own.up for client, own in first.items()}, server)
    second = turn(method, method.send(after, "a"), here(model, "a", 2), first["a"].memory)
    assert any(t.any() for t in after.changed.total.values())
    ((delta,),) = (fit.also for fit in second.fits)
    assert tree.sha256(delta) == tree.sha256(after.changed.total)


def test_flora_draws_factors_for_every_turn() -> None:
    model = tiny.model("bert", SPEC, "float32")
    down = FLora().send(FLora().init(ServerEnv(model, ("a", "b"), 0, 3)), "a")
    starts = [turn(FLora(), down, here(model, *place)).fits[0].params for place in (("a", 1), ("a", 2), ("b", 1))]
    for stem in down.widths:
        drawn = torch.stack([start[f"{stem}.A"] for start in starts])
        assert len(drawn.unique(dim=0)) == 3 and not any(start[f"{stem}.B"].any() for start in starts)


def test_flora_draws_factors_for_every_turn_from_a_warm_start_too() -> None:
    """What the run starts from is folded away; nobody goes on in its directions alone."""
    model = tiny.model("bert", SPEC, "float32")
    model.warm_start({name: t.float() for name, t in tiny.params(model, tiny.place()).items()})
    down = FLora().send(FLora().init(ServerEnv(model, ("a", "b"), 0, 3)), "a")
    starts = [turn(FLora(), down, here(model, *place)).fits[0].params for place in (("a", 1), ("a", 2), ("b", 1))]
    for stem in down.widths:
        drawn = torch.stack([start[f"{stem}.A"] for start in starts])
        assert len(drawn.unique(dim=0)) == 3 and not any(start[f"{stem}.B"].any() for start in starts)
        bound = 1 / math.sqrt(drawn.shape[2])
        assert 0.8 * bound < drawn.abs().max() <= bound


def test_fedsa_lora_goes_on_with_its_own_factors_and_head() -> None:
    model, method = tiny.model("bert", SPEC, "float32"), FedSALora(lr=0.01)
    down = method.send(method.init(ServerEnv(model, ("a",), 0, 3)), "a")
    own = pairs.others({name: t.float() for name, t in tiny.params(model, tiny.place(3)).items()}, "A")
    (fit,), _, after = turn(method, down, here(model), Memory(own))
    assert tree.sha256(fit.params) == tree.sha256({**down.params, **own})
    assert tree.sha256(after.local) == tree.sha256(pairs.others(model.fit(fit).params, "A"))


def test_flora_starts_from_another_adapter_by_folding_it_in() -> None:
    model = tiny.model("bert", SPEC, "float32")
    params = {name: t.float() for name, t in tiny.params(model, tiny.place()).items()}
    model.warm_start(params)
    state = FLora().init(ServerEnv(model, ("a",), 0, 1))
    data = tiny.examples(tiny.place(1), 6)
    got, wanted = model.logits(FLora().result(state), data), model.logits(params, data)
    assert torch.allclose(got, wanted, atol=1e-4) and state.changed.version == 1


def test_answers_that_do_not_fit_are_refused() -> None:
    down = FLora().send(FLora().init(env()), "c0")
    good = Update({f"{SLOT}.A": torch.ones(4, 5), f"{SLOT}.B": torch.ones(6, 4), **OWN}, 3, 1.0)
    stacked(down, good)
    for change in (
        {f"{SLOT}.A": torch.ones(3, 5)},
        {f"{SLOT}.B": torch.ones(6, 3)},
        {f"{SLOT}.B": torch.ones(6, 4, dtype=torch.int64)},
        {f"{SLOT}.A": torch.ones(4, 5).half()},
        {"block.1.query.A": torch.ones(1)},
    ):
        with pytest.raises(RecordError):
            stacked(down, replace(good, params={**good.params, **change}))
    turn = RoLora().send(RoLora().init(env()), "c0")
    accept = RoLora().round()[0].accept
    accept(turn, Update({f"{SLOT}.B": torch.zeros(6, 4).double(), **OWN}, 1, 0.0))
    with pytest.raises(RecordError):
        accept(turn, Update({f"{SLOT}.A": torch.zeros(4, 5).double(), **OWN}, 1, 0.0))


@pytest.mark.parametrize("name", FAMILY)
def test_only_lora_is_accepted(name: str) -> None:
    method = methods.load(name)()
    assert method.accepts(Lora(rank=2)) is None and method.adapter() == Lora()
    assert "not prefix; leave adapter.kind out" in str(method.accepts(Prefix()))


def test_broadcasts_of_flora_hold_no_fresh_factors() -> None:
    down = FLora().send(FLora().init(env()), "c0")
    assert type(down) is Broadcast and down.head.keys() == OWN.keys() and not down.news.steps
    assert down.widths == {SLOT: (6, 5)} and down.rank == 4
