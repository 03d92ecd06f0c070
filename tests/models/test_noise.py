"""Dropout noise by place: reproducible anywhere, different everywhere, and fair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from fedpeft.core import tree
from fedpeft.core.fit import SGD, Fit
from fedpeft.models.adapters import lora
from fedpeft.models.noise import keep, row_keys

SHAPE = (9, 16)
HALF = torch.tensor([0.5])


def noise(seed: int = 1, step: int = 0, row: int = 0, module: str = "block.0.query", p: float = 0.5) -> torch.Tensor:
    return keep(row_keys([seed], step, [row], tiny.CPU), module, SHAPE, torch.tensor([p]))[0]


def test_the_same_place_gives_the_same_noise_in_any_batch() -> None:
    keys = row_keys([5, 1, 7], 3, [2, 0, 2], tiny.CPU)
    batch = keep(keys, "block.0.query", SHAPE, torch.tensor([0.3, 0.5, 0.0]))
    assert torch.equal(batch[1], noise(1, 3, 0, p=0.5))
    assert torch.equal(batch[0], noise(5, 3, 2, p=0.3))
    assert torch.equal(batch[2], torch.ones(SHAPE))


def test_longer_padding_changes_nothing_before_it() -> None:
    keys = row_keys([4, 9], 0, [1, 1], tiny.CPU)
    p = torch.tensor([0.4, 0.2])
    assert torch.equal(keep(keys, "m", (5, 16), p), keep(keys, "m", (9, 16), p)[:, :5])


@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 1}, {"row": 1}, {"module": "block.0.value"}])
def test_another_place_gives_other_and_unrelated_noise(other: dict[str, int]) -> None:
    pairs = [(noise(row=100 + i), noise(**{"row": 100 + i} | {k: v + i if k == "row" else v for k, v in other.items()}))
             for i in range(0, 80, 2)]  # fmt: skip
    a, b = (torch.cat(own).flatten() - 1 for own in zip(*pairs, strict=True))
    assert len(a) == 40 * 144
    assert abs((a * b).mean().item()) < 4 / len(a) ** 0.5  # +-1 each: independent within four standard errors


def test_neighbouring_numbers_are_unrelated() -> None:
    x = torch.cat([noise(row=i)[None] for i in range(40)]) - 1
    for shifted in (x[1:] * x[:-1], x[:, 1:] * x[:, :-1], x[:, :, 1:] * x[:, :, :-1]):
        assert abs(shifted.mean().item()) < 4 / shifted.numel() ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_right_and_the_expectation_is_kept(p: float) -> None:
    x = torch.cat([noise(row=i, p=p)[None] for i in range(100)])
    assert x.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    error = (p * (1 - p) / x.numel()) ** 0.5
    assert abs((x == 0).float().mean().item() - p) < 4 * error


def test_large_and_negative_seeds_are_places_too() -> None:
    seeds = [0, (1 << 63) - 1, (1 << 64) - 1, -5]
    keys = row_keys(seeds, 0, [0] * 4, tiny.CPU)
    assert len(set(keys.tolist())) == 4


def test_training_has_the_same_noise_in_a_cohort_and_alone_and_other_noise_for_another_seed() -> None:
    """Rows of very different lengths, so that parts and padding differ between the two."""
    model = tiny.model()
    fits = []
    for i in range(3):
        data = tiny.examples(tiny.place(i), 6, longest=3 + 10 * i)
        batches = [[0, 1, 2], [3, 4], [0, 5]]
        fits.append(Fit(tiny.params(model, tiny.place(i)), data, batches, SGD(0.1), seed=3, dropout=0.4))
    for alone, fitted in zip(map(model.fit, fits), model.fit_many(fits), strict=True):
        assert not isinstance(fitted, Exception)
        assert alone.losses == pytest.approx(fitted.losses, abs=1e-9)
        assert tree.norm(tree.sub(alone.params, fitted.params)) < 1e-9
    losses = {model.fit(replace(fits[0], seed=seed, dropout=p)).losses for seed, p in [(3, 0.4), (4, 0.4), (3, 0.0)]}
    assert len(losses) == 3


def test_every_module_step_and_row_of_a_model_has_noise_of_its_own() -> None:
    """With rate 0 nothing but the noise can change the loss; the effect of each projection's noise is seen alone."""
    model = tiny.model()
    data = tiny.examples(tiny.place(1), 1).take([0, 0])  # the same text twice
    params = tiny.params(model, tiny.place())
    plain = Fit(params, data, [[0], [0]], SGD(0.0), seed=3, dropout=0.5)
    first, second = model.fit(plain).losses
    assert first != second
    assert model.fit(replace(plain, batches=[[1]])).losses[0] not in (first, second)

    seen: dict[str, torch.Tensor] = {}
    original = lora.keep

    def recorded(keys: torch.Tensor, module: str, shape: tuple[int, int], p: torch.Tensor) -> torch.Tensor:
        seen[module] = original(keys, module, shape, p)
        return seen[module]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "keep", recorded)
        model.fit(plain)
    assert seen.keys() == model.slots.keys()
    assert len({tuple(noise.flatten().tolist()) for noise in seen.values()}) == len(model.slots)


def test_prediction_has_no_noise() -> None:
    model = tiny.model()
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 4)
    before = model.logits(params, data)
    model.fit(Fit(params, data, [[0, 1]], SGD(0.1), dropout=0.5))
    assert torch.equal(model.logits(params, data), before)
