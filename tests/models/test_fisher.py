"""The Fisher information by hooks against autograd sample by sample, and the specification's golden numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import tiny_lm
from fedpeft.core import pairs
from fedpeft.core.adapter import Lora, Prefix
from fedpeft.core.errors import FitError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, Fit
from fedpeft.core.model import Fisher, FisherProbe
from fedpeft.core.tree import Params
from fedpeft.models import fisher as module
from fedpeft.models.hf import HFModel
from fedpeft.models.readouts.cloze import ClozeReadout
from fedpeft.models.readouts.verbalizer import VerbalizerReadout


def gradients(model: HFModel, params: Params, data: Examples, row: int, base: str = "") -> dict[str, Tensor]:
    """Of one row's own loss with respect to the factors, by one step of SGD at rate 1."""
    names = frozenset(name for name in params if name.endswith((".A", ".B")))
    fitted = model.fit(Fit(params, data, [[row]], SGD(1.0), train=names, base=base))
    return {name: params[name] - fitted.params[name] for name in sorted(names)}


def expected(model: HFModel, params: Params, data: Examples, rows: list[int], weights: Any = None) -> Any:
    traces, sums = [], {}
    for row in rows:
        weight = 1.0 if weights is None else weights[row]
        squares = {name: (weight * g).square() for name, g in gradients(model, params, data, row).items()}
        traces.append(sum(float(g.sum()) for g in squares.values()))
        for name, g in squares.items():
            sums[name] = sums.get(name, 0) + g.mean(dim=1) / len(rows)
    return torch.tensor(traces), sums


def assert_same(got: Any, wanted: Any, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(got.trace.double(), wanted[0].double(), rtol=rtol, atol=0)
    assert got.rows.keys() == wanted[1].keys()
    for name, t in wanted[1].items():
        torch.testing.assert_close(got.rows[name].double(), t.double(), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("budget", [2048, 30])
def test_it_is_the_square_of_every_samples_own_gradient(family: str, budget: int) -> None:
    """All projections at once (GPT-2's share a module), padded rows, rows that come twice."""
    spec = Lora(rank=3, alpha=6.0, targets=tiny.everything(family))
    model = tiny.model(family, spec, budget=budget)
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 7)
    rows = [5, 0, 3, 3]
    got = model.fisher(params, data, rows)
    assert_same(got, expected(model, params, data, rows))
    alone = torch.cat([model.fisher(params, data, [row]).trace for row in rows])
    torch.testing.assert_close(got.trace, alone, rtol=1e-5, atol=0)


def watched(body: torch.nn.Module) -> Any:
    """Enough of a base for the hooks."""
    return type("Body", (), {"module": body})


def test_golden_numbers_of_one_module() -> None:
    """X, G, A, B and c of the specification: ∂B (2, -6), ∂A (8, -4), f 120; row means A (40), B (4, 36)."""
    linear = torch.nn.Linear(2, 2, bias=False)
    body = torch.nn.Module()
    body.add_module("linear", linear)
    slot = module.Slot("block.0.query", "linear", 2, 2, 0, 2)
    for b, f, rows in (([[3.0], [1.0]], 120.0, {"A": [40.0], "B": [4.0, 36.0]}), ([[0.0], [0.0]], 40.0, {"A": [0.0]})):
        params = {"block.0.query.A": torch.tensor([[[1.0, 2.0]]]), "block.0.query.B": torch.tensor([b])}
        taps = module._Taps(2.0, params)
        with taps.on(watched(body), {"block.0.query": slot}):
            y = linear(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]))
            y.backward(torch.tensor([[[1.0, 1.0], [0.0, -1.0]]]))
        found = taps.found
        assert float(sum(g.square().sum() for g in found.values())) == f
        for side, own in rows.items():
            assert found[f"block.0.query.{side}"].square().mean(dim=2)[0].tolist() == own
        assert found["block.0.query.B"][0].flatten().tolist() == [2.0, -6.0]


def test_a_module_that_is_called_again_adds_up_before_squaring() -> None:
    linear = torch.nn.Linear(2, 2, bias=False)
    body = torch.nn.Module()
    body.add_module("linear", linear)
    slot = module.Slot("block.0.query", "linear", 2, 2, 0, 2)
    params = {"block.0.query.A": torch.tensor([[[1.0, 2.0]]]), "block.0.query.B": torch.tensor([[[3.0], [1.0]]])}
    taps = module._Taps(1.0, params)
    with taps.on(watched(body), {"block.0.query": slot}):
        x = torch.ones(1, 1, 2)
        (linear(x).sum() - linear(x).sum()).backward()
    assert taps.found and not any(g.any() for g in taps.found.values())


def test_a_zero_b_gives_a_zero_gradient_of_a() -> None:
    model = tiny.model("bert")
    params = {n: torch.zeros_like(t) if n.endswith(".B") else t for n, t in tiny.params(model, tiny.place()).items()}
    got = model.fisher(params, tiny.examples(tiny.place(1), 5), [0, 1, 2, 3, 4])
    assert all(t.any() if name.endswith(".B") else not t.any() for name, t in got.rows.items())


def test_memory_is_bounded_without_any_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("bert")
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 9)
    whole = model.fisher(params, data, range(9))
    monkeypatch.setattr(module, "MOST_NUMBERS", 1)
    single = model.fisher(params, data, range(9))
    torch.testing.assert_close(whole.trace, single.trace, rtol=1e-5, atol=0)
    for name, t in whole.rows.items():
        torch.testing.assert_close(t, single.rows[name], rtol=1e-5, atol=1e-12)


def test_nothing_is_left_behind() -> None:
    model = tiny.model("bert")
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 5)
    before = model.logits(params, data)
    model.fisher(params, data, [0, 1])
    assert torch.equal(model.logits(params, data), before)
    assert not any(t.requires_grad or t.grad is not None for t in params.values())
    hooks = [len(inner._forward_hooks) for inner in model.base.module.modules()]
    model.fisher(params, data, [0, 1])
    assert [len(inner._forward_hooks) for inner in model.base.module.modules()] == hooks


def test_cloze() -> None:
    model = tiny_lm.model("bert", ClozeReadout(tiny_lm.lm_head("bert"), (11, 31, 7)))
    drawn = tiny.examples(tiny.place(2), 5)
    data = Examples(drawn.tokens, drawn.labels, None, np.zeros(5, dtype=np.int64))
    params = {n: t for n, t in tiny.params(model, tiny.place()).items() if "head" not in n}
    assert_same(model.fisher(params, data, [0, 2, 4]), expected(model, params, data, [0, 2, 4]))


@pytest.mark.parametrize(("norm", "power"), [("mean", 0.0), ("sqrt", 0.5), ("sum", 1.0)])
def test_answers_of_several_tokens(norm: Any, power: float) -> None:
    """The loss is the mean over an answer's tokens; the gradient is what `token_norm` says."""
    answers = [(5,), (7, 8, 9), (4, 6)]
    model = tiny_lm.model("gpt2", VerbalizerReadout(tiny_lm.lm_head("gpt2"), answers))
    data = tiny.examples(tiny.place(2), 6)
    params = {n: t for n, t in tiny.params(model, tiny.place()).items() if "head" not in n}
    weights = [len(answers[label]) ** power for label in data.labels]
    assert len(set(weights)) > 1 or norm == "mean"
    got = model.fisher(params, data, range(6), norm)
    assert_same(got, expected(model, params, data, list(range(6)), weights))


def test_it_needs_factors() -> None:
    model = tiny.model("bert", Prefix(length=2))
    params = {n: t.double() for n, t in model.init(tiny.place()).items()}
    with pytest.raises(FitError, match="is of LoRA's factors, and there are none"):
        model.fisher(params, tiny.examples(tiny.place(1), 3), [0])


@pytest.mark.parametrize("budget", [2048, 60])
def test_clients_share_passes_and_get_their_own(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors and ranks of their own, a slot that one lacks, a delta that one alone has, equal params, other norms."""
    model = tiny.model("bert", Lora(rank=4, alpha=6.0), budget=budget)
    full = tiny.params(model, tiny.place())
    other = {name: t + 0.1 for name, t in full.items()}
    low = {**pairs.others(other), **pairs.factors(pairs.cut(other, 2))}
    part = {name: t for name, t in other.items() if "block.1.value" not in name}
    stem, draw = "delta.block.1.query", tiny.place(5)
    sizes = ((f"{stem}.left", (tiny.WIDTH, 2)), (f"{stem}.right", (2, tiny.WIDTH)))
    delta = {name: torch.from_numpy(draw.normal(size=size)) for name, size in sizes}
    of = tiny.examples(tiny.place(1), 9)
    probes = [
        FisherProbe(full, of, range(9)),
        FisherProbe(dict(full), tiny.examples(tiny.place(2), 4), [3, 1]),
        FisherProbe(low, tiny.examples(tiny.place(3), 6), range(6), "sum"),
        FisherProbe(part, of, [0, 2], "mean", (delta,)),
    ]
    passes: list[int] = []
    seen = model.seen
    monkeypatch.setattr(model, "seen", lambda b, s, items, step: passes.append(len(items)) or seen(b, s, items, step))
    together = model.fisher_many(probes)
    shared = len(passes)
    for probe, got in zip(probes, together, strict=True):
        alone = model.fisher(probe.params, probe.data, probe.rows, probe.token_norm, probe.also)
        assert_same(got, (alone.trace, alone.rows))
    assert shared < len(passes) - shared and sum(passes[:shared]) == 19
    assert together[2].rows["block.0.query.A"].shape == (2,)  # type: ignore[union-attr]
    assert "block.1.value.A" not in together[3].rows  # type: ignore[union-attr]


def test_a_client_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """One's params are wrong; another's rows are too many for the memory, so that everybody is taken alone."""
    model = tiny.model("bert")
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 9)
    good, bad, large = (FisherProbe(params, data, rows) for rows in ([0, 1], [12], range(9)))
    seen = model.seen

    def short(base: Any, stack: Any, items: Any, step: int) -> Any:
        if len(items) > 4:
            raise MemoryError("out of memory")
        return seen(base, stack, items, step)

    monkeypatch.setattr(model, "seen", short)
    found = model.fisher_many([good, bad, large])
    assert_same(found[0], (lambda own: (own.trace, own.rows))(model.fisher(params, data, [0, 1])))
    assert isinstance(found[1], FitError) and "row 12" in str(found[1]) and isinstance(found[2], MemoryError)


def test_what_acts_beside_the_params_is_in_it() -> None:
    """A base delta in `also` gives what it gives among the params; two of them add up."""
    model = tiny.model("bert", Lora(rank=2, alpha=3.0, targets=("query",), blocks=(1,)))
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 6)
    stem, draw = "delta.block.1.query", tiny.place(5)
    left, right = (torch.from_numpy(draw.normal(size=s)) for s in ((tiny.WIDTH, 2), (2, tiny.WIDTH)))
    delta, half = ({f"{stem}.left": left * f, f"{stem}.right": right} for f in (1.0, 0.5))
    whole = model.fisher({**params, **delta}, data, range(6))
    for also in ((delta,), (half, half)):
        assert_same(model.fisher(params, data, range(6), also=also), (whole.trace, whole.rows))
        losses = model.losses(params, data, range(6), also)
        torch.testing.assert_close(losses, model.losses({**params, **delta}, data, range(6)))
    assert not torch.allclose(whole.trace, model.fisher(params, data, range(6)).trace)


@pytest.mark.parametrize("base", ["int8", "blocks:1,2"])
def test_it_is_that_of_the_base_that_trains(base: str) -> None:
    """A client that holds a quantised base, or some of the blocks, ranks its rows by these, whatever others do."""
    model = tiny.model("gpt2", Lora(rank=2, alpha=3.0, targets=("query", "down"), blocks=(1, 2)), dtype="float32")
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 4)
    whole, own = model.fisher_many([FisherProbe(params, data, range(4), base=name) for name in ("", base)])
    assert isinstance(whole, Fisher) and isinstance(own, Fisher)
    wanted = [
        sum(float(g.square().sum()) for g in gradients(model, params, data, row, base).values()) for row in range(4)
    ]
    torch.testing.assert_close(own.trace, torch.tensor(wanted), rtol=1e-4, atol=0)
    assert not torch.allclose(own.trace, whole.trace, rtol=1e-3)
    losses = [model.fit(Fit(params, data, [[row]], SGD(0.0), base=base)).loss for row in range(4)]
    torch.testing.assert_close(model.losses(params, data, range(4), base=base), torch.tensor(losses))
    assert not torch.allclose(model.losses(params, data, range(4)), torch.tensor(losses), rtol=1e-3)
