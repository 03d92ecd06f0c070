"""Planted least squares: what becomes of a weight when machines of unequal rank train it, round after round."""

from __future__ import annotations

import pytest
import torch

import toy
from fedpeft.core.exchange import ServerEnv
from fedpeft.methods.fedpipe import FedPipe

RANKS, SHARES, WIDTH, ROUNDS, STEPS = (2, 4, 8, 16), (0.4, 0.3, 0.2, 0.1), 64, 20, 5  # most rows at the least rank


def final_loss(seed: int, tail: str, planted: int) -> float:
    """Of four machines that look for one 64x64 weight of a rank, after 20 rounds of five local steps of Adam."""
    own = FedPipe(tail=tail, aggregation="svd_product")  # type: ignore[arg-type]
    drawn = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=drawn)

    wanted = normal(WIDTH, planted) @ normal(planted, WIDTH) / (WIDTH * planted) ** 0.5
    inputs = [normal(128, WIDTH) for _ in RANKS]

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x @ (weight - wanted).T).square().sum(dim=1).mean() / 2

    b, a = torch.zeros(WIDTH, 16), torch.empty(16, WIDTH).uniform_(-1, 1, generator=drawn) / WIDTH**0.5
    for number in range(1, ROUNDS + 1):
        answers = []
        for rank, x in zip(RANKS, inputs, strict=True):
            pair = [b[:, :rank].clone().requires_grad_(), a[:rank].clone().requires_grad_()]
            rest = b[:, rank:] @ a[rank:] if tail == "frozen" else torch.zeros(WIDTH, WIDTH)
            optimizer = torch.optim.Adam(pair, lr=0.01)
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss(x, pair[0] @ pair[1] + rest).backward()
                optimizer.step()
            answers.append((pair[0].detach(), pair[1].detach()))
        env = ServerEnv(toy.ToyModel(), ("c",), seed, ROUNDS, number, "train")
        after = own.combined((b, a), answers, SHARES, env, "w")
        b, a = after["w.B"], after["w.A"]
    return float(sum(share * loss(x, b @ a) for share, x in zip(SHARES, inputs, strict=True)))


@pytest.mark.parametrize("planted", [8, 32])
def test_a_frozen_tail_beats_a_dropped_one_where_small_machines_have_most_rows(planted: int) -> None:
    """Who truncates undoes what it cannot carry; seen: 1.7 to over 100 times the loss, by what was planted."""
    frozen, dropped = (sum(final_loss(seed, tail, planted) for seed in range(2)) for tail in ("frozen", "drop"))
    assert dropped >= 1.5 * frozen
