"""Arguments that several verbs have, with their help, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Config: TypeAlias = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration.", show_default=False)
]
RunDir: TypeAlias = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.", show_default=False)]
Set: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key, such as run.rounds=10; may be given often.",
        show_default=False,
    ),
]
Client: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="CLIENT",
        help="A client's own model instead of the global one, by its id in partition.json, such as 003 or 3.",
        show_default=False,
    ),
]
ExpertPrompt: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="What the tuned small model alone reads before the prompt, or around {prompt}; chat: the tokenizer's own "
        "template; empty: nothing; else that of the run.",
        show_default=False,
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
