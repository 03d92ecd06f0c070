"""The endpoint over loopback, with a scripted decoder: OpenAI's client, streams, refusals, limits, an orderly life."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx
import openai
import pytest

from fedpeft.proxy.blackbox import BackendError
from proxy.callers import client
from proxy.served import TOKENIZER, until

TEXT = "naïve 日本語 🎉 fin"


# --- answers ----------------------------------------------------------------------------------------------------


def test_models_are_the_steered_one_and_its_parts(url):
    listed = {model.id: model for model in client(url).models.list()}
    assert list(listed) == ["toy", "toy:large", "toy:small"]
    assert listed["toy"].alpha == 0.75 and listed["toy"].large == "large" and not hasattr(listed["toy:small"], "alpha")
    assert listed["toy"].max_context == 64 and listed["toy"].max_tokens == 64
    assert client(url).models.retrieve("toy:large").kind == "large"
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'; there are toy, toy:large, toy:small"):
        client(url).models.retrieve("x")


def test_a_completion(url, script):
    found = client(url).completions.create(
        model="toy", prompt="hi", max_tokens=40, temperature=0.5, seed=7, top_p=0.9, presence_penalty=1,
        frequency_penalty=-1, logit_bias={"5": 3}, stop=["zz"],
        extra_body={"alpha": 1.5, "top_k": 9, "min_p": 0.1, "repetition_penalty": 1.3, "beta": 0.2},
    )  # fmt: skip
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == ("you said hi", "stop", 0, None)
    assert found.object == "text_completion" and found.model == "toy" and found.id.startswith("cmpl-")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (2, 11, 13)
    assert found.fedpeft == {"alpha": 1.5, "exact": False, "mass": 0.875, "least_mass": 0.75}
    ((trio, prompts, (settings,)),) = script.opened
    assert trio.steered and prompts == [TOKENIZER("hi")["input_ids"]]
    given = {name: getattr(settings, name) for name in ("max_tokens", "temperature", "seed", "top_p", "alpha", "top_k")}
    assert given == {"max_tokens": 40, "temperature": 0.5, "seed": 7, "top_p": 0.9, "alpha": 1.5, "top_k": 9}
    assert (settings.presence_penalty, settings.frequency_penalty, settings.repetition_penalty) == (1, -1, 1.3)
    assert (settings.min_p, settings.beta, settings.logit_bias, settings.stop) == (0.1, 0.2, {5: 3.0}, ("zz",))


def test_what_is_not_asked_for_has_the_api_s_defaults(url, script):
    for _ in range(2):
        assert client(url).completions.create(model="toy", prompt="hi").choices[0].text == "you said hi"
    first, second = (settings for _, _, (settings,) in script.opened)
    assert (first.max_tokens, first.temperature, first.alpha, first.logprobs) == (16, 1.0, 0.75, 0)
    assert first.beta == 0.03, "what the artefact has"
    assert first.seed != second.seed, "unseeded answers must differ"


def test_several_prompts_and_several_answers(url, script):
    found = client(url).completions.create(model="toy", prompt=["a", "b"], n=2, max_tokens=20, seed=5)
    texts = [(choice.index, choice.text) for choice in found.choices]
    assert texts == [(0, "you said a"), (1, "you said a"), (2, "you said b"), (3, "you said b")]
    assert found.usage.prompt_tokens == 2 and found.usage.completion_tokens == 40
    assert [s.seed for _, _, settings in script.opened for s in settings] == [5, 6, 7, 8]


def test_token_ids_as_prompts(url):
    ids = TOKENIZER(["a", "bc"])["input_ids"]
    assert client(url).completions.create(model="toy", prompt=ids[0]).choices[0].text == "you said a"
    found = client(url).completions.create(model="toy", prompt=ids)
    assert [choice.text for choice in found.choices] == ["you said a", "you said bc"]


def test_a_chat(url, script):
    found = client(url).chat.completions.create(model="toy", messages=[{"role": "user", "content": "hi"}])
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "you said hi", "stop")
    assert found.object == "chat.completion" and found.id.startswith("chatcmpl-")
    assert script.opened[0][2][0].max_tokens == 62, "a chat takes what there is room for"


@pytest.mark.parametrize("name", ["toy:large", "toy:small"])
def test_the_parts_answer_by_themselves(url, script, name):
    assert client(url).completions.create(model=name, prompt="x").choices[0].text == "you said x"
    ((trio, _, (settings,)),) = script.opened
    assert (trio.large is None) == (name == "toy:small") and not trio.steered
    assert settings.alpha is None and settings.beta == 0
    with pytest.raises(openai.BadRequestError, match="has no alpha; leave it out, or ask toy"):
        client(url).completions.create(model=name, prompt="x", extra_body={"alpha": 1})


def test_log_probabilities_of_completions(url):
    found = client(url).completions.create(model="toy", prompt="é", logprobs=1, max_tokens=20)
    logprobs = found.choices[0].logprobs
    assert found.choices[0].text == "you said é"
    assert logprobs.tokens == [*"you said ", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs.token_logprobs == [-0.5] * 11 and logprobs.top_logprobs[0] == {"y": -0.5}
    assert logprobs.text_offset == [*range(9), 9, 19]
    assert client(url).completions.create(model="toy", prompt="a", logprobs=0).choices[0].logprobs.top_logprobs is None


def test_log_probabilities_of_chats(url):
    found = client(url).chat.completions.create(
        model="toy", messages=[{"role": "user", "content": "é"}], logprobs=True, top_logprobs=2
    )
    content = found.choices[0].logprobs.content
    assert bytes(byte for each in content for byte in each.bytes).decode() == "you said é"
    assert [each.logprob for each in content[0].top_logprobs] == [-0.5, -1.5] and content[0].top_logprobs[
        0
    ].token == "y"


# --- streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [None, 1])
def test_streamed_completions_say_the_same_as_whole_ones(url, script, logprobs):
    script.says = lambda prompt: f"{TEXT} {prompt}"
    ask: dict[str, Any] = {"model": "toy", "prompt": ["a", "b"], "max_tokens": 50, "logprobs": logprobs}
    whole = client(url).completions.create(**ask)
    texts, tokens, offsets, finishes = ["", ""], [[], []], [[], []], [None, None]
    for chunk in client(url).completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        assert "\ufffd" not in choice.text
        texts[choice.index] += choice.text
        finishes[choice.index] = choice.finish_reason or finishes[choice.index]
        if logprobs is not None:
            tokens[choice.index] += choice.logprobs.tokens
            offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices] == [f"{TEXT} a", f"{TEXT} b"]
    assert finishes == [choice.finish_reason for choice in whole.choices] == ["stop", "stop"]
    if logprobs is not None:
        assert tokens == [choice.logprobs.tokens for choice in whole.choices]
        assert offsets == [choice.logprobs.text_offset for choice in whole.choices]


def test_streamed_chats_say_the_same_as_whole_ones(url, script):
    script.says = lambda prompt: TEXT
    ask: dict[str, Any] = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    whole = client(url).chat.completions.create(**ask)
    chunks = list(client(url).chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].usage is None
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    told = [each.bytes for c in chunks[:-1] if c.choices[0].logprobs for each in c.choices[0].logprobs.content]
    assert told == [each.bytes for each in whole.choices[0].logprobs.content]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert chunks[-1].fedpeft == whole.fedpeft and len({c.id for c in chunks}) == 1


def test_the_wire_of_a_stream(url, script):
    with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "x", "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])


def test_tokens_are_sent_when_they_are_said_not_at_the_end(url, script):
    seen = threading.Event()
    script.fail = lambda step: None if step == 1 or seen.wait(10) else AssertionError("the first token was not sent")
    said = ""
    for chunk in client(url).completions.create(model="toy", prompt="x", stream=True):
        said += chunk.choices[0].text
        seen.set()
    assert said == "you said x"


def test_a_client_that_leaves_frees_its_rows(shared, url, script):
    engine = shared[1]
    script.says, script.pause_s = lambda prompt: "x" * 60, 0.01
    for stream in (True, False):
        script.dropped.clear()
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as raw:
            body = json.dumps({"prompt": ["a", "b"], "max_tokens": 60, "stream": stream}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: engine.running == 2)
        until(lambda: engine.running == 0)
        assert sorted(script.dropped) == [0, 1], "the rows were decoded to their end"


def test_a_backend_that_dies_in_a_stream_is_told_and_the_server_lives(url, script):
    script.fail = lambda step: BackendError("the large model at x does not answer; look there") if step == 4 else None
    said = ""
    with pytest.raises(openai.APIError, match="the large model at x does not answer; look there") as told:
        for chunk in client(url).completions.create(model="toy", prompt="x", stream=True):
            said += chunk.choices[0].text
    assert said == "you" and told.value.code == "backend_error"
    with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "x", "stream": True}) as response:
        events = response.read().decode().split("\n\n")
    error = json.loads(events[-3].removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and events[-2] == "data: [DONE]"
    with pytest.raises(openai.InternalServerError, match="does not answer") as told:
        client(url).completions.create(model="toy", prompt="x")
    assert told.value.status_code == 502
    script.fail = lambda step: None
    assert client(url).completions.create(model="toy", prompt="x").choices[0].text == "you said x"


def test_an_error_before_the_first_token_is_a_status_in_streams_too(url, script):
    script.fail = lambda step: BackendError("gone") if step == 1 else None
    with pytest.raises(openai.InternalServerError, match="gone"):
        client(url).completions.create(model="toy", prompt="x", stream=True)
