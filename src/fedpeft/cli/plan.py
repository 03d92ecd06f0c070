"""`fedpeft plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft.cli.options import Json

Model = Annotated[str, typer.Option(help="demo, minilm, a folder, a config.json or a hub name; no weights are read.")]
Devices = Annotated[Path, typer.Option(metavar="FILE.toml", help="The machines, with the examples that they hold.")]
Deadline = Annotated[
    float | None,
    typer.Option(
        help="Seconds of a round; default: the median machine's time for all its examples with one weight at the least "
        "rank in the largest batch that fits."
    ),
]
Scores = Annotated[
    Path | None,
    typer.Option(metavar="RUN|FILE", help="Importance of the weights (those without one count 0); default: all alike."),
]
Fix = Annotated[
    str | None,
    typer.Option(
        metavar="K=V,..",
        help="Price one configuration: batch=4,rank=8,kinds=q+v,bits=nf4dq or with checkpointing=yes; defaults: "
        "batch=8, rank=8, kinds as in --kinds, bits=full, checkpointing=no.",
    ),
]


def plan(
    model: Model,
    devices: Devices,
    seq: Annotated[int, typer.Option(metavar="N", help="Tokens of a row.")],
    deadline: Deadline = None,
    scores: Scores = None,
    fix: Fix = None,
    kinds: Annotated[str, typer.Option(help="Candidates, joined by + or commas, or all.")] = "q+k+v+o",
    classes: Annotated[int | None, typer.Option(help="Of a classifier, at least 2; default: a language model.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the base as it is loaded; default: the configuration's.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="Ranks to choose from.")] = "2,4,8,16",
    batches: Annotated[str, typer.Option(help="Rows per step to choose from.")] = "1,2,4,8,16,32",
    bits: Annotated[str, typer.Option(help="largest | search | full.")] = "largest",
    search: Annotated[str, typer.Option(help="greedy | milp.")] = "greedy",
    cover: Annotated[int, typer.Option(help="How many of the best weights somebody must train.")] = 0,
    loop: Annotated[str, typer.Option(help="With --fix: ours | plain, whose training loop.")] = "ours",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Where the plan is kept, as --json has it.")
    ] = None,
    json: Json = False,
) -> None:
    """Plan who trains what: weights, ranks, batch and bits for unequal machines, within their memory and a deadline."""
    from fedpeft.app import planning
    from fedpeft.cli import render_plan
    from fedpeft.planner.plan import Choices

    _one_of("--bits", bits, "largest", "search", "full")
    _one_of("--search", search, "greedy", "milp")
    _one_of("--loop", loop, "ours", "plain")
    told = planning.plan(
        model,
        devices,
        seq,
        deadline=deadline,
        scores=scores,
        fix=fix,
        kinds=[kind.strip() for kind in kinds.replace(",", "+").split("+")],
        classes=classes,
        dtype=dtype,
        search="milp" if search == "milp" else "greedy",
        cover=cover,
        choices=Choices(ranks=_numbers("--ranks", ranks), batches=_numbers("--batches", batches), bits=bits),
        loop="plain" if loop == "plain" else "ours",
    )
    render_plan.print_plan(told, json, out)
    if not told.get("fixed") and not told["plans"]:
        raise typer.Exit(2)


def _one_of(name: str, value: str, *known: str) -> None:
    from fedpeft.core.errors import RequestError

    if value not in known:
        raise RequestError(f"{name} is {value!r}; use {' or '.join(known)}")


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from fedpeft.core.errors import RequestError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise RequestError(f"{name} is {text!r}; give whole numbers joined by commas")
    return tuple(map(int, parts))
