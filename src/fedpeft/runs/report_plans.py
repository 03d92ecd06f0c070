"""Who trained what in a planned federation, and why: a picture of the ranks, a table of the machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedpeft.runs.report_sections import table
from fedpeft.runs.units import bytes_text, count_text, seconds_text, share_text

CELL, LEFT, TOP, MOST = 15.0, 96.0, 46.0, 40  # of the picture: a cell, margins, and machines that it shows
HEAD = ["machine", "bits", "batch", "steps", "peak", "step", "round", "up", "left out", "coverage", "why", "trains"]

WRAPPED = 'style="white-space: normal; min-width: 11em"'  # cells of a table keep to one line otherwise


def plans(told: Mapping[str, Any]) -> str:
    """HTML of a run's plans, from its choices; empty without any."""
    chosen: Mapping[str, Any] = told.get("plans") or {}
    excluded: Mapping[str, str] = told.get("excluded") or {}
    if not chosen and not excluded:
        return ""
    share, length = share_text(float(told.get("under_training") or 0.0)), float(told.get("deadline_s") or 0.0)
    words = (
        f"<p>{count_text(len(chosen), 'machine')} took part, planned for a round of {seconds_text(length)}; {share} of "
        f"the examples of the machines that take part were left out of a round for want of time. "
        f"{_untrained(told.get('untrained') or ())}</p>"
    )
    if told.get("warning"):
        words += f"<p>{escape(str(told['warning']))}.</p>"
    picture = ranks(chosen, told.get("weight_scores") or {})
    rows = [_row(name, own) for name, own in chosen.items()]
    inner = words + picture + (table(HEAD, rows, words="machine,bits,why,trains") if rows else "")
    if excluded:
        out = [[escape(name), escape(str(reason))] for name, reason in excluded.items()]
        inner += f"<h3>Could not join</h3>{table(['machine', 'why'], out, words='machine,why')}"
    return inner


def _row(name: str, plan: Mapping[str, Any]) -> list[str]:
    p = plan["predicted"]
    why = "".join(f"<li>{escape(line)}</li>" for line in plan["why"])
    return [
        escape(name),
        escape(plan["bits"]) + (", checkpointing" if plan["checkpointing"] else ""),
        str(plan["batch"]),
        str(plan["steps"]),
        bytes_text(p["peak_bytes"]),
        seconds_text(p["step_s"]),
        seconds_text(p["round_s"]),
        bytes_text(p["up_bytes"]),
        share_text(p["under_training"]),
        f"{p['coverage']:.2f}",
        f'<details style="white-space: normal;" class="why"><summary>why</summary><ul>{why}</ul></details>',
        f"<div {WRAPPED}>{escape(plan['weights'])}</div>",
    ]


def _untrained(names: Sequence[str]) -> str:
    if not names:
        return "Every weight is trained by somebody."
    few = ", ".join(map(escape, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"Nobody trains {few}."


def ranks(chosen: Mapping[str, Any], scores: Mapping[str, float]) -> str:
    """A row per machine and a column per weight, the darker the higher the rank; above, the weights' importance."""
    shown = list(chosen.items())[:MOST]
    weights = sorted(scores or {name: 0.0 for _, plan in shown for name in plan["ranks"]}, key=_place)
    top = max((rank for _, plan in shown for rank in plan["ranks"].values()), default=0)
    if not weights or not top:
        return ""
    most = max(scores.values(), default=0.0) or 1.0
    width, height = max(460.0, LEFT + CELL * len(weights) + 8), TOP + CELL * len(shown) + 8
    parts = [
        f'<svg class="chart plans" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="rank of every weight on '
        f'every machine"><text class="tick end" x="{LEFT - 8:g}" y="{TOP - 6:g}">importance</text>'
    ]
    for i, name in enumerate(weights):
        score = float(scores.get(name, 0.0))
        bar = (TOP - 10) * max(0.0, score) / most
        parts.append(
            f'<rect class="rest" x="{LEFT + CELL * i + 1:g}" y="{TOP - 4 - bar:.1f}" width="{CELL - 2:g}" '
            f'height="{max(bar, 0.5):.1f}"><title>{escape(name)}: score {score:.4g}</title></rect>'
        )
    for j, (machine, plan) in enumerate(shown):
        y = TOP + CELL * j
        parts.append(f'<text class="tick end" x="{LEFT - 8:g}" y="{y + 11:g}">{escape(machine[:14])}</text>')
        for i, name in enumerate(weights):
            rank = int(plan["ranks"].get(name, 0))
            look = (
                f'class="c0" fill-opacity="{0.25 + 0.75 * rank / top:.2f}"'
                if rank
                else 'class="rest" fill-opacity="0.3"'
            )
            parts.append(
                f'<rect {look} x="{LEFT + CELL * i + 1:g}" y="{y + 1:g}" width="{CELL - 2:g}" height="{CELL - 2:g}">'
                f"<title>{escape(machine)}, {escape(name)}: {f'rank {rank}' if rank else 'not trained'}</title></rect>"
            )
    more = f"<p>{len(chosen) - MOST} further machines are in the table.</p>" if len(chosen) > MOST else ""
    note = f"<p>Columns are weights from the lowest block up; the darkest is rank {top}.</p>"
    return "".join(parts) + "</svg>" + note + more


def _place(name: str) -> tuple[int, str]:
    """Lower blocks first."""
    parts = name.split(".", 2)
    return (int(parts[1]), parts[2]) if parts[0] == "block" and len(parts) > 2 and parts[1].isdigit() else (-1, name)
