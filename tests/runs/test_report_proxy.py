"""The page's section on a large model: curve, advice, scores of what was said, and nothing where there was none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpeft.runs.history import History
from fedpeft.runs.report_proxy import proxy

CURVE = {
    "alphas": [0.0, 0.5, 1.0], "nll": [2.5, 2.25, 2.75], "best": 0.5, "base_large": 2.5, "tuned_small": 2.0,
    "base_small": 3.0, "tokens": 9,
    "advice": "the tuned small model alone is better than any combination: serve it alone",
}  # fmt: skip
SCORES = {"proxy": {"perplexity": 9.5, "alpha": 0.5, "exact_match": 0.25}, "large": {"perplexity": 12.2}}


def history(told: dict[str, Any] | None, rounds: tuple[dict[str, Any], ...] = (), **config: Any) -> History:
    manifest: dict[str, Any] = {"metrics": {"best": {"test": {**SCORES, "global": {"perplexity": 7.4}}}}}
    if told is not None:
        manifest["proxy"] = told
    return History(Path("run"), {"proxy": config}, manifest, rounds, (), {}, (), ())


def test_the_curve_has_a_mark_for_each_alpha_and_a_line_for_each_model_alone() -> None:
    page = proxy(history({"large": "<b>L</b>", "alpha": 0.5, "alpha_by": "nll", "curve": CURVE}))
    for alpha, nll in zip(CURVE["alphas"], CURVE["nll"], strict=True):  # type: ignore[call-overload]
        assert f"alpha {alpha:g}: {nll:.4f} nats per token" in page
    assert page.count('class="level"') == 3 and "&lt;b&gt;L&lt;/b&gt;, alpha 0.5" in page and "<b>L" not in page
    assert "The tuned small model alone is better than any combination: serve it alone." in page
    assert "9.500" in page and "0.250" in page and "12.200" in page and "7.400" in page
    assert "nothing" not in proxy(history(None)).lower() and proxy(history(None)) == ""


@pytest.mark.parametrize(
    ("proxy_score", "tuned", "large", "said"),
    [
        (9.5, 12.0, 12.2, "The large model is worth asking: steered, it is better than the tuned small model"),
        (9.5, 9.5, 12.2, "The large model is not worth asking: the tuned small model alone is as good or better."),
        (9.5, 7.4, 8.2, "The large model is not worth asking"),
        (12.2, 13.0, 12.2, "The large model is worth asking, but not worth steering: alone it is as good or better."),
    ],
)
def test_one_sentence_says_whether_the_large_model_is_worth_asking(
    proxy_score: float, tuned: float, large: float, said: str
) -> None:
    scores = {"proxy": {"perplexity": proxy_score}, "global": {"perplexity": tuned}, "large": {"perplexity": large}}
    told = {"large": "L", "alpha": 0.5, "alpha_by": "nll", "curve": None}
    manifest = {"metric": "perplexity", "metrics": {"best": {"test": scores}}, "proxy": told}
    page = proxy(History(Path("run"), {}, manifest, (), (), {}, (), ()))
    assert said in page and page.count("worth asking") == 1
    figures = f"{proxy_score:.3f} the large model, steered, {tuned:.3f} the small model, tuned, {large:.3f} the large"
    assert f"Test perplexity (lower is better): {figures} model alone." in page


def test_what_alpha_was_chosen_by_says_whether_the_large_model_is_worth_asking() -> None:
    by = {"proxy": {"exact_match": 0.5, "perplexity": 9.0}, "large": {"exact_match": 0.25, "perplexity": 8.0}}
    by["global"] = {"exact_match": 0.375, "perplexity": 7.0}
    told = {"large": "L", "alpha": 0.5, "alpha_by": "exact_match", "curve": None}
    manifest = {"metric": "perplexity", "metrics": {"best": {"test": by}}, "proxy": told}
    page = proxy(History(Path("run"), {}, manifest, (), (), {}, (), ()))
    assert "is worth asking: steered" in page and "Test exact match: 0.500 the large model, steered" in page
    del by["large"]
    assert "worth asking" not in proxy(History(Path("run"), {}, manifest, (), (), {}, (), ()))


def test_the_expert_prompt_is_told_and_escaped() -> None:
    told = {"large": "L", "alpha": 0.5, "alpha_by": "given", "curve": None}
    page = proxy(history(told, expert_prompt="<b>brief</b>"))
    assert "The tuned small model alone read &#x27;&lt;b&gt;brief&lt;/b&gt;&#x27; with every prompt." in page
    assert "alone read" not in proxy(history(told))


def test_the_best_alpha_is_drawn_against_rounds_where_there_are_several() -> None:
    rounds = ({"round": 0, "alpha_curve": {"best": 0.0}}, {"round": 1}, {"round": 2, "alpha_curve": {"best": 0.75}})
    told = {"large": "L", "alpha": 0.75, "alpha_by": "nll", "curve": CURVE}
    assert "round 2: 0.75" in proxy(history(told, rounds)) and "best alpha" not in proxy(history(told, rounds[:1]))


def test_a_model_of_few_candidates_has_scores_of_what_it_said() -> None:
    told = {"large": "L", "alpha": 1.0, "alpha_by": "rouge_l", "curve": None, "text_scores": {"0.5": 0.3, "1": 0.4}}
    page = proxy(history(told, public="texts.jsonl"))
    assert "by ROUGE-L on validation rows" in page and "validation rouge l" in page and "0.400" in page
    assert "<svg" not in page and "no public texts" not in page
    assert "no public texts" in proxy(history({**told, "alpha_by": "given", "public_texts": None}))
