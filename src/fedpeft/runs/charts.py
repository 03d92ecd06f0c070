"""Small pictures as SVG text: no script, no network, colours from the page's style sheet.

Colours are the classes `c0` to `c7` and `rest` of `report.css`: a palette that colour-blind readers can tell
apart, with a variant for dark pages. Every mark has a title that appears when the pointer rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from fedpeft.runs.units import count_text

COLOURS = 8

WIDTH, HEIGHT = 380.0, 236.0
TOP, BOTTOM, LEFT = 12.0, 40.0, 42.0
LABEL_PX = 8.6  # width of a letter of a label at its font size
LABEL_GAP = 13.0  # least distance of two labels


@dataclass(frozen=True)
class Point:
    """One mark of a line."""

    x: float
    y: float
    spread: float = 0.0  # half the height of the band
    title: str = ""


@dataclass(frozen=True)
class Line:
    """One series: its points in order of x, its label at its end, its colour by number."""

    label: str
    points: Sequence[Point]
    colour: int = 0  # beyond the palette the colours start again, dashed


@dataclass(frozen=True)
class Level:
    """A horizontal line: a score that does not change."""

    label: str
    y: float


def line_chart(lines: Sequence[Line], x_label: str, levels: Sequence[Level] = (), name: str = "") -> str:
    """Lines over a common x axis that starts at 0, with bands of spread and labels at the lines' ends.

    Args:
        name: what the picture shows, for readers who hear the page.
    """
    drawn = [line for line in lines if line.points]
    ys = [y for line in drawn for p in line.points for y in (p.y - p.spread, p.y + p.spread)]
    ys += [level.y for level in levels]
    if not drawn:
        return ""
    ticks = nice_ticks(min(ys), max(ys), 5)
    x_max = max(p.x for line in drawn for p in line.points) or 1.0
    step = 1.0 if all(p.x == round(p.x) for line in drawn for p in line.points) else 0.0  # whole numbers stay whole
    x_ticks = [t for t in nice_ticks(0.0, x_max, 4, step) if t <= x_max * 1.0001]
    labels = [line.label for line in drawn] + [level.label for level in levels]
    right = WIDTH - 10 - min(152.0, LABEL_PX * max(len(label) for label in labels))
    low, high, x_digits = ticks[0], ticks[-1], decimals(x_ticks[1] - x_ticks[0]) if len(x_ticks) > 1 else 0

    def at_x(x: float) -> float:
        return LEFT + (right - LEFT) * x / x_max

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (y - low) / (high - low)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(name)}">']
    digits = decimals(ticks[1] - ticks[0])
    for tick in ticks:
        y = at_y(tick)
        parts.append(f'<path class="grid" d="M{LEFT:g} {y:.1f}H{right:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6:g}" y="{y + 3.5:.1f}">{tick:.{digits}f}</text>')
    for tick in x_ticks:
        x = at_x(tick)
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15:g}">{tick:.{x_digits}f}</text>')
    parts.append(f'<text class="axis mid" x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 6:g}">{escape(x_label)}</text>')
    ends: list[tuple[float, str, str]] = []
    for level in levels:
        y = at_y(level.y)
        parts.append(
            f'<path class="level" d="M{LEFT:g} {y:.1f}H{right:.1f}"><title>{escape(level.label)}</title></path>'
        )
        ends.append((y, level.label, "rest"))
    for line in drawn:
        parts += _draw(line, at_x, at_y)
        ends.append((at_y(line.points[-1].y), line.label, _colour(line.colour)))
    parts += _end_labels(ends, right + 7)
    return "".join(parts) + "</svg>"


def _draw(line: Line, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> list[str]:
    colour = _colour(line.colour)
    places = [(at_x(p.x), at_y(p.y), p) for p in line.points]
    parts = []
    if any(p.spread for p in line.points):
        upper = [f"{x:.1f} {at_y(p.y + p.spread):.1f}" for x, _, p in places]
        lower = [f"{x:.1f} {at_y(p.y - p.spread):.1f}" for x, _, p in reversed(places)]
        parts.append(f'<path class="band {colour}" d="M{"L".join(upper + lower)}Z"/>')
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in places)
    parts.append(f'<path class="line {colour}{" dashed" if line.colour >= COLOURS else ""}" d="M{path}"/>')
    for x, y, p in places:
        parts.append(
            f'<g class="mark {colour}"><title>{escape(p.title)}</title><circle class="reach" cx="{x:.1f}" cy="{y:.1f}" '
            f'r="9"/><circle cx="{x:.1f}" cy="{y:.1f}" r="{2.6 if len(places) > 1 else 4:g}"/></g>'
        )
    return parts


def _end_labels(ends: Sequence[tuple[float, str, str]], x: float) -> list[str]:
    """Labels beside the ends of their lines, moved apart where they would overlap."""
    order = sorted(ends)
    ys = [y for y, _, _ in order]
    for i in range(1, len(ys)):
        ys[i] = max(ys[i], ys[i - 1] + LABEL_GAP)
    over = max(0.0, ys[-1] - (HEIGHT - BOTTOM)) if ys else 0.0
    for i in reversed(range(len(ys))):
        ceiling = HEIGHT - BOTTOM if i == len(ys) - 1 else ys[i + 1] - LABEL_GAP
        ys[i] = min(ys[i], ceiling) if over else ys[i]
    return [
        f'<text class="label {colour}" x="{x:.1f}" y="{y + 3.5:.1f}">{escape(_cut(text, 20))}</text>'
        for y, (_, text, colour) in zip(ys, order, strict=True)
    ]


def stacked_columns(
    bars: Sequence[tuple[str, Sequence[int]]], labels: Sequence[str], colours: Sequence[int], of: str = "client"
) -> str:
    """One column per client, as high as it has rows, divided by label; stretches to the width of the page.

    Args:
        bars: (client, rows per label).
        colours: number of each label's colour; -1 for the rest.
        of: what a column stands for.
    """
    most = max((sum(counts) for _, counts in bars), default=0) or 1
    gap = 0.12 if len(bars) <= 60 else 0.0
    parts = [f'<svg class="columns" viewBox="0 0 {len(bars)} 100" preserveAspectRatio="none" role="img" '
             f'aria-label="rows per label of each {of}">']  # fmt: skip
    for i, (client, counts) in enumerate(bars):
        told = ", ".join(f"{label} {n}" for label, n in zip(labels, counts, strict=True) if n)
        rows = count_text(sum(counts), "row")
        parts.append(f"<g><title>{escape(f'{client}: {rows} ({told})')}</title>")
        base = 100.0
        for n, colour in zip(counts, colours, strict=True):
            height = 100.0 * n / most
            base -= height
            if n:
                parts.append(
                    f'<rect class="{_colour(colour)}" x="{i + gap / 2:g}" y="{base:.3f}" width="{1 - gap:g}" '
                    f'height="{height:.3f}"/>'
                )
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def share_bar(counts: Sequence[int], labels: Sequence[str], colours: Sequence[int]) -> str:
    """A thin bar that shows which share each label has."""
    total = sum(counts) or 1
    parts = ['<svg class="share" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">']
    x = 0.0
    for n, label, colour in zip(counts, labels, colours, strict=True):
        if n:
            width = 100.0 * n / total
            parts.append(f'<rect class="{_colour(colour)}" x="{x:.2f}" width="{width:.2f}" height="10">'
                         f"<title>{escape(label)}: {n}</title></rect>")  # fmt: skip
            x += width
    return "".join(parts) + "</svg>"


def strip(values: Sequence[tuple[str, float]], colour: int, most: float = 1.0) -> str:
    """One tick per client between 0 and `most`: how unequally a score is distributed."""
    parts = ['<svg class="strip" viewBox="0 0 100 14" preserveAspectRatio="none" role="img" '
             'aria-label="score of each client">']  # fmt: skip
    parts.append('<path class="grid" d="M0 13.5H100"/>')
    for client, value in values:
        parts.append(f'<path class="stroke {_colour(colour)}" d="M{100 * value / most:.2f} 1V13">'
                     f"<title>{escape(client)}: {value:.3f}</title></path>")  # fmt: skip
    return "".join(parts) + "</svg>"


def nice_ticks(low: float, high: float, about: int, least: float = 0.0) -> list[float]:
    """Round numbers that enclose the range, about as many as asked for, at equal distances of at least `least`."""
    if not high > low:
        low, high = low - 0.05, high + 0.05
    raw = max((high - low) / about, least)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def decimals(step: float) -> int:
    """How many decimals it takes to write multiples of the step exactly."""
    return next((d for d in range(9) if abs(round(step, d) - step) < 1e-9 * step), 9)


def _colour(number: int) -> str:
    return "rest" if number < 0 else f"c{number % COLOURS}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
