"""What the finished cells of studies say, in one file that can be kept, and as a table.

    python -m benchmarks.studies.collect runs/fedpeptao_trec --out benchmarks/results/fedpeptao_trec.json

A study that takes hours is collected while it runs. Per task and method the point of the grid is the one with the best
validation score at the first seed, as `fedpeft compare` chooses it; the table has the test scores at that point.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft.core.metrics import lower, rank

Cell = dict[str, Any]
CHOICES = (  # of what a method decided by itself
    "layers", "ratio", "ratio_from", "deadline_s", "under_training", "left_out", "trained_numbers", "excluded",
    "untrained", "depth", "width",
)  # fmt: skip


def read_cell(folder: Path) -> Cell | None:
    """One finished run, None for one that is not."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest.get("status") != "finished":
        return None
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metric, best = manifest["metric"], manifest["metrics"]["best"]

    def score(split: str, of: str = "best") -> dict[str, float]:
        return {who: v[metric] for who, v in manifest["metrics"][of].get(split, {}).items() if metric in v}

    set_up = [line for line in lines if line["round"] == 0]
    return {
        "task": config["task"]["name"],
        "label": manifest.get("label", config["method"]["name"]),
        "metric": metric,
        "method": config["method"]["name"],
        "seed": config["run"]["seed"],
        "lr": config["method"].get("lr"),
        "validation": score("validation"),
        "test": score("test"),
        "final": score("test", "final"),
        "test_metrics": manifest["metrics"]["best"].get("test", {}).get("global", {}),
        "best_round": best.get("round"),
        "curve": [
            [line["round"], {who: v[metric] for who, v in line["metrics"]["validation"].items() if metric in v}]
            for line in lines
            if line.get("metrics", {}).get("validation")
        ],
        "bytes": manifest["bytes_down"] + manifest["bytes_up"],
        "set_up_bytes": sum(line["bytes_down"] + line["bytes_up"] for line in set_up),
        "simulated_seconds": manifest["simulated_seconds"],
        "set_up_simulated_seconds": sum(line["simulated_seconds"] for line in set_up),
        "seconds": manifest["seconds"],
        "rounds": manifest["rounds_done"],
        "choices": {k: v for k, v in manifest.get("choices", {}).items() if k in CHOICES},
        "plans": {
            client: {key: plan[key] for key in ("examples", "bits", "batch", "steps", "weights", "trained_numbers")}
            | {key: plan["predicted"][key] for key in ("round_s", "under_training", "peak_bytes")}
            for client, plan in manifest.get("choices", {}).get("plans", {}).items()
        },
        "trainable_parameters": manifest.get("trainable_parameters"),
        "round_simulated_seconds": [line["simulated_seconds"] for line in lines if line["round"]],
        "round_bytes": [line["bytes_down"] + line["bytes_up"] for line in lines if line["round"]],
        "clients_asked": _asked(folder / "exchanges.jsonl"),
        "params_sha256": manifest["params_sha256"],
        "commit": manifest.get("commit"),
    }


def _asked(exchanges: Path) -> int | None:
    """How many clients took part in rounds; None where it was not written down."""
    if not exchanges.is_file():
        return None
    lines = [json.loads(line) for line in exchanges.read_text().splitlines()]
    return len({line["client"] for line in lines if line["round"]})


def collect(studies: Sequence[Path], before: Sequence[Cell] = ()) -> list[Cell]:
    """The cells of the studies and those kept before, newer ones in place of older ones, in a fixed order."""
    found = {_key(cell): cell for cell in before}
    for study in studies:
        for manifest in sorted(study.glob("*/manifest.json")):
            cell = read_cell(manifest.parent)
            if cell is not None:
                found[_key(cell)] = cell
    return [found[key] for key in sorted(found)]


def _key(cell: Mapping[str, Any]) -> tuple[str, str, int, float]:
    return cell["task"], cell["label"], cell["seed"], float(cell["lr"] or 0.0)


def selected(cell: Mapping[str, Any]) -> float:
    """The validation score that selects: of personal models where there are some."""
    validation: dict[str, float] = cell["validation"]
    return validation.get("personalized", validation["global"])


def place(cell: Mapping[str, Any]) -> float:
    """A key that puts the best cell first."""
    return rank(cell.get("metric", "accuracy"), selected(cell))


def planned(cells: Sequence[Cell]) -> list[str]:
    """A row of Markdown per task and method of planned federations; none where nothing was planned.

    U is of the examples of those who have a plan; `left out` counts those of the excluded too. Numbers are trained by a
    mean machine, its head apart; a round is the longest of a run, in simulated seconds.
    """
    rows = [
        "| task | method | seeds | test, global | U | left out | excluded | numbers | MB | round s | in all s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    known = [cell for cell in cells if "under_training" in cell["choices"]]
    for task, label in sorted({(cell["task"], cell["label"]) for cell in known}):
        own = [cell for cell in known if (cell["task"], cell["label"]) == (task, label)]
        told = [cell["choices"] for cell in own]
        shares = " | ".join(f"{statistics.fmean(t[key] for t in told):.2f}" for key in ("under_training", "left_out"))
        out = statistics.fmean(len(t["excluded"]) for t in told)
        numbers = statistics.fmean(t["trained_numbers"] for t in told)
        longest = statistics.fmean(max(cell["round_simulated_seconds"]) for cell in own)
        costs = f"{_average(own, 'bytes') / 1e6:.2f} | {longest:.2f} | {_average(own, 'simulated_seconds'):.1f}"
        scores = _mean(own, "global")
        rows.append(f"| {task} | {label} | {len(own)} | {scores} | {shares} | {out:.1f} | {numbers:.0f} | {costs} |")
    return rows if known else []


def table(cells: Sequence[Cell]) -> list[str]:
    """A row of Markdown per task and method: mean and range of the test scores at the chosen rate.

    The global score is that of the best-validated parameters, the personal one that of the last round: memories of
    earlier rounds are not kept.
    """
    rows = [
        "| task | method | lr | seeds | test, global | test, personal | traffic MB | of it set-up | simulated s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, label in sorted({(cell["task"], cell["label"]) for cell in cells}):
        chosen = _chosen(cells, task, label)
        lr = chosen[0]["lr"]
        scores = f"{_mean(chosen, 'global')} | {_mean(chosen, 'personalized')}"
        traffic = f"{_average(chosen, 'bytes') / 1e6:.0f} | {_average(chosen, 'set_up_bytes') / 1e6:.0f}"
        seconds = f"{_average(chosen, 'simulated_seconds'):.1f}"
        rows.append(f"| {task} | {label} | {lr:g} | {len(chosen)} | {scores} | {traffic} | {seconds} |")
    return rows


def reaching(cells: Sequence[Cell], label: str, share: float) -> list[str]:
    """A row of Markdown per task and method: what it takes to a common global validation score.

    The goal is a share of the best score of the method that is named, the mean over its seeds, as in `fedpeft compare`;
    where less is better, that score divided by the share. Rounds, MB and simulated seconds, set-up included, are those
    of the first evaluation that reached it, means over the seeds that did.
    """
    head = "| task | method | goal | seeds that reach it | rounds | MB | simulated s |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for task in sorted({cell["task"] for cell in cells if cell["label"] == label}):
        named = _chosen(cells, task, label)
        less = lower(named[0].get("metric", "accuracy"))
        best = statistics.fmean((min if less else max)(v["global"] for _, v in cell["curve"]) for cell in named)
        goal = best / share if less else best * share
        for method in sorted({cell["label"] for cell in cells if cell["task"] == task}):
            own = _chosen(cells, task, method)
            found = [(cell, at) for cell in own if (at := _first(cell, goal, less)) is not None]
            costs = [(at, *_spent(cell, at)) for cell, at in found]
            means = [statistics.fmean(column) for column in zip(*costs, strict=True)]
            told = f"{means[0]:.0f} | {means[1] / 1e6:.0f} | {means[2]:.1f}" if means else "| |"
            rows.append(f"| {task} | {method} | {goal:.3f} | {len(found)} of {len(own)} | {told} |")
    return rows


def _first(cell: Cell, goal: float, less: bool) -> int | None:
    """The round of the first evaluation at which the global score is as good as the goal."""
    reached = (n for n, scores in cell["curve"] if (scores["global"] <= goal if less else scores["global"] >= goal))
    return next(reached, None)


def _spent(cell: Cell, at: int) -> tuple[float, float]:
    """(bytes, simulated seconds) up to the end of a round; in proportion where single rounds are not known."""
    spent = []
    for key in ("bytes", "simulated_seconds"):
        set_up, each = cell[f"set_up_{key}"], cell.get(f"round_{key}")
        rounds = sum(each[:at]) if each else at / cell["rounds"] * (cell[key] - set_up)
        spent.append(set_up + rounds)
    return spent[0], spent[1]


def _chosen(cells: Sequence[Cell], task: str, label: str) -> list[Cell]:
    """The cells of a method at the point of the grid that is best at its first seed."""
    own = [cell for cell in cells if (cell["task"], cell["label"]) == (task, label)]
    first = min(cell["seed"] for cell in own)
    lr = min((cell for cell in own if cell["seed"] == first), key=place)["lr"]
    return [cell for cell in own if cell["lr"] == lr]


def _average(cells: Sequence[Cell], key: str) -> float:
    return statistics.fmean(cell[key] for cell in cells)


def _mean(cells: Sequence[Cell], who: str) -> str:
    scores = [cell["final" if who == "personalized" else "test"].get(who) for cell in cells]
    known = [score for score in scores if score is not None]
    if not known:
        return ""
    spread = f" ({min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.3f}{spread}"


def main(arguments: Sequence[str] | None = None) -> list[Cell]:
    """Collect, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="*", help="folders that `fedpeft compare` wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; cells that it has are kept")
    parser.add_argument("--goal", default="LoRA", help="whose score is the common goal (default: LoRA)")
    parser.add_argument("--share", type=float, default=0.95, help="the share of it (default: .95)")
    options = parser.parse_args(arguments)
    before = json.loads(options.out.read_text()) if options.out.exists() else []
    cells = collect(options.studies, before)
    options.out.write_text(json.dumps(cells, indent=1) + "\n")
    print("\n".join([*table(cells), *planned(cells)]))
    print("\n".join(reaching(cells, options.goal, options.share)))
    return cells


if __name__ == "__main__":
    main()
