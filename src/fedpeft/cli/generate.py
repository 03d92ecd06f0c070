"""`fedpeft generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpeft.cli.options import ExpertPrompt, Json

if TYPE_CHECKING:
    from fedpeft.app.proxying import Artefact
    from fedpeft.proxy.answers import Completion
    from fedpeft.proxy.settings import Settings

NAMES = {
    "proxy": "proxy-tuned large model",
    "large": "large model alone",
    "tuned_small": "tuned small model",
    "base_small": "untrained small model",
}


BLANK = {  # by whether there is any text
    False: "the model ended it before it said anything that can be shown",
    True: "it has nothing but spaces and line breaks",
}


def generate(
    folder: Annotated[
        str,
        typer.Argument(metavar="RUN_DIR", help="The folder of a run, or of an exported adapter.", show_default=False),
    ],
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="An instruction for the run's template.", show_default=False)
    ],
    context: Annotated[
        str, typer.Option(metavar="TEXT", help="What the instruction is about.", show_default=False)
    ] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the template.")] = False,
    large: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="The large model that is steered: a folder, a hub id, http://, vllm+http:// or llamacpp+http://; "
            "else that of the run. none: the tuned small model answers alone.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="How much of the small models' difference is added; else as the run chose it.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this mass; 1: from all.")] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Draw from the K likeliest tokens; 0: from all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens with this share of the likeliest one's.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: said tokens become less likely (of log-probabilities).")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draws.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; up to four.", show_default=False)
    ] = None,
    speculate: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens that the small model drafts ahead; else as the run says.", show_default=False
        ),
    ] = None,
    expert_prompt: ExpertPrompt = None,
    token_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The environment variable that holds the large model's key.", show_default=False
        ),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is said.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Let the models answer alone, too.")] = False,
    json: Json = False,
) -> None:
    """Say something with a run's adapter, alone or steering a large model."""
    from fedpeft.app.holding import key_of
    from fedpeft.app.proxying import answer, open_artefact
    from fedpeft.app.proxying import compare as compared
    from fedpeft.cli import render
    from fedpeft.core.errors import RequestError
    from fedpeft.proxy.settings import Settings

    if stream and (json or compare):
        raise RequestError(f"--stream prints one answer as it is said; leave out {'--json' if json else '--compare'}")
    opened = open_artefact(folder, large, alpha, key_of(token_env, "--token-env"), expert_prompt)
    ids = opened.prompt(prompt) if raw else opened.prompt(instruction=prompt, context=context)
    if raw and context:
        raise RequestError(f"--context {context!r} has no place in a raw prompt; leave out --raw or --context")
    settings = Settings(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()), **opened.settings,
    )  # fmt: skip
    drafts = opened.speculate if speculate is None else speculate
    if stream:
        _say_if_blank("the answer", _stream(opened, ids, settings, drafts))
    elif compare:
        answers = compared(opened, ids, settings, drafts)
        told = {who: _told(own) for who, own in answers.items()}
        typer.echo(
            render.as_json(told) if json else "\n\n".join(f"{NAMES[w]}:\n{own.text}" for w, own in answers.items())
        )
        for who, own in answers.items():
            _say_if_blank(f"the answer of the {NAMES[who]}", own.text)
    else:
        found = answer(opened, ids, settings, drafts)
        typer.echo(render.as_json({"prompt_tokens": len(ids), **_told(found)}) if json else found.text)
        _say_if_blank("the answer", found.text)


def _stream(opened: Artefact, ids: list[int], settings: Settings, drafts: int) -> str:
    from fedpeft.app.proxying import speak

    said = ""
    for emitted in speak(opened, ids, settings, drafts):
        typer.echo(emitted.text, nl=False)
        said += emitted.text
    typer.echo()
    return said


def _say_if_blank(what: str, text: str) -> None:
    """An answer without a visible character is no error, but nobody should look for it in vain."""
    if not text.strip():
        remedy = "ask in other words, or try another --alpha, a longer --max-tokens or a --temperature above 0"
        typer.echo(f"note: {what} is blank: {BLANK[bool(text)]}; {remedy}", err=True)


def _told(found: Completion) -> dict[str, Any]:
    return {
        "text": found.text,
        "tokens": list(found.tokens),
        "finish": found.finish,
        "logprobs": list(found.logprobs),
        "alpha": found.alpha,
        "mass": found.mass,
        "least_mass": found.least_mass,
        "exact": found.exact,
    }
