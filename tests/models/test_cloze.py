"""The format cloze: transformers' own masked model on the same tokens, and cohorts against single clients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
import tiny_lm
from cohorts import alone, assert_close, together
from fedpeft.core.errors import FitError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, AdamW, Fit
from fedpeft.core.rng import Rng
from fedpeft.models.hf import HFModel
from fedpeft.models.readouts import Item
from fedpeft.models.readouts.cloze import ClozeReadout

FAMILIES = ("bert", "roberta", "electra")
WORDS, MASK = (11, 31, 7), 4


def model(family: str, budget: int = 2048) -> HFModel:
    return tiny_lm.model(family, ClozeReadout(tiny_lm.lm_head(family), WORDS), budget)


def masked(rng: Rng, rows: int, longest: int = 12) -> Examples:
    """Rows with a mask somewhere."""
    data = tiny.examples(rng, rows, longest=longest)
    marks = np.array([rng.integers(len(tokens)) for tokens in data.tokens])
    for tokens, mark in zip(data.tokens, marks, strict=True):
        tokens[mark] = MASK
    return Examples(data.tokens, data.labels, None, marks)


def adapter(of: HFModel, seed: int = 0) -> dict[str, Tensor]:
    """LoRA without any head."""
    return {k: t for k, t in tiny.params(of, tiny.place(seed)).items() if not k.startswith("head")}


def plain(family: str, data: Examples) -> tuple[Tensor, Tensor]:
    """Logits at the masks, and each row's loss, of transformers' model for the rows one by one."""
    full = tiny_lm.language_model(family)
    logits, losses = [], []
    for tokens, label, mark in zip(data.tokens, data.labels, data.marks if data.marks is not None else (), strict=True):
        ids = torch.from_numpy(tokens).long()[None]
        targets = torch.full_like(ids, -100)
        targets[0, mark] = WORDS[label]
        with torch.no_grad():
            out = full(input_ids=ids, labels=targets)
        logits.append(out.logits[0, mark])
        losses.append(out.loss)
    return torch.stack(logits), torch.stack(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_scores_are_those_of_transformers(family: str) -> None:
    """An adapter that does nothing leaves the masked model's own loss, over the whole vocabulary."""
    of, data = model(family), masked(tiny.place(), 9)
    nothing = {name: torch.zeros_like(t) for name, t in adapter(of).items()}
    logits, losses = plain(family, data)
    torch.testing.assert_close(of.logits(None, data), logits[:, list(WORDS)].float())
    fitted = of.fit(Fit(nothing, data, [[i] for i in range(9)], SGD(0.0)))
    torch.testing.assert_close(torch.tensor(fitted.losses, dtype=torch.float64), losses, rtol=1e-9, atol=1e-9)
    sums = of.score(nothing, data)
    expected = F.cross_entropy(logits[:, list(WORDS)], torch.from_numpy(data.labels), reduction="sum")
    assert sums["loss"].item() == pytest.approx(expected.item(), rel=1e-6) and int(sums["n"]) == 9
    assert of.logits(None, data, [4, 4]).shape == (2, 3) and of.classes == 3


def test_a_loss_over_the_labels_is_among_their_words() -> None:
    of = tiny_lm.model("bert", ClozeReadout(tiny_lm.lm_head("bert"), WORDS, "labels"))
    data = masked(tiny.place(), 9)
    nothing = {name: torch.zeros_like(t) for name, t in adapter(of).items()}
    words = plain("bert", data)[0][:, list(WORDS)].double().numpy()
    shares = np.exp(words) / np.exp(words).sum(axis=1, keepdims=True)
    fitted = of.fit(Fit(nothing, data, [[i] for i in range(9)], SGD(0.0)))
    np.testing.assert_allclose(fitted.losses, -np.log(shares[np.arange(9), data.labels]), rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_same_model_by_finite_differences(family: str) -> None:
    """One step of SGD with rate 1 moves a parameter by minus the slope of the mean loss."""
    of, data, rows = model(family), masked(tiny.place(1), 5), list(range(5))
    params = adapter(of, 2)
    name = sorted(params)[-1]

    def loss(values: dict[str, Tensor]) -> float:
        return of.fit(Fit(values, data, [rows], SGD(0.0))).loss

    moved = of.fit(Fit(params, data, [rows], SGD(1.0), train=frozenset({name}))).params[name]
    direction = torch.randn(params[name].shape, generator=torch.Generator().manual_seed(0)).double()
    up, down = (loss({**params, name: params[name] + sign * 1e-5 * direction}) for sign in (1, -1))
    slope = ((params[name] - moved) * direction).sum().item()
    assert slope == pytest.approx((up - down) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [2048, 20])
def test_a_cohort_is_its_clients_one_by_one(family: str, budget: int) -> None:
    of = model(family, budget)
    fits = []
    for client in range(4):
        data = masked(tiny.place(client), 6 + client)
        batches = data.epochs(2, 3, tiny.place(10 + client))
        fits.append(Fit(adapter(of, client), data, batches, AdamW(1e-2, eps=1e-6)))
    single = alone(model(family), fits)
    assert_close(together(of, fits), single, 1e-9)
    assert not any(torch.equal(t, fits[0].params[name]) for one in single for name, t in one.params.items())


def test_another_precision_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    of, data = model("bert"), masked(tiny.place(), 6)
    params, rows = adapter(of), list(range(6))
    exact, rough = (of.fit(Fit(params, data, [rows], SGD(0.1), base=base)).loss for base in ("", "float32"))
    assert rough == pytest.approx(exact, rel=1e-4) and rough != exact
    coarse = of.fit(Fit(params, data, [rows], SGD(0.1), base="bfloat16")).loss
    assert coarse == pytest.approx(exact, rel=0.1) and coarse not in (exact, rough)


def test_nothing_of_the_format_travels() -> None:
    of = model("bert")
    assert of.readout.params == frozenset() and of.readout.shapes() == {}
    assert not any(name.startswith("head") for name in of.init(tiny.place()))
    assert of.lowest_block(["block.2.query.A"]) == 2
    data = masked(tiny.place(), 3)
    assert of.readout.projected(Item(0, data, 1)) == 1


def test_rows_that_cannot_be_trained() -> None:
    of, data = model("bert"), masked(tiny.place(), 3)
    for wrong, message in (
        (Examples(data.tokens, data.labels), "the rows have no mask; tokenise them with the task's template"),
        (Examples(data.tokens, np.array([0, 1, 3]), None, data.marks), "a label is 3; label words are for the classes"),
    ):
        with pytest.raises(FitError, match=message):
            of.fit(Fit(adapter(of), wrong, [[0]], SGD(0.1)))
    with pytest.raises(FitError, match=r"'head.weight' does not exist in this model"):
        of.fit(Fit(tiny.params(of, tiny.place()), data, [[0]], SGD(0.1)))


def test_a_hessian_of_the_format_is_symmetric() -> None:
    of, data = model("bert"), masked(tiny.place(), 4)
    params = adapter(of)
    multiply = of.hessian(params, data, range(4))
    u, v = adapter(of, 5), adapter(of, 6)
    one, two = (sum((a[k] * b[k]).sum().item() for k in a) for a, b in ((u, multiply(v)), (v, multiply(u))))
    assert one == pytest.approx(two, rel=1e-8)
