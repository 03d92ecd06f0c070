"""Timing that survives a busy machine: what is compared runs in turns, and medians are taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes; a GPU is waited for before and after."""
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every work, `repeats` times after a call that does not count; the order is turned round each time."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats):
        names = list(works) if repeat % 2 == 0 else list(works)[::-1]
        for name in names:
            times[name].append(seconds(works[name]))
    return times


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the ratios of neighbours."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """Floating point operations per second of a square matrix product, the median of several."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    torch.mm(a, a)
    return 2 * size**3 / statistics.median(seconds(lambda: torch.mm(a, a)) for _ in range(repeats))
