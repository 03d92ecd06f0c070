"""What a request to the endpoint asks for, checked: a refusal names the field, the value and the remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedpeft.proxy.refusal import Refusal
from fedpeft.proxy.settings import ALPHAS, PENALTIES

Message: TypeAlias = dict[str, str]  # role and content
Prompt: TypeAlias = str | tuple[int, ...] | tuple[Message, ...]

MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS, MOST_BIASES = 4, 256, 20, 1024
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Range:
    """A field that is a number: its bounds, and whether it is a whole one, or above its least."""

    least: float
    most: float
    whole: bool = False
    above: bool = False

    def check(self, name: str, value: Any) -> Any:
        """The value, an int or a float. Raises Refusal."""
        kind = "an integer" if self.whole else "a number"
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            raise Refusal(f"{name} must be {kind}, not {shown(value)}", name, "invalid_type")
        low = value > self.least if self.above else value >= self.least
        if not (low and value <= self.most):  # NaN fails, too
            start = f"above {self.least:g}" if self.above else f"from {self.least:g}"
            raise Refusal(f"{name} must be {kind} {start} to {self.most:g}, not {shown(value)}", name)
        return value if self.whole else float(value)


NUMBERS = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, above=True),
    "min_p": Range(0, 1),
    "top_k": Range(0, 1_000_000, whole=True),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(*PENALTIES),
    "alpha": Range(*ALPHAS),
    "beta": Range(0, 1),
    "seed": Range(-(2**63), 2**63 - 1, whole=True),
}
BOTH = {*NUMBERS, "model", "max_tokens", "n", "stop", "stream", "stream_options", "logprobs", "logit_bias", "user"}
FIELDS = {
    "completions": BOTH | {"prompt", "echo"},
    "chat": BOTH | {"messages", "top_logprobs", "max_completion_tokens"},
}
NEUTRAL: dict[str, Any] = {  # fields of OpenAI's API that are taken where they ask for nothing
    "best_of": 1, "suffix": "", "tools": [], "response_format": {"type": "text"}, "store": False,
    "service_tier": "auto", "modalities": ["text"], "tool_choice": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_tokens: tokens of an answer.
        max_rows: answers: prompts times n.
        vocab: ids are below it.
    """

    max_tokens: int
    max_rows: int
    vocab: int


@dataclass(frozen=True)
class Asked:
    """A request that was understood.

    Attributes:
        model: whose answer; None: the served one.
        prompts: texts, token ids, or the messages of one chat.
        n: answers to each.
        max_tokens: of an answer; None: as the route has it.
        numbers: sampling fields that were given, by name.
        logprobs: how many alternatives beside each token; None: no log-probabilities.
        usage: whether a stream ends with a count of tokens.
        echo: whether answers begin with the prompt.
    """

    model: str | None
    prompts: tuple[Prompt, ...]
    n: int = 1
    max_tokens: int | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stream: bool = False
    usage: bool = False
    echo: bool = False


def shown(value: Any) -> str:
    """A value in a message: short, and of a text or a list no more than its beginning."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def parse(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises Refusal: no JSON, no object, NaN or Infinity."""

    def refuse(constant: str) -> None:
        raise Refusal(f"the body holds {constant}, which is no JSON; give a finite number", None, "invalid_json")

    try:
        found = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise Refusal(f"the body is no JSON{where}; send one object in UTF-8", None, "invalid_json") from None
    if not isinstance(found, dict):
        raise Refusal(f"the body must be a JSON object, not {type(found).__name__}", None, "invalid_json")
    return found


def asked_of(body: Mapping[str, Any], route: str, limits: Limits) -> Asked:
    """A body understood.

    Args:
        route: `completions` or `chat`.

    Raises:
        Refusal: with the field that is wrong.
    """
    given = {name: value for name, value in body.items() if value is not None}
    _known(given, FIELDS[route])
    chat = route == "chat"
    prompts = (_messages(given),) if chat else _prompts(given, limits.vocab)
    n = Range(1, limits.max_rows, whole=True).check("n", given.get("n", 1))
    if n * len(prompts) > limits.max_rows:
        message = f"{len(prompts)} prompts with n {n} are {n * len(prompts)} answers; at most {limits.max_rows} at once"
        raise Refusal(f"{message}: send several requests", "n")
    stream, echo = _flag(given, "stream"), _flag(given, "echo")
    user = given.get("user", "")
    if not isinstance(user, str):
        raise Refusal(f"user must be a text, not {shown(user)}", "user", "invalid_type")
    found = Asked(
        model=_checked(given["model"], "model") if "model" in given else None,
        prompts=prompts,
        n=n,
        max_tokens=_max_tokens(given, limits.max_tokens, 0 if echo else 1),
        numbers={name: kind.check(name, given[name]) for name, kind in NUMBERS.items() if name in given},
        stop=_stops(given.get("stop", [])),
        logit_bias=_biases(given.get("logit_bias", {}), limits.vocab),
        logprobs=_chat_logprobs(given) if chat else _logprobs(given),
        stream=stream,
        usage=_usage(given, stream),
        echo=echo,
    )
    if found.max_tokens == 0 and found.n > 1:
        raise Refusal(f"with max_tokens 0 all n {n} answers are the prompt; leave n out", "n")
    return found


def _known(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse fields that would be ignored."""
    for name, value in given.items():
        if name in known or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name in NEUTRAL:
            message = f"{name} is not supported here; leave it out, or send {json.dumps(NEUTRAL[name])}"
            raise Refusal(message, name, "unsupported_parameter")
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"is {near[0]} meant?" if near else f"there are {', '.join(sorted(known))}"
        raise Refusal(f"{shown(name)} is no field of this route; {remedy}", name[:80], "unsupported_parameter")


def _checked(value: Any, name: str) -> str:
    """A text that can be written in UTF-8 (JSON can hold half a character)."""
    if not isinstance(value, str):
        raise Refusal(f"{name} must be a text, not {shown(value)}", name, "invalid_type")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refusal(f"{name} holds half a character (a lone surrogate); send whole ones", name) from None
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise Refusal(f"{name} must be true or false, not {shown(value)}", name, "invalid_type")
    return value


def _ids(value: list[Any], vocab: int, name: str) -> tuple[int, ...]:
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int):
            raise Refusal(f"{name} mixes token ids with {shown(token)}; send ids alone", name, "invalid_type")
        if not 0 <= token < vocab:
            raise Refusal(f"{name} holds token id {token}; the vocabulary's ids are 0 to {vocab - 1}", name)
    return tuple(value)


def _prompts(given: Mapping[str, Any], vocab: int) -> tuple[Prompt, ...]:
    """A text, texts, token ids, or lists of token ids."""
    value = given.get("prompt")
    if value is None:
        raise Refusal(
            "prompt is missing; send a text, a list of texts, or token ids", "prompt", "missing_required_parameter"
        )
    if isinstance(value, str):
        return (_checked(value, "prompt"),)
    if not isinstance(value, list) or not value:
        message = f"prompt must be a text, a list of texts, or token ids, not {shown(value)}"
        raise Refusal(message, "prompt", "invalid_type")
    if isinstance(value[0], str):
        return tuple(_checked(each, "prompt") for each in value)
    if not isinstance(value[0], list):
        return (_ids(value, vocab, "prompt"),)
    if not all(isinstance(each, list) and each for each in value):
        raise Refusal("prompt must hold lists of at least one token id each", "prompt", "invalid_type")
    return tuple(_ids(each, vocab, "prompt") for each in value)


def _messages(given: Mapping[str, Any]) -> tuple[Message, ...]:
    value = given.get("messages")
    if value is None:
        raise Refusal("messages is missing; send a list of {role, content}", "messages", "missing_required_parameter")
    if not isinstance(value, list) or not value:
        raise Refusal(
            f"messages must be a list of at least one message, not {shown(value)}", "messages", "invalid_type"
        )
    return tuple(_message(each, f"messages[{i}]") for i, each in enumerate(value))


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise Refusal(f"{name} must be {{role, content}}, not {shown(value)}", name, "invalid_type")
    if extra := sorted(key for key, held in value.items() if key not in ("role", "content") and held is not None):
        raise Refusal(f"{name} has {shown(extra[0])}; a message has role and content", name, "unsupported_parameter")
    role = "system" if value.get("role") == "developer" else value.get("role")
    if role not in ROLES:
        raise Refusal(f"{name}.role must be one of {', '.join(ROLES)}, not {shown(role)}", f"{name}.role")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content") for part in content)
    return {"role": role, "content": _checked(content, f"{name}.content")}


def _part(value: Any, name: str) -> str:
    if not isinstance(value, dict) or value.get("type") != "text" or value.keys() != {"type", "text"}:
        raise Refusal(f"{name} may hold parts {{type: text, text}} alone, not {shown(value)}", name)
    return _checked(value["text"], name)


def _max_tokens(given: Mapping[str, Any], most: int, least: int) -> int | None:
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(names) == 2:
        raise Refusal("max_tokens and max_completion_tokens are one thing; send one", "max_completion_tokens")
    return Range(least, most, whole=True).check(names[0], given[names[0]]) if names else None


def _stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list):
        raise Refusal(f"stop must be a text or a list of texts, not {shown(value)}", "stop", "invalid_type")
    if len(found) > MOST_STOPS:
        raise Refusal(f"stop may hold {MOST_STOPS} texts, not {len(found)}", "stop")
    for text in found:
        if not 0 < len(_checked(text, "stop")) <= LONGEST_STOP:
            raise Refusal(f"a stop text has 1 to {LONGEST_STOP} characters, not {len(text)}", "stop")
    return tuple(found)


def _biases(value: Any, vocab: int) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        message = f"logit_bias must be an object of at most {MOST_BIASES} token ids and numbers, not {shown(value)}"
        raise Refusal(message, "logit_bias", "invalid_type")
    found = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab):
            message = f"logit_bias holds {shown(key)}; its keys are token ids, 0 to {vocab - 1}"
            raise Refusal(message, "logit_bias")
        found[int(key)] = Range(-100, 100).check("logit_bias", bias)
    return found


def _logprobs(given: Mapping[str, Any]) -> int | None:
    if "logprobs" not in given:
        return None
    return int(Range(0, MOST_LOGPROBS, whole=True).check("logprobs", given["logprobs"]))


def _chat_logprobs(given: Mapping[str, Any]) -> int | None:
    """Chats have a switch, and a number beside it."""
    wanted = _flag(given, "logprobs")
    if "top_logprobs" not in given:
        return 0 if wanted else None
    if not wanted:
        raise Refusal("top_logprobs needs logprobs true", "top_logprobs")
    return int(Range(0, MOST_LOGPROBS, whole=True).check("top_logprobs", given["top_logprobs"]))


def _usage(given: Mapping[str, Any], stream: bool) -> bool:
    if "stream_options" not in given:
        return False
    value = given["stream_options"]
    if not stream:
        raise Refusal("stream_options needs stream true", "stream_options")
    if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
        message = f"stream_options may be {{include_usage: true}}, not {shown(value)}"
        raise Refusal(message, "stream_options", "unsupported_parameter")
    if value.get("include_obfuscation"):
        raise Refusal(
            "include_obfuscation is not supported here; leave it out", "stream_options", "unsupported_parameter"
        )
    return _flag(value, "include_usage")


def fit(prompt_tokens: int, max_tokens: int | None, room: int | None, default: int) -> int:
    """How many tokens an answer may have.

    Args:
        max_tokens: as asked for; None: `default`, or as many as there is room for.
        room: tokens that the models can read behind the prompt; None: no bound is known.

    Raises:
        Refusal: prompt and answer do not fit into the context.
    """
    if room is None:
        return default if max_tokens is None else max_tokens
    if room < (max_tokens != 0):
        context = f"the models read {prompt_tokens + room}, answer included"
        message = f"the prompt has {prompt_tokens} tokens and {context}; shorten it"
        raise Refusal(message, "prompt", "context_length_exceeded")
    if max_tokens is None:
        return min(default, room)
    if max_tokens > room:
        context = f"the {prompt_tokens + room} that the models read"
        message = f"{prompt_tokens} tokens of the prompt and max_tokens {max_tokens} are more than {context}"
        raise Refusal(f"{message}; ask for at most {room}", "max_tokens", "context_length_exceeded")
    return max_tokens
