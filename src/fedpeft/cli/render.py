"""Results as people and as programs read them."""

from __future__ import annotations

import json as json_module
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedpeft.runs.units import (
    bytes_text,
    count_text,
    flops_text,
    number_text,
    score_text,
    seconds_text,
    share_text,
)

if TYPE_CHECKING:
    from fedpeft.app import Comparison, Run
    from fedpeft.progress import Progress


def as_json(value: Any) -> str:
    """The value as indented JSON; paths become text, numbers that are not finite become null."""
    from fedpeft.runs.files import plain

    return json_module.dumps(plain(value), indent=2, ensure_ascii=False)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: frozenset[int] = frozenset()) -> str:
    """Columns as wide as their widest cell; those in `numbers` to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * w for w in widths], *rows]:
        cells = [
            cell.rjust(w) if i in numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def time_left(progress: Progress) -> float | None:
    """Seconds to the last round at the pace of the rounds so far; None before the first round is done."""
    spent = progress.seconds - progress.set_up_seconds
    if progress.round < 1 or spent <= 0:
        return None
    return spent / progress.round * max(0, progress.rounds - progress.round)


def progress_line(progress: Progress) -> str:
    """One line: round, loss, bytes, time left, and the scores of an evaluation."""
    left = time_left(progress)
    parts = [
        f"set-up: {progress.exchange}" if progress.exchange else f"round {progress.round}/{progress.rounds}",
        "" if progress.loss is None else f"loss {progress.loss:.3f}",
        bytes_text(progress.bytes_down + progress.bytes_up),
        f"{seconds_text(progress.seconds)} gone",
        "" if left is None else f"{seconds_text(left)} left",
        *(f"{name} {score}" for name, score in _scores(progress.metrics or {})),
    ]
    return "  ".join(part for part in parts if part)


def _scores(metrics: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    """Every number that is not a loss, with the names that lead to it."""
    found: list[tuple[str, str]] = []
    for key, value in metrics.items():
        name = f"{path} {key}".strip()
        if isinstance(value, Mapping):
            found += _scores(value, name)
        elif isinstance(value, int | float) and key not in ("loss", "n", "round", "clients"):
            found.append((name, score_text(float(value))))
    return found


def print_run(run: Run, json: bool) -> None:
    """The result of one run."""
    if json:
        typer.echo(as_json({"folder": run.folder, "manifest": run.manifest, "metrics": run.metrics}))
        return
    manifest = run.manifest
    rows = [[name, score] for name, score in _scores(run.metrics)]
    if rows:
        typer.echo(text_table(["score", ""], rows, frozenset({1})))
    traffic = manifest.get("bytes_down", 0) + manifest.get("bytes_up", 0)
    typer.echo(
        f"{count_text(manifest.get('rounds_done', 0), 'round')}, {bytes_text(traffic)} of traffic, "
        f"{seconds_text(manifest.get('seconds', 0.0))} here, "
        f"{seconds_text(manifest.get('simulated_seconds', 0.0))} simulated"
    )
    if manifest.get("params_sha256"):
        typer.echo(f"params_sha256: {manifest['params_sha256']}")
    typer.echo(f"report: {run.folder / 'report.html'}")


def print_comparison(comparison: Comparison, json: bool) -> None:
    """The table of a study, the best first."""
    failures = list(comparison.failures)
    if json:
        whole = {"folder": comparison.folder, "report": comparison.report, "table": list(comparison.table)}
        typer.echo(as_json(whole | {"failures": failures}))
        return
    typer.echo(comparison_table(comparison.table))
    if failures:
        typer.echo(f"{count_text(len(failures), 'cell')} failed and {'is' if len(failures) == 1 else 'are'} left out:")
        for failure in failures:
            typer.echo(f"  - {failure}")
    typer.echo(f"report: {comparison.report}")


def comparison_table(table: Sequence[Mapping[str, Any]]) -> str:
    """Rows (label, task, mean, std, seeds, bytes, simulated_seconds) as text; further keys become columns."""
    further = list(dict.fromkeys(key for row in table for key in row if key not in _KNOWN and not key.startswith("_")))
    head = ["method", "task", "score", "seeds", "traffic", "simulated", *(key.replace("_", " ") for key in further)]
    rows = [
        [
            str(row.get("label", "")),
            str(row.get("task", "")),
            score_text(row.get("mean"), row.get("std")),
            _cell("seeds", row.get("seeds")),
            _cell("bytes", row.get("bytes")),
            _cell("simulated_seconds", row.get("simulated_seconds")),
            *(_cell(key, row.get(key)) for key in further),
        ]
        for row in table
    ]
    return text_table(head, rows, frozenset(range(2, len(head))))


_KNOWN = frozenset({"label", "task", "mean", "std", "seeds", "bytes", "simulated_seconds", "target"})


def _cell(key: str, value: Any) -> str:
    """A value as its key says: bytes, seconds, a score, a list."""
    if value is None:
        return "—"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "bytes" in key:
            return bytes_text(value)
        if "seconds" in key or key.endswith("_s"):
            return seconds_text(value)
        return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_cell(str(k), v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(key, v) for v in value)
    return str(value)


def print_scores(scores: Mapping[str, Any], json: bool) -> None:
    """What an evaluation gave; behind a model's scores the round that it was taken after, and at last who has none."""
    if json:
        typer.echo(as_json(scores))
        return
    after = {who: f" (round {at})" for who, at in scores.get("rounds", {}).items()}
    rows = []
    for split, by in scores.items():
        for who, values in by.items() if split not in ("rounds", "not_scored") else ():
            rows += [[name + after.get(who, ""), score] for name, score in _scores(values, f"{split} {who}")]
    typer.echo(text_table(["score", ""], rows, frozenset({1})))
    for who, why in scores.get("not_scored", {}).items():
        typer.echo(f"{who} has no score: {why}")


def print_predictions(rows: Sequence[Mapping[str, Any]], out: Path | None, json: bool) -> None:
    """Predictions: as JSON lines, as one JSON array, or where they were written."""
    if json:
        typer.echo(as_json(list(rows)))
    elif out is not None:
        typer.echo(f"{count_text(len(rows), 'prediction')}: {out}")
    else:
        from fedpeft.runs.files import to_json

        for row in rows:
            typer.echo(to_json(row))


def print_path(what: str, path: Path, json: bool) -> None:
    """Where something was written."""
    typer.echo(as_json({what: path}) if json else f"{what}: {path}")


FORMS = {  # of an export, as `fedpeft.json` names them
    "adapter": "a PEFT adapter",
    "own": "an adapter in fedpeft's own form, which peft does not know; go on with it by run.init_from",
    "changes_base": "a change of the base in fedpeft's own form, which peft does not know; to go on with it, export "
    "the run with --rank N or --merge",
    "merged": "a model with the adapter folded in",
    "head": "the base with the trained head",
}


def print_export(path: Path, json: bool) -> None:
    """Where an export was written, and what it is."""
    from fedpeft.models.peft_folder import NOTE, read_json

    note = read_json(path / NOTE)
    form = str(note.get("form", "adapter"))
    factored: Mapping[str, Any] = note.get("factored", {})
    if json:
        typer.echo(as_json({"exported": path, "form": form, **factored}))
        return
    kind = "changes_base" if note.get("changes_base") else form
    typer.echo(f"exported: {path} ({FORMS.get(kind, kind)})")
    if factored:
        rank, alpha = note["adapter"]["rank"], note["adapter"]["alpha"]
        typer.echo(
            f"rank {rank} leaves out {factored['left_out']:.2%} of the norm of what was trained; a run goes on from it "
            f"with adapter.rank={rank} and adapter.alpha={alpha:g}"
        )
    if note.get("learnt") is False:
        typer.echo("its adapter changes nothing: it was not trained. A client's own model is exported with --client")


def print_facts(facts: Mapping[str, Any], json: bool) -> None:
    """Names and values with their units, nested ones indented."""
    typer.echo(as_json(facts) if json else "\n".join(_fact_lines(facts, "")))


def _fact_lines(facts: Mapping[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for key, value in facts.items():
        name = str(key).removesuffix("_bytes").replace("_", " ")
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}:", *_fact_lines(value, indent + "  ")]
        elif key == "warnings":
            lines += [f"{indent}{name}:", *(f"{indent}  - {sentence}" for sentence in value)]
        else:
            lines.append(f"{indent}{name}: {_fact(str(key), value)}")
    return lines


def _fact(key: str, value: Any) -> str:
    """A value as its key says: operations, a part of a whole, a mean of counts, or what `_cell` knows."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return _cell(key, value)
    if "flops" in key:
        return flops_text(value)
    if key == "majority" or "share" in key:
        return share_text(value)
    return number_text(value) if key.startswith(("rows", "tokens")) else _cell(key, value)


def print_names(found: Mapping[str, str], json: bool, traits: Mapping[str, Sequence[str]] | None = None) -> None:
    """Names with a sentence each, and what tells a thing from the others."""
    told = traits or {}
    if json:
        extra = {name: {"traits": list(own)} for name, own in told.items()}
        typer.echo(as_json([{"name": n, "meaning": meaning, **extra.get(n, {})} for n, meaning in found.items()]))
        return
    width = max(map(len, found))
    for name, meaning in found.items():
        own = f"  [{', '.join(told[name])}]" if told.get(name) else ""
        typer.echo(f"{name.ljust(width)}  {meaning}{own}")


def print_options(
    name: str,
    meaning: str,
    options: Sequence[Mapping[str, Any]],
    json: bool,
    adapter: Mapping[str, Any] | None = None,
) -> None:
    """One thing with its options, and the adapter that it brings."""
    if json:
        told = {"name": name, "meaning": meaning, "options": list(options)}
        typer.echo(as_json(told if adapter is None else {**told, "adapter": adapter}))
        return
    typer.echo(f"{name}: {meaning}")
    if adapter is not None:
        own = [f"{key} {_default(value)}" for key, value in adapter.items() if key != "kind"]
        typer.echo(f"adapter: {', '.join([str(adapter['kind']), *own])}")
    cells = [[str(o["name"]), _default(o["default"]), str(o["type"])] for o in options]
    if not cells:
        return
    head = ["option", "default", "type", "meaning"]
    used = sum(2 + max(len(row[i]) for row in [head, *cells]) for i in range(3))
    room = max(40, shutil.get_terminal_size((120, 24)).columns - used)
    rows = []
    for row, option in zip(cells, options, strict=True):
        first, *rest = textwrap.wrap(str(option["meaning"]), room) or [""]
        rows += [[*row, first], *(["", "", "", line] for line in rest)]
    typer.echo("\n" + text_table(head, rows))


def _default(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
