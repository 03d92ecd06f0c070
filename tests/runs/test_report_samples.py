"""Texts of models in the report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from fedpeft.runs.report_samples import LONGEST, MOST_LINES, samples


def page(said: str) -> str:
    sample: dict[str, Any] = {"instruction": "Say <b>.", "context": "", "references": ["yes"], "global": said}
    return samples(cast(Any, SimpleNamespace(samples=[sample])))


def test_line_breaks_do_not_fill_the_page_and_long_texts_are_cut() -> None:
    assert page("one\ntwo").count("one<br>two") == 1 and "…" not in page("one\ntwo")
    many = page("\n".join("line" for _ in range(40)))
    assert many.count("line") == MOST_LINES and "line<br>…" in many
    long = page("a" * (LONGEST + 1))
    assert "a" * LONGEST + "…" in long and "a" * (LONGEST + 1) not in long


def test_what_people_and_models_wrote_is_escaped() -> None:
    found = page("<script>")
    assert "&lt;script&gt;" in found and "Say &lt;b&gt;." in found and "<script>" not in found
