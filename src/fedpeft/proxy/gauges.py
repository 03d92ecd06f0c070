"""Counts and times of the endpoint, as text for Prometheus (exposition format 0.0.4)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

Labels = tuple[tuple[str, str], ...]


class Measure(Protocol):
    """Something that is printed."""

    def lines(self) -> list[str]:
        """HELP, TYPE and samples."""
        ...


def _sample(name: str, labels: Labels, value: float) -> str:
    inner = ",".join(f'{key}="{_escaped(held)}"' for key, held in labels)
    return f"{name}{{{inner}}} {value:g}" if inner else f"{name} {value:.17g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _head(name: str, meaning: str, kind: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]


class Counter:
    """A number that only grows, per set of labels; safe between threads."""

    def __init__(self, name: str, meaning: str) -> None:
        self.name, self.meaning = name, meaning
        self._lock = threading.Lock()
        self._held: dict[Labels, float] = {}

    def add(self, amount: float = 1, **labels: str) -> None:
        """Count."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._held[key] = self._held.get(key, 0) + amount

    def value(self, **labels: str) -> float:
        """What was counted under these labels."""
        return self._held.get(tuple(sorted(labels.items())), 0)

    def lines(self) -> list[str]:
        """Its text."""
        with self._lock:
            held = sorted(self._held.items()) or [((), 0.0)]
        return [*_head(self.name, self.meaning, "counter"), *(_sample(self.name, *each) for each in held)]


class Gauge:
    """A number that is looked up when it is asked for."""

    def __init__(self, name: str, meaning: str, look: Callable[[], float]) -> None:
        self.name, self.meaning, self._look = name, meaning, look

    def lines(self) -> list[str]:
        """Its text."""
        return [*_head(self.name, self.meaning, "gauge"), _sample(self.name, (), self._look())]


class Histogram:
    """How values are spread: counts up to each bound; safe between threads."""

    def __init__(self, name: str, meaning: str, bounds: Sequence[float]) -> None:
        self.name, self.meaning, self.bounds = name, meaning, tuple(bounds)
        self._lock = threading.Lock()
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        place = next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))
        with self._lock:
            self._counts[place] += 1
            self._sum += value

    def lines(self) -> list[str]:
        """Its text."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        found, so_far = _head(self.name, self.meaning, "histogram"), 0
        for bound, count in zip([*(f"{b:g}" for b in self.bounds), "+Inf"], counts, strict=True):
            so_far += count
            found.append(_sample(f"{self.name}_bucket", (("le", bound),), so_far))
        return [*found, _sample(f"{self.name}_sum", (), total), _sample(f"{self.name}_count", (), so_far)]


def exposition(measures: Sequence[Measure]) -> str:
    """All of them, one after another."""
    return "".join(f"{line}\n" for measure in measures for line in measure.lines())
