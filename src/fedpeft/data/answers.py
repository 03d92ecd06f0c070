"""Prompts and answers as token ids: what the format `generate` learns from and says something behind.

The usual template is Alpaca's (Taori et al. 2023), with and without a context. An answer is the response and the end
token. A row that is too long loses, in this order: its context's end, as long as the answer keeps half of what the
template leaves; the end of its answer; the end of its instruction. The template is never cut.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.core.errors import DataError
from fedpeft.core.examples import Choices, Examples
from fedpeft.data import tokens as kept
from fedpeft.data.instructions import choices_of
from fedpeft.data.load import cache_folder
from fedpeft.data.templates import CHAT, Template, parse

if TYPE_CHECKING:
    from fedpeft.data.tasks import Table

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)
_CHUNK = 1000  # rows that are tokenised at once
Ids = list[int]


@dataclass(frozen=True)
class Prompting:
    """How rows become prompts and answers in a tokenizer's tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
        end: id of the end token, behind every answer.
        max_length: tokens of a row.
        template: None: Alpaca's; `chat`: the tokenizer's own; else text with {instruction} and {context}.
        choices: the column of further answers.
        plain: whether rows are plain texts, which need no template.

    Raises:
        DataError: a chat template was asked for and the tokenizer has none, or no token is left beside the template.
    """

    tokenizer: Any
    end: int
    max_length: int
    template: str | None = None
    choices: str = "choices"
    plain: bool = False

    def __post_init__(self) -> None:
        if self.template == CHAT and not getattr(self.tokenizer, "chat_template", None):
            raise DataError("task.template is chat, and the model's tokenizer has no chat template; write a template")
        if self._fixed > self.max_length - 2:
            raise DataError(
                f"task.max_length is {self.max_length} and the template alone takes {self._fixed} tokens; use at least "
                f"{self._fixed + 2}, or a shorter task.template"
            )

    def render(self, instruction: str, context: str) -> str:
        """What stands before the answer."""
        if self.template == CHAT:
            said = f"{instruction}\n\n{context}" if context else instruction
            message = [{"role": "user", "content": said}]
            return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        return self._pattern(bool(context)).render(instruction, context, "").text

    def examples(self, table: Table, cache: bool = True) -> Examples:
        """The rows as token ids with where their answers begin; plain text without responses is all answer.

        The result is kept on disk, and read from there the next time; rows with choices are not.

        Raises:
            DataError: a row without any token.
        """
        path = self._cached(table) if cache and self.choices not in table.columns else None
        stored = None if path is None else kept.read_arrays(path, len(table))
        if stored is not None:
            return _examples(stored, table, None)
        rows = self._texts(table) if self.plain else self._answers(table)
        tokens = [prompt + answer for prompt, answer, _ in rows]
        arrays: dict[str, NDArray[Any]] = {
            "ids": np.fromiter((token for row in tokens for token in row), np.int32),
            "lengths": np.fromiter(map(len, tokens), np.int64, count=len(tokens)),
            "marks": np.fromiter((len(prompt) for prompt, _, _ in rows), np.int64, count=len(rows)),
        }
        if path is not None:
            kept.write_arrays(path, arrays)
        choices = tuple(options for _, _, options in rows)
        return _examples(arrays, table, choices if any(choices) else None)

    def prompts(self, table: Table, room: int) -> list[NDArray[np.int32]]:
        """What something is to be said behind, cut so that so many tokens of an answer have room."""
        room = min(room, max(1, (self.max_length - self._fixed) // 2))
        if self.plain:
            whole = self._encode(list(table.texts))
            return [np.asarray(ids[: self.max_length - room], np.int32) for ids in whole]
        contexts = table.pairs or ("",) * len(table)
        found = self._encode([self.render(*row) for row in zip(table.texts, contexts, strict=True)])
        for i, ids in enumerate(found):
            if len(ids) > self.max_length - room:
                _, found[i] = self._shrunk(table.texts[i], contexts[i], self.max_length - room)
        return [np.asarray(ids, np.int32) for ids in found]

    def behind(self, instruction: str, context: str, answers: Sequence[str]) -> list[Ids]:
        """The tokens of answers as they stand behind a prompt, without the end token."""
        text = instruction if self.plain else self.render(instruction, context)
        stem, *wholes = self._encode([text, *(text + answer for answer in answers)])
        return [self._behind(stem, whole, answer) for whole, answer in zip(wholes, answers, strict=True)]

    def public(self, table: Table) -> Examples:
        """As `examples`, of rows of which some have no response: these end with their prompt.

        Raises:
            DataError: there is no row.
        """
        if not len(table):
            raise DataError("there is no public text; give rows, or leave proxy.public out")
        if self.plain:
            return self.examples(table)
        responses = table.responses or ()
        answered = [i for i, response in enumerate(responses) if response.strip()]
        others = [i for i in range(len(table)) if i not in set(answered)]
        parts = self.examples(table.take(answered)) if answered else None
        asked = self.prompts(table.take(others), 1)
        tokens: list[NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(table)
        starts = np.zeros(len(table), np.int64)
        for i, prompt in zip(others, asked, strict=True):
            tokens[i], starts[i] = prompt, len(prompt)
        if parts is not None and parts.starts is not None:
            for place, i in enumerate(answered):
                tokens[i], starts[i] = parts.tokens[place], parts.starts[place]
        return Examples(tuple(tokens), np.zeros(len(table), np.int64), starts=starts)

    @property
    def facts(self) -> dict[str, str]:
        """What a model card tells: the template (of plain text the text alone), and the token behind an answer."""
        template = "{instruction}" if self.plain else self.template or ALPACA_CONTEXT
        return {"prompt": template, "end": str(self.tokenizer.convert_ids_to_tokens(self.end))}

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    # --- rows ---

    def _texts(self, table: Table) -> list[tuple[Ids, Ids, Choices | None]]:
        """Plain texts: the first token is given, all others and the end token are to be predicted."""
        found: list[tuple[Ids, Ids, Choices | None]] = []
        for i, ids in enumerate(self._encode(list(table.texts))):
            if not ids:
                raise DataError(f"row {i + 1} of a split gives no token; drop empty texts")
            whole = [*ids, self.end][: self.max_length]
            found.append((whole[:1], whole[1:], None))
        return found

    def _answers(self, table: Table) -> list[tuple[Ids, Ids, Choices | None]]:
        found = []
        responses, contexts = table.responses or (), table.pairs or ("",) * len(table)
        options = choices_of(table, self.choices)
        for start in range(0, len(table), _CHUNK):
            part = range(start, min(start + _CHUNK, len(table)))
            texts = [self.render(table.texts[i], contexts[i]) for i in part]
            stems = self._encode(texts)
            wholes = self._encode([text + responses[i] for text, i in zip(texts, part, strict=True)])
            for i, text, stem, whole in zip(part, texts, stems, wholes, strict=True):
                answer = [*self._behind(stem, whole, responses[i]), self.end]
                if len(stem) + len(answer) > self.max_length:
                    room = min(len(answer), max(self.max_length - len(stem), (self.max_length - self._fixed) // 2, 1))
                    text, stem = self._shrunk(table.texts[i], contexts[i], self.max_length - room)
                    answer = answer[: self.max_length - len(stem)]
                found.append((stem, answer, self._choices(text, stem, options[i], responses[i])))
        return found

    def _choices(self, text: str, stem: Ids, options: Sequence[str], response: str) -> Choices | None:
        if not options:
            return None
        room, wholes = self.max_length - len(stem), self._encode([text + option for option in options])
        answers = [
            np.asarray([*self._behind(stem, whole, option), self.end][:room], np.int32)
            for whole, option in zip(wholes, options, strict=True)
        ]
        return Choices(tuple(answers), options.index(response)) if response in options else None

    def _behind(self, stem: Ids, whole: Ids, answer: str) -> Ids:
        """The answer's tokens as they stand behind the prompt; by themselves where the tokenizer joins them with it."""
        if whole[: len(stem)] == stem:
            return whole[len(stem) :]
        return list(self.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])

    def _shrunk(self, instruction: str, context: str, most: int) -> tuple[str, Ids]:
        """The prompt in at most so many tokens, as text and ids: the context is cut first, then the instruction."""
        for cut_context in (True, False):
            own = context if cut_context else instruction
            while True:
                text = self.render(instruction, own) if cut_context else self.render(own, "")
                ids = self._encode([text])[0]
                if len(ids) <= most or not own:
                    break
                own = self._shortened(own, len(ids) - most)
            if len(ids) <= most:
                return text, ids
        return text, ids  # the template alone: what is left of the row is the answer's

    def _shortened(self, text: str, over: int) -> str:
        """The text without about its last `over` tokens, by one character at least."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in found["offset_mapping"]]
        keep = len(ends) - over
        return text[: min(ends[keep - 1], len(text) - 1)] if keep > 0 else ""

    def _encode(self, texts: list[str]) -> list[Ids]:
        """Token ids with the special tokens that stand before a text, without those behind it."""
        if not texts:
            return []
        framed = self.template != CHAT
        found = self.tokenizer(texts, add_special_tokens=framed, return_special_tokens_mask=True, verbose=False)
        rows: list[Ids] = []
        for ids, special in zip(found["input_ids"], found["special_tokens_mask"], strict=True):
            last = len(ids)
            while framed and last and special[last - 1] and last > 1:
                last -= 1
            rows.append(list(ids[:last]))
        return rows

    # --- templates ---

    def _pattern(self, context: bool) -> Template:
        return parse(self.template or (ALPACA_CONTEXT if context else ALPACA))

    @cached_property
    def _fixed(self) -> int:
        """Tokens of the template without a row's own texts."""
        return 0 if self.plain else len(self._encode([self.render("", "")])[0])

    def _cached(self, table: Table) -> Any:
        """The file that the rows' tokens are kept in; None where they cannot be."""
        identity, folder = kept.identity_of(self.tokenizer), cache_folder(None)
        if identity is None or folder is None:
            return None
        chat = getattr(self.tokenizer, "chat_template", None) if self.template == CHAT else None
        own = [self.template, ALPACA, ALPACA_CONTEXT, str(chat), self.end, self.plain]
        key = kept.key_of(table, identity, self.max_length, json.dumps(own))
        return folder / f"answers-{key}.npz"


def cut_answers(data: Examples, end: int) -> int:
    """How many rows' answers were cut: those that do not end with the end token."""
    return sum(int(tokens[-1]) != end for tokens in data.tokens)


def _examples(arrays: dict[str, NDArray[Any]], table: Table, choices: tuple[Choices | None, ...] | None) -> Examples:
    ids, lengths = arrays["ids"], arrays["lengths"]
    rows = tuple(np.split(ids, np.cumsum(lengths)[:-1])) if len(lengths) else ()
    return Examples(rows, table.labels, starts=arrays["marks"], choices=choices)
