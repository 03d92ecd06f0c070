"""AdaLoRA: its triplets against changed weights, its penalty, its budget, and what the server keeps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from fedpeft.core import tree
from fedpeft.core.adapter import AdaLora, HeadOnly, Lora
from fedpeft.core.errors import ConfigError, FitError, ModelError, RecordError
from fedpeft.core.exchange import ClientEnv, ServerEnv, Weights
from fedpeft.core.federate import federate
from fedpeft.core.fit import SGD, AdamW, Fit
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.adalora import METHOD, Answer, Orthogonal, scored, sensitivities
from fedpeft.models.export import export_adapter, import_adapter
from fedpeft.models.hf import HFModel
from fedpeft.models.merge import merge
from turns import turn

SPEC = AdaLora(rank=3, alpha=6.0)


def drawn(model: HFModel, seed: int = 0) -> dict[str, Tensor]:
    rng = tiny.place(seed)
    fresh = model.init(rng)
    return {n: (t + torch.from_numpy(rng.normal(0, 0.4, t.shape))).to(model.base.dtype) for n, t in fresh.items()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_triplets_are_a_change_of_the_weights(family: str) -> None:
    """P diag(E) Q, at alpha / rank, on every projection."""
    spec = AdaLora(rank=3, alpha=6.0, targets=tiny.everything(family))
    model = tiny.model(family, spec)
    params, data = drawn(model), tiny.examples(tiny.place(1), 7)
    body = copy.deepcopy(tiny.module(family))
    with torch.no_grad():
        for stem, slot in model.slots.items():
            change = 2.0 * params[f"{stem}.P"] @ torch.diag(params[f"{stem}.E"]) @ params[f"{stem}.Q"]
            weight = body.get_submodule(slot.path).weight
            rows = weight if isinstance(body.get_submodule(slot.path), nn.Linear) else weight.T
            rows[slot.offset : slot.offset + slot.d_out] += change
    head = {name: t for name, t in params.items() if "head" in name}
    expected = HFModel(tiny.freeze(body, None, "changed", tiny.CPU), HeadOnly(), 3).logits(head, data)
    assert torch.allclose(model.logits(params, data), expected, atol=1e-5)
    fresh = model.init(tiny.place())
    fresh = {name: t.double() for name, t in fresh.items()}
    alone = {name: t for name, t in fresh.items() if "head" in name}
    assert torch.allclose(model.logits(fresh, data), model.logits(alone, data), atol=1e-6)


def test_it_merges_and_survives_its_own_export(tmp_path: Any) -> None:
    model = tiny.model("bert", SPEC, "float32")
    params, data = drawn(model), tiny.examples(tiny.place(1), 5)
    folder = export_adapter(model, params, tmp_path / "out", labels=list("abc"), card={})
    back = import_adapter(folder, model)
    assert all(torch.equal(back[name], t) for name, t in params.items())
    merged = merge(model, params, list("abc"))
    assert torch.allclose(tiny.plain_logits(merged, data, "mean").float(), model.logits(params, data), atol=1e-4)


def test_a_cohort_trains_as_its_clients_alone() -> None:
    model = tiny.model("bert", SPEC)
    fits = []
    for i in range(3):
        data = tiny.examples(tiny.place(i), 6)
        fits.append(Fit(drawn(model, i), data, [[0, 1], [2, 3]], AdamW(0.01, eps=1e-6), penalty=Orthogonal(0.1)))
    for together, fit in zip(model.fit_many(fits), fits, strict=True):
        for name, t in model.fit(fit).params.items():
            torch.testing.assert_close(together.params[name], t, rtol=1e-9, atol=1e-9)  # type: ignore[union-attr]


def test_what_does_not_fit_is_refused() -> None:
    model = tiny.model("bert", SPEC)
    params = drawn(model)
    for name, wrong in (("E", torch.zeros(2).double()), ("P", torch.zeros(tiny.WIDTH, 2).double())):
        with pytest.raises(FitError, match=r"do not fit together|came without"):
            model.check_params({**params, f"block.0.query.{name}": wrong})
    with pytest.raises(ModelError, match=r"adapter\.rank is 0"):
        tiny.model("bert", AdaLora(rank=0))
    assert "not lora" in str(METHOD().accepts(Lora())) and METHOD().accepts(AdaLora(rank=2)) is None
    with pytest.raises(ConfigError, match=r"method\.share is 1\.5"):
        METHOD(share=1.5)
    with pytest.raises(ConfigError, match=r"first_share 0\.6 and method\.last_share 0\.4 leave no round"):
        METHOD(first_share=0.6, last_share=0.4)


def test_the_penalty_is_that_of_the_paper() -> None:
    draw = np.random.default_rng(0)
    p, q = draw.normal(size=(2, 5, 3)), draw.normal(size=(2, 3, 4))
    params = {"s.P": torch.from_numpy(p), "s.Q": torch.from_numpy(q), "s.E": torch.zeros(2, 3)}
    wanted = [
        np.linalg.norm(p[k].T @ p[k] - np.eye(3)) ** 2 + np.linalg.norm(q[k] @ q[k].T - np.eye(3)) ** 2 for k in (0, 1)
    ]
    assert Orthogonal(0.5)(params).tolist() == pytest.approx([0.5 * w for w in wanted])


def test_the_budget_falls_cubically() -> None:
    """Of 100 triplets over 10 rounds: all in the first, half from the seventh, in between the cube of what is left."""
    method = METHOD(share=0.5, first_share=0.1, last_share=0.3)
    got = [method.budget(r, 10, 100) for r in range(1, 11)]
    wanted = [100, *(50 + int(np.ceil(50 * (1 - (r - 1) / 6) ** 3 - 1e-9)) for r in range(2, 7)), 50, 50, 50, 50]
    assert got == wanted and METHOD(share=0.001).budget(10, 10, 20) == 1


def test_sensitivity_is_the_root_mean_square_of_number_times_gradient() -> None:
    """After one step, Adam's corrected second moment is the square of the gradient."""
    model = tiny.model("bert", SPEC)
    params, data = drawn(model), tiny.examples(tiny.place(1), 6)
    fit = Fit(params, data, [[0, 1, 2, 3, 4, 5]], AdamW(1e-9))
    plain = model.fit(Fit(params, data, fit.batches, SGD(1.0)))
    got = sensitivities(model.fit(fit))
    for stem, own in got.items():
        p, e, q = ((params[f"{stem}.{s}"] * (params[f"{stem}.{s}"] - plain.params[f"{stem}.{s}"])).abs() for s in "PEQ")
        torch.testing.assert_close(own, e + p.mean(dim=0) + q.mean(dim=1), rtol=1e-4, atol=1e-9)
    assert len(got) == 2 * tiny.BLOCKS


def test_the_server_smooths_and_prunes() -> None:
    """Two slots of two triplets, half are kept after the last round: those of the largest product."""
    method = METHOD(share=0.5, beta1=0.5, beta2=0.5)
    ones = {f"{s}.{side}": torch.ones(2, 2) if side != "E" else torch.ones(2) for s in "ab" for side in "PEQ"}
    state = METHOD.state(ones, kept=4)
    env = ServerEnv(None, ("x",), 0, 1, round=1)  # type: ignore[arg-type]
    first = {"a": torch.tensor([4.0, 0.0]), "b": torch.tensor([2.0, 1.0])}
    up = Answer(ones, first, 3, 1.0)
    state = method.average(state, {"x": up}, env)
    assert (
        state.smoothed.mean["a"].tolist() == [2, 0]
        and state.smoothed.spread["a"].tolist() == [1, 0]
        and state.kept == 2
    )
    assert state.params["a.E"].tolist() == [1, 0] and state.params["b.E"].tolist() == [1, 0]
    assert state.params["a.P"].tolist() == ones["a.P"].tolist(), "what is outside of the budget may come back"
    assert method.choices(state) == {"triplets": 2, "triplets_of": {"a": 1, "b": 1}}
    scored(Weights(ones), up)
    with pytest.raises(RecordError, match="negative"):
        scored(Weights(ones), Answer(ones, {"a": -first["a"], "b": first["b"]}, 3, 1.0))
    with pytest.raises(RecordError):
        scored(Weights(ones), Answer(ones, {"a": first["a"]}, 3, 1.0))


def test_ten_rounds_of_two_clients_as_numpy_has_them() -> None:
    """Unequal weights and momenta: Ī <- .7 Ī + .3 I, U <- .6 U + .4 |I - Ī|; the largest Ī U of 12 keep their E."""
    method, rounds, slots, draw = METHOD(share=0.4, beta1=0.7, beta2=0.6), 10, "abcd", np.random.default_rng(0)
    shapes = {"P": (5, 3), "E": (3,), "Q": (3, 4)}
    start = {f"{slot}.{side}": torch.ones(shape) for slot in slots for side, shape in shapes.items()}
    state, mean, spread = METHOD.state(start, kept=12), np.zeros((4, 3)), np.zeros((4, 3))
    for round in range(1, rounds + 1):
        told, numbers, ups = draw.random((2, 4, 3)), draw.normal(size=(2, 4, 3)), {}
        for i, n in enumerate((1, 3)):
            own = {name: torch.full_like(t, 2.0 + 4 * i) for name, t in start.items()}
            own |= {f"{slot}.E": torch.tensor(numbers[i, j]).float() for j, slot in enumerate(slots)}
            sensitivity = {slot: torch.tensor(told[i, j]).float() for j, slot in enumerate(slots)}
            ups[str(i)] = Answer(own, sensitivity, n, 1.0)
        state = method.average(state, ups, ServerEnv(None, ("0", "1"), 0, rounds, round=round))  # type: ignore[arg-type]
        now = 0.25 * told[0] + 0.75 * told[1]
        mean = 0.7 * mean + 0.3 * now
        spread = 0.6 * spread + 0.4 * np.abs(now - mean)
        kept = np.zeros(12, dtype=bool)
        kept[np.argsort(-(mean * spread).ravel())[: method.budget(round, rounds, 12)]] = True
        wanted = (0.25 * numbers[0] + 0.75 * numbers[1]) * kept.reshape(4, 3)
        got = np.stack([state.params[f"{slot}.E"].numpy() for slot in slots])
        assert np.allclose(got, wanted, atol=1e-6) and state.kept == kept.sum(), round
        assert bool((state.params["a.P"] == 5).all()) and bool((state.params["d.Q"] == 5).all())


def test_clients_train_with_the_penalty_and_tell_their_sensitivities() -> None:
    model = tiny.model("bert", SPEC, "float32")
    here = ClientEnv("a", model, {"train": tiny.examples(tiny.place(1), 5)}, 0, 3, 1, "train")
    (fit,), up, _ = turn(METHOD(penalty=0.3), Weights(here.initial()), here)
    assert fit.penalty == Orthogonal(0.3) and fit.train is None
    assert tree.sha256(up.sensitivities) == tree.sha256(sensitivities(model.fit(fit))) and up.examples == 5


def test_a_run_ends_with_its_budget() -> None:
    model = tiny.model("bert", SPEC, "float32")
    method = METHOD(cohort=3, batch_size=4, lr=5e-3, share=0.5)
    data = {f"c{i}": {"train": tiny.examples(tiny.place(i), 9)} for i in range(4)}
    done = list(federate(method, InProcess(lambda: method, model, data, 0), model, rounds=5, seed=0))
    state = done[-1].state
    assert state.kept == 9 == sum(int((t != 0).sum()) for n, t in state.params.items() if n.endswith(".E"))
    assert state.loss < done[0].state.loss and done[0].state.kept > 9
