"""Distillation over the vocabulary against plain autograd and torch's own KL divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny_lm
from fedpeft.core import tree
from fedpeft.core.adapter import Full, Lora
from fedpeft.core.errors import FitError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import SGD, AdamW, Fit
from fedpeft.core.model import Target
from fedpeft.core.rng import rng_for
from fedpeft.maths import logits
from fedpeft.maths.logits import NO_TOKEN
from fedpeft.models import distil as maths
from fedpeft.models.hf import HFModel
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.models.readouts.head import HeadReadout

LENGTHS, STARTS = (7, 5, 9, 4, 3), (4, 1, 6, 4, 3)  # the last two rows have no answer


def data() -> Examples:
    rng = rng_for(0, "distil")
    rows = tuple(rng.integers(5, 40, size=n).astype(np.int32) for n in LENGTHS)
    return Examples(rows, np.zeros(len(rows), np.int64), starts=np.array(STARTS))


def model(family: str, budget: int = 2048) -> HFModel:
    return tiny_lm.model(family, GenerateReadout(tiny_lm.lm_head(family)), budget)


def moved(own: HFModel, seed: int = 3, size: float = 0.1) -> dict[str, Tensor]:
    """An adapter that does something, in float64."""
    rng = rng_for(seed, "moved")
    start = own.init(rng_for(0, "adapter"))
    return {name: t.double() + size * torch.from_numpy(rng.standard_normal(t.shape)) for name, t in start.items()}


def plain_logits(own: HFModel, params: dict[str, Tensor], row: int) -> Tensor:
    """(positions, vocabulary) from whole sequences through the language model, LoRA folded into a copy by hand."""
    full = tiny_lm.language_model("llama")
    weights = dict(full.named_parameters())
    changed = {}
    for name, slot in own.slots.items():
        change = own.scale * params[f"{name}.B"] @ params[f"{name}.A"]
        path = f"model.{slot.path}.weight"
        changed[path] = weights[path].detach() + change
    tokens = torch.from_numpy(data().tokens[row].astype(np.int64))[None]
    logits: Tensor = torch.func.functional_call(full, changed, (), {"input_ids": tokens}).logits[0]
    return logits[STARTS[row] - 1 : max(STARTS[row], LENGTHS[row] - 1)]


@pytest.mark.parametrize("budget", [2048, 10])
def test_token_logits_are_those_of_the_language_model(budget: int) -> None:
    own = model("llama", budget)
    params = moved(own)
    for params_or_none, used in ((params, params), (None, {k: torch.zeros_like(v) for k, v in params.items()})):
        wanted = torch.cat([plain_logits(own, used, row) for row in (2, 0, 3, 1)])
        found = own.token_logits(params_or_none, data(), [2, 0, 3, 1])
        assert found.dtype == torch.float32 and found.shape == (3 + 3 + 1 + 4, own.readout.lm.vocabulary)
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-5)


def test_with_learned_positions_and_padding_rows_do_not_depend_on_their_company() -> None:
    own = model("gpt2")
    whole = own.token_logits(None, data())
    alone = torch.cat([own.token_logits(None, data(), [row]) for row in range(len(LENGTHS))])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)


def teacher_of(n: int, some: bool) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Random teachers' logits per row; where `some`, of five tokens alone."""
    generator = torch.Generator().manual_seed(1)
    counts = [max(1, length - start) for length, start in zip(LENGTHS, STARTS, strict=True)]
    logits = {row: 3 * torch.randn(count, 5 if some else n, generator=generator) for row, count in enumerate(counts)}
    ids = {row: torch.randperm(n, generator=generator)[:5].expand(count, 5) for row, count in enumerate(counts)}
    return logits, ids


@pytest.mark.parametrize(("temperature", "share", "some"), [(1.0, 1.0, False), (2.0, 0.7, False), (1.5, 0.5, True)])
@pytest.mark.parametrize("budget", [2048, 12])
def test_a_step_is_that_of_plain_autograd(temperature: float, share: float, some: bool, budget: int) -> None:
    own = model("llama", budget)
    size = own.readout.lm.vocabulary - (0 if some else 3)  # a teacher without the padded tokens
    logits, ids = teacher_of(size, some)
    batch = [4, 2, 0, 1]

    def teach(rows: Sequence[int]) -> Target:
        picked = torch.cat([ids[row] for row in rows]) if some else None
        return Target(torch.cat([logits[row] for row in rows]), picked)

    params = moved(own)
    fitted = own.distil(Fit(params, data(), [batch], SGD(1.0)), teach, temperature, share)
    leaves = {name: t.clone().requires_grad_() for name, t in params.items()}
    said = [plain_logits(own, leaves, row) for row in batch]
    soft, n = torch.zeros((), dtype=torch.float64), sum(map(len, said))
    for row, student in zip(batch, said, strict=True):
        q = F.log_softmax(student[:, :size] / temperature, 1)
        q = q.gather(1, ids[row]) if some else q
        p = F.log_softmax(logits[row].double() / temperature, 1)
        soft = soft + F.kl_div(q, p, reduction="sum", log_target=True) * temperature**2
    answered = [(s, data().tokens[row][STARTS[row] :]) for row, s in zip(batch, said, strict=True) if row < 3]
    hard = sum(F.cross_entropy(s[:, :size], torch.from_numpy(y.astype(np.int64)), reduction="sum") for s, y in answered)
    loss = share * soft / n + (1 - share) * hard / n
    loss.backward()
    assert fitted.loss == pytest.approx(float(loss.detach()), rel=1e-9)
    for name, leaf in leaves.items():
        torch.testing.assert_close(params[name] - fitted.params[name], leaf.grad, rtol=1e-7, atol=1e-9)


def test_the_loss_by_hand() -> None:
    """Teacher (.5, .25, .25), student uniform: KL = .5 ln 1.5 + 2 .25 ln .75 = .058892; tau 2: 4 KL = .056882."""
    own = model("llama")
    lesson = maths._Lesson(own, own.readout.lm, lambda rows: Target(torch.zeros(1, 3)), 1.0, 1.0)
    teacher = Target(torch.tensor([[0.5, 0.25, 0.25]]).log())
    uniform, nobody = torch.zeros(1, 3), torch.tensor([NO_TOKEN])
    assert float(lesson._loss(uniform, teacher, nobody)) == pytest.approx(0.058892, abs=1e-6)
    warm = maths._Lesson(own, own.readout.lm, lesson.teach, 2.0, 1.0)
    assert float(warm._loss(uniform, teacher, nobody)) == pytest.approx(0.056882, abs=1e-6)
    never = Target(torch.tensor([[0.0, 0.0, -math.inf]]))  # a token that the teacher rules out
    assert float(lesson._loss(uniform, never, nobody)) == pytest.approx(math.log(1.5), abs=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_padding_of_the_students_vocabulary_counts_for_nothing(share: float) -> None:
    """Three real tokens of five: full rows and candidates that are all of them give the same loss."""
    own = model("llama")
    student = torch.tensor([[0.1, 0.2, 0.3, 50.0, 60.0]])
    full = Target(torch.tensor([[1.0, 0.0, -1.0]]), None, 3)
    few = Target(torch.tensor([[-1.0, 1.0, 0.0]]), torch.tensor([[2, 0, 1]]), 3)
    lesson = maths._Lesson(own, own.readout.lm, lambda rows: full, 1.0, share)
    losses = [float(lesson._loss(student, each, torch.tensor([1]))) for each in (full, few)]
    teacher, real = full.logits.log_softmax(1), student[:, :3].log_softmax(1)
    wanted = share * (teacher.exp() * (teacher - real)).sum() - (1 - share) * real[0, 1]
    assert losses == pytest.approx([float(wanted)] * 2, rel=1e-5)


def test_the_loss_that_trains_is_that_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's loss changes with `distillation_loss`, so that what is tested there is what trains."""
    own = model("llama")
    scores = teacher_of(own.readout.lm.vocabulary, some=False)[0]

    def teach(rows: Sequence[int]) -> Target:
        return Target(torch.cat([scores[row] for row in rows]))

    fit = Fit(own.init(rng_for(0, "adapter")), data(), [[0, 3]], SGD(0.0))
    before, formula = own.distil(fit, teach, 2.0, 0.5).loss, logits.distillation_loss
    monkeypatch.setattr(logits, "distillation_loss", lambda *given, **named: 3 * formula(*given, **named))
    assert own.distil(fit, teach, 2.0, 0.5).loss == pytest.approx(3 * before, rel=1e-6)


@pytest.mark.parametrize("spec", [Lora(rank=4), Full()])
def test_a_student_of_the_teachers_architecture_becomes_it_and_the_base_stays(spec: Lora | Full) -> None:
    base = tiny_lm.base("llama")
    own = HFModel(base, spec, 0, 2048, GenerateReadout(tiny_lm.lm_head("llama")))
    lora = model("llama")
    wanted = lora.token_logits(moved(lora, size=0.05), data())
    counts = maths.positions(data())
    starts = [0, *np.cumsum(counts).tolist()]

    def teach(rows: Sequence[int]) -> Target:
        return Target(torch.cat([wanted[starts[row] : starts[row + 1]] for row in rows]))

    before = tree.sha256(base.module.state_dict())
    fit = Fit(
        own.init(rng_for(0, "adapter")), data(), [[0, 1, 2, 3, 4]] * 40, AdamW(1e-3 if spec.kind == "full" else 1e-2)
    )
    fitted = own.distil(fit, teach)
    assert fitted.losses[-1] < fitted.losses[0] / 5
    assert tree.sha256(base.module.state_dict()) == before
    assert own.distil(fit, teach).losses == fitted.losses


def test_what_cannot_be_distilled_is_told() -> None:
    own, teach = model("llama"), lambda rows: Target(torch.zeros(1, 3))
    fit = Fit(own.init(rng_for(0, "adapter")), data(), [[0]], SGD(1.0))
    with pytest.raises(FitError, match=r"temperature of a distillation is 0.*above 0"):
        own.distil(fit, teach, temperature=0.0)
    with pytest.raises(FitError, match=r"share of the loss is 1\.5"):
        own.distil(fit, teach, share=1.5)
    with pytest.raises(FitError, match="do not say where their answers begin"):
        own.token_logits(None, Examples(data().tokens, data().labels))
    labels = HFModel(tiny_lm.base("llama"), Lora(rank=4), 3, 2048, HeadReadout(3, own.width, True))
    with pytest.raises(FitError, match="this model predicts labels"):
        labels.token_logits(None, data())
