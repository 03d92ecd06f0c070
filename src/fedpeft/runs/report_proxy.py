"""What the page says of a large model that a run's adapter steers: the alpha curve, all four models, and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedpeft.core.metrics import rank
from fedpeft.runs import charts
from fedpeft.runs.history import BASE, GLOBAL, LARGE, PROXY, History
from fedpeft.runs.report_sections import direction, section, table
from fedpeft.runs.units import score_text

MODELS = {
    PROXY: "large model, steered",
    LARGE: "large model alone",
    GLOBAL: "small model, tuned",
    BASE: "small model, untrained",
}
NOTE = (
    "The large model answers with z_L + alpha (z_T - z_B): its own scores and what tuning changed in the small one. "
    "Alpha was chosen on the validation texts."
)
LOSSES = "<figcaption>Validation loss by alpha</figcaption>"
_HIDDEN = ("alpha", "n")


def proxy(run: History) -> str:
    """The section of one run; empty text where it had no large model."""
    told = run.manifest.get("proxy")
    if not isinstance(told, Mapping):
        return ""
    curve = told.get("curve")
    parts = [f"<p>{_sentence(told)}{_expert(run)}</p>"]
    if isinstance(curve, Mapping):
        if curve.get("advice"):
            parts.append(f'<p class="notice">{escape(str(curve["advice"]).capitalize())}.</p>')
        parts.append(f'<div class="row"><figure>{_curve(curve)}{LOSSES}</figure>{_alphas(run)}</div>')
    parts.append(_text_scores(told))
    parts.append(_worth(run, str(told.get("alpha_by"))))
    parts.append(_models(run))
    if _configured(run, "public") is None:
        parts.append("<p>Nothing was distilled into the small model: there were no public texts (proxy.public).</p>")
    return section("The large model", NOTE, "".join(parts))


def _sentence(told: Mapping[str, Any]) -> str:
    how = {
        "nll": "by the loss of the validation answers",
        "given": "given, not chosen",
        "exact_match": "by exact match on validation rows",
        "rouge_l": "by ROUGE-L on validation rows",
    }
    alpha, by = float(told.get("alpha", 0.0)), str(told.get("alpha_by"))
    public = told.get("public_texts")
    distilled = f" {public:,} public texts were shown to it, to distil it in every round." if public else ""
    return f"{escape(str(told.get('large')))}, alpha {alpha:g} ({how.get(by, escape(by))}).{distilled}"


def _configured(run: History, key: str) -> Any:
    return (run.config.get("proxy") or {}).get(key)


def _expert(run: History) -> str:
    text = _configured(run, "expert_prompt")
    return "" if text is None else f" The tuned small model alone read {escape(repr(text))} with every prompt."


def _worth(run: History, by: str) -> str:
    """Whether the large model is worth asking, by the scores of this run; empty text where they are not there.

    Args:
        by: how alpha was chosen; where that was a score, it counts, else the run's metric.
    """
    split, scores = _best(run)
    three = (PROXY, GLOBAL, LARGE)
    whole = (name for name in (by, run.metric, "exact_match") if all(name in scores.get(who, {}) for who in three))
    if (metric := next(whole, None)) is None:
        return ""
    steered, tuned, large = (rank(metric, float(scores[who][metric])) for who in three)
    if steered < min(tuned, large):
        said = (
            "The large model is worth asking: steered, it is better than the tuned small model and than itself alone."
        )
    elif tuned <= min(steered, large):
        said = "The large model is not worth asking: the tuned small model alone is as good or better."
    else:
        said = "The large model is worth asking, but not worth steering: alone it is as good or better."
    figures = ", ".join(f"{score_text(float(scores[who][metric]))} the {MODELS[who]}" for who in three)
    less = direction(run) if metric == run.metric else ""
    return f"<p>{said} {escape(f'{split} {metric}'.replace('_', ' ').capitalize())}{less}: {figures}.</p>"


def _curve(curve: Mapping[str, Any]) -> str:
    """Mean loss against alpha, with the models alone as levels."""
    points = [
        charts.Point(float(alpha), float(nll), title=f"alpha {alpha:g}: {nll:.4f} nats per token")
        for alpha, nll in zip(curve["alphas"], curve["nll"], strict=True)
        if nll is not None
    ]
    levels = [
        charts.Level(name, float(curve[key]))
        for key, name in (("base_large", "large alone"), ("tuned_small", "tuned small"), ("base_small", "base small"))
        if curve.get(key) is not None
    ]
    name = "validation loss of the combined models against alpha"
    return charts.line_chart([charts.Line("steered", points)], "alpha", levels, name)


def _alphas(run: History) -> str:
    """The best alpha of every evaluation, where it was chosen more than once."""
    told = [(line["round"], line["alpha_curve"]["best"]) for line in run.rounds if line.get("alpha_curve")]
    if len(told) < 2:
        return ""
    points = [charts.Point(float(round), float(best), title=f"round {round}: {best:g}") for round, best in told]
    picture = charts.line_chart([charts.Line("best alpha", points, 1)], "round", (), "best alpha against rounds")
    return f"<figure>{picture}<figcaption>Best alpha by round</figcaption></figure>"


def _text_scores(told: Mapping[str, Any]) -> str:
    scores = told.get("text_scores")
    if not scores:
        return ""
    rows = [[escape(str(alpha)), escape(score_text(value))] for alpha, value in scores.items()]
    return table(["alpha", f"validation {str(told.get('alpha_by')).replace('_', ' ')}"], rows)


def _models(run: History) -> str:
    """All four models on the same rows, those that were scored."""
    split, scores = _best(run)
    held = [who for who in MODELS if scores.get(who)]
    names: Sequence[str] = list(dict.fromkeys(key for who in held for key in scores[who] if key not in _HIDDEN))
    rows = [[escape(MODELS[who]), *(escape(score_text(scores[who].get(name))) for name in names)] for who in held]
    return table([split, *(name.replace("_", " ") for name in names)], rows, words=split) if rows else ""


def _best(run: History) -> tuple[str, Mapping[str, Mapping[str, Any]]]:
    """(test or validation, scores by who predicts) of the best-validated parameters."""
    best: Mapping[str, Any] = (run.manifest.get("metrics") or {}).get("best") or {}
    split = "test" if best.get("test") else "validation"
    return split, best.get(split) or {}
