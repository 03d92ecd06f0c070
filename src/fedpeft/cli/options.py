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
Large: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="The large model that is steered: a folder, a hub id, http://, vllm+http:// or llamacpp+http://; "
        "else that of the run. none: the tuned small model answers alone.",
        show_default=False,
    ),
]
Alpha: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="How much of the small models' difference is added, -100 to 100; else as the run chose it.",
        show_default=False,
    ),
]
Speculate: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens that are drafted ahead, from what the text said before or by the small model; 0: none; "
        "else as the run was configured.",
        show_default=False,
    ),
]
TokenEnv: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The environment variable that holds the key of the large model's server.",
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
