"""What combined models think of given texts: log-probabilities, choices, and the alpha curve in one pass.

Texts are teacher-forced: every model reads them once, whatever the number of alphas. Continuations of texts are scored
with log softmax(z_L + alpha (z_T - z_B)), see `proxy/decode.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fedpeft.core.errors import RequestError
from fedpeft.maths.logits import combine, curve_terms, losses, offsets
from fedpeft.models.sessions import Speaker
from fedpeft.proxy.answers import Top, told
from fedpeft.proxy.blackbox import BlackBoxLM, Labels
from fedpeft.proxy.demands import check_scorable
from fedpeft.proxy.expert import Expert
from fedpeft.proxy.recorded import BATCH_SCORES, Recorded, asked
from fedpeft.proxy.settings import ALPHA_WORDS, alpha_fits
from fedpeft.proxy.trio import Prompts, Trio

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
BEYOND = (3.0, 4.0)  # looked at where the end of the grid is best

Normalise = Literal["sum", "tokens", "bytes", "prior"]


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of a text's tokens from where its scored part begins.

    Attributes:
        logprobs: one per token.
        top: the likeliest tokens at each place with their log-probabilities.
    """

    logprobs: tuple[float, ...]
    top: tuple[Top, ...]

    @property
    def total(self) -> float:
        """Of the scored part."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class Chosen:
    """One of several continuations.

    Attributes:
        best: index of the greatest score, the first on ties.
        scores: of each, normalised as asked for; of single tokens by the labels' scores, relative to one another.
    """

    best: int
    scores: tuple[float, ...]


@dataclass(frozen=True)
class AlphaCurve:
    """Mean token losses of combined models on texts that were not trained on.

    Attributes:
        nll: by alpha, ascending, nats per token.
        base_large, tuned_small, base_small: of those models alone.
        tokens: that were scored.
    """

    nll: dict[float, float]
    base_large: float
    tuned_small: float
    base_small: float
    tokens: int

    @property
    def best(self) -> float:
        """The alpha of least loss, the smaller on ties."""
        return min(self.nll, key=lambda alpha: (self.nll[alpha], alpha))

    def best_of(self, count: int) -> tuple[float, ...]:
        """So many alphas of least loss, best first."""
        return tuple(sorted(self.nll, key=lambda alpha: (self.nll[alpha], alpha))[:count])

    @property
    def advice(self) -> str | None:
        """What the curve says against proxy-tuning here; None: nothing."""
        if self.tuned_small < min(self.nll.values()):
            return "the tuned small model alone is better than any combination: serve it alone"
        if self.best == 0:
            return "the proxy does not help: the large model alone is best"
        return None


def score(
    trio: Trio,
    sequences: Prompts,
    starts: Sequence[int],
    alpha: float | None = None,
    n_top: int = 0,
) -> list[Scored]:
    """Log-probabilities of each text's tokens from a place on, under what a trio decodes with.

    Args:
        sequences: token ids.
        starts: where the scored part of each begins; at least 1, as nothing stands before the first token.
        alpha: needed where all three models are there.
        n_top: how many of the likeliest tokens are told at each place.

    Raises:
        RequestError: no alpha, or a start outside a text.
        CannotDo: a large model that does not give all scores, or not of several positions where a text has them.
    """
    _known(trio, alpha)
    found: list[Scored | None] = [None] * len(sequences)
    for heard in _heard(trio, sequences, starts):
        scores = heard.large if heard.change is None else combine(heard.large, heard.change, float(alpha or 0))
        words = told(scores, heard.targets.tolist(), [n_top] * len(scores))
        found[heard.text] = Scored(tuple(lp for lp, _ in words), tuple(top for _, top in words))
    return [own for own in found if own is not None]


def alpha_curve(
    trio: Trio,
    sequences: Prompts,
    starts: Sequence[int],
    grid: Sequence[float] = GRID,
) -> AlphaCurve:
    """The mean loss of the texts' tokens from a place on, for every alpha of a grid, in one pass of each model.

    Where 2, the end of the usual grid, is best, the curve goes on to 3 and 4.

    Args:
        grid: alphas; 0, the large model alone, is always among them.

    Raises:
        RequestError: a trio without all three models, no text, or a start outside a text.
        CannotDo: see `score`.
    """
    if not trio.steered:
        raise RequestError("an alpha curve compares three models; give a large one, a tuned and a base small one")
    if not sequences or not grid:
        raise RequestError(f"{len(sequences)} texts and {len(grid)} alphas make no curve; give validation data")
    points = sorted({0.0, *map(float, grid)})
    beyond = BEYOND if points[-1] == GRID[-1] else ()
    every = [*points, *beyond]
    totals = torch.zeros(len(every), dtype=torch.float64)
    alone = torch.zeros(2, dtype=torch.float64)
    tokens = 0
    for heard in _heard(trio, sequences, starts):
        assert heard.change is not None and heard.small is not None
        totals += curve_terms(heard.large, heard.change, heard.targets, every).cpu()
        alone += torch.stack([losses(own, heard.targets).double().sum() for own in heard.small]).cpu()
        tokens += len(heard.targets)
    nll = dict(zip(every, (totals / tokens).tolist(), strict=True))
    tuned_small, base_small = (alone / tokens).tolist()
    within = {alpha: nll[alpha] for alpha in points}
    curve = AlphaCurve(within, nll[0.0], tuned_small, base_small, tokens)
    return AlphaCurve(nll, nll[0.0], tuned_small, base_small, tokens) if curve.best == GRID[-1] else curve


def choose_continuation(
    trio: Trio,
    prompt: Sequence[int],
    options: Prompts,
    alpha: float | None = None,
    normalise: Normalise = "sum",
    empty: Sequence[int] = (),
) -> Chosen:
    """The likeliest of several continuations of a prompt.

    Single tokens are compared by lp_L + alpha (lp_T - lp_B) of those tokens alone: the normaliser is the same for all,
    so backends that do not give all scores do.

    Args:
        options: token ids, at least one each.
        normalise: "sum" of log-probabilities; per "tokens" or "bytes" of the option; or less its score behind an empty
            prompt ("prior").
        empty: what an empty prompt is, such as the beginning-of-text token; for "prior".

    Raises:
        RequestError: no options, an empty one, another `normalise`, or no empty prompt where one is needed.
        CannotDo: see `score`.
    """
    if normalise not in get_args(Normalise):
        raise RequestError(f"normalise is {normalise!r}; use one of {', '.join(get_args(Normalise))}")
    if not options or not all(map(len, options)):
        raise RequestError(f"{len(options)} options, some without tokens: give at least one, none of them empty")
    if normalise in ("sum", "tokens") and all(len(option) == 1 for option in options):
        scores = _by_labels(trio, prompt, [option[0] for option in options], alpha)
    else:
        scores = _behind(trio, prompt, options, alpha)
    if normalise == "tokens":
        scores = [own / len(option) for own, option in zip(scores, options, strict=True)]
    elif normalise == "bytes":
        sizes = [len(str(trio.tokenizer.decode(list(option))).encode()) for option in options]
        scores = [own / max(1, size) for own, size in zip(scores, sizes, strict=True)]
    elif normalise == "prior":
        if not empty:
            raise RequestError("an empty prompt has no tokens here; give the beginning-of-text token as `empty`")
        scores = [own - bare for own, bare in zip(scores, _behind(trio, empty, options, alpha), strict=True)]
    return Chosen(max(range(len(scores)), key=lambda i: (scores[i], -i)), tuple(scores))


def _behind(trio: Trio, prompt: Sequence[int], options: Prompts, alpha: float | None) -> list[float]:
    whole = [[*prompt, *option] for option in options]
    return [own.total for own in score(trio, whole, [len(prompt)] * len(options), alpha)]


def _by_labels(trio: Trio, prompt: Sequence[int], labels: Sequence[int], alpha: float | None) -> list[float]:
    if any(not 0 <= label < trio.vocab for label in labels):
        raise RequestError(f"labels {list(labels)} are not all among {trio.vocab} tokens")
    _known(trio, alpha)
    large = None if trio.large is None else _labels_of_large(trio.large, prompt, labels)
    small = [own[0, list(labels)].cpu() for own in _last(trio, prompt)]
    if large is None:
        return list(small[0].tolist())
    return list((combine(large, offsets(small[0], small[1]), float(alpha or 0)) if small else large).tolist())


def _last(trio: Trio, prompt: Sequence[int]) -> Iterator[Tensor]:
    """(1, V) of the tuned and of the base model behind a prompt."""
    read = (*trio.tuned_prompts([prompt]), prompt)
    for speaker, own in zip((trio.tuned, trio.base), read, strict=True):
        if speaker is not None:
            yield speaker.scores([own], [(len(own) - 1, len(own))])[0]


def _labels_of_large(large: BlackBoxLM, prompt: Sequence[int], labels: Sequence[int]) -> Tensor:
    session = large.open([list(prompt)], Labels(tuple(labels)))
    try:
        first = session.first
    finally:
        session.close()
    assert first.ids is not None, "labels come with their ids"
    by_id = dict(zip(first.ids[0, 0].tolist(), first.values[0, 0].tolist(), strict=True))
    return torch.tensor([by_id[label] for label in labels])


def _known(trio: Trio, alpha: float | None) -> None:
    if trio.steered and (alpha is None or not alpha_fits(alpha)):
        raise RequestError(f"alpha is {alpha}; give {ALPHA_WORDS}, such as that of the alpha curve")


@dataclass(frozen=True)
class _HeardText:
    """What the models say before each token of a text's scored part.

    Attributes:
        text: index.
        targets: (n,) the tokens.
        large: (n, V_eff) z_L, or z_T where the small model is alone.
        change: (n, V_eff); None: nothing is added.
        small: (n, V_eff) z_T and z_B, where there are all three.
    """

    text: int
    targets: Tensor
    large: Tensor
    change: Tensor | None
    small: tuple[Tensor, Tensor] | None


def _heard(trio: Trio, sequences: Prompts, starts: Sequence[int]) -> Iterator[_HeardText]:
    if len(sequences) != len(starts):
        raise RequestError(f"{len(sequences)} texts came with {len(starts)} starts; give one for each")
    for own, start in zip(sequences, starts, strict=True):
        if not 1 <= start < len(own):
            raise RequestError(f"a text of {len(own)} tokens is scored from {start} on; use 1 to {len(own) - 1}")
        if max(own[start:]) >= trio.vocab:
            raise RequestError(f"token {max(own[start:])} does not exist; use 0 to {trio.vocab - 1}")
    for texts in _batches(trio, sequences, starts):
        own_texts, own_starts = [sequences[i] for i in texts], [starts[i] for i in texts]
        large = [None] * len(texts) if trio.large is None else _large(trio, trio.large, own_texts, own_starts)
        tuned = _small(trio.tuned, own_texts, own_starts, trio.expert)
        base = _small(trio.base, own_texts, own_starts)
        for text, own, start, *each in zip(texts, own_texts, own_starts, large, tuned, base, strict=True):
            yield _one(trio, text, own[start:], *each)


def _small(
    speaker: Speaker | None, sequences: Prompts, starts: Sequence[int], expert: Expert | None = None
) -> Sequence[Tensor | None]:
    """(n, V) of each text, read behind its own beginning or behind what an expert reads for it."""
    if speaker is None:
        return [None] * len(sequences)
    if expert is not None:
        prompts = [expert.around(own[:start]) for own, start in zip(sequences, starts, strict=True)]
        sequences = [[*own, *text[start:]] for own, text, start in zip(prompts, sequences, starts, strict=True)]
        starts = list(map(len, prompts))
    return speaker.scores(sequences, [(start - 1, len(own) - 1) for own, start in zip(sequences, starts, strict=True)])


def _one(
    trio: Trio, text: int, answer: Sequence[int], large: Tensor | None, tuned: Tensor | None, base: Tensor | None
) -> _HeardText:
    alone = large if tuned is None else tuned[:, : trio.vocab]
    assert alone is not None, "a trio has one model at least"
    targets = torch.tensor(list(answer), device=alone.device)
    if large is None or tuned is None or base is None:
        return _HeardText(text, targets, alone, None, None)
    return _HeardText(text, targets, large, offsets(tuned, base, trio.vocab), (alone, base[:, : trio.vocab]))


def _large(trio: Trio, large: BlackBoxLM, sequences: Prompts, starts: Sequence[int]) -> list[Tensor]:
    """(n, V_eff) of each text."""
    if isinstance(large, Recorded):
        known = [large.find(own, start) for own, start in zip(sequences, starts, strict=True)]
        if large.candidates is None and None not in known:
            device = torch.device("cpu") if trio.tuned is None else trio.tuned.model.device
            return [large.forced([row]).logits.to(device) for row in known if row is not None]
    return asked(large, sequences, starts, trio.large_scores)


def _batches(trio: Trio, sequences: Prompts, starts: Sequence[int]) -> list[list[int]]:
    """Texts that go through together: answers of like length, within what memory and the large model take.

    Raises:
        CannotDo: it cannot score these texts.
        RequestError: a text is longer than it reads.
    """
    answers = [len(own) - start for own, start in zip(sequences, starts, strict=True)]
    budget = max(1, BATCH_SCORES // trio.vocab)
    most_rows = most_tokens = budget
    if trio.large is not None and sequences:
        caps = trio.large.caps
        check_scorable(caps, max(answers))
        most_rows, most_tokens = caps.max_batch, caps.max_context
        if (longest := max(map(len, sequences))) > most_tokens:
            raise RequestError(f"a text has {longest} tokens and {caps.identity} reads {most_tokens}; shorten it")
    batches: list[list[int]] = []
    for i in sorted(range(len(sequences)), key=lambda i: (answers[i], len(sequences[i]))):
        rows = [*batches[-1], i] if batches else [i]
        width = max(starts[k] for k in rows) + answers[i]
        if batches and len(rows) <= most_rows and width <= most_tokens and width * len(rows) <= budget:
            batches[-1] = rows
        else:
            batches.append([i])
    return batches
