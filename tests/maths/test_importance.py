"""Sensitivity of triplets: golden values, AdaLoRA's own allocator in PEFT as oracle, gradients from Adam's moments."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedpeft.core.fit import AdamW, Moments
from fedpeft.maths.importance import Orthonormal, Smoothed, fresh_triplets, matrix_scores, products, triplet_scores


def test_golden_values_of_two_steps() -> None:
    """I = 1, then .2: Ī .15, .1575; U .1275, .11475; s .019125, .018073125."""
    one = Smoothed().after({"w": torch.tensor([1.0], dtype=torch.float64)}, 0.85, 0.85)
    two = one.after({"w": torch.tensor([0.2], dtype=torch.float64)}, 0.85, 0.85)
    assert [float(s.mean["w"]) for s in (one, two)] == pytest.approx([0.15, 0.1575])
    assert [float(s.spread["w"]) for s in (one, two)] == pytest.approx([0.1275, 0.11475])
    assert [float(s.scores["w"]) for s in (one, two)] == pytest.approx([0.019125, 0.018073125])


def test_scores_equal_pefts_rank_allocator() -> None:
    """Five random steps on two matrices, unequal betas."""
    layer = pytest.importorskip("peft.tuners.adalora.layer")
    torch.manual_seed(0)
    names, rank = ("layer0", "layer1"), 3

    def model() -> torch.nn.Module:
        net = torch.nn.Module()
        for name in names:
            inner = torch.nn.Module()
            inner.lora_A = torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.randn(rank, 5))})
            inner.lora_B = torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.randn(4, rank))})
            inner.lora_E = torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.randn(rank, 1))})
            net.add_module(name, inner)
        return net

    net = model()
    settings = SimpleNamespace(beta1=0.8, beta2=0.6, init_r=rank, target_r=rank, tinit=0, tfinal=0, total_step=10)
    allocator = layer.RankAllocator(net, settings, "default")
    smoothed = Smoothed()
    sides = {"P": "lora_B", "E": "lora_E", "Q": "lora_A"}
    for _ in range(5):
        sensitivity = {}
        for full, p in net.named_parameters():
            p.grad = torch.randn_like(p)
            stem, part, _ = full.split(".")
            side = next(k for k, v in sides.items() if v == part)
            own = (p * p.grad).abs().detach()
            sensitivity[f"{stem}.{side}"] = own.flatten() if side == "E" else own
        allocator.update_ipt(net)
        smoothed = smoothed.after(sensitivity, 0.8, 0.6)
    ours = triplet_scores(smoothed.scores)
    for name in names:
        theirs = allocator._element_score(f"{name}.lora_E.default").view(-1)
        for part, dim in (("lora_A", 1), ("lora_B", 0)):
            theirs = theirs + allocator._element_score(f"{name}.{part}.default").mean(dim=dim).view(-1)
        torch.testing.assert_close(ours[name], theirs, rtol=1e-6, atol=1e-9)
    assert matrix_scores(smoothed.scores)["layer0"] == pytest.approx(float(ours["layer0"].sum()), rel=1e-6)


def test_the_gradient_is_read_from_adams_first_moment() -> None:
    rng = np.random.default_rng(1)
    shapes = {"s.P": (4, 2), "s.E": (2,), "s.Q": (2, 3)}
    params = {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}
    old = {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}
    gradient = {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}
    for before in (Moments(), Moments(3, old, old)):
        first = {name: 0.9 * before.first.get(name, torch.zeros(())) + 0.1 * g for name, g in gradient.items()}
        found = products(params, Moments(4, first, first), before, AdamW())
        for name in shapes:
            np.testing.assert_allclose(found[name], (params[name] * gradient[name]).abs(), rtol=1e-12)


def test_the_penalty_is_the_mean_norm_of_what_lacks_to_orthonormal_triplets() -> None:
    rng = np.random.default_rng(2)
    p, q = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 3, 4))
    stacked = {"a.P": torch.from_numpy(p), "a.E": torch.zeros(2, 3), "a.Q": torch.from_numpy(q)}
    want = [
        0.1 * (np.linalg.norm(p[i].T @ p[i] - np.eye(3)) + np.linalg.norm(q[i] @ q[i].T - np.eye(3))) / 2
        for i in range(2)
    ]
    np.testing.assert_allclose(Orthonormal(0.1)(stacked), want, rtol=1e-9)
    perfect = {"a.P": torch.eye(3)[None], "a.E": torch.zeros(1, 3), "a.Q": torch.eye(3)[None].requires_grad_()}
    Orthonormal(0.1)(perfect).sum().backward()  # type: ignore[no-untyped-call]
    assert bool(torch.isfinite(perfect["a.Q"].grad).all())  # type: ignore[arg-type]


def test_fresh_triplets_are_the_same_everywhere_and_change_nothing() -> None:
    sizes = {"block.0.query": (64, 32), "block.0.value": (16, 32)}
    one, two = fresh_triplets(7, sizes, 4), fresh_triplets(7, dict(reversed(list(sizes.items()))), 4)
    assert all(torch.equal(one[name], two[name]) for name in one) and not bool(one["block.0.query.E"].any())
    assert one["block.0.query.P"].shape == (64, 4) and one["block.0.query.Q"].shape == (4, 32)
    assert float(one["block.0.query.P"].std()) == pytest.approx(0.02, rel=0.15)
