"""`fedpeft generate`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from fedpeft.cli.options import Alpha, ExpertPrompt, Json, Large, Speculate, TokenEnv

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

Folder: TypeAlias = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="The folder of a run, or of an exported adapter.", show_default=False)
]
Prompt: TypeAlias = Annotated[
    str, typer.Option(metavar="TEXT", help="An instruction for the run's template.", show_default=False)
]
Context: TypeAlias = Annotated[
    str, typer.Option(metavar="TEXT", help="What the instruction is about.", show_default=False)
]
Raw: TypeAlias = Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the template.")]
MaxTokens: TypeAlias = Annotated[int, typer.Option(metavar="N", help="Most tokens of the answer.")]
Temperature: TypeAlias = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopP: TypeAlias = Annotated[float, typer.Option(help="Draw from the likeliest tokens with this mass; 1: from all.")]
TopK: TypeAlias = Annotated[int, typer.Option(metavar="K", help="Draw from the K likeliest tokens; 0: from all.")]
MinP: TypeAlias = Annotated[float, typer.Option(help="Draw from tokens with this share of the likeliest one's.")]
Repetition: TypeAlias = Annotated[
    float, typer.Option(help="Above 1: said tokens become less likely (of log-probabilities).")
]
Seed: TypeAlias = Annotated[int, typer.Option(metavar="N", help="Of the draws.")]
Stop: TypeAlias = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End before this text; up to four.", show_default=False)
]
Stream: TypeAlias = Annotated[bool, typer.Option("--stream", help="Print the answer as it is said.")]
Compare: TypeAlias = Annotated[bool, typer.Option("--compare", help="Let the models answer alone, too.")]


def generate(
    folder: Folder,
    prompt: Prompt,
    context: Context = "",
    raw: Raw = False,
    large: Large = None,
    alpha: Alpha = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    speculate: Speculate = None,
    expert_prompt: ExpertPrompt = None,
    token_env: TokenEnv = None,
    stream: Stream = False,
    compare: Compare = False,
    json: Json = False,
) -> None:
    """Say something with a run's adapter, alone or steering a large model."""
    from fedpeft.app.holding import key_of
    from fedpeft.app.proxying import open_artefact
    from fedpeft.core.errors import RequestError
    from fedpeft.proxy.settings import Settings

    if stream and (json or compare):
        raise RequestError(f"--stream prints one answer as it is said; leave out {'--json' if json else '--compare'}")
    if raw and context:
        raise RequestError(f"--context {context!r} has no place in a raw prompt; leave out --raw or --context")
    settings = Settings(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
    )  # fmt: skip
    opened = open_artefact(folder, large, alpha, key_of(token_env, "--token-env"), expert_prompt)
    settings = replace(settings, **opened.settings)
    ids = opened.prompt(prompt) if raw else opened.prompt(instruction=prompt, context=context)
    drafts = opened.speculate if speculate is None else speculate
    if stream:
        _stream(opened, ids, settings, drafts)
    else:
        (_compare if compare else _answer)(opened, ids, settings, drafts, json)


def _answer(opened: Artefact, ids: list[int], settings: Settings, drafts: int, json: bool) -> None:
    from fedpeft.app.proxying import answer
    from fedpeft.cli import render

    found = answer(opened, ids, settings, drafts)
    typer.echo(render.as_json({"prompt_tokens": len(ids), **_told(found)}) if json else found.text)
    _say_if_blank("the answer", found.text)


def _compare(opened: Artefact, ids: list[int], settings: Settings, drafts: int, json: bool) -> None:
    from fedpeft.app.proxying import compare
    from fedpeft.cli import render

    found = compare(opened, ids, settings, drafts)
    texts = "\n\n".join(f"{NAMES[who]}:\n{own.text}" for who, own in found.items())
    typer.echo(render.as_json({who: _told(own) for who, own in found.items()}) if json else texts)
    for who, own in found.items():
        _say_if_blank(f"the answer of the {NAMES[who]}", own.text)


def _stream(opened: Artefact, ids: list[int], settings: Settings, drafts: int) -> None:
    from fedpeft.app.proxying import speak

    said = ""
    for emitted in speak(opened, ids, settings, drafts):
        typer.echo(emitted.text, nl=False)
        said += emitted.text
    typer.echo()
    _say_if_blank("the answer", said)


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
