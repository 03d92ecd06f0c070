"""Pictures: marks where the numbers say, labels that do not overlap, text that is escaped."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.runs import charts
from fedpeft.runs.charts import Level, Line, Point
from fedpeft.runs.units import bytes_text, bytes_unit, score_text, seconds_text, seconds_unit

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, numbers, st.integers(1, 8))
@settings(deadline=None)
def test_ticks_are_round_even_and_enclose_the_range(a: float, b: float, about: int) -> None:
    low, high = min(a, b), max(a, b)
    if 0 < high - low < 1e-6:
        return
    ticks = charts.nice_ticks(low, high, about)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
    assert len(ticks) <= about + 3
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-3
    assert all(t2 - t1 == pytest.approx(step, rel=1e-6, abs=1e-9) for t1, t2 in itertools.pairwise(ticks))


@pytest.mark.parametrize(("step", "places"), [(1.0, 0), (0.5, 1), (0.25, 2), (0.05, 2), (20.0, 0), (0.002, 3)])
def test_decimals_write_a_step_exactly(step: float, places: int) -> None:
    assert charts.decimals(step) == places


def test_marks_stand_where_the_numbers_say() -> None:
    """y from 0 to 1 on the ticks 0, .2, .. 1: the middle of the frame is .5; x from 0 to 10: 5 is half way."""
    points = [Point(0, 0.0), Point(5, 0.5), Point(10, 1.0)]
    svg = charts.line_chart([Line("a", points)], "round")
    path = re.search(r'class="line c0" d="M([\d. L]+)"', svg)
    assert path is not None
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, pair.split())) for pair in path[1].split("L"))
    assert (x0, y0) == (charts.LEFT, charts.HEIGHT - charts.BOTTOM)
    assert y2 == charts.TOP
    assert (x1, y1) == (pytest.approx((x0 + x2) / 2, abs=0.1), pytest.approx((y0 + y2) / 2, abs=0.1))


def test_band_goes_along_the_spread() -> None:
    svg = charts.line_chart([Line("a", [Point(1, 0.5, 0.5), Point(2, 0.5, 0.5)])], "round")
    band = re.search(r'class="band c0" d="M([\d. L]+)Z"', svg)
    assert band is not None
    ys = [float(pair.split()[1]) for pair in band[1].split("L")]
    assert ys == [charts.TOP] * 2 + [charts.HEIGHT - charts.BOTTOM] * 2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
@settings(deadline=None)
def test_end_labels_keep_their_distance_and_stay_in_the_picture(ends: list[float]) -> None:
    lines = [Line(f"line {i}", [Point(1, y)], i) for i, y in enumerate(ends)]
    svg = charts.line_chart(lines, "round", [Level("majority", 0.5)])
    ys = sorted(float(y) for y in re.findall(r'class="label [^"]*" x="[\d.]+" y="([\d.-]+)"', svg))
    assert len(ys) == len(ends) + 1
    assert all(b - a >= charts.LABEL_GAP - 0.11 for a, b in itertools.pairwise(ys))
    assert ys[-1] <= charts.HEIGHT - charts.BOTTOM + 4
    ElementTree.fromstring(svg)


def test_nothing_to_draw_is_no_picture() -> None:
    assert charts.line_chart([Line("a", [])], "round", [Level("majority", 0.2)]) == ""


def test_one_point_is_a_dot_and_whole_rounds_have_whole_ticks() -> None:
    svg = charts.line_chart([Line("a", [Point(2, 0.4, title="t")])], "round")
    assert svg.count("<circle") == 2
    ticks = re.findall(r'class="tick mid"[^>]*>([^<]+)<', svg)
    assert ticks == ["0", "1", "2"]


def test_text_is_escaped_everywhere() -> None:
    evil = "<b>&\"'"
    pictures = [
        charts.line_chart([Line(evil, [Point(1, 1, title=evil)])], evil, [Level(evil, 0.5)], evil),
        charts.stacked_columns([(evil, [1, 2])], [evil, "b"], [0, 1]),
        charts.share_bar([1], [evil], [0]),
        charts.strip([(evil, 0.5)], 0),
    ]
    for svg in pictures:
        assert "<b>" not in svg
        texts = "".join(ElementTree.fromstring(svg).itertext())
        assert evil in texts


def test_share_bar_is_full_and_in_proportion() -> None:
    widths = [
        float(w) for w in re.findall(r'width="([\d.]+)" height="10"', charts.share_bar([1, 0, 3], "abc", [0, 1, 2]))
    ]
    assert widths == [25.0, 75.0]


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (12_345_678, "12.3 MB"), (4.56e11, "456 GB"),
     (3e15, "3000 TB")],
)  # fmt: skip
def test_bytes(n: float, text: str) -> None:
    assert bytes_text(n) == text


@pytest.mark.parametrize(
    ("s", "text"),
    [(0, "0 s"), (0.0123, "12 ms"), (0.42, "0.42 s"), (12.34, "12.3 s"), (59.97, "1 min 00 s"), (245, "4 min 05 s"),
     (7380, "2 h 03 min"), (3 * 86400 + 4 * 3600, "3 d 4 h"), (math.inf, "—")],
)  # fmt: skip
def test_seconds(s: float, text: str) -> None:
    assert seconds_text(s) == text


def test_scores_and_units_of_axes() -> None:
    assert (score_text(0.5), score_text(0.5, 0.01), score_text(None), score_text(math.nan)) == (
        "0.500", "0.500 ± 0.010", "—", "—",
    )  # fmt: skip
    assert bytes_unit(9e8) == (1e6, "MB") and bytes_unit(0) == (1.0, "bytes")
    assert seconds_unit(119) == (1.0, "seconds") and seconds_unit(7200) == (3600.0, "hours")
