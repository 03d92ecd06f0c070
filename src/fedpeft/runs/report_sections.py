"""The sections of the report page, each a function from runs to HTML; a section without content is empty text."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from fedpeft.core.metrics import lower, rank
from fedpeft.runs import charts
from fedpeft.runs.history import (
    BARS,
    EMULATOR,
    GLOBAL,
    LABEL_PRIOR,
    LARGE,
    LEVELS,
    PERSONALIZED,
    PROXY,
    Group,
    History,
    Score,
    spread,
)
from fedpeft.runs.units import bytes_text, bytes_unit, count_text, score_text, seconds_text, seconds_unit

NAMES = {GLOBAL: "global model", PERSONALIZED: "personalised models", PROXY: "large model, steered by the global one"}


def section(title: str, note: str, inner: str) -> str:
    """A titled box; empty text where there is nothing inside."""
    said = f"<p>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{inner}</section>" if inner else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = (), words: str = "") -> str:
    """A table of cells that are HTML already.

    Args:
        classes: the style of each row.
        words: names of the columns that hold words, which stand to the left, separated by commas.
    """
    sides = [' class="words"' if name in words.split(",") else "" for name in head]
    top = "".join(f"<th{side}>{escape(name)}</th>" for name, side in zip(head, sides, strict=True))
    body = ""
    for row, name in zip(rows, classes or [""] * len(rows), strict=True):
        cells = "".join(f"<td{side}>{cell}</td>" for cell, side in zip(row, sides, strict=True))
        body += f'<tr class="{name}">{cells}</tr>' if name else f"<tr>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def definitions(values: Mapping[str, Any]) -> str:
    """Any plain value as names and values, nested as it is."""
    return "<dl>" + "".join(f"<dt>{escape(str(k))}</dt><dd>{_value(v)}</dd>" for k, v in values.items()) + "</dl>"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return definitions(value)
    if isinstance(value, list | tuple):
        if any(isinstance(v, Mapping | list | tuple) for v in value):
            return "".join(_value(v) for v in value)
        return escape(", ".join(_plain(v) for v in value)) or "—"
    return escape(_plain(value))


def _plain(value: Any) -> str:
    if value is None:
        return "—"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# --- what came out ----------------------------------------------------------------------------------------------


def trouble(run: History) -> str:
    """A notice about a run that did not come to its end."""
    status = run.manifest.get("status", "unknown")
    if status == "finished":
        return ""
    done, rounds = run.manifest.get("rounds_done", 0), (run.config.get("run") or {}).get("rounds", "?")
    reason = run.manifest.get("error") or run.manifest.get("reason")
    said = f"<p>{escape(str(reason))}</p>" if reason else ""
    return (
        f'<section class="notice"><h2>{escape(run.label)}, seed {run.seed}: {escape(str(status))} after {done} of '
        f"{rounds} round{'s' if rounds != 1 else ''}</h2>{said}<p>The page shows what there is so far. Go on with: "
        f"<code>fedpeft resume {escape(str(run.folder))}</code></p></section>"
    )


def left_out(failures: Sequence[str]) -> str:
    """A notice about cells of a study that failed."""
    if not failures:
        return ""
    told = "".join(f"<li>{escape(failure)}</li>" for failure in failures)
    head = f"{count_text(len(failures), 'cell')} failed and {'is' if len(failures) == 1 else 'are'} left out"
    return f'<section class="notice"><h2>{head}</h2><ul>{told}</ul></section>'


def cards(run: History) -> str:
    """The result of one run beside what it has to be compared with."""
    split, values = run.final
    score = f"{split} {run.metric.replace('_', ' ')}"
    after = {who: f" of round {at}" for who, at in run.taken.items()}
    shown = [("first", score_text(values.get(GLOBAL)), f"{score}, global model{after.get(GLOBAL, '')}")]
    shown += [("", score_text(values[bar]), f"{score}, {told}") for bar, told in BARS.items() if bar in values]
    if PROXY in values:
        shown.append(("", score_text(values[PROXY]), f"{score}, the large model, steered by it"))
    if LARGE in values:
        shown.append(("", score_text(values[LARGE]), f"{score}, the large model alone"))
    if EMULATOR in values:
        shown.append(("", score_text(values[EMULATOR]), f"{score}, with the blocks that clients have"))
    if PERSONALIZED in values:
        told = f"{score}, personalised models{after.get(PERSONALIZED, '')}"
        shown.append(("", score_text(values[PERSONALIZED]), told))
        if LABEL_PRIOR in values:
            shown.append(("", score_text(values[LABEL_PRIOR]), f"{score}, each client's own majority label"))
    traffic = run.total("bytes_down") + run.total("bytes_up")
    shown.append(("", bytes_text(traffic), "traffic, all clients, set-up included"))
    shown.append(("", seconds_text(run.total("simulated_seconds")), "simulated time on the clients' devices"))
    shown.append(("", seconds_text(run.total("seconds")), "measured time on this machine"))
    inner = "".join(
        f'<div class="card {name}"><b>{escape(number)}</b><span>{escape(told)}</span></div>'
        for name, number, told in shown
    )
    return f'<div class="cards">{inner}</div>'


def results_table(groups: Sequence[Group]) -> str:
    """All methods side by side: mean and spread over seeds, with the majority label and what each cost."""
    tasks = list(dict.fromkeys(g.task for g in groups))
    parts = []
    for task in tasks:
        members = sorted((g for g in groups if g.task == task), key=_rank)
        split = members[0].runs[0].final[0]
        rows = [
            [
                escape(g.label),
                escape(score_text(*spread(g.final(GLOBAL)))),
                escape(score_text(*spread(g.final(PERSONALIZED)))),
                str(len(g.runs)),
                escape(bytes_text(g.mean_total("bytes_down") + g.mean_total("bytes_up"))),
                escape(seconds_text(g.mean_total("simulated_seconds"))),
                escape(seconds_text(g.mean_total("seconds"))),
            ]
            for g in members
        ]
        bars = [bar for bar in BARS if any(g.final(bar) for g in members)]
        rows += [[escape(BARS[bar]), _first(members, bar), "", "", "", "", ""] for bar in bars]
        if own := [g for g in members if g.final(PERSONALIZED) and g.final(LABEL_PRIOR)]:
            rows.append(["each client's own majority label", "", _first(own, LABEL_PRIOR), "", "", "", ""])
        metric = members[0].runs[0].metric.replace("_", " ")
        head = ["method", f"{split} {metric}", "personalised", "seeds", "traffic", "simulated time", "measured time"]
        title = f"<h3>{escape(task)}</h3>" if len(tasks) > 1 else ""
        parts.append(title + table(head, rows, ["best", *[""] * (len(rows) - 1)]))
    return section(
        "Results", "Mean and sample standard deviation over seeds; traffic and times per run.", "".join(parts)
    )


def to_target(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each method of a study spent until its global model was as good as the common target."""
    known = [row for row in rows if row.get("target") is not None]
    if not known:
        return ""
    several = len({row["task"] for row in known}) > 1
    cells = [
        [
            escape(f"{row['label']}, {row['task']}" if several else str(row["label"])),
            score_text(row["target"]),
            *(
                ["not reached", ""]
                if row["bytes_to_target"] is None
                else [bytes_text(row["bytes_to_target"]), seconds_text(row["seconds_to_target"])]
            ),
        ]
        for row in known
    ]
    note = "Until the global model reached it for the first time, set-up included; means over seeds."
    return section("To a common target", note, table(["method", "target", "traffic", "simulated time"], cells))


def _rank(g: Group) -> float:
    """A key that puts the best first, by what a method makes: personalised models, else the global one."""
    score = spread(g.final(PERSONALIZED) or g.final(PROXY) or g.final(GLOBAL))[0]
    return math.inf if score is None else rank(g.runs[0].metric, score)


def _first(groups: Sequence[Group], who: str) -> str:
    """The mean of a baseline, which is the same for all methods of a task."""
    found = (spread(g.final(who))[0] for g in groups if g.final(who))
    return escape(score_text(next(found, None)))


# --- how it came about ------------------------------------------------------------------------------------------

Axis = tuple[str, Callable[[Score], float], Callable[[float], tuple[float, str]]]
AXES: tuple[Axis, ...] = (
    ("round", lambda s: float(s.round), lambda most: (1.0, "")),
    ("traffic, both directions", lambda s: s.bytes, bytes_unit),
    ("simulated time", lambda s: s.simulated_seconds, seconds_unit),
)


def score_charts(groups: Sequence[Group], suffix: str) -> str:
    """Validation score against rounds, bytes and simulated time, and the training loss."""
    metric = groups[0].runs[0].metric.replace("_", " ")
    level = [one for bar, told in LEVELS.items() for one in _level(groups, bar, told)]
    own = _level(groups, LABEL_PRIOR, "own majority")
    rows = []
    if len(groups) == 1:
        series = [(groups[0], who) for who in (GLOBAL, PERSONALIZED, PROXY)]
        labels = {GLOBAL: "global", PERSONALIZED: "personalised", PROXY: "large, steered"}
        both = level + own if groups[0].final(PERSONALIZED) else level
        rows.append(_charts([(labels[who], g, who, i) for i, (g, who) in enumerate(series)], metric, both))
    else:
        for who in (GLOBAL, PERSONALIZED, PROXY):
            bars = level + own if who == PERSONALIZED else level
            drawn = _charts([(g.label, g, who, i) for i, g in enumerate(groups)], f"{metric}, {NAMES[who]}", bars)
            rows.append(f"<h3>{escape(NAMES[who].capitalize())}</h3>{drawn}" if drawn else "")
    losses = _loss_chart(groups)
    inner = "".join(rows) + (f'<h3>Training loss</h3><div class="row">{losses}</div>' if losses else "")
    note = f"Validation {metric}{direction(groups[0].runs[0])}; the test set is scored once, at the end."
    if any(len(g.runs) > 1 for g in groups):
        note += " Lines are means over seeds, bands one standard deviation."
    return section(f"Score against rounds, traffic and time{suffix}", note, inner)


def direction(run: History) -> str:
    """What to add to a metric's name where lower is better."""
    return " (lower is better)" if lower(run.metric) else ""


def _level(groups: Sequence[Group], who: str, label: str) -> list[charts.Level]:
    """A baseline that is the same in every round."""
    found = [v for g in groups for run in g.runs for s in run.scores if (v := s.values.get(who)) is not None]
    return [charts.Level(label, found[0])] if found else []


def _charts(series: Sequence[tuple[str, Group, str, int]], name: str, levels: Sequence[charts.Level]) -> str:
    drawn = []
    for axis, x_of, unit_of in AXES:
        unit, unit_name = unit_of(
            max((x_of(s) for _, g, _, _ in series for run in g.runs for s in run.scores), default=0)
        )
        lines = [charts.Line(label, _points(g, who, x_of, unit), colour) for label, g, who, colour in series]
        x_label = f"{axis} ({unit_name})" if unit_name else axis
        if picture := charts.line_chart(lines, x_label, levels, f"{name} against {axis}"):
            drawn.append(f"<figure>{picture}</figure>")
    return f'<div class="row">{"".join(drawn)}</div>' if drawn else ""


def _points(g: Group, who: str, x_of: Callable[[Score], float], unit: float) -> list[charts.Point]:
    by_round: dict[int, list[Score]] = {}
    for run in g.runs:
        for score in run.scores:
            if who in score.values:
                by_round.setdefault(score.round, []).append(score)
    points = []
    for round, scores in sorted(by_round.items()):
        mean, deviation = spread([s.values[who] for s in scores])
        spent = bytes_text(statistics.fmean(s.bytes for s in scores))
        seeds = f", {len(scores)} seeds" if len(scores) > 1 else ""
        title = f"{g.label}, {NAMES[who]}, round {round}, {spent}: {score_text(mean, deviation)}{seeds}"
        x = statistics.fmean(x_of(s) for s in scores) / unit
        points.append(charts.Point(x, mean or 0.0, deviation or 0.0, title))
    return points


def _loss_chart(groups: Sequence[Group]) -> str:
    lines = []
    for i, g in enumerate(groups):
        by_round: dict[int, list[float]] = {}
        for run in g.runs:
            for round, loss in run.losses:
                by_round.setdefault(round, []).append(loss)
        points = [
            charts.Point(float(round), statistics.fmean(values), spread(values)[1] or 0.0,
                         f"{g.label}, round {round}: {statistics.fmean(values):.4g}")
            for round, values in sorted(by_round.items())
        ]  # fmt: skip
        lines.append(charts.Line(g.label if len(groups) > 1 else "loss", points, i))
    picture = charts.line_chart(lines, "round", (), "training loss against rounds")
    return f"<figure>{picture}</figure>" if picture else ""


# --- what it cost -----------------------------------------------------------------------------------------------


def cost(groups: Sequence[Group]) -> str:
    """Bytes per exchange and direction, the set-up apart, times and memory."""
    tasks = {g.task for g in groups}
    rows, classes = [], []
    for g in groups:
        name = g.label if len(tasks) == 1 else f"{g.label}, {g.task}"
        for i, (cells, style) in enumerate(_cost_rows(g)):
            rows.append([escape(name) if i == 0 else "", *cells] if len(groups) > 1 else cells)
            classes.append(style)
    head = ["method", *COST_HEAD] if len(groups) > 1 else COST_HEAD
    memory = [m for g in groups for run in g.runs if (m := run.manifest.get("peak_memory_bytes"))]
    note = "Lengths of what was serialised, per run" + (
        ", mean over seeds." if any(len(g.runs) > 1 for g in groups) else "."
    )
    if memory:
        note += f" Peak memory of the process: {bytes_text(max(memory))}."
    note += " The measured time of the whole run includes evaluation."
    return section("What it cost", note, table(head, rows, classes, words="exchange"))


COST_HEAD = ("exchange", "answers", "down", "up", "down per client", "up per client", "simulated", "measured")


def _cost_rows(g: Group) -> list[tuple[list[str], str]]:
    """One row per exchange, the set-up's first, then the totals; each with its style."""
    lines = [{**line, "run": i} for i, run in enumerate(g.runs) for line in run.exchanges]
    kinds: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for line in lines:  # the exchanges "warmup 1", "warmup 2", ... are one row
        name = re.sub(r" \d+$", "", str(line.get("exchange", "?")))
        kinds.setdefault((line.get("round", 0) > 0, name), []).append(line)
    rows, n_runs = [], len(g.runs)
    set_up = [line for (in_round, _), of in kinds.items() if not in_round for line in of]
    if len([kind for kind in kinds if not kind[0]]) > 1:
        kinds[False, "all"] = set_up
    for (in_round, name), of in sorted(kinds.items(), key=lambda item: item[0][0]):
        down, up = (sum(li.get(key, 0) for li in of) for key in ("bytes_down", "bytes_up"))
        answered = [li for li in of if not li.get("lost")]
        rows.append(
            [
                escape(name if in_round else f"{name} (set-up)"),
                f"{len(answered) / n_runs:,.0f}",
                bytes_text(down / n_runs),
                bytes_text(up / n_runs),
                bytes_text(down / len(of)),
                bytes_text(up / len(answered)) if answered else "—",
                seconds_text(_simulated(of) / n_runs),
                seconds_text(sum(li.get("seconds", 0.0) for li in of) / n_runs),
            ]
        )
    total = [bytes_text(g.mean_total("bytes_down")), bytes_text(g.mean_total("bytes_up"))]
    times = [seconds_text(g.mean_total("simulated_seconds")), seconds_text(g.mean_total("seconds"))]
    return [*((row, "") for row in rows), (["whole run", "", *total, "", "", *times], "total")]


def _simulated(lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of the slowest client of each attempt of an exchange, summed; the rule of `clock.slowest`."""
    slowest: dict[Any, float] = {}
    for line in lines:
        if not line.get("lost") or str(line["lost"]).startswith("late"):
            key = (line["run"], line["number"], line.get("attempt", 0))
            slowest[key] = max(slowest.get(key, 0.0), float(line.get("simulated_seconds", 0.0)))
    return sum(slowest.values())


def losses(groups: Sequence[Group]) -> str:
    """Why answers were not used, if any were."""
    reasons: Counter[tuple[str, str]] = Counter()
    for g in groups:
        for run in g.runs:
            for line in run.exchanges:
                if line.get("lost"):
                    reasons[(g.label, str(line["lost"]))] += 1
    rows = [[escape(label), escape(reason), f"{n:,}"] for (label, reason), n in reasons.most_common(20)]
    note = "Clients that were asked and whose answer was not used; the round went on without them."
    return section("Lost answers", note, table(["method", "reason", "times"], rows, words="reason") if rows else "")
