"""What a body asks for, and every refusal with its field, code and remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedpeft.proxy.asking import Asked, Limits, asked_of, fit, parse
from fedpeft.proxy.blackbox import BackendError, CannotDo
from fedpeft.proxy.refusal import Refusal, refusal_of

LIMITS = Limits(max_tokens=100, max_rows=6, vocab=50)
CHAT = [{"role": "user", "content": "hi"}]


def asked(route: str = "completions", **body: Any) -> Asked:
    base: dict[str, Any] = {"prompt": "hi"} if route == "completions" else {"messages": CHAT}
    return asked_of(parse(json.dumps(base | body).encode()), route, LIMITS)


def test_everything_that_can_be_asked_arrives():
    numbers = {
        "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "top_k": 7, "presence_penalty": -1, "frequency_penalty": 1.5,
        "repetition_penalty": 1.2, "alpha": -0.5, "beta": 0.1, "seed": -3,
    }  # fmt: skip
    found = asked(
        model="m", n=3, max_tokens=9, stop=["a", "b"], logit_bias={"7": -100, "49": 2}, logprobs=5, stream=True,
        stream_options={"include_usage": True}, echo=True, user="me", **numbers,
    )  # fmt: skip
    assert found == Asked(
        "m", ("hi",), 3, 9, numbers, ("a", "b"), {7: -100.0, 49: 2.0}, 5, True, True, True
    )  # fmt: skip
    assert asked() == asked(best_of=1, suffix=None, store=False, stop=None, n=None) == Asked(None, ("hi",))


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("x", ("x",)),
        (["x", "y"], ("x", "y")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_prompts_have_four_forms(prompt, found):
    assert asked(prompt=prompt).prompts == found


def test_a_chat_s_messages_and_its_own_fields():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = asked(
        "chat", messages=[{"role": "developer", "content": "d"}, {"role": "user", "content": parts, "name": None}],
        max_completion_tokens=5, logprobs=True, top_logprobs=2,
    )  # fmt: skip
    assert found.prompts == (({"role": "system", "content": "d"}, {"role": "user", "content": "ab"}),)
    assert (found.max_tokens, found.logprobs) == (5, 2)
    assert asked("chat", logprobs=True).logprobs == 0 and asked("chat", logprobs=False).logprobs is None


@pytest.mark.parametrize(
    ("body", "param", "code", "words"),
    [
        ({"temperature": 2.1}, "temperature", "invalid_value", "from 0 to 2, not 2.1"),
        ({"temperature": True}, "temperature", "invalid_type", "a number, not True"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty", "invalid_value", "from 0.01 to 10, not 1e-46"),
        ({"top_p": 0}, "top_p", "invalid_value", "above 0 to 1, not 0"),
        ({"top_k": 1.5}, "top_k", "invalid_type", "an integer, not 1.5"),
        ({"alpha": "big"}, "alpha", "invalid_type", "not 'big'"),
        ({"seed": 2**63}, "seed", "invalid_value", "not 9223372036854775808"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "from 1 to 100, not 0"),
        ({"max_tokens": 101}, "max_tokens", "invalid_value", "from 1 to 100, not 101"),
        ({"n": 7}, "n", "invalid_value", "from 1 to 6"),
        ({"n": 4, "prompt": ["a", "b"]}, "n", "invalid_value", "8 answers; at most 6"),
        ({"n": 2, "max_tokens": 0, "echo": True}, "n", "invalid_value", "leave n out"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value", "4 texts, not 5"),
        ({"stop": [""]}, "stop", "invalid_value", "1 to 256 characters, not 0"),
        ({"stop": 3}, "stop", "invalid_type", "not 3"),
        ({"logprobs": 21}, "logprobs", "invalid_value", "from 0 to 20, not 21"),
        ({"logit_bias": {"50": 1}}, "logit_bias", "invalid_value", "token ids, 0 to 49"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value", "'-1'"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "invalid_value", "-100 to 100"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type", "object"),
        ({"stream": "yes"}, "stream", "invalid_type", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "stream true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "unsupported_parameter", "include_usage"),
        ({"prompt": None}, "prompt", "missing_required_parameter", "missing"),
        ({"prompt": []}, "prompt", "invalid_type", "not []"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_type", "a text"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_type", "mixes token ids with 'a'"),
        ({"prompt": [[1], []]}, "prompt", "invalid_type", "at least one token id"),
        ({"prompt": [50]}, "prompt", "invalid_value", "0 to 49"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value", "half a character"),
        ({"model": 3}, "model", "invalid_type", "not 3"),
        ({"user": 3}, "user", "invalid_type", "not 3"),
        ({"temprature": 1}, "temprature", "unsupported_parameter", "is temperature meant?"),
        ({"xyzzy": 1}, "xyzzy", "unsupported_parameter", "there are alpha, beta"),
        ({"best_of": 3}, "best_of", "unsupported_parameter", "send 1"),
        ({"messages": CHAT}, "messages", "unsupported_parameter", "no field of this route"),
    ],
)  # fmt: skip
def test_a_completion_that_is_wrong(body, param, code, words):
    with pytest.raises(Refusal) as told:
        asked(**body)
    assert (told.value.param, told.value.code, told.value.status) == (param, code, 400)
    assert words in str(told.value)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": ["hi"]}, "messages[0]", "role, content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "system, user, assistant, not 'tool'"),
        ({"messages": [*CHAT, {"role": "user"}]}, "messages[1].content", "not None"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0]", "'tool_calls'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "text"),
        ({"tools": [{"type": "function"}]}, "tools", "leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format", '{"type": "text"}'),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs true"),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "one thing"),
        ({"echo": True}, "echo", "no field"),
    ],
)
def test_a_chat_that_is_wrong(body, param, words):
    with pytest.raises(Refusal) as told:
        asked("chat", **body)
    assert told.value.param == param and words in str(told.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "character 0"),
        (b'{"a": ', "no JSON"),
        (b"[1]", "not list"),
        (b'{"alpha": NaN}', "NaN"),
        (b'{"alpha": -Infinity}', "-Infinity"),
        (b"\xff", "UTF-8"),
        (b"[" * 100_000, "no JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "no JSON"),
    ],
)
def test_what_is_no_json(body, words):
    with pytest.raises(Refusal, match=words) as told:
        parse(body)
    assert told.value.code == "invalid_json"


def test_a_number_too_large_for_a_float_is_not_finite():
    with pytest.raises(Refusal, match="alpha must be a number from -100 to 100, not inf"):
        asked_of(parse(b'{"prompt": "x", "alpha": 1e999}'), "completions", LIMITS)


def test_long_values_are_shown_by_their_beginning():
    with pytest.raises(Refusal) as told:
        asked(stop={"secret": "x" * 10_000})
    assert len(str(told.value)) < 120


def test_prompt_and_answer_must_fit():
    assert fit(10, 5, 20, 16) == 5 and fit(10, None, 20, 16) == 16 and fit(10, None, 4, 16) == 4
    assert fit(10, None, None, 16) == 16 and fit(10, 99, None, 16) == 99 and fit(10, 0, 0, 16) == 0
    for given, words in (((10, 21, 20, 16), "at most 20"), ((10, None, 0, 16), "shorten"), ((10, 0, -1, 16), "has 10")):
        with pytest.raises(Refusal, match=words) as told:
            fit(*given)
        assert told.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("error", "status", "code", "words"),
    [
        (BackendError("large died"), 502, "backend_error", "large died"),
        (CannotDo("large", "a", "b", "c"), 400, "cannot_do", "large cannot do a: b; c"),
        (MemoryError(), 503, "out_of_memory", "--max-batch"),
        (ValueError("secret"), 500, "internal_error", "ValueError"),
    ],
)
def test_what_clients_are_told_of_errors(error, status, code, words):
    told = refusal_of(error)
    assert (told.status, told.code) == (status, code) and words in str(told) and "secret" not in str(told)
    assert told.body()["error"].keys() == {"message", "type", "param", "code"}
