"""Answers of the endpoint as clients of OpenAI's API read them: whole ones, and the chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

_PRINTED = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`, turned round)."""
    hidden = [byte for byte in range(256) if byte not in _PRINTED]
    return {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class Vocabulary:
    """Texts as token ids and back, and single tokens as texts and bytes; those that were looked up are kept.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        inner = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(inner.to_str())["decoder"] if inner is not None else None
        self._characters = byte_characters() if "ByteLevel" in json.dumps(decoder) else None
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._known: dict[int, bytes] = {}
        self._frame = self._front()

    def _front(self) -> list[int]:
        """What the tokenizer puts before a text; what it puts behind is left out, for an answer is to follow."""
        bare, framed = (list(self._tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
        starts = [i for i in range(len(framed)) if bare and framed[i : i + len(bare)] == bare]
        return framed[: starts[0]] if starts else []

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that goes on."""
        return [*self._frame, *self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids as a text, special tokens left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text; a special token's are its name's."""
        if token not in self._known:
            self._known[token] = self._look_up(token)
        return self._known[token]

    def _look_up(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None or token in self._special:
            return str(piece or "").encode()
        if self._characters is not None and all(c in self._characters for c in piece):
            return bytes(self._characters[c] for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # a byte that has no token of its own
            return bytes([int(piece[3:5], 16)])
        if piece.startswith("▁"):
            return str(piece.replace("▁", " ")).encode()
        text: str = self._tokenizer.decode([token])
        return text.encode()

    def text_of(self, token: int) -> str:
        """The token as a text; bytes that are no whole characters are written `bytes:\\xe2`, as OpenAI does."""
        held = self.bytes_of(token)
        try:
            return held.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in held)


class Token(Protocol):
    """One token with its log-probability; None: the first of a scored text has none."""

    @property
    def token(self) -> int: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top(self) -> Sequence[tuple[int, float]]: ...


@dataclass(frozen=True)
class Given:
    """A token of a prompt that was scored."""

    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


@dataclass
class Part:
    """What there is to say about one answer: all of it, or what a chunk brings.

    Attributes:
        index: of the answer.
        tokens: those that the text came from, where log-probabilities are wanted.
        finish: `stop`, `length`, or None while it goes on.
        offset: characters of the tokens before.
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    offset: int = 0


@dataclass(frozen=True)
class Usage:
    """Tokens that were read and said."""

    prompt: int
    said: int

    def body(self) -> dict[str, int]:
        """As the API has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.said,
            "total_tokens": self.prompt + self.said,
        }


class Answers:
    """One request's answers, in the shape of its route.

    Args:
        key: the request's id.
        created: seconds since 1970.
        logprobs: how many alternatives beside each token; None: no log-probabilities.
        usage: whether a stream tells the usage.
    """

    kind = chunk_kind = "text_completion"

    def __init__(
        self, key: str, created: int, model: str, words: Vocabulary, logprobs: int | None, usage: bool = False
    ) -> None:
        self.key, self.created, self.model, self.words = key, created, model, words
        self.logprobs, self.usage = logprobs, usage

    def whole(self, parts: Iterable[Part], usage: Usage, notes: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._choice(part) for part in parts]
        return self._head(self.kind) | {"choices": choices, "usage": usage.body(), "fedpeft": notes}

    def chunk(self, part: Part) -> dict[str, Any]:
        """What a stream says next."""
        found = self._head(self.chunk_kind) | {"choices": [self._delta(part)]}
        return found | {"usage": None} if self.usage else found

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says before the first text, if anything."""
        return None

    def closing(self, usage: Usage, notes: dict[str, Any]) -> dict[str, Any] | None:
        """What a stream says behind the last text: the usage, where it is wanted."""
        if not self.usage:
            return None
        return self._head(self.chunk_kind) | {"choices": [], "usage": usage.body(), "fedpeft": notes}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.key, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, part: Part) -> dict[str, Any]:
        logprobs = self._logprobs(part)
        return {"index": part.index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    def _delta(self, part: Part) -> dict[str, Any]:
        return self._choice(part)

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        texts = [self.words.text_of(each.token) for each in part.tokens]
        offsets, place = [], part.offset
        for text in texts:
            offsets.append(place)
            place += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if each.logprob is None else _json(each.logprob) for each in part.tokens],
            "top_logprobs": [self._top(each) for each in part.tokens] if self.logprobs else None,
            "text_offset": offsets,
        }

    def _top(self, each: Token) -> dict[str, float] | None:
        if each.logprob is None:
            return None
        return {self.words.text_of(token): _json(logprob) for token, logprob in each.top}


class ChatAnswers(Answers):
    """The same for chats."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Who speaks."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        found = self._head(self.chunk_kind) | {"choices": [choice]}
        return found | {"usage": None} if self.usage else found

    def _choice(self, part: Part) -> dict[str, Any]:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return self._told(part, "message", message)

    def _delta(self, part: Part) -> dict[str, Any]:
        return self._told(part, "delta", {"content": part.text} if part.text or part.finish is None else {})

    def _told(self, part: Part, name: str, value: dict[str, Any]) -> dict[str, Any]:
        return {"index": part.index, name: value, "logprobs": self._logprobs(part), "finish_reason": part.finish}

    def _logprobs(self, part: Part) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        content = [
            self._entry(each.token, each.logprob or 0.0)
            | {"top_logprobs": [self._entry(*pair) for pair in each.top] if self.logprobs else []}
            for each in part.tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        held = list(self.words.bytes_of(token))
        return {"token": self.words.text_of(token), "logprob": _json(logprob), "bytes": held}


def _json(logprob: float) -> float:
    """A log-probability that JSON can hold: minus infinity is -9999, as in OpenAI's API."""
    return max(logprob, -9999.0)
