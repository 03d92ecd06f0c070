"""Texts that a model says: for the rows of a file, and for a few test rows at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fedpeft.app.federation import Federation
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params
from fedpeft.data.instructions import references_of
from fedpeft.data.tasks import Table
from fedpeft.models.generation import generate
from fedpeft.proxy.decode import decode
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.trio import Trio
from fedpeft.runs.history import BASE, GLOBAL
from fedpeft.runs.texts import exact_match, rouge_available, rouge_l

log = logging.getLogger("fedpeft")
Voice: TypeAlias = Callable[[Table], list[str]]


@dataclass(frozen=True)
class Spoken:
    """What models said for some rows.

    Attributes:
        metrics: by who speaks, exact match and ROUGE-L; nothing of plain text, which has no right answer.
        samples: per row: prompt, references, and what each said.
    """

    metrics: dict[str, dict[str, float]]
    samples: list[dict[str, Any]]


def say(fed: Federation, params: Params, table: Table) -> list[str]:
    """What a model says for each row: behind its prompt, or behind a plain text."""
    prompting, tokens = fed.format.prompting, fed.config.task.generate_tokens
    assert prompting is not None, "only the format generate predicts texts"
    prompts = prompting.prompts(table, tokens)
    found = generate(fed.model, params, prompts, tokens, prompting.end, fed.positions)
    return [prompting.decode(ids).strip() for ids in found]


def as_said(fed: Federation, trio: Trio, table: Table, settings: Settings, speculate: int = 0) -> list[str]:
    """What combined models say for each row."""
    prompting = fed.format.prompting
    assert prompting is not None, "only the format generate predicts texts"
    prompts = [own.tolist() for own in prompting.prompts(table, settings.max_tokens)]
    found = decode(trio, prompts, [settings] * len(prompts), speculate)
    return [prompting.decode(own.tokens).strip() for own in found]


def speak(fed: Federation, params: Params, further: Mapping[str, Voice] | None = None) -> Spoken | None:
    """What the model, the untrained base and others say for at most `task.generate_rows` test rows; None: no such rows.

    The rows are a sample, the same in every run of the task. Of a plain text the first half is given, and the rest of
    it stands beside what is said.

    Args:
        further: who else speaks, and how.
    """
    task, section, prompting = fed.task, fed.config.task, fed.format.prompting
    if prompting is None or task.test is None or not section.generate_rows:
        return None
    rows = rng_for(0, "samples").permutation(len(task.test))[: section.generate_rows]
    table = task.test.take(np.sort(rows))
    if task.response is None:
        table, references = _halves(table)
    else:
        references = references_of(table, section.references)
    said = {who: say(fed, own, table) for who, own in ((GLOBAL, params), (BASE, {}))}
    said |= {who: voice(table) for who, voice in (further or {}).items()}
    contexts = table.pairs or ("",) * len(table)
    samples = [
        {"instruction": text, "context": context, "references": right, **{who: texts[i] for who, texts in said.items()}}
        for i, (text, context, right) in enumerate(zip(table.texts, contexts, references, strict=True))
    ]
    if task.response is None:
        return Spoken({}, samples)
    return Spoken({who: rate(texts, references, section.match) for who, texts in said.items()}, samples)


def rate(said: list[str], references: list[list[str]], match: str) -> dict[str, float]:
    """Exact match, and ROUGE-L where it is installed."""
    hits = [exact_match(text, own, match) for text, own in zip(said, references, strict=True)]
    found = {"exact_match": sum(hits) / len(hits)}
    if rouge_available():
        found["rouge_l"] = rouge_l(said, references)
    else:
        log.warning("there is no ROUGE-L: install fedpeft[generate] (pip install 'fedpeft[generate]')")
    return found


def _halves(table: Table) -> tuple[Table, list[list[str]]]:
    """The first half of each text's words as a prompt, and the rest."""
    cuts = [text.split(" ") for text in table.texts]
    heads = tuple(" ".join(words[: (len(words) + 1) // 2]) for words in cuts)
    rests = [[" ".join(words[(len(words) + 1) // 2 :])] for words in cuts]
    return Table(heads, None, table.labels, table.columns, table.files), rests


def with_texts(metrics: Mapping[str, Mapping[str, float]], spoken: Spoken) -> dict[str, dict[str, float]]:
    """The scores with those of what was said."""
    every = dict.fromkeys((*metrics, *spoken.metrics))
    return {who: {**metrics.get(who, {}), **spoken.metrics.get(who, {})} for who in every}
