"""The report page: complete, self-contained, escaped, and there whatever is missing."""

from __future__ import annotations

import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.core.errors import StoreError
from fedpeft.runs.history import group, read_history
from fedpeft.runs.report import write_report
from fedpeft.runs.store import RunFolder

LABELS = ["DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"]


def make_run(
    folder: Path,
    *,
    method: str = "fedavg",
    seed: int = 0,
    rounds: int = 40,
    clients: int = 100,
    labels: list[str] | None = None,
    ceiling: float = 0.9,
    personalized: bool = True,
    status: str = "finished",
    stop_after: int | None = None,
    setup: bool = False,
    **manifest: Any,
) -> Path:
    """A run folder as a real run leaves it, with made-up figures."""
    labels = labels or LABELS
    rng = np.random.default_rng(seed)
    ids = [f"{i:03d}" for i in range(clients)]
    sizes = np.random.default_rng(0).dirichlet(np.full(clients, 5.0)) * 50 * clients
    shares = np.random.default_rng(1).dirichlet(np.ones(len(labels)), size=clients)
    counts = {c: [int(n * p) for p in share] for c, n, share in zip(ids, sizes, shares, strict=True)}
    with RunFolder.create(folder) as run:
        run.save_config(
            {
                "model": {"name": "minilm", "dtype": "float32"},
                "task": {"name": "trec", "metric": None},
                "partition": {"kind": "dirichlet", "clients": clients, "alpha": 1.0},
                "method": {"name": method, "cohort": 10, "lr": 1e-3},
                "adapter": {"kind": "lora", "rank": 8},
                "run": {"rounds": rounds, "seed": seed},
            }
        )
        run.save_partition(
            {
                "labels": labels,
                "clients": {c: {"name": c, "label_counts": {"train": n}} for c, n in counts.items()},
                "sha256": "f" * 64,
            }
        )
        last = rounds if stop_after is None else stop_after
        for r in range(0 if setup else 1, last + 1):
            run.append_exchanges(exchange_lines(r, ids, rng))
            run.append_metrics(metrics_line(r, last, rounds, ceiling, personalized, rng))
        lines = run.metrics()
        run.update_manifest(
            **{
                "status": status,
                "metric": "accuracy",
                "rounds_done": last,
                "versions": {"fedpeft": "0.1.0", "torch": "2.13.0"},
                "params_sha256": "0" * 64,
                "peak_memory_bytes": 812_000_000,
                "seconds": 93.2,
                **{k: sum(line[k] for line in lines) for k in ("bytes_down", "bytes_up", "simulated_seconds")},
                **manifest,
            }
        )
    if stop_after is None:
        scored = {
            c: {
                "rows": sum(counts[c]),
                "label_counts": counts[c],
                "global": {"accuracy": float(np.clip(rng.normal(ceiling, 0.07), 0, 1))},
                **(
                    {"personalized": {"accuracy": float(np.clip(rng.normal(ceiling, 0.1), 0, 1))}}
                    if personalized
                    else {}
                ),
                "lost": int(rng.integers(3)),
            }
            for c in ids
        }
        (folder / "clients.json").write_text(json.dumps(scored))
    return folder


def exchange_lines(round: int, ids: list[str], rng: np.random.Generator) -> list[dict[str, Any]]:
    cohort = rng.choice(ids, size=min(10, len(ids)), replace=False)
    name = "train" if round else "score"
    return [
        {
            "number": round + 1,
            "round": round,
            "exchange": name,
            "client": str(c),
            "attempt": 0,
            "bytes_down": 1_180_000 if round else 400,
            "bytes_up": 0 if i == 0 and round % 5 == 1 else 1_180_000 if round else 9000,
            "steps": 7,
            "seconds": 0.2,
            "simulated_seconds": float(rng.uniform(3, 9)),
            "lost": "not available" if i == 0 and round % 5 == 1 else None,
        }
        for i, c in enumerate(cohort)
    ]


def metrics_line(
    r: int, last: int, rounds: int, ceiling: float, personalized: bool, rng: np.random.Generator
) -> dict[str, Any]:
    def scores() -> dict[str, Any]:
        accuracy = ceiling - (ceiling - 0.25) * math.exp(-r / 9) + float(rng.normal(0, 0.008))
        both = {"global": {"accuracy": accuracy, "loss": 1 - accuracy}, "majority": {"accuracy": 0.232, "loss": 1.6}}
        both["label_prior"] = {"accuracy": 0.431, "loss": 1.2}
        return {**both, "personalized": {"accuracy": accuracy + 0.02, "loss": 1 - accuracy}} if personalized else both

    line = {
        "round": r,
        "train_loss": 1.7 * math.exp(-r / 14) + 0.12 + float(rng.normal(0, 0.02)) if r else None,
        "seconds": 2.3,
        "simulated_seconds": 8.8,
        "bytes_down": 11_800_000 if r else 40_000,
        "bytes_up": 10_620_000 if r else 90_000,
        "clients": 10,
        "lost_clients": int(r % 5 == 1),
    }
    if r and (r % 5 == 0 or r == rounds):
        line["metrics"] = {"validation": scores()}
        if r == last:
            line["metrics"]["test"] = scores()
    return line


class Page(HTMLParser):
    """The page's text by heading, its tables, and a check that elements are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.links: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [f"{tag} {k}={v}" for k, v in attrs if k in ("href", "src", "srcset", "action", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")
        if tag != "meta":  # the only one that has no end; the pictures' elements end themselves
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.rows and ("td" in self.open or "th" in self.open) and "title" not in self.open:
            self.rows[-1][-1] += data
        if "h2" in self.open:
            self.headings[-1] += data


def report(tmp_path: Path, *folders: Path, title: str | None = None) -> Page:
    return Page(write_report(folders, tmp_path / "report.html", title))


def test_report_of_one_run_has_every_section(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "run", setup=True, choices={"ratio": 0.5, "why": "least bytes"}))
    assert page.headings == [
        "Score against rounds, traffic and time",
        "Who has which labels",
        "Clients, the worst first",
        "What it cost",
        "Lost answers",
        "What fedavg chose, and why",
        "Configuration",
        "Manifest",
    ]
    assert "least bytes" in page.text and "params_sha256" in page.text and "f" * 64 in page.text


def test_report_needs_no_network_and_no_script(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "run"))
    assert page.links == []
    assert not re.search(r"https?://|@import|url\(|<script|<link|<img", page.source)
    assert (tmp_path / "report.html").stat().st_size < 400_000


def test_headline_is_the_test_score_of_the_last_round_beside_the_majority(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    test = RunFolder.open(folder).metrics()[-1]["metrics"]["test"]
    cards = re.findall(r"<b>(.*?)</b><span>(.*?)</span>", report(tmp_path, folder).source)
    assert (f"{test['global']['accuracy']:.3f}", "test accuracy, global model") in cards
    assert (f"{test['personalized']['accuracy']:.3f}", "test accuracy, personalised models") in cards
    assert ("0.232", "test accuracy, always the majority label") in cards
    assert ("0.431", "test accuracy, each client&#x27;s own majority label") in cards


def test_result_is_the_best_validated_global_model_and_the_final_personal_ones(tmp_path: Path) -> None:
    """Personal models need the clients' memories, and those of the best-validated round are gone."""
    both = [
        {"test": {"global": {"accuracy": g}, "personalized": {"accuracy": p}}} for g, p in ((0.777, 0.1), (0.5, 0.6))
    ]
    folder = make_run(tmp_path / "run", metrics={"best": {"round": 5, **both[0]}, "final": both[1]})
    assert read_history(folder).final == ("test", {"global": 0.777, "personalized": 0.6})
    cards = re.findall(r"<b>(.*?)</b><span>(.*?)</span>", report(tmp_path, folder).source)
    assert ("0.777", "test accuracy, global model of round 5") in cards
    assert ("0.600", "test accuracy, personalised models of round 40") in cards


def test_scores_carry_what_was_spent_until_then(tmp_path: Path) -> None:
    history = read_history(make_run(tmp_path / "run", setup=True))
    third = history.scores[2]  # evaluated in rounds 5, 10, 15
    assert third.round == 15
    assert third.bytes == 130_000 + 15 * (11_800_000 + 10_620_000)
    assert third.simulated_seconds == pytest.approx(16 * 8.8)


def test_worst_clients_come_first_by_their_own_model(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    scored = json.loads((folder / "clients.json").read_text())
    worst = sorted(scored, key=lambda c: scored[c]["personalized"]["accuracy"])
    page = report(tmp_path, folder)
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == "client")
    assert [row[0] for row in page.rows[start + 1 : start + 9]] == worst[:8]
    assert page.rows[start + 1][1] == f"{scored[worst[0]]['global']['accuracy']:.3f}"
    assert sum(len(row) == 6 and row[0] in scored for row in page.rows) == 100


def test_cost_tells_the_setup_apart_and_adds_up(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "run", setup=True))
    rows = {row[0]: row for row in page.rows if row}
    assert rows["score (set-up)"][1:6] == ["10", "4.00 kB", "90.0 kB", "400 B", "9.00 kB"]
    assert rows["train"][1] == "392"  # 40 rounds of 10, one lost in every fifth
    assert rows["train"][2] == "472 MB" and rows["train"][5] == "1.18 MB"
    assert rows["whole run"][2] == "472 MB"
    assert "Peak memory of the process: 812 MB" in page.text
    lost = next(row for row in page.rows if row[-1:] == ["8"] and row[1:2] == ["not available"])
    assert lost[0] == "fedavg"


def test_simulated_time_of_an_exchange_is_its_slowest_answering_client(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / str(seed), seed=seed, rounds=2, clients=4) for seed in (0, 1)]
    expected = []
    for folder in folders:
        by_round: dict[int, float] = {}
        for line in RunFolder.open(folder).exchanges():
            if line["lost"] is None:
                by_round[line["round"]] = max(by_round.get(line["round"], 0.0), line["simulated_seconds"])
        expected.append(sum(by_round.values()))
    rows = {row[0]: row for row in report(tmp_path, *folders).rows if row}
    assert rows["train"][6] == f"{statistics.fmean(expected):.1f} s"


def test_several_runs_are_grouped_over_seeds_with_mean_and_deviation(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / f"{m}{seed}", method=m, seed=seed, ceiling=top, clients=24, rounds=10)
        for m, top in (("local", 0.6), ("fedavg", 0.8))
        for seed in (0, 1, 2)
    ]
    page = report(tmp_path, *folders, title="Side by side")
    tests = [RunFolder.open(f).metrics()[-1]["metrics"]["test"]["global"]["accuracy"] for f in folders]
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == "method")
    best, second = page.rows[start + 1], page.rows[start + 2]
    assert (best[0], second[0]) == ("fedavg", "local")
    assert best[1] == f"{statistics.fmean(tests[3:]):.3f} ± {statistics.stdev(tests[3:]):.3f}"
    assert second[1] == f"{statistics.fmean(tests[:3]):.3f} ± {statistics.stdev(tests[:3]):.3f}"
    assert best[3] == "3"
    assert page.rows[start + 3][:2] == ["always the majority label", "0.232"]
    assert page.rows[start + 4][:3] == ["each client's own majority label", "", "0.431"]
    assert page.source.count('class="band c1"') == 7  # six pictures of scores and one of losses
    assert "Side by side" in page.text


def test_groups_that_share_a_label_say_what_sets_them_apart(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b", rounds=20)
    assert [g.label for g in group([read_history(one), read_history(two)])] == [
        "fedavg (rounds 40)",
        "fedavg (rounds 20)",
    ]


def test_label_of_a_study_is_used(tmp_path: Path) -> None:
    assert read_history(make_run(tmp_path / "run", label="LoRA <8>")).label == "LoRA <8>"


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"'"
    folder = make_run(
        tmp_path / "run",
        labels=[evil, *LABELS[1:]],
        label=evil,
        status="failed",
        error=f"client said {evil}",
        choices={evil: [evil, {"deep": evil}]},
    )
    page = report(tmp_path, folder, make_run(tmp_path / "other", method=evil), title=evil)
    assert "<script" not in page.source
    assert page.text.count(evil) >= 6


def test_run_that_failed_in_round_three_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", stop_after=2, status="failed", error="too few clients answered")
    page = report(tmp_path, folder)
    assert page.headings[0] == "fedavg, seed 0: failed after 2 of 40 rounds"
    assert "too few clients answered" in page.text and f"fedpeft resume {folder}" in page.text
    assert "Score against rounds, traffic and time" in page.headings  # the training loss is there
    assert "Clients, the worst first" not in page.headings
    assert "Who has which labels" in page.headings


def test_folder_with_nothing_but_a_configuration_still_renders(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run") as run:
        run.save_config({"method": {"name": "fedavg"}})
    page = report(tmp_path, tmp_path / "run")
    assert "unknown after 0 of ? rounds" in page.headings[0]
    assert "—" in page.text


def test_no_personalised_scores_leaves_no_empty_column(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "run", personalized=False))
    assert "personalised" not in page.text
    assert "Clients, the worst first" in page.headings


def test_one_client(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "run", clients=1, method="centralized"))
    assert page.source.count('<svg class="columns" viewBox="0 0 1 100"') == 1


def test_many_labels_and_clients_are_told_but_not_all_drawn(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "run", clients=600, labels=[f"topic {i}" for i in range(20)]))
    assert "13 other labels" in page.text
    assert "240 of 600 clients, evenly chosen" in page.text
    columns = page.source.split('class="columns"')[1].split("</svg>")[0]
    assert columns.count("<g>") == 240


def test_columns_are_as_high_as_the_client_has_rows(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", clients=7)
    counts = {c: v["label_counts"] for c, v in json.loads((folder / "clients.json").read_text()).items()}
    most = max(map(sum, counts.values()))
    columns = report(tmp_path, folder).source.split('class="columns"')[1].split("</svg>")[0]
    for drawn in columns.split("<g>")[1:]:
        client = re.search(r"<title>(\d+):", drawn)
        assert client is not None
        heights = [float(h) for h in re.findall(r'height="([\d.]+)"', drawn)]
        assert sum(heights) == pytest.approx(100 * sum(counts[client[1]]) / most, abs=0.01)


def test_labels_that_a_curriculum_prefers_are_told(tmp_path: Path) -> None:
    """Of 8 rows in round 1 six have their client's own most frequent label, of 20 in round 2 twelve."""
    with RunFolder.create(tmp_path / "run") as run:
        held = {"a": {"label_counts": {"train": [4, 4]}}, "b": {"label_counts": {"train": [1, 4]}}}
        run.save_partition({"labels": ["no", "yes"], "clients": held, "sha256": "f" * 64})
        run.update_manifest(status="finished")
        lines = [(1, "a", [3, 1], None), (1, "b", [1, 3], None), (2, "a", [5, 5], None), (2, "b", [3, 7], None)]
        for number, (r, client, labels, lost) in enumerate([*lines, (2, "c", [9, 0], "late"), (0, "a", [2], None)]):
            told = {"number": number, "round": r, "client": client, "labels": labels, "lost": lost}
            run.append_exchanges([told])
        run.save_config({"method": {"name": "mine"}, "run": {"rounds": 2, "seed": 0}})
        for chooses in (False, True):
            run.update_manifest(chooses_rows=chooses)
            page = report(tmp_path, run.path)
            assert ("Which labels were trained on" in page.headings) is chooses
    said = "0.75 of what it trains on in round 1 (0.62 of all its rows) and 0.60 in round 2."
    assert said in page.text and "round 1: 8 rows (no 4, yes 4)" in page.text
    assert "round 2: 20 rows (no 8, yes 12)" in page.text and "round 0" not in page.text


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a folder"):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")


def test_damaged_client_scores_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "clients.json").write_text("{")
    with pytest.raises(StoreError, match=r"clients\.json is damaged"):
        write_report([folder], tmp_path / "report.html")


def test_no_text_of_a_table_is_cut(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "run", rounds=2, clients=4)], tmp_path / "page.html").read_text()
    assert "The measured time of the whole run includes evaluation." in page
    style = page[page.index("<style>") : page.index("</style>")]
    assert "ellipsis" not in style and not re.search(r"t[dh][^{}]*\{[^}]*overflow: hidden", style)
