"""The choice of layers as a picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fedpeft.runs.history import Group, History
from fedpeft.runs.report_choices import RIGHT, blocks, choices, ranking


def rectangles(svg: str) -> list[tuple[str, float]]:
    """(colour, width) of every bar."""
    return [(c, float(w)) for c, w in re.findall(r'<rect class="(\w+)"[^>]* width="([\d.]+)"', svg)]


def test_a_ranking_has_a_bar_per_layer_as_long_as_its_score() -> None:
    bars = rectangles(ranking([2.0, 8.0, 4.0, 8.0], [1, 3]))
    assert [colour for colour, _ in bars] == ["rest", "c0", "rest", "c0"]
    widths = [width for _, width in bars]
    assert widths[1] == widths[3] and widths[2] / widths[1] == 0.5 and abs(widths[0] / widths[1] - 0.25) < 1e-3
    ranks = re.findall(r"no\. (\d)", ranking([2.0, 8.0, 4.0, 8.0], [1, 3]))
    assert ranks == ["4", "1", "3", "2"], "ties go to the lower layer"


def test_the_longest_label_ends_inside_the_picture() -> None:
    drawn = ranking([12345.6] + [1.33] * 29, [0])
    longest = max(len(words) for words in re.findall(r">([^<]*no\. \d+)<", drawn))
    assert longest * 7 + 6 < RIGHT, "7 units a letter at this size"


def test_the_words_say_which_layers_and_what_a_score_means() -> None:
    told = {"layers": [1], "of_layers": 2, "layers_by": "score", "layer_scores": [0.5, 1.33]}
    told["scores_mean"] = "The score is <b> where a layer helps."
    config, manifest = {"method": {"name": "elsewhere:Chooser"}}, {"choices": told}
    run = History(Path("here"), config, manifest, (), (), {}, (), ())
    page = choices(Group("FedPepTAO", (run,)))
    assert "1 layer of 2 shared: layer 1, chosen by score. The score is &lt;b&gt; where a layer helps." in page
    assert "scores_mean" not in page and "scores mean" not in page
    told["layers_by"] = "random"
    assert "The score is" not in choices(Group("FedPepTAO", (run,)))


def test_layers_without_scores_are_boxes() -> None:
    assert [colour for colour, _ in rectangles(blocks([0, 2], 3))] == ["c0", "rest", "c0"]


# --- why a teacher steers so far, and what plugging in gives -------------------------------------------------------


def page_of(choice: dict[str, Any], metrics: Any = None, rounds: Any = (), **config: Any) -> str:
    manifest = {"choices": choice, "metric": "accuracy", "metrics": {"best": {"test": metrics or {}}}}
    return choices(Group("M", (History(Path("here"), config, manifest, rounds, (), {}, (), ()),)))


CURVE = {"alphas": [0.0, 0.75, 1.0], "nll": [2.5, 2.25, 2.3], "best": 0.75, "base_large": 2.5, "tuned_small": 2.75}


def test_the_teachers_alpha_has_a_reason() -> None:
    rounds = ({"round": 0}, {"round": 1, "alpha_curve": CURVE})
    page = page_of({"teacher_alpha": 0.75}, rounds=rounds, proxy={"alpha": "auto", "select": "nll"})
    assert (
        "The teacher of the last round steered with alpha 0.75: the one of least loss on the validation texts, " in page
    )
    assert "2.2500 nats per token; the large model alone has 2.5000, the tuned small model alone 2.7500." in page
    by_text = page_of({"teacher_alpha": 0.75}, rounds=rounds, proxy={"select": "exact_match"}, method={"serve": "post"})
    assert "texts. What is served goes by exact match (proxy.select), the teacher does not." in by_text
    assert "nats" not in by_text, "the last curve is of what distillation gave"
    given = page_of({"teacher_alpha": 2.0}, proxy={"alpha": 2.0})
    assert "steered with alpha 2 in every round: given (proxy.alpha), not chosen." in given
    assert "The teacher" not in page_of({"loops": 3})


def test_plugging_in_is_compared_with_the_emulator() -> None:
    for whole, part, said in ((0.75, 0.5, "gains 0.250"), (0.5, 0.625, "loses 0.125"), (0.5, 0.5, "changes nothing")):
        page = page_of({"trained_blocks": [0]}, {"global": {"accuracy": whole}, "emulator": {"accuracy": part}})
        assert f"have a test accuracy of {whole:.3f}; around the emulator, where clients tuned them, {part:.3f}" in page
        assert f"so plugging in {said}." in page
    assert "lugg" not in page_of({"trained_blocks": [0]}, {"global": {"accuracy": 0.5}})


def test_huge_scores_do_not_break_the_picture() -> None:
    drawn: Any = ranking([49994.84, 1.0], [0])
    assert "5.0e+04" in drawn and all(width >= 1 for _, width in rectangles(drawn))
