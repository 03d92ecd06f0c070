"""What a method decided by itself, as a picture where it is a choice of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fedpeft.core.metrics import better
from fedpeft.runs.history import EMULATOR, GLOBAL, Group, History, spread
from fedpeft.runs.report_plans import plans
from fedpeft.runs.report_sections import definitions, direction, section, table
from fedpeft.runs.units import count_text, score_text

_DRAWN = (
    "layers", "of_layers", "layers_by", "layer_scores", "scores_mean", "ratio", "ratio_from", "ratios", "client_scores"
)  # fmt: skip
BAR, STEP, LEFT, RIGHT = 15.0, 21.0, 64.0, 110.0  # of the ranking: height of a bar, distance of two, margins
WIDTH = 460.0
_LEGEND = '<ul class="legend"><li><i class="c0"></i>shared</li><li><i class="rest"></i>not shared</li></ul>'


def choices(g: Group) -> str:
    """The section on a group's choices, of its first run; those of the other seeds in one line each."""
    chosen = [(run, found) for run in g.runs if isinstance(found := run.manifest.get("choices"), Mapping) and found]
    if not chosen:
        return ""
    first, told = chosen[0]
    if drawn := plans(told):
        return section(f"What {g.label} planned, and why", f"Seed {first.seed}.", drawn)
    inner = _layers(told) if isinstance(told.get("layers"), Sequence) else ""
    rest = {key: value for key, value in told.items() if not inner or key not in (*_DRAWN, "warning")}
    inner += definitions(rest) if rest else ""
    inner += _teacher(first, told) + _plugged_in(g)
    inner += "".join(_other_seed(run, found) for run, found in chosen[1:] if "layers" in found)
    return section(f"What {g.label} chose, and why", f"Seed {first.seed}.", inner)


def _teacher(run: History, told: Mapping[str, Any]) -> str:
    """Why the teacher of a distilling run steered as far as it did."""
    alpha = told.get("teacher_alpha")
    if alpha is None:
        return ""
    proxy, method = run.config.get("proxy") or {}, run.config.get("method") or {}
    if proxy.get("alpha", "auto") != "auto":
        return f"<p>The teacher steered with alpha {alpha:g} in every round: given (proxy.alpha), not chosen.</p>"
    words = f"The teacher of the last round steered with alpha {alpha:g}: the one of least loss on the validation texts"
    last = run.rounds[-1] if run.rounds else {}
    curve = last.get("alpha_curve") or {}
    losses = dict(zip(curve.get("alphas", ()), curve.get("nll", ()), strict=True))
    if method.get("serve", "pre") == "pre" and losses.get(alpha) is not None:  # the curve is of the teacher's adapter
        words += (
            f", {losses[alpha]:.4f} nats per token; the large model alone has {curve['base_large']:.4f}, the tuned "
            f"small model alone {curve['tuned_small']:.4f}"
        )
    if proxy.get("select", "nll") != "nll":
        words += (
            f". What is served goes by {str(proxy['select']).replace('_', ' ')} (proxy.select), the teacher does not"
        )
    return f"<p>{escape(words)}.</p>"


def _plugged_in(g: Group) -> str:
    """The whole model with what was tuned beside the part of it that clients tuned it in."""
    whole, part = spread(g.final(GLOBAL)), spread(g.final(EMULATOR))
    if whole[0] is None or part[0] is None:
        return ""
    run = g.runs[0]
    metric, split = run.metric, run.final[0]
    gap = f"{abs(whole[0] - part[0]):.3f}"
    if better(metric, whole[0], part[0]):
        said = f"so plugging in gains {gap}"
    elif better(metric, part[0], whole[0]):
        said = f"so plugging in loses {gap}"
    else:
        said = "so plugging in changes nothing"
    words = (
        f"Plugged into the whole model, the tuned blocks have a {split} {metric.replace('_', ' ')}{direction(run)} of "
        f"{score_text(*whole)}; around the emulator, where clients tuned them, {score_text(*part)}: {said}"
    )
    return f"<p>{escape(words)}.</p>"


def _layers(told: Mapping[str, Any]) -> str:
    layers = [int(layer) for layer in told["layers"]]
    total = int(told.get("of_layers", max(layers, default=0) + 1))
    scores = [float(score) for score in told.get("layer_scores") or []]
    how = str(told.get("layers_by", "the method's rule"))
    named = f"layer{'s' if len(layers) != 1 else ''} {', '.join(map(str, layers))}"
    words = f"<p>{count_text(len(layers), 'layer')} of {total} shared: {named}, chosen by {escape(how)}. "
    words += f"{escape(str(told['scores_mean']))} " if scores and how == "score" and "scores_mean" in told else ""
    if told.get("ratio") is not None:
        words += f"The share of layers, {float(told['ratio']):.3g}, is "
        words += {"fixed": "given.", "fallback": "the given one, because the devices' own were of no use."}.get(
            str(told.get("ratio_from")), f"measured ({escape(str(told.get('ratio_from')))})."
        )
    words += f" {escape(str(told['warning']))}.</p>" if told.get("warning") else "</p>"
    picture = ranking(scores, layers) if len(scores) == total and any(scores) else blocks(layers, total)
    return words + picture + _ratios(told.get("ratios") or {})


def ranking(scores: Sequence[float], chosen: Sequence[int]) -> str:
    """A bar per layer, as long as its score, with its rank; the chosen ones in colour."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    rank = {layer: place + 1 for place, layer in enumerate(order)}
    most = max(scores) or 1.0
    height = STEP * len(scores) + 4
    parts = [
        f'<svg class="chart ranking" viewBox="0 0 {WIDTH:g} {height:g}" role="img" '
        f'aria-label="score and rank of every layer">'
    ]
    for i, score in enumerate(scores):
        y = 2 + STEP * i
        width = (WIDTH - LEFT - RIGHT) * max(score, 0.0) / most
        colour = "c0" if i in chosen else "rest"
        what = "shared" if i in chosen else "not shared"
        parts.append(
            f'<text class="tick end" x="{LEFT - 8:g}" y="{y + 11:g}">layer {i}</text>'
            f'<rect class="{colour}" x="{LEFT:g}" y="{y:g}" width="{max(width, 1):.1f}" height="{BAR:g}">'
            f"<title>layer {i}: score {score:.4g}, rank {rank[i]}, {what}</title></rect>"
            f'<text class="tick" x="{LEFT + max(width, 1) + 6:.1f}" y="{y + 11:g}">'
            f"{_short(score)}, no. {rank[i]}</text>"
        )
    return "".join(parts) + "</svg>" + _LEGEND


def blocks(chosen: Sequence[int], total: int) -> str:
    """A box per layer, the chosen ones in colour: for choices without scores."""
    parts = [f'<svg class="share" viewBox="0 0 {total} 1" preserveAspectRatio="none" role="img" aria-label="layers">']
    for i in range(total):
        colour, what = ("c0", "shared") if i in chosen else ("rest", "not shared")
        parts.append(
            f'<rect class="{colour}" x="{i + 0.04:g}" width="0.92" height="1"><title>layer {i}: {what}</title></rect>'
        )
    ends = "".join(f"<span>layer {i}</span>" for i in dict.fromkeys((0, total - 1)))
    return "".join(parts) + f'</svg><div class="ends">{ends}</div>' + _LEGEND


def _ratios(ratios: Mapping[str, Any]) -> str:
    """What every device measured, folded away."""
    if not ratios:
        return ""
    head = ["device", "ratio", "usable", "gap from", "to", "Lipschitz", "rows"]
    rows = [
        [
            escape(str(client)),
            f"{own['ratio']:.3g}",
            "yes" if own["usable"] else "no",
            *(f"{own[key]:.3g}" for key in ("low", "high", "lipschitz")),
            f"{own['examples']:,}",
        ]
        for client, own in sorted(ratios.items())
    ]
    return f"<details><summary>What {count_text(len(rows), 'device')} measured</summary>{table(head, rows)}</details>"


def _other_seed(run: History, told: Mapping[str, Any]) -> str:
    layers = ", ".join(str(layer) for layer in told["layers"])
    share = "" if told.get("ratio") is None else f", share {float(told['ratio']):.3g}"
    return f"<p>Seed {run.seed}: layers {escape(layers)}{share}.</p>"


def _short(score: float) -> str:
    return f"{score:.3g}" if math.isfinite(score) and score < 1e4 else f"{score:.1e}"
