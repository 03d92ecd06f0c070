"""What the server alone holds in one run: a large model that it may ask, and the texts that it may show to it.

It gives a method that distils its teacher (`methods/fedpt.py`), and the run its alpha, its curve and its scores.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fedpeft.app.federation import Federation
from fedpeft.app.generating import Voice, as_said, rate
from fedpeft.core import tree
from fedpeft.core.errors import ConfigError, RequestError
from fedpeft.core.examples import Examples
from fedpeft.core.model import Target, Teacher
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params
from fedpeft.data.instructions import read_public, references_of
from fedpeft.data.sources import from_files
from fedpeft.data.tasks import Table
from fedpeft.maths.logits import combine, offsets
from fedpeft.models.readouts import Item
from fedpeft.models.sessions import Speaker
from fedpeft.proxy.blackbox import BlackBoxLM, CannotDo
from fedpeft.proxy.demands import check_scorable
from fedpeft.proxy.expert import Expert, expert_of
from fedpeft.proxy.recorded import MOST_BYTES, Recorded
from fedpeft.proxy.scoring import BEYOND, GRID, AlphaCurve, alpha_curve, score
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.trio import Trio
from fedpeft.runs.history import LARGE, PROXY
from fedpeft.runs.metrics import metrics_of
from fedpeft.runs.texts import rouge_available

if TYPE_CHECKING:
    from fedpeft.models.readouts.generate import GenerateReadout

SCORES = "large_scores"  # folder of a run


@dataclass
class Holding:
    """A large model with its texts; a `Held` of methods that distil.

    Attributes:
        vocab: V_eff, the tokens that both models have.
        public: texts to distil on; None: none are to be.
        expert: what the tuned small model alone reads around a prompt.
        folder: of the run; None: nothing is kept on disk.
    """

    fed: Federation
    large: BlackBoxLM
    vocab: int
    public: Examples | None = None
    expert: Expert | None = None
    folder: Path | None = None
    _curves: dict[str, AlphaCurve] = field(default_factory=dict)  # the last one, by the hash of the parameters
    _said: dict[str, dict[float, float]] = field(default_factory=dict)  # text scores, by the same hash
    _alone: dict[str, dict[str, float]] = field(default_factory=dict)  # scores of the large model, by split

    # --- what a method asks ---

    def best_alpha(self, params: Params) -> float:
        """The configured alpha, else that of the least loss on the validation texts."""
        fixed = self.fed.config.proxy.alpha
        return self.curve(params).best if fixed == "auto" else float(fixed)

    def teacher(self, params: Params, alpha: float) -> Teacher:
        """z_L + alpha (z_T - z_B) on rows of the public texts; of all tokens, or of L's candidates."""
        model, public = self.fed.model, self.public
        assert public is not None, "a teacher is asked for where there are public texts"
        read = public if self.expert is None else self.expert.examples(public)

        def teach(rows: Sequence[int]) -> Target:
            large = self._public.forced(rows)
            tuned, base = model.token_logits(params, read, rows), model.token_logits(None, public, rows)
            change = offsets(tuned, base, self.vocab)
            change = change if large.ids is None else change.gather(1, large.ids)
            return Target(combine(large.logits, change, alpha), large.ids, self.vocab)

        return teach

    # --- what a run asks ---

    @property
    def scorable(self) -> bool:
        """Whether the large model gives scores of given texts, which losses need."""
        caps = self.large.caps
        return caps.full and caps.block

    def curve(self, params: Params) -> AlphaCurve:
        """The mean loss on the validation texts at every alpha of the grid."""
        key = tree.sha256(params)
        if key not in self._curves:
            self._curves = {key: self.curve_of(self.trio(params))}
        return self._curves[key]

    def curve_of(self, trio: Trio) -> AlphaCurve:
        """As `curve`, of other small models."""
        sequences, starts = _texts(self.fed.whole("validation"))
        return alpha_curve(replace(trio, large=self._remembered("validation")), sequences, starts)

    def chosen(self, params: Params) -> float:
        """The alpha that is served: the configured one, or what `proxy.select` says."""
        proxy = self.fed.config.proxy
        if proxy.alpha != "auto":
            return float(proxy.alpha)
        if proxy.select == "nll":
            return self.curve(params).best
        return _best(self.text_scores(params))

    def text_scores(self, params: Params) -> dict[float, float]:
        """What is said at each alpha that is tried, by `proxy.select`; empty where no texts are said to choose one.

        These are the three of least loss; where no loss is told, the grid, and 3 and 4 where its end is best.
        """
        proxy = self.fed.config.proxy
        if proxy.alpha != "auto" or proxy.select == "nll":
            return {}
        key = tree.sha256(params)
        if key not in self._said:
            grid = self.curve(params).best_of(3) if self.scorable else GRID
            said = {alpha: self._said_well(params, alpha) for alpha in grid}
            if not self.scorable and _best(said) == GRID[-1]:
                said |= {alpha: self._said_well(params, alpha) for alpha in BEYOND}
            self._said[key] = said
        return dict(self._said[key])

    def scores(self, params: Params, alpha: float, split: str) -> dict[str, dict[str, float]]:
        """Metrics of the proxy and of the large model alone on a split; nothing where the latter tells no losses."""
        return self.scores_with(self.trio(params), alpha, split)

    def scores_with(self, trio: Trio, alpha: float, split: str) -> dict[str, dict[str, float]]:
        """As `scores`, of other small models."""
        data = self.fed.whole(split)
        if not self.scorable or not len(data):
            return {}
        trio = replace(trio, large=self._remembered(split))
        if split not in self._alone:
            self._alone[split] = self._metrics(replace(trio, tuned=None, base=None), None, data)
        return {PROXY: {**self._metrics(trio, alpha, data), "alpha": alpha}, LARGE: dict(self._alone[split])}

    def scores_of(self, params: Params, alpha: float, data: Examples) -> dict[str, dict[str, float]]:
        """As `scores`, on rows that are not the run's; nothing is remembered."""
        if not self.scorable or not len(data):
            return {}
        trio = self.trio(params)
        alone = self._metrics(replace(trio, tuned=None, base=None), None, data)
        return {PROXY: {**self._metrics(trio, alpha, data), "alpha": alpha}, LARGE: alone}

    def say(self, params: Params | None, alpha: float | None, table: Table) -> list[str]:
        """What the proxy says for each row, or without parameters the large model alone."""
        trio = self.trio(params or {})
        trio = trio if params is not None else replace(trio, tuned=None, base=None)
        config = self.fed.config
        settings = Settings(max_tokens=config.task.generate_tokens, alpha=alpha, beta=config.proxy.beta)
        return as_said(self.fed, trio, table, settings, config.proxy.speculate if params is not None else 0)

    def trio(self, params: Params) -> Trio:
        """The three models."""
        model, prompting = self.fed.model, self.fed.format.prompting
        assert prompting is not None, "only the format generate has a large model"
        candidates = None if self.large.caps.full else self.fed.config.proxy.top_k
        ends = frozenset({prompting.end})
        tokenizer = self.fed.base.tokenizer
        tuned, base = Speaker(model, params), Speaker(model)
        return Trio(self.large, tuned, base, tokenizer, self.vocab, ends, candidates, self.expert)

    @property
    def kept_bytes(self) -> dict[str, int]:
        """What the large model's scores take on disk at most, by the texts that they are of."""
        if not self.scorable:
            return {}
        splits = [split for split in ("validation", "test") if len(self.fed.whole(split))]
        found = {split: min(self._remembered(split).size_bytes, MOST_BYTES) for split in splits}
        return found if self.public is None else {**found, "public": min(self._public.size_bytes, MOST_BYTES)}

    # --- inside ---

    def _metrics(self, trio: Trio, alpha: float | None, data: Examples) -> dict[str, float]:
        readout = self.fed.model.readout
        outcomes = readout.outcomes(_Passes(self.fed, trio, alpha), None, data)
        return metrics_of(readout.sums(outcomes, data), self.fed.metric)

    def _said_well(self, params: Params, alpha: float) -> float:
        """Exact match or ROUGE-L on a sample of the validation rows, the same every time."""
        section, table = self.fed.config.task, self.fed.task.validation
        assert table is not None, "alpha is chosen on validation texts"
        picked = rng_for(0, "samples").permutation(len(table))[: max(1, section.generate_rows)]
        rows = table.take(sorted(picked.tolist()))
        said = self.say(params, alpha, rows)
        found = rate(said, references_of(rows, section.references), section.match)
        return found[self.fed.config.proxy.select]

    @cached_property
    def _public(self) -> Recorded:
        assert self.public is not None, "there are public texts"
        sequences, starts = _texts(self.public)
        return Recorded(self.large, sequences, starts, self.vocab, self._kept, bits=16, whole=False)

    def _remembered(self, split: str) -> Recorded:
        """The large model, which remembers what it said of the split's texts, their choices included."""
        if split not in self._recorded:
            readout, data = cast("GenerateReadout", self.fed.model.readout), self.fed.whole(split)
            items = [item for row in range(len(data)) for item in readout.predicting(0, data, row)]
            sequences = [readout.sequence(item)[0].tolist() for item in items]
            starts = [readout.known(item) or 1 for item in items]
            self._recorded[split] = Recorded(self.large, sequences, starts, self.vocab, self._kept)
        return self._recorded[split]

    @cached_property
    def _recorded(self) -> dict[str, Recorded]:
        return {}

    @property
    def _kept(self) -> Path | None:
        return None if self.folder is None else self.folder / SCORES


@dataclass(frozen=True)
class _Passes:
    """What a readout asks to score rows, answered by combined models."""

    fed: Federation
    trio: Trio
    alpha: float | None

    def logits(self, params: Params | None, data: Any, rows: Sequence[int] | None = None) -> Tensor:
        """No classes here."""
        raise RequestError("a large model is asked for texts, and class scores were asked for; use format generate")

    def item_losses(self, params: Params, items: Sequence[Item]) -> Tensor:
        """(items,) mean negative log-likelihood of each answer's tokens."""
        readout = self.fed.model.readout
        sequences = [readout.sequence(item)[0].tolist() for item in items]
        found = score(self.trio, sequences, [readout.known(item) or 1 for item in items], self.alpha)
        return torch.tensor([-own.total / len(own.logprobs) for own in found], dtype=torch.float64)


def hold(fed: Federation) -> Holding | None:
    """Open the large model and read the public texts; None where the configuration names no large model.

    Raises:
        RequestError: a model that cannot be opened or reads other tokens, no key, no validation texts, texts that are
            longer than it reads, or no ROUGE-L where that is to choose.
        CannotDo: it cannot give what the run needs.
    """
    from fedpeft.proxy.backends import open_backend
    from fedpeft.proxy.tokenizers import check_tokenizers

    proxy, prompting, lm = fed.config.proxy, fed.format.prompting, fed.model.lm
    if proxy.large is None:
        return None
    if prompting is None or lm is None:
        raise ConfigError([f"proxy.large: it says texts; use task.format generate, not {fed.config.task.format}."])
    if proxy.alpha == "auto" and fed.task.validation is None:
        raise ConfigError(
            ["proxy.alpha: auto is chosen on texts that the server has; give task.validation, or a number (--alpha)."]
        )
    if proxy.alpha == "auto" and proxy.select == "rouge_l" and not rouge_available():
        raise RequestError(
            "proxy.select is rouge_l, and what computes ROUGE-L is not installed; pip install 'fedpeft[generate]', or "
            "use another proxy.select"
        )
    Speaker(fed.model, fed.initial)  # an adapter that cannot speak token by token is refused before anything is trained
    large = open_backend(proxy.large, token=key_of(proxy.token_env), top_k=proxy.top_k)
    vocab = check_tokenizers(fed.base.tokenizer, large, (prompting.end,), lm.vocabulary)
    public = None
    if proxy.public is not None and getattr(fed.method, "distil", False):
        public = prompting.public(read_public(fed.task, from_files(proxy.public)))
    found = Holding(fed, large, vocab, public, expert_of(proxy.expert_prompt, fed.base.tokenizer))
    _check(found)
    return found


def key_of(variable: str | None, named: str = "proxy.token_env") -> str | None:
    """The key that a variable holds, without blanks around it. Raises RequestError where it holds none."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RequestError(f"{named} names the variable {variable}, which is not set or empty; set it to the key first")
    return key


def _check(held: Holding) -> None:
    """Refuse what the large model cannot do before the first round."""
    proxy, caps, fed = held.fed.config.proxy, held.large.caps, held.fed
    if held.public is not None:
        check_scorable(caps, 2)
    if proxy.alpha == "auto" and proxy.select == "nll" and not held.scorable:
        raise CannotDo(
            caps.identity,
            "an alpha by likelihood (proxy.select nll)",
            "it does not give the scores of all tokens of given texts",
            "use proxy.select exact_match or rouge_l, a number for proxy.alpha, or a logit server",
        )
    if proxy.speculate and not caps.block:
        raise CannotDo(caps.identity, "speculation", "it scores one position a call", "use proxy.speculate 0")
    texts = [fed.whole(split) for split in ("validation", "test")] + ([] if held.public is None else [held.public])
    longest = max((int(own.lengths.max()) for own in texts if len(own)), default=0)
    if longest > caps.max_context:
        raise RequestError(
            f"a text has {longest} tokens and {caps.identity} reads {caps.max_context}; lower task.max_length"
        )
    most, around = fed.positions, 0 if held.expert is None else len(held.expert.around(()))
    if most is not None and around and longest + around > most:
        raise RequestError(
            f"a text has {longest} tokens, proxy.expert_prompt {around}, and the small model reads {most}; shorten "
            "the expert prompt, or lower task.max_length"
        )


def curve_facts(curve: AlphaCurve) -> dict[str, Any]:
    """An alpha curve as plain data: alphas and mean losses in nats per token, beside those of the models alone."""
    return {
        "alphas": list(curve.nll),
        "nll": list(curve.nll.values()),
        "best": curve.best,
        "base_large": curve.base_large,
        "tuned_small": curve.tuned_small,
        "base_small": curve.base_small,
        "tokens": curve.tokens,
        "advice": curve.advice,
    }


def proxy_facts(held: Holding | None, params: Params) -> dict[str, Any]:
    """What a manifest says of the large model and of the alpha that goes with these parameters."""
    if held is None:
        return {}
    caps, proxy = held.large.caps, held.fed.config.proxy
    drawn = held.scorable and len(held.fed.whole("validation"))
    found: dict[str, Any] = {
        "large": caps.identity,
        "alpha": held.chosen(params),
        "alpha_by": proxy.select if proxy.alpha == "auto" else "given",
        "vocab": held.vocab,
        "curve": curve_facts(held.curve(params)) if drawn else None,
        "text_scores": {f"{alpha:g}": value for alpha, value in sorted(held.text_scores(params).items())},
    }
    if held.public is not None:
        found["public_texts"] = len(held.public)
    return {"proxy": found}


def voices(held: Holding | None, params: Params) -> dict[str, Voice]:
    """Who speaks at the end of a run besides the small models."""
    if held is None:
        return {}
    return {
        PROXY: lambda table: held.say(params, held.chosen(params), table),
        LARGE: lambda table: held.say(None, None, table),
    }


def _best(said: Mapping[float, float]) -> float:
    """The alpha of the greatest score, the smaller on ties."""
    return max(said, key=lambda alpha: (said[alpha], -alpha))


def _texts(data: Examples) -> tuple[list[list[int]], list[int]]:
    assert data.starts is not None, "rows of the format generate have answers"
    return [own.tolist() for own in data.tokens], data.starts.tolist()
