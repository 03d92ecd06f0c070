"""Quantities as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def bytes_text(n: float) -> str:
    """Bytes with a decimal prefix and three digits: 999 B, 1.23 MB, 45.6 GB."""
    size = float(n)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            return f"{size:.0f} B" if unit == "B" else f"{_three(size)} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def seconds_text(s: float) -> str:
    """A duration: 0.42 s, 12.3 s, 4 min 05 s, 2 h 03 min, 3 d 4 h."""
    if not math.isfinite(s):
        return "—"
    if s == 0:
        return "0 s"
    if s < 59.95:
        return f"{_three(s)} s" if s >= 0.0995 else f"{s * 1000:.0f} ms"
    minutes, rest = divmod(round(s), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def flops_text(n: float) -> str:
    """Counted operations with a decimal prefix and three digits: 999 FLOPs, 4.70 GFLOPs."""
    size = float(n)
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if abs(size) < 999.5 or unit == "E":
            return f"{size:.0f} FLOPs" if unit == "" else f"{_three(size)} {unit}FLOPs"
        size /= 1000
    raise AssertionError("unreachable")


def count_text(n: float, what: str, several: str | None = None) -> str:
    """A number of things: 1 round, 1,200 rounds, 2.5 rounds.

    Args:
        what: the name of one.
        several: the name of more than one; None: with an s.
    """
    return f"{number_text(n)} {what if n == 1 else several or what + 's'}"


def number_text(n: float) -> str:
    """A count, or the mean of counts: 1,200 or 23.6."""
    return f"{n:,.0f}" if n == round(n) else f"{n:,.1f}"


def share_text(x: float) -> str:
    """A part of a whole: 38.1 %."""
    return f"{100 * x:.1f} %"


def score_text(value: float | None, spread: float | None = None) -> str:
    """A score with three decimals, with its spread where there is one; a dash where there is no score."""
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:.3f}" if spread is None else f"{value:.3f} ± {spread:.3f}"


def bytes_unit(most: float) -> tuple[float, str]:
    """The unit in which numbers up to `most` bytes are small: (bytes, name)."""
    return _unit(most, ((1.0, "bytes"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")))


def seconds_unit(most: float) -> tuple[float, str]:
    """The unit in which numbers up to `most` seconds are small: (seconds, name)."""
    return _unit(most, ((1.0, "seconds"), (60.0, "minutes"), (3600.0, "hours"), (86400.0, "days")))


def _unit(most: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    return next((unit for unit in reversed(units) if most >= 2 * unit[0]), units[0])


def _three(x: float) -> str:
    return f"{x:.2f}" if abs(x) < 9.995 else f"{x:.1f}" if abs(x) < 99.95 else f"{x:.0f}"
