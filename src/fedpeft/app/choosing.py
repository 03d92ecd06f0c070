"""Multiple choice by likelihood: which of several answers a run's adapter finds likeliest, alone or steering."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpeft.app.proxying import open_artefact
from fedpeft.proxy.scoring import Chosen, Normalise, choose_continuation


def choose(
    folder: Path | str,
    instruction: str,
    options: Sequence[str],
    context: str = "",
    *,
    normalise: Normalise = "tokens",
    large: str | None = None,
    alpha: float | None = None,
    token: str | None = None,
    expert_prompt: str | None = None,
) -> Chosen:
    """The likeliest of several answers to an instruction.

    Where every option is one token and `normalise` is "sum" or "tokens", these tokens alone are compared, which servers
    can answer that give no scores of whole texts.

    Args:
        folder: a run's folder, or that of an exported adapter.
        options: answers as a row's response would be written, with its blank before it.
        normalise: "sum" of the tokens' log-probabilities; per "tokens" or "bytes" of the option; or less its score
            behind an empty prompt ("prior").
        large, alpha, token, expert_prompt: see `open_artefact`.

    Raises:
        RequestError: no or empty options, or what `open_artefact` refuses.
        CannotDo: the large model does not give what is needed.
    """
    artefact = open_artefact(folder, large, alpha, token, expert_prompt)
    prompt = artefact.prompt(instruction=instruction, context=context)
    answers = artefact.prompting.behind(instruction, context, options)
    tokenizer = artefact.prompting.tokenizer
    first = artefact.prompting.end if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    return choose_continuation(artefact.trio, prompt, answers, artefact.alpha, normalise, empty=[first])
