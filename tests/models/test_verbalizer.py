"""The format verbalizer: transformers' own causal model on the same tokens, and cohorts against single clients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import tiny_lm
from cohorts import alone, assert_close, together
from fedpeft.core.errors import FitError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, AdamW, Fit
from fedpeft.models.hf import HFModel
from fedpeft.models.readouts import Item
from fedpeft.models.readouts.verbalizer import VerbalizerReadout

FAMILIES = ("gpt2", "llama")
ANSWERS = ((11, 2), (31, 8, 40, 2), (7, 9, 2))


def model(family: str, budget: int = 2048) -> HFModel:
    return tiny_lm.model(family, VerbalizerReadout(tiny_lm.lm_head(family), ANSWERS), budget)


def adapter(of: HFModel, seed: int = 0) -> dict[str, Tensor]:
    return {k: t for k, t in tiny.params(of, tiny.place(seed)).items() if not k.startswith("head")}


def plain(family: str, data: Examples, answer: int | None = None) -> Tensor:
    """(rows,) loss of each row's answer by transformers' logits of the row alone; None: of its label.

    It is the loss that transformers gives, which computes it in float32.
    """
    full = tiny_lm.language_model(family)
    losses = []
    for tokens, label in zip(data.tokens, data.labels, strict=True):
        own = ANSWERS[label if answer is None else answer]
        ids = torch.tensor([[*tokens.tolist(), *own]])
        targets = ids.clone()
        targets[0, : len(tokens)] = -100
        with torch.no_grad():
            out = full(input_ids=ids, labels=targets)
        likely = out.logits[0].log_softmax(dim=-1)
        start = len(tokens) - 1
        losses.append(-torch.stack([likely[start + i, token] for i, token in enumerate(own)]).mean())
        assert losses[-1].item() == pytest.approx(out.loss.item(), rel=1e-5)
    return torch.stack(losses)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [2048, 20])
def test_losses_and_scores_are_those_of_transformers(family: str, budget: int) -> None:
    of, data = model(family, budget), tiny.examples(tiny.place(), 8)
    expected = torch.stack([plain(family, data, answer) for answer in range(3)], dim=1)
    torch.testing.assert_close(of.logits(None, data), -expected.float(), rtol=1e-6, atol=1e-6)
    nothing = {name: torch.zeros_like(t) for name, t in adapter(of).items()}
    fitted = of.fit(Fit(nothing, data, [[i] for i in range(8)], SGD(0.0)))
    torch.testing.assert_close(
        torch.tensor(fitted.losses, dtype=torch.float64), plain(family, data), rtol=1e-9, atol=1e-9
    )
    batch = of.fit(Fit(nothing, data, [list(range(8))], SGD(0.0)))
    assert batch.loss == pytest.approx(plain(family, data).mean().item(), rel=1e-9)  # rows weigh alike
    least = expected.argmin(dim=1)
    hits = (least == torch.from_numpy(data.labels)).sum()
    assert of.score(nothing, data)["confusion"].trace() == hits
    assert torch.equal(of.logits(None, data, [5, 2]).argmax(dim=1), least[[5, 2]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [2048, 24])
def test_a_cohort_is_its_clients_one_by_one(family: str, budget: int) -> None:
    of = model(family, budget)
    fits = []
    for client in range(4):
        data = tiny.examples(tiny.place(client), 5 + client)
        fits.append(Fit(adapter(of, client), data, data.epochs(2, 3, tiny.place(9 + client)), AdamW(1e-2, eps=1e-6)))
    assert_close(together(of, fits), alone(model(family), fits), 1e-9)


def test_gradient_by_finite_differences() -> None:
    of, data, rows = model("gpt2"), tiny.examples(tiny.place(1), 5), list(range(5))
    params = adapter(of, 2)
    name = sorted(params)[0]
    moved = of.fit(Fit(params, data, [rows], SGD(1.0), train=frozenset({name}))).params[name]
    direction = torch.randn(params[name].shape, generator=torch.Generator().manual_seed(0)).double()
    up, down = (
        of.fit(Fit({**params, name: params[name] + sign * 1e-5 * direction}, data, [rows], SGD(0.0))).loss
        for sign in (1, -1)
    )
    assert ((params[name] - moved) * direction).sum().item() == pytest.approx((up - down) / 2e-5, rel=1e-5)


def test_the_head_sees_the_states_before_the_answers_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    of, data = model("gpt2"), tiny.examples(tiny.place(), 6)
    readout = of.readout
    assert isinstance(readout, VerbalizerReadout)
    seen: list[int] = []
    whole = readout.lm.logits

    def logits(states: Tensor) -> Tensor:
        seen.append(len(states))
        return whole(states)

    monkeypatch.setattr(readout.lm, "logits", logits)
    of.fit(Fit(adapter(of), data, [list(range(6))], SGD(0.0)))
    assert sum(seen) == sum(len(ANSWERS[label]) for label in data.labels)
    seen.clear()
    of.logits(None, data)
    assert sum(seen) == 6 * sum(map(len, ANSWERS))


def test_work_counts_the_answers() -> None:
    of, data = model("gpt2"), tiny.examples(tiny.place(), 6)
    own = [len(tokens) + len(ANSWERS[label]) for tokens, label in zip(data.tokens, data.labels, strict=True)]
    fitted = of.fit(Fit(adapter(of), data, [list(range(6))], SGD(0.0)))
    assert (fitted.tokens, fitted.pairs) == (sum(own), sum(n * n for n in own))
    every = [len(tokens) + len(answer) for tokens in data.tokens for answer in ANSWERS]
    assert of.passes(None, data) == (sum(every), sum(n * n for n in every))


def test_an_item_without_an_answer_is_the_context() -> None:
    readout, data = model("gpt2").readout, tiny.examples(tiny.place(), 2)
    item = Item(0, data, 1)
    assert readout.sequence(item)[0].tolist() == data.tokens[1].tolist()
    assert (readout.length(item), readout.projected(item)) == (len(data.tokens[1]), 0)
    assert readout.sequence(Item(0, data, 1, 2))[0].tolist() == [*data.tokens[1].tolist(), *ANSWERS[2]]


def test_a_label_without_an_answer() -> None:
    of, data = model("gpt2"), tiny.examples(tiny.place(), 3)
    with pytest.raises(FitError, match="a label is 5; answers are for the classes 0 to 2"):
        of.fit(Fit(adapter(of), Examples(data.tokens, np.array([0, 5, 1])), [[0]], SGD(0.1)))


def test_another_precision_of_the_base() -> None:
    of, data = model("llama"), tiny.examples(tiny.place(), 6)
    exact, rough = (of.fit(Fit(adapter(of), data, [range(6)], SGD(0.1), base=base)).loss for base in ("", "float32"))
    assert rough == pytest.approx(exact, rel=1e-4) and rough != exact
