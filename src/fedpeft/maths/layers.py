"""Which layers matter: a score of each layer's outputs, how many to take, and which.

The score is the one of FedPepTAO (Che et al. 2023, arXiv 2310.15080; from the authors' code): of neural architecture
search without training (NASWOT, Mellor et al. 2021, arXiv 2006.04647) with the opposite sign. It is large where samples
are nearly collinear, that is where a layer hardly tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedpeft.core.counts import round_up
from fedpeft.core.rng import Rng

EPSILON = 1e-5

By = Literal["score", "random", "first", "last", "middle"]


def layer_score(outputs: Tensor) -> float:
    """zeta = (1/b) sum_k [ln(lambda_k + eps) + 1 / (lambda_k + eps)] over the eigenvalues of the cosine matrix.

    At least 1 (to rounding), and 1 only for orthogonal samples. It has a pole at collinear ones: give no row twice.
    Different numbers of samples are not comparable (cosine .9 gives 4.4 for two, 7.0 for eight).

    Args:
        outputs: (b, features) of one layer, zero at padding.
    """
    rows = outputs.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    eigenvalues = torch.linalg.eigvalsh(rows @ rows.T).clamp_min(0) + EPSILON
    return float((eigenvalues.log() + 1 / eigenvalues).mean())


def relative_changes(changes: Tensor, sizes: Tensor, of_input: bool = False) -> Tensor:
    """(blocks,) float32: how much each block's output changes for its size, the mean over samples.

    The idea is FibecFed's (arXiv 2410.00131), the quotient ours.

    Args:
        changes: (blocks + 1, samples) norms of the changes, first of what enters the lowest block.
        sizes: (blocks + 1, samples) norms of the outputs.
        of_input: for the change of what enters the block instead of its output's size.
    """
    changes, sizes = (t.double().clamp_min(1e-30) for t in (changes, sizes))
    whole = changes[1:] / (changes[:-1] if of_input else sizes[1:])
    return whole.mean(dim=1).float()


def layer_count(ratio: float, layers: int, candidates: int) -> int:
    """clamp(ceil(ratio L), 1, number of candidates); a ratio that rounding puts just above a whole number counts less.

    Args:
        ratio: share of all layers.
        layers: L.
        candidates: how many of them may be taken.
    """
    return max(1, min(round_up(ratio * layers), candidates))


def choose_layers(scores: Tensor, count: int, by: By, candidates: Sequence[int], rng: Rng) -> tuple[int, ...]:
    """`count` of the candidates, ascending.

    Args:
        scores: of every layer; larger goes first, equal ones by their place. Used by "score" alone.
        by: score; random; the first; the last; or those in the middle, from (candidates - count) // 2 on.
        rng: for "random".
    """
    places = list(candidates)
    if by == "score":
        chosen = sorted(places, key=lambda layer: (-float(scores[layer]), layer))[:count]
    elif by == "random":
        chosen = [places[i] for i in rng.choice(len(places), size=count, replace=False)]
    else:
        start = {"first": 0, "last": len(places) - count, "middle": (len(places) - count) // 2}[by]
        chosen = places[start : start + count]
    return tuple(sorted(chosen))
