"""The sections of the report page that are about clients: who has what, and how each of them fares."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from fedpeft.core.metrics import lower, rank
from fedpeft.runs import charts
from fedpeft.runs.history import GLOBAL, PERSONALIZED, Client, Group, History
from fedpeft.runs.report_sections import NAMES, direction, section, table
from fedpeft.runs.units import count_text, score_text

WORST = 12  # clients shown before the rest is folded away
COLUMNS = 240  # clients, or rounds, that a picture of columns can hold


def _label_colours(clients: Sequence[Client], labels: Sequence[str]) -> tuple[list[str], list[int]]:
    """Names and colours per label: the most frequent ones get a colour each, all others share one."""
    n = max((len(c.label_counts) for c in clients), default=0)
    names = [labels[i] if i < len(labels) else f"label {i}" for i in range(n)]
    totals = [sum(c.label_counts[i] for c in clients if i < len(c.label_counts)) for i in range(n)]
    ranked = sorted(range(n), key=lambda i: (-totals[i], i))
    own = sorted(ranked if n <= charts.COLOURS else ranked[: charts.COLOURS - 1])
    return names, [own.index(i) if i in own else -1 for i in range(n)]


def partition_picture(run: History, suffix: str) -> str:
    """The label distribution of the partition, one column per client."""
    clients = sorted((c for c in run.clients if c.label_counts), key=lambda c: (-sum(c.label_counts), c.name))
    if not clients:
        return ""
    names, colours = _label_colours(clients, run.labels)
    step = max(1.0, len(clients) / COLUMNS)
    shown = [clients[int(i * step)] for i in range(min(len(clients), COLUMNS))]
    padded = [(c.name, [*c.label_counts, *[0] * (len(names) - len(c.label_counts))]) for c in shown]
    # Labels of one colour lie together: first those with a colour of their own, then the rest.
    order = sorted(range(len(names)), key=lambda i: (colours[i] < 0, i))
    bars = [(name, [counts[i] for i in order]) for name, counts in padded]
    picture = charts.stacked_columns(bars, [names[i] for i in order], [colours[i] for i in order])
    most = sum(clients[0].label_counts)
    some = f"{len(shown)} of {len(clients)} clients, evenly chosen" if len(shown) < len(clients) else ""
    below = "<span>largest client</span>" + (f"<span>{some}</span>" if some else "") + "<span>smallest</span>"
    frame = _frame(picture, most, below if len(shown) > 1 else "")
    kind = (run.config.get("partition") or {}).get("kind", "")
    sizes = [sum(c.label_counts) for c in clients]
    note = (
        f"{count_text(len(clients), 'client')}, {count_text(sum(sizes), 'training row')}, {min(sizes):,} to "
        f"{max(sizes):,} each (median {statistics.median(sizes):,.0f}); kind {kind}."
    )
    if len(names) < 2:  # rows without categories
        return section(f"Who has how many rows{suffix}", note, frame)
    return section(f"Who has which labels{suffix}", note, frame + _legend(names, colours))


def labels_in_training(run: History, suffix: str = "") -> str:
    """Which labels were trained on, round by round, where a curriculum chooses the rows."""
    lines = [line for line in run.exchanges if line.get("lost") is None and line.get("round") and line.get("labels")]
    if not lines or not run.manifest.get("chooses_rows"):
        return ""
    names, colours = _label_colours(run.clients, run.labels)
    rounds = sorted({int(line["round"]) for line in lines})
    step = max(1.0, len(rounds) / COLUMNS)
    shown = [rounds[int(i * step)] for i in range(min(len(rounds), COLUMNS))]
    bars = [(f"round {r}", [0] * len(names)) for r in shown]
    at = {r: counts for r, (_, counts) in zip(shown, bars, strict=True)}
    for line in lines:
        for label, count in enumerate(line["labels"]):
            if line["round"] in at and label < len(names):
                at[line["round"]][label] += count
    if len(names) < 2:
        return ""
    held = run.partition.get("clients") or {}
    first, last = ([line for line in lines if line["round"] == r] for r in (rounds[0], rounds[-1]))
    whole = [own["label_counts"]["train"] for line in first if (own := held.get(line["client"]))]
    shares = [_purity([line["labels"] for line in part]) for part in (first, last)]
    note = (
        f"Rows by label in training, repeats counted. A client's most frequent label makes up {shares[0]:.2f} of what "
        f"it trains on in round {rounds[0]}"
        + (f" ({_purity(whole):.2f} of all its rows)" if whole else "")
        + (f" and {shares[1]:.2f} in round {rounds[-1]}." if len(rounds) > 1 else ".")
    )
    picture = charts.stacked_columns(bars, names, colours, "round")
    ends = dict.fromkeys((rounds[0], rounds[-1]))
    below = "".join(f"<span>round {r}</span>" for r in ends)
    frame = _frame(picture, max(sum(counts) for _, counts in bars), below)
    return section(f"Which labels were trained on{suffix}", note, frame + _legend(names, colours))


def _frame(picture: str, most: int, below: str) -> str:
    """Columns of rows with their scale, and what stands below them."""
    scale = f'<div class="scale"><span>{most:,}</span><span>rows</span><span>0</span></div>'
    return f'<div class="columns-frame">{scale}{picture}<div class="below">{below}</div></div>'


def _purity(counts: Sequence[Sequence[int]]) -> float:
    """The share of rows that have the most frequent label of their client."""
    return sum(max(own) for own in counts) / max(1, sum(map(sum, counts)))


def _legend(names: Sequence[str], colours: Sequence[int]) -> str:
    shown = [(name, f"c{colour}") for name, colour in zip(names, colours, strict=True) if colour >= 0]
    others = sum(colour < 0 for colour in colours)
    if others:
        shown.append((count_text(others, "other label"), "rest"))
    items = "".join(f'<li><i class="{colour}"></i>{escape(name)}</li>' for name, colour in shown)
    return f'<ul class="legend">{items}</ul>'


def client_table(run: History) -> str:
    """Every client, the worst first."""
    clients = sorted(run.clients, key=lambda c: (_worst_first(run, c), -c.rows, c.name))
    if not any(c.scores for c in clients):
        return ""
    names, colours = _label_colours(clients, run.labels)
    columns = [who for who in (GLOBAL, PERSONALIZED) if any(who in c.scores for c in clients)]
    head = ["client", *(NAMES[who] for who in columns), "rows", "labels", "times lost"]
    rows = [
        [
            f'<span title="{escape(c.name)}">{escape(c.name)}</span>',
            *(score_text(c.scores.get(who)) for who in columns),
            f"{c.rows:,}",
            charts.share_bar(c.label_counts, names[: len(c.label_counts)], colours[: len(c.label_counts)]),
            str(c.lost),
        ]
        for c in clients
    ]
    inner = table(head, rows[:WORST], words="labels")
    if len(rows) > WORST:
        others = count_text(len(rows) - WORST, "other client")
        inner += f"<details><summary>{others}</summary>{table(head, rows[WORST:])}</details>"
    metric = run.metric.replace("_", " ")
    return section(
        "Clients, the worst first",
        f"{metric.capitalize()} on each client's own rows after the last round{direction(run)}.",
        inner,
    )


def _worst_first(run: History, client: Client) -> float:
    """A key that puts the worst score first, and clients without any last."""
    return math.inf if client.score is None else -rank(run.metric, client.score)


def client_scores(groups: Sequence[Group], suffix: str) -> str:
    """How unequally each method serves the clients: one tick per client."""
    rows = []
    run = groups[0].runs[0]
    every = [v for g in groups for r in g.runs for c in r.clients for v in c.scores.values()]
    most = max(every, default=0.0) or 1.0 if lower(run.metric) else 1.0
    scale = f"each client from 0 to {most:.3g}"
    for i, g in enumerate(groups):
        found = [(f"{c.name}, seed {run.seed}", c.scores) for run in g.runs for c in run.clients if c.scores]
        for who in (GLOBAL, PERSONALIZED):
            values = [(name, scores[who]) for name, scores in found if who in scores]
            if values:
                numbers = sorted((v for _, v in values), key=lambda v: -rank(run.metric, v))
                tenth = statistics.fmean(numbers[: max(1, len(numbers) // 10)])
                rows.append([escape(g.label), NAMES[who], score_text(tenth), score_text(statistics.median(numbers)),
                             charts.strip(values, i, most)])  # fmt: skip
    head = ["method", "model", "worst tenth", "median", scale]
    note = f"Score of each client's own rows after the last round{direction(run)}; one tick per client and seed."
    return section(f"How the clients fare{suffix}", note, table(head, rows, words=f"model,{scale}") if rows else "")
