"""How a run's rows become tokens and its labels are predicted: the task's format over its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedpeft.config import RunConfig
from fedpeft.core.errors import DataError, ModelError
from fedpeft.core.examples import Examples
from fedpeft.core.metrics import Of
from fedpeft.data.answers import Prompting
from fedpeft.data.tasks import Table, Task
from fedpeft.data.templates import Template
from fedpeft.data.tokens import tokenise
from fedpeft.data.words import answer_ids, word_ids
from fedpeft.models.families import is_decoder
from fedpeft.models.lm_head import load_lm_head
from fedpeft.models.load import Base
from fedpeft.models.readouts import Readout
from fedpeft.models.readouts.cloze import ClozeReadout
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.models.readouts.verbalizer import VerbalizerReadout


@dataclass(frozen=True)
class Format:
    """A task format.

    Attributes:
        max_length: tokens of a row, an answer included.
        readout: None: the trained head.
        template: what a row's texts are put into; None: nothing.
        reserve: tokens that the longest answer takes.
        prompting: of the format generate: how rows become prompts and answers.
    """

    base: Base
    max_length: int
    readout: Readout | None = None
    template: Template | None = None
    reserve: int = 0
    prompting: Prompting | None = None

    @property
    def of(self) -> Of:
        """What is predicted: labels, or text."""
        return "labels" if self.prompting is None else "text"

    def tokens(self, table: Table) -> Examples:
        """The rows as the model reads them."""
        if self.prompting is not None:
            return self.prompting.examples(table)
        return tokenise(table, self.base.tokenizer, self.max_length, template=self.template, reserve=self.reserve)


def build_format(config: RunConfig, task: Task, base: Base) -> Format:
    """The format that the configuration names.

    Raises:
        ModelError: a model that the format is not for, or without a language-model head.
        DataError: a label word that cannot be used.
    """
    name, section = config.model.name, config.task
    if section.format == "generate":
        return _generate(config, base, task.response is None)
    if task.pattern is None or task.words is None:
        return Format(base, section.max_length)
    if section.format == "cloze":
        if is_decoder(base.family) or base.tokenizer.mask_token_id is None:
            raise ModelError(
                f"task.format cloze needs a masked language model, and {name} (family {base.family}) has no mask "
                "token or reads left to right; use task.format verbalizer or head, or a model such as demo"
            )
        lm_head = load_lm_head(name, base)
        words = word_ids(task.words, base.tokenizer, given=not task.named)
        return Format(base, section.max_length, ClozeReadout(lm_head, words, section.loss_over), task.pattern)
    if not is_decoder(base.family):
        raise ModelError(
            f"task.format verbalizer needs a causal language model (GPT-2, Llama and their like), and {name} is of the "
            f"family {base.family}; use task.format cloze or head"
        )
    answers = answer_ids(task.words, task.pattern, base.tokenizer, _end(name, base))
    readout = VerbalizerReadout(load_lm_head(name, base), answers)
    return Format(base, section.max_length, readout, task.pattern.split()[0], max(map(len, answers)))


def _generate(config: RunConfig, base: Base, plain: bool) -> Format:
    name, section = config.model.name, config.task
    if not is_decoder(base.family):
        raise ModelError(
            f"task.format generate needs a causal language model (GPT-2, Llama and their like), and {name} is of the "
            f"family {base.family}; give another model.name, or use task.format cloze or head"
        )
    lm_head = load_lm_head(name, base)
    end = _end(name, base) if section.end is None else _token(section.end, base)
    longest = min(section.max_length, int(getattr(base.tokenizer, "model_max_length", section.max_length)))
    prompting = Prompting(base.tokenizer, end, longest, section.template, section.choices, plain)
    readout = GenerateReadout(lm_head, partial(_size, base.tokenizer))
    return Format(base, section.max_length, readout, prompting=prompting)


def _size(tokenizer: Any, tokens: Sequence[int]) -> int:
    """Bytes of the text that tokens are, in UTF-8; tokens that stand for no text have none."""
    return len(tokenizer.decode(tokens, skip_special_tokens=True).encode())


def _token(text: str, base: Base) -> int:
    """The id of a token by its name, or of a text that is one token."""
    tokenizer = base.tokenizer
    named = tokenizer.get_vocab().get(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if named is None else [named]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise DataError(f"task.end {text!r} is not one token of the model's tokenizer; name one, such as its end token")
    return int(ids[0])


def _end(name: str, base: Base) -> int:
    """The end token's id: the tokenizer's, else the model's."""
    end = base.tokenizer.eos_token_id
    if end is None:
        end = getattr(base.module.config, "eos_token_id", None)
    if isinstance(end, list | tuple) and end:
        end = end[0]
    if not isinstance(end, int):
        raise ModelError(f"model {name} has no end token, which answers need; use task.format head")
    return end
