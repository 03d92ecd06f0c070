"""Plans and device profiles as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from fedpeft.cli.render import as_json, text_table
from fedpeft.planner.device import Profile
from fedpeft.planner.plan import spans
from fedpeft.runs.units import bytes_text, count_text, flops_text, seconds_text, share_text

HEAD = ("machine", "bits", "batch", "steps", "peak", "of", "step", "round", "up", "down", "left out", "coverage")


def print_plan(told: Mapping[str, Any], json: bool, out: Path | None = None) -> None:
    """A table of the machines, then why, then what all of them together leave out; in a file the JSON."""
    if out is not None:
        out.write_text(as_json(told) + "\n", encoding="utf-8")
    typer.echo(as_json(told) if json else "\n".join(_fixed(told) if "fixed" in told else _plans(told)))


def _plans(told: Mapping[str, Any]) -> Iterator[str]:
    yield f"{told['model']}: {count_text(told['parameters'], 'parameter')}, rows of {told['tokens']} tokens"
    yield from _too_long(told)
    rows = []
    for name, plan in told["plans"].items():
        p = plan["predicted"]
        rows.append(
            [
                name,
                plan["bits"] + (" ckpt" if plan["checkpointing"] else ""),
                str(plan["batch"]),
                str(plan["steps"]),
                bytes_text(p["peak_bytes"]),
                bytes_text(int(plan["usable_bytes"])),
                seconds_text(p["step_s"]),
                seconds_text(p["round_s"]),
                bytes_text(p["up_bytes"]),
                bytes_text(p["down_bytes"]),
                share_text(p["under_training"]),
                f"{p['coverage']:.2f}",
            ]
        )
    if rows:
        yield ""
        yield text_table(HEAD, rows, frozenset(range(2, len(HEAD))))
    for name, plan in told["plans"].items():
        yield ""
        yield f"{name} trains {plan['weights']}"
        yield from (f"  {line}" for line in plan["why"])
    for name, no in told["excluded"].items():
        yield ""
        yield f"{name} cannot join: {no['reason']}"
        if no["least_bytes"] > no["usable_bytes"]:
            yield f"  {bytes_text(round(no['missing_bytes']))} more of memory would let it"
    yield ""
    yield from _together(told)


def _together(told: Mapping[str, Any]) -> Iterator[str]:
    yield f"deadline of a round: {seconds_text(told['deadline_s'])} ({told['deadline_from']})"
    if told["under_training"] is not None:
        share = share_text(told["under_training"])
        yield f"under-training: {share} of the examples of the machines that take part are not used in a round"
    if told["untrained"]:
        blocks: dict[str, list[int]] = {}
        for name in told["untrained"]:
            _, block, kind = name.split(".", 2)
            blocks.setdefault(kind, []).append(int(block))
        yield "nobody trains: " + "; ".join(f"{kind} {spans(own)}" for kind, own in blocks.items())
    if told["scores"] == "all alike":
        yield "importance: all weights count alike; give --scores to plan with measured ones"
    if told["unscored"]:
        yield f"importance: {len(told['unscored'])} of {told['candidates']} weights have no score and count 0"
    for what, key in (("memory", "peak_ratio"), ("time", "step_overhead_s")):
        if names := told["uncalibrated"][what]:
            yield f"{what} not calibrated, a formula alone: {', '.join(names)} (no {key}; see fedpeft profile)"


def _too_long(told: Mapping[str, Any]) -> Iterator[str]:
    """Where rows are longer than what the model was made for."""
    if told["most_tokens"] and told["tokens"] > told["most_tokens"]:
        most = told["most_tokens"]
        yield f"--seq {told['tokens']} exceeds the model's {most} positions (max_position_embeddings)"


def _fixed(told: Mapping[str, Any]) -> Iterator[str]:
    fixed = told["fixed"]
    yield (
        f"{told['model']}: batch {fixed['batch']}, rank {fixed['rank']} on {', '.join(fixed['kinds'])}, "
        f"{fixed['bits']}, rows of {told['tokens']} tokens"
    )
    parts = [f"{key} {bytes_text(value)}" for key, value in fixed["memory"].items() if value]
    yield from _too_long(told)
    yield f"memory ({fixed['loop']} loop): {', '.join(parts)}"
    yield f"one step: {flops_text(fixed['flops'])}"
    yield ""
    rows = [
        [
            name,
            bytes_text(own["peak_bytes"]),
            bytes_text(int(own["usable_bytes"])),
            "yes" if own["fits"] else "no",
            seconds_text(own["step_s"]),
            str(own["steps"]),
            seconds_text(own["round_s"]),
        ]
        for name, own in fixed["machines"].items()
    ]
    yield text_table(("machine", "peak", "of", "fits", "step", "steps", "round"), rows, frozenset({1, 2, 4, 5, 6}))


def print_profile(told: Mapping[str, Any], table: str, out: Path | None, json: bool) -> None:
    """What was measured, and the table that a devices file takes."""
    if json:
        typer.echo(as_json({**told, "profile": vars(told["profile"]), "file": out}))
        return
    p = told["profile"]
    lines = [
        f"{told['device']}, {count_text(told['threads'], 'thread')}, {told['model']}",
        f"memory: {bytes_text(p.memory_bytes)} usable",
        f"training: {flops_text(p.flops_per_s)} per second and {1000 * p.step_overhead_s:.2f} ms a step "
        f"(a third size was predicted to {share_text(told['time_error'])})",
        "peak memory: "
        + (f"{p.peak_ratio:.3f} of the predicted" if told["peak_ratio_measured"] else "not measured here"),
        f"formats: {', '.join(p.formats)}",
        f"disk: {bytes_text(round(told['disk_bytes_per_s']))} per second, {bytes_text(told['disk_free_bytes'])} free",
        "bandwidth: " + _bandwidth(p, told["bandwidth_measured"]),
        "",
        table.rstrip() if out is None else f"written to {out}",
    ]
    typer.echo("\n".join(lines))


def _bandwidth(profile: Profile, measured: Mapping[str, bool]) -> str:
    """What was measured of the way to the server."""
    if not any(measured.values()):
        return "unknown; give --server URL, of a file of 64 KiB or more that also takes a POST"
    up, down = (f"{bytes_text(round(n))} per second" for n in (profile.up_bytes_per_s, profile.down_bytes_per_s))
    told = [f"{up} up" if measured["up"] else "up unknown, since the server takes no POST"]
    told.append(f"{down} down" if measured["down"] else "down unknown, since its answer has less than 64 KiB")
    return f"{', '.join(told)}; latency {seconds_text(profile.latency_s)}"
