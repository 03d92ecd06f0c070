"""The endpoint with the real decoding loop: over a model that says given texts, and over tiny random models."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import psutil
import pytest
import torch

import black_boxes
import trios
from fedpeft.models.sessions import Speaker
from fedpeft.proxy.decode import decode
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.trio import Trio
from proxy.parrot import speaking
from proxy.served import TOKENIZER, Artefact, serving, until

TEXT = "naïve 日本語 🎉 fin"
PADDED = 260  # rows of the embedding matrices; 257 tokens are real


def trio() -> Trio:
    """Tiny random models over bytes: a Llama steered by a GPT-2."""
    small, large = trios.model("gpt2", 1, 2, PADDED), trios.model("llama", 2, 3, PADDED)
    tuned = Speaker(small, trios.adapter(small, 3))
    return Trio(black_boxes.box(Speaker(large)), tuned, Speaker(small), TOKENIZER, 257, frozenset({0}))


@pytest.fixture(scope="module")
def real() -> Trio:
    return trio()


@pytest.fixture(scope="module")
def url(real: Trio) -> Iterator[str]:
    with serving(artefact=Artefact(real)) as (url, _):
        yield url


def ask(url: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/completions", json={"prompt": "x"} | body, timeout=60)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def stream(url: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, the last event left out."""
    body = {"prompt": "x", "stream": True} | body
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


# --- a model that says a text ---------------------------------------------------------------------------------------


def test_no_chunk_holds_half_a_character():
    with serving(artefact=speaking(TEXT)) as (url, _):
        chunks = stream(url, max_tokens=100, temperature=0)
        assert ask(url, max_tokens=100, temperature=0)["choices"][0]["text"] == text_of(chunks) == TEXT
        assert all("\ufffd" not in chunk["choices"][0]["text"] for chunk in chunks)
        assert [c for chunk in chunks for c in chunk["choices"][0]["text"]] == list(TEXT), "a chunk per character"


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        ("three", "one two "),
        (["two", "three"], "one "),
        ("twot", None),
        ("e t", "on"),
        ("é", "one two three"),
    ],
)
def test_stop_texts_are_found_across_chunks_and_never_shown(stop, left):
    with serving(artefact=speaking("one two three")) as (url, _):
        chunks = stream(url, max_tokens=100, stop=stop, temperature=0)
        whole = ask(url, max_tokens=100, stop=stop, temperature=0)["choices"][0]
        assert text_of(chunks) == whole["text"] == (left or "one two three")
        assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "stop"


def test_an_answer_that_is_cut_says_so():
    with serving(artefact=speaking("one two three")) as (url, _):
        found = ask(url, max_tokens=5, temperature=0, logprobs=1)
        assert found["choices"][0]["text"] == "one t" and found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == 5 == len(found["choices"][0]["logprobs"]["tokens"])


# --- tiny models ----------------------------------------------------------------------------------------------------

PROMPTS = ["once", "a much longer prompt", "?"]


def alone(trio: Trio, prompt: str, **settings: Any) -> str:
    """What the decoding loop says without an endpoint."""
    ids = TOKENIZER(prompt)["input_ids"]
    (found,) = decode(trio, [ids], [Settings(alpha=0.75, beta=0.03, max_tokens=12, **settings)])
    return found.text


def test_answers_are_those_of_the_decoding_loop(url, real):
    greedy = ask(url, prompt=PROMPTS, max_tokens=12, temperature=0)
    assert [c["text"] for c in greedy["choices"]] == [alone(real, prompt) for prompt in PROMPTS]
    assert greedy["fedpeft"] == {"alpha": 0.75, "exact": True, "mass": 1.0, "least_mass": 1.0}
    drawn = ask(url, prompt=PROMPTS, n=2, max_tokens=12, seed=4, top_p=0.9)
    asked = [prompt for prompt in PROMPTS for _ in range(2)]
    said = [alone(real, prompt, temperature=1.0, seed=4 + i, top_p=0.9) for i, prompt in enumerate(asked)]
    assert [c["text"] for c in drawn["choices"]] == said and len(set(said)) == 6


def test_streams_say_the_same(url):
    body = {"prompt": PROMPTS, "max_tokens": 20, "seed": 1, "logprobs": 3}
    whole, chunks = ask(url, **body), stream(url, **body)
    for i, choice in enumerate(whole["choices"]):
        assert text_of(chunks, i) == choice["text"]
        parts = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["index"] == i]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [x for part in parts for x in part[name]] == choice["logprobs"][name]


def test_the_parts_by_themselves_are_alpha_zero_and_the_tuned_one(url, real):
    body = {"max_tokens": 10, "temperature": 0}
    assert ask(url, model="toy:large", **body)["choices"] == ask(url, alpha=0, **body)["choices"]
    small = decode(replace(real, large=None, base=None), [TOKENIZER("x")["input_ids"]], [Settings(max_tokens=10)])
    assert ask(url, model="toy:small", **body)["choices"][0]["text"] == small[0].text
    assert ask(url, **body)["choices"] != ask(url, alpha=0, **body)["choices"]


def test_a_text_is_scored(url, real):
    text, alpha = "naïve", 0.5
    found = ask(url, prompt=text, echo=True, logprobs=2, max_tokens=0, alpha=alpha)
    (choice,) = found["choices"]
    assert choice["text"] == text and choice["finish_reason"] == "length" and found["usage"]["completion_tokens"] == 0
    ids = TOKENIZER(text)["input_ids"]
    (large,), (tuned,), (base,) = (
        speaker.scores([ids]) for speaker in (real.large.speaker, real.tuned, real.base)
    )  # fmt: skip
    z = (large + alpha * (tuned - base))[:, :257].double()
    expected = torch.log(z.exp() / z.exp().sum(dim=-1, keepdim=True))
    told = choice["logprobs"]
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    ahead = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(told["token_logprobs"][1:]).double(), ahead, atol=1e-4, rtol=1e-4)
    for at, top in zip(expected, told["top_logprobs"][1:], strict=False):
        assert sorted(top.values(), reverse=True) == pytest.approx(at.topk(2).values.tolist(), abs=1e-4)
    assert told["tokens"][2:4] == ["bytes:\\xc3", "bytes:\\xaf"]


def test_an_echo_comes_before_what_is_said(url):
    said = ask(url, prompt="ab", max_tokens=3, temperature=0)["choices"][0]["text"]
    body = {"prompt": "ab", "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 1}
    (choice,) = ask(url, **body)["choices"]
    assert choice["text"] == f"ab{said}" and len(choice["logprobs"]["tokens"]) == 5
    assert choice["logprobs"]["tokens"][:2] == ["a", "b"] and choice["logprobs"]["text_offset"][:3] == [0, 1, 2]
    chunks = stream(url, **body)
    assert text_of(chunks) == f"ab{said}" and chunks[0]["choices"][0]["logprobs"]["token_logprobs"][0] is None
    ids = TOKENIZER(["ab"])["input_ids"]
    assert ask(url, prompt=ids, max_tokens=0, echo=True)["choices"][0]["text"] == "ab"


def test_scoring_needs_a_backend_that_can(real):
    few = black_boxes.box(real.large.speaker)
    few.caps = replace(few.caps, full=False, top_k=20)
    with serving(artefact=Artefact(replace(real, large=few))) as (url, _):
        body = {"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 0}
        response = httpx.post(f"{url}/v1/completions", json=body)
        assert response.status_code == 400 and response.json()["error"]["code"] == "cannot_do"
        notes = ask(url, max_tokens=5)["fedpeft"]
        assert 0 < notes["least_mass"] <= notes["mass"] < 1


def test_a_backend_that_dies_in_the_middle(real):
    box = black_boxes.box(real.large.speaker)
    with serving(artefact=Artefact(replace(real, large=box))) as (url, _):
        box.dies_after = 3
        chunks = stream(url, max_tokens=10, temperature=0)
        assert chunks[-1]["error"]["code"] == "backend_error" and "start it again" in chunks[-1]["error"]["message"]
        assert box.open_sessions == 0
        box.dies_after = None
        assert ask(url, max_tokens=12, temperature=0)["choices"][0]["text"] == alone(real, "x")


def test_drafts_of_the_small_model_change_no_token(real):
    with serving(artefact=Artefact(real), speculate=3) as (url, _):
        found = ask(url, prompt=PROMPTS, max_tokens=12, temperature=0)
        assert [c["text"] for c in found["choices"]] == [alone(real, prompt) for prompt in PROMPTS]


def test_fifty_requests_at_once_within_bounded_memory(real):
    box = black_boxes.box(real.large.speaker)
    prompts = [f"{i} is a prompt" for i in range(50)]
    steered = replace(real, large=box)
    expected = [alone(real, prompt) for prompt in prompts]
    with serving(artefact=Artefact(steered), max_batch=8, max_queue=50) as (url, engine):

        def one(i: int) -> str:
            body = {"prompt": prompts[i], "max_tokens": 12, "temperature": 0}
            return text_of(stream(url, **body)) if i % 2 else str(ask(url, **body)["choices"][0]["text"])

        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            assert list(pool.map(one, range(50))) == expected
            before = psutil.Process().memory_info().rss
            assert list(pool.map(one, range(50))) == expected
        assert psutil.Process().memory_info().rss - before < 30e6
        until(lambda: engine.running == 0 and box.open_sessions == 0)
    assert max(rows for rows, _ in box.calls) <= 8
