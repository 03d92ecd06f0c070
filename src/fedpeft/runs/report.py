"""The report: one page that needs no network, about one run or about several side by side.

Text from outside (labels, paths, reasons) is escaped where it enters the page; numbers come from the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fedpeft.runs import report_clients as clients
from fedpeft.runs import report_sections as sections
from fedpeft.runs.files import write_file
from fedpeft.runs.history import Group, group, read_history
from fedpeft.runs.report_choices import choices
from fedpeft.runs.report_costs import proxy_costs
from fedpeft.runs.report_proxy import proxy
from fedpeft.runs.report_samples import samples
from fedpeft.runs.units import count_text


def write_report(
    folders: Sequence[Path],
    out: Path,
    title: str | None = None,
    failures: Sequence[str] = (),
    compared: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the page about the runs in the folders and return its path.

    Args:
        folders: run folders, at least one; runs that differ only in their seed are shown as mean and spread.
        out: the HTML file, replaced if it is there.
        title: the page's heading; None takes it from the runs.
        failures: the cells of a study that are left out, with the reason.
        compared: the rows of a study's table, of which what it takes to the common target is shown.

    Raises:
        StoreError: a folder holds no run, or the page cannot be written.
    """
    groups = group([read_history(folder) for folder in folders])
    write_file(Path(out), render(groups, title, failures, compared).encode(), durable=False)
    return Path(out)


def render(
    groups: Sequence[Group],
    title: str | None = None,
    failures: Sequence[str] = (),
    compared: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page as HTML."""
    heading = title or _heading(groups)
    alone = groups[0].runs[0] if len(groups) == 1 and len(groups[0].runs) == 1 else None
    parts = [f"<header><h1>{escape(heading)}</h1><p>{escape(_subtitle(groups))}</p></header>"]
    parts += [sections.trouble(run) for g in groups for run in g.runs]
    parts.append(sections.left_out(failures))
    parts.append(sections.cards(alone) if alone else sections.results_table(groups))
    parts.append(sections.to_target(compared))
    tasks = list(dict.fromkeys(g.task for g in groups))
    for task in tasks:
        members = [g for g in groups if g.task == task]
        suffix = f": {task}" if len(tasks) > 1 else ""
        parts.append(sections.score_charts(members, suffix))
        parts.append(clients.partition_picture(members[0].runs[0], suffix))
        parts.append(clients.client_scores(members, suffix) if not alone else clients.client_table(alone))
    if alone:
        parts += [clients.labels_in_training(alone), proxy(alone), samples(alone)]
    else:
        parts += [
            clients.labels_in_training(g.runs[0], f": {g.label}, {g.task}, seed {g.runs[0].seed}") for g in groups
        ]
    parts.append(sections.cost(groups))
    parts.append(sections.losses(groups))
    parts += [choices(g) for g in groups]
    parts += [proxy_costs(g) for g in groups]
    parts.append(_configurations(groups))
    parts.append(_manifests(groups))
    style = resources.files("fedpeft.runs").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{style}</style></head>\n<body><main>"
        + "\n".join(part for part in parts if part)
        + "<footer>Made by fedpeft from the files of the run folder; <code>fedpeft report</code> makes it again."
        "</footer></main></body></html>\n"
    )


def _heading(groups: Sequence[Group]) -> str:
    tasks = list(dict.fromkeys(g.task for g in groups))
    if len(groups) == 1:
        return f"{groups[0].label} on {tasks[0]}"
    return f"{count_text(len({g.label for g in groups}), 'method')} on {', '.join(tasks)}"


def _subtitle(groups: Sequence[Group]) -> str:
    run = groups[0].runs[0]
    config = run.config
    seeds = sorted({r.seed for g in groups for r in g.runs})
    adapter = config.get("adapter") or {}
    rounds = (config.get("run") or {}).get("rounds")
    holders = count_text(len(run.clients), "client") if run.clients else "? clients"
    facts = [
        f"model {Path(str((config.get('model') or {}).get('name', '?'))).name}",
        f"adapter {adapter.get('kind', '?')}" + (f" of rank {adapter['rank']}" if "rank" in adapter else ""),
        f"{holders}, {(config.get('partition') or {}).get('kind', '?')} partition",
        count_text(rounds, "round") if isinstance(rounds, int) else "? rounds",
        ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds)),
    ]
    started = run.manifest.get("started")
    return " · ".join([*facts, str(started)] if started else facts)


def _configurations(groups: Sequence[Group]) -> str:
    shown = []
    for g in groups:
        text = yaml.safe_dump(dict(g.runs[0].config), sort_keys=False, allow_unicode=True)
        opened = " open" if len(groups) == 1 else ""
        note = f" (seed {g.runs[0].seed} of {len(g.runs)} seeds)" if len(g.runs) > 1 else ""
        name = f"{g.label}, {g.task}{note}" if len(groups) > 1 else f"config.yaml{note}"
        shown.append(f"<details{opened}><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>")
    said = "Running it again repeats the run."
    if any(run.manifest.get("replanned") for g in groups for run in g.runs):
        said = (
            "The number of rounds was changed while a method planned by it: running this again need not repeat the run."
        )
    return sections.section("Configuration", said, "".join(shown))


def _manifests(groups: Sequence[Group]) -> str:
    shown = []
    hidden = {"metrics", "choices", "proxy_costs"}  # these have sections of their own
    for g in groups:
        for run in g.runs:
            facts: dict[str, Any] = {key: value for key, value in run.manifest.items() if key not in hidden}
            if partition_hash := run.partition.get("sha256"):
                facts["partition_sha256"] = partition_hash
            name = f"{g.label}, {g.task}, seed {run.seed}"
            inner = sections.definitions(facts) if facts else '<p class="note">The manifest is empty.</p>'
            opened = " open" if len(groups) == 1 and len(g.runs) == 1 else ""
            shown.append(f"<details{opened}><summary>{escape(name)}</summary>{inner}</details>")
    return sections.section(
        "Manifest", "Versions, machine and hashes: what it takes to check a repetition.", "".join(shown)
    )
