"""What a run's models said for some test rows, for the report: every text is somebody's, so all of it is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from fedpeft.runs.history import BASE, GLOBAL, LARGE, PROXY, History
from fedpeft.runs.report_sections import section, table

SHOWN = 8  # before the rest is folded away
LONGEST = 600  # characters of a text that are shown
MOST_LINES = 8  # of a text; a model that says nothing but line breaks does not fill the page
WHO = {GLOBAL: "said", BASE: "the untrained base", PROXY: "the steered large model", LARGE: "the large model alone"}


def samples(run: History) -> str:
    """Prompts, a reference, and what the model and the untrained base said; empty text where nothing was generated."""
    who = [one for one in WHO if one in (GLOBAL, BASE) or any(one in sample for sample in run.samples)]
    rows = [
        [_cell(_given(one)), _cell(_reference(one)), *(_cell(one.get(name)) for name in who)] for one in run.samples
    ]
    names = {**WHO, GLOBAL: "the tuned small model"} if PROXY in who else WHO
    head = ["given", "reference", *(names[name] for name in who)]
    words = ",".join(head)
    if not rows:
        return ""
    inner = table(head, rows[:SHOWN], words=words)
    if len(rows) > SHOWN:
        more = table(head, rows[SHOWN:], words=words)
        inner += f"<details><summary>{len(rows) - SHOWN} more</summary>{more}</details>"
    note = "Test rows, answered word by word by the best-validated parameters, always with the likeliest next one."
    return section("What it says", note, f'<div class="samples">{inner}</div>')


def _given(sample: Mapping[str, Any]) -> str:
    return "\n".join(str(sample[key]) for key in ("instruction", "context") if sample.get(key))


def _reference(sample: Mapping[str, Any]) -> str:
    references = sample.get("references") or [""]
    more = f" (and {len(references) - 1} more)" if len(references) > 1 else ""
    return f"{references[0]}{more}"


def _cell(text: Any) -> str:
    shown = str(text or "")
    cut = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…"
    lines = cut.splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], "…"]
    return "<br>".join(escape(line) for line in lines) or "—"
