"""The plans of a planned federation as a picture and a table."""

from __future__ import annotations

import re
from typing import Any

from fedpeft.runs.report_plans import MOST, plans, ranks


def plan(ranks: dict[str, int], **changes: Any) -> dict[str, Any]:
    predicted = {"peak_bytes": 2_000_000, "step_s": 0.01, "round_s": 0.5, "up_bytes": 900, "under_training": 0.25}
    told = {"bits": "nf4", "batch": 4, "steps": 7, "checkpointing": True, "weights": "query 0 r8", "why": ["a < b"]}
    return {**told, "ranks": ranks, "predicted": {**predicted, "coverage": 0.5}, **changes}


TOLD = {
    "deadline_s": 0.6,
    "under_training": 0.125,
    "weight_scores": {"block.1.query": 0.75, "block.0.query": 0.25},
    "plans": {"a<b>": plan({"block.0.query": 8}), "c": plan({"block.0.query": 2, "block.1.query": 4})},
    "excluded": {"tiny": "needs 5 GB; 1 GB usable"},
    "untrained": ["block.2.key"],
}


def test_a_picture_has_a_cell_per_machine_and_weight() -> None:
    page = plans(TOLD)
    assert page.count('class="c0"') == 3 and page.count("not trained") == 1
    assert re.search(r'fill-opacity="1\.00".*?<title>a&lt;b&gt;, block\.0\.query: rank 8', page)
    assert page.index("block.0.query: score 0.25") < page.index("block.1.query: score 0.75")


def test_the_table_says_what_and_why_and_escapes_names() -> None:
    page = plans(TOLD)
    assert "a<b>" not in page and "a &lt; b" in page and "nf4, checkpointing" in page
    assert "2 machines took part, planned for a round of 0.60 s; 12.5 %" in page
    assert "12.5 % of the examples of the machines that take part were left out" in page
    assert "Nobody trains block.2.key." in page and "needs 5 GB; 1 GB usable" in page


def test_why_stands_before_what_is_trained_and_both_wrap() -> None:
    page = plans(TOLD)
    assert page.index(">why</th>") < page.index(">trains</th>")
    assert re.search(r'<div style="white-space: normal;[^>]*>query 0 r8</div>', page)
    assert re.search(r'<details style="white-space: normal;[^>]*><summary>why', page)


def test_nothing_planned_gives_nothing() -> None:
    assert plans({}) == "" and ranks({}, {}) == ""
    assert "Could not join" in plans({"excluded": {"a": "why"}})


def test_many_machines_are_cut_in_the_picture_alone() -> None:
    many = {f"m{i}": plan({"block.0.query": 8}) for i in range(MOST + 2)}
    page = plans({**TOLD, "plans": many})
    assert "2 further machines are in the table" in page and page.count("<summary>why</summary>") == MOST + 2
