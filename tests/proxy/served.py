"""What tests of the endpoint share: a scripted decoder behind it, a tokenizer with all bytes, and a server."""

from __future__ import annotations

import contextlib
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedpeft.proxy.answers import Completion, Emitted
from fedpeft.proxy.blackbox import Caps
from fedpeft.proxy.desk import Options
from fedpeft.proxy.engine import Engine
from fedpeft.proxy.serving import make_app
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.trio import Trio

CAPS = Caps("large", None, 257, True, 257, True, 64, 8, True)


def byte_tokenizer() -> Any:
    """Byte-level, a token for each of the 256 bytes and an end token."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(["<end>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


TOKENIZER = byte_tokenizer()


@dataclass(frozen=True)
class FakeLarge:
    """A black box that nobody asks."""

    caps: Caps = CAPS


def fake_trio(large: Any = None, context: int = 64) -> Trio:
    """Three models that a scripted decoder does not look at."""
    small = types.SimpleNamespace(positions=context)
    return Trio(large or FakeLarge(replace(CAPS, max_context=context)), small, small, TOKENIZER, 257, frozenset({0}))  # type: ignore[arg-type]


@dataclass
class Artefact:
    """What is served; a chat's prompt is its last message."""

    trio: Trio = field(default_factory=fake_trio)
    name: str = "toy"
    alpha: float = 0.75
    settings: Mapping[str, Any] = field(default_factory=lambda: {"alpha": 0.75, "beta": 0.03})

    speculate: int = 0

    def prompt(self, said: Sequence[Mapping[str, str]]) -> list[int]:
        """Its token ids."""
        return list(TOKENIZER(said[-1]["content"])["input_ids"])


@dataclass
class Script:
    """A decoder that says a text, a token at a time, and keeps a record of what it was asked.

    Attributes:
        says: the text, from the prompt's.
        gate: each step waits until it is set.
        fail: raised at this step, by number from 1.
    """

    says: Callable[[str], str] = lambda prompt: f"you said {prompt}"
    gate: threading.Event = field(default_factory=threading.Event)
    fail: Callable[[int], BaseException | None] = lambda step: None
    refuse: Callable[[Sequence[Sequence[int]]], BaseException | None] = lambda prompts: None
    pause_s: float = 0.0
    opened: list[tuple[Trio, list[Sequence[int]], list[Settings]]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    closed: int = 0
    most: int = 0
    now: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def __call__(
        self, trio: Trio, prompts: Sequence[Sequence[int]], settings: Sequence[Settings], speculate: int
    ) -> Scripted:
        """Open a batch."""
        if (error := self.refuse(prompts)) is not None:
            raise error
        self.opened.append((trio, list(prompts), list(settings)))
        self.now += len(prompts)
        self.most = max(self.most, self.now)
        return Scripted(self, prompts, settings)


class Scripted:
    """One batch of a `Script`."""

    def __init__(self, script: Script, prompts: Sequence[Sequence[int]], settings: Sequence[Settings]) -> None:
        self.script, self.settings = script, settings
        texts = [script.says(TOKENIZER.decode(prompt)) for prompt in prompts]
        self.left = {row: [*TOKENIZER(text)["input_ids"], 0] for row, text in enumerate(texts)}
        self.held = {row: b"" for row in self.left}
        self.said = dict.fromkeys(self.left, 0)
        self.steps = 0

    errors: Mapping[int, Exception] = {}

    def advance(self) -> list[Emitted]:
        """A token for each row."""
        assert self.script.gate.wait(20), "the gate was never opened"
        time.sleep(self.script.pause_s)
        self.steps += 1
        if (error := self.script.fail(self.steps)) is not None:
            raise error
        return [self.one(row) for row in list(self.left)]

    def one(self, row: int) -> Emitted:
        """The next token of a row; half characters are held back."""
        token = self.left[row].pop(0)
        self.said[row] += 1
        finish = "stop" if token == 0 else "length" if self.said[row] == self.settings[row].max_tokens else None
        text = ""
        if token:
            piece = TOKENIZER.convert_ids_to_tokens(token)
            self.held[row] += TOKENIZER.convert_tokens_to_string([piece]).encode() if piece.isascii() else raw(piece)
            with contextlib.suppress(UnicodeDecodeError):
                text = self.held[row].decode()
                self.held[row] = b""
        if finish:
            self.gone(row)
        return Emitted(row, token, text, -0.5, ((token, -0.5), (1, -1.5))[: self.settings[row].logprobs], finish)

    def gone(self, row: int) -> None:
        """Count a row that ended."""
        if self.left.pop(row, None) is not None:
            self.script.now -= 1

    def completions(self) -> list[Completion]:
        """Of all rows; their texts are not asked for."""
        return [Completion((), "", "stop", (), (), s.alpha, 0.875, 0.75, False) for s in self.settings]

    def drop(self, row: int) -> None:
        """Go on without it."""
        self.script.dropped.append(row)
        self.gone(row)

    def close(self) -> None:
        """Give everything back."""
        self.script.closed += 1
        for row in list(self.left):
            self.gone(row)


def raw(piece: str) -> bytes:
    """The bytes of a byte-level token, by GPT-2's published table written out another way."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in shown}
    table |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in shown)}
    return bytes(table[c] for c in piece)


@contextlib.contextmanager
def serving(
    script: Any = None, options: Options | None = None, artefact: Any = None, **engine: Any
) -> Iterator[tuple[str, Engine]]:
    """An endpoint at a free port of this machine: its URL, and its engine."""
    import uvicorn

    from fedpeft.proxy.listening import bind, reached

    made = Engine(**engine) if script is None else Engine(decoding=script, **engine)
    app = make_app(artefact or Artefact(), made, options or Options())
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws="none"))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        until(lambda: server.started)
        yield reached(sock), made
    finally:
        server.should_exit = True
        thread.join(20)
        made.close()
        sock.close()
        assert not thread.is_alive()


def until(true: Callable[[], bool], limit_s: float = 15.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.002)
