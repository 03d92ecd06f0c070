"""What all requests to the endpoint share: the models that can be asked, limits, the engine, and counts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fedpeft.core.errors import RequestError
from fedpeft.proxy.asking import Limits
from fedpeft.proxy.bodies import Vocabulary
from fedpeft.proxy.engine import Engine
from fedpeft.proxy.gauges import Counter, Gauge, Histogram, Measure, exposition
from fedpeft.proxy.refusal import Refusal
from fedpeft.proxy.trio import Trio

PATHS = ("/", "/page.css", "/page.js", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Artefact(Protocol):
    """What is served: `fedpeft.app.proxying.open_artefact` gives one."""

    @property
    def name(self) -> str:
        """What the steered model is called."""
        ...

    @property
    def trio(self) -> Trio:
        """Large, tuned and base models."""
        ...

    @property
    def alpha(self) -> float | None:
        """How far the small models steer; None: there is nothing to steer."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Fields of `Settings` that the steered model has unless others are asked for, such as `beta`."""
        ...

    def prompt(self, said: Sequence[Mapping[str, str]], /) -> list[int]:
        """The token ids of a chat, the answer to follow. Raises RequestError."""
        ...


@dataclass(frozen=True)
class Options:
    """Limits of the endpoint.

    Attributes:
        key: what clients must send; None: nothing.
        max_tokens: tokens of one answer.
        timeout_s: of one request, the time in the queue included.
        max_body_bytes: of a request.
    """

    key: str | None = None
    max_tokens: int = 1024
    timeout_s: float = 300.0
    max_body_bytes: int = 2**20

    def __post_init__(self) -> None:
        for name, value in (("--max-tokens-limit", self.max_tokens), ("--timeout", self.timeout_s)):
            if not value > 0:
                raise RequestError(f"{name} {value} answers nobody; use more than 0")


@dataclass(frozen=True)
class View:
    """A model that can be asked.

    Attributes:
        kind: `proxy`, `large` or `small`.
        alpha: where none is asked for; None: nothing steers.
    """

    name: str
    kind: str
    trio: Trio
    alpha: float | None


def views_of(artefact: Artefact) -> dict[str, View]:
    """The models that can be asked, by name: the steered one, and what it is made of beside it."""
    trio, name = artefact.trio, artefact.name
    if not trio.steered:
        kind = "small" if trio.large is None else "large"
        return {name: View(name, kind, trio, None)}
    large, small = replace(trio, tuned=None, base=None), replace(trio, large=None, base=None)
    found = [View(name, "proxy", trio, artefact.alpha)]
    found += [View(f"{name}:large", "large", large, None), View(f"{name}:small", "small", small, None)]
    return {view.name: view for view in found}


class Desk:
    """One endpoint's shared things.

    Args:
        artefact: what is served.
        engine: decodes; its rows are those of all requests.
    """

    def __init__(self, artefact: Artefact, engine: Engine, options: Options) -> None:
        self.artefact, self.engine, self.options = artefact, engine, options
        self.views = views_of(artefact)
        self.main = self.views[artefact.name]
        self.words = Vocabulary(artefact.trio.tokenizer)
        self.limits = Limits(options.max_tokens, engine.max_queue, artefact.trio.vocab)
        self.created = int(time.time())
        self.answers = Counter("fedpeft_http_responses_total", "Answers by path and status.")
        self.ends = Counter("fedpeft_requests_total", "Completions and chats by how they ended.")
        self.tokens = Counter("fedpeft_tokens_total", "Tokens, read in prompts and said in answers.")
        self.first = Histogram("fedpeft_first_token_seconds", "From a streamed request to its first token.", SECONDS)
        self.whole = Histogram("fedpeft_request_seconds", "From a request to its last token.", SECONDS)
        self._measures: list[Measure] = [
            self.answers,
            self.ends,
            self.tokens,
            self.first,
            self.whole,
            Gauge("fedpeft_rows_waiting", "Answers in the queue.", lambda: engine.waiting),
            Gauge("fedpeft_rows_running", "Answers that are decoded now.", lambda: engine.running),
        ]

    def view(self, name: str | None) -> View:
        """The model of that name. Raises Refusal, with status 404."""
        if name is None:
            return self.main
        if name not in self.views:
            message = f"there is no model {name[:80]!r}; there are {', '.join(self.views)}"
            raise Refusal(message, "model", "model_not_found", 404)
        return self.views[name]

    def described(self, view: View) -> dict[str, Any]:
        """A model as the list of models has it."""
        large, context = view.trio.large, view.trio.room(())
        most = min(self.options.max_tokens, context or self.options.max_tokens)
        found = {"id": view.name, "object": "model", "created": self.created, "owned_by": "fedpeft", "kind": view.kind}
        found |= {"max_context": context, "max_tokens": most}
        found |= {"large": None if large is None else large.caps.identity}
        return found | ({} if view.alpha is None else {"alpha": view.alpha})

    def observe(self, method: str, path: str, status: int) -> None:
        """Count an answer; paths that nobody serves are one."""
        self.answers.add(method=method[:8], path=path if path in PATHS else "other", status=str(status))

    def metrics(self) -> str:
        """All counts and times."""
        return exposition(self._measures)
