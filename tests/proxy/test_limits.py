"""What the endpoint refuses, bounds, counts and keeps to itself, with a scripted decoder, over loopback."""

from __future__ import annotations

import base64
import concurrent.futures
import logging
import re
import threading
import time

import httpx
import openai
import pytest

from fedpeft.core.errors import RequestError
from fedpeft.proxy.desk import Options
from fedpeft.proxy.guard import check_host
from proxy.callers import client, post
from proxy.served import Artefact, Script, fake_trio, serving, until

TEXT = "naïve 日本語 🎉 fin"


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "code", "status"),
    [
        (b"{", None, "invalid_json", 400),
        (b'{"prompt": "x", "alpha": NaN}', None, "invalid_json", 400),
        (b'{"prompt": "x", "alpha": 1e999}', "alpha", "invalid_value", 400),
        ({"prompt": "x", "nonsense": 1}, "nonsense", "unsupported_parameter", 400),
        ({"prompt": "x" * 65}, "prompt", "context_length_exceeded", 400),
        ({"prompt": "x" * 60, "max_tokens": 5}, "max_tokens", "context_length_exceeded", 400),
        ({"prompt": ""}, "prompt", "invalid_value", 400),
        ({"prompt": "x", "model": "gpt"}, "model", "model_not_found", 404),
    ],
)
def test_refusals_have_the_four_fields(url, script, body, param, code, status):
    response = post(url, body)
    error = response.json()["error"]
    assert response.status_code == status and error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert script.opened == []


def test_paths_and_methods_that_are_not_served(url):
    assert httpx.get(f"{url}/v1/embeddings").json()["error"]["code"] == "not_found"
    wrong = httpx.get(f"{url}/v1/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "wrong_method"
    for path in ("/docs", "/openapi.json"):
        assert httpx.get(url + path).status_code == 404, "its pages would load scripts from elsewhere"


def test_foreign_pages_cannot_ask(url):
    plain = httpx.post(f"{url}/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert plain.status_code == 415 and plain.json()["error"]["code"] == "unsupported_media_type"
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io:80", ""):
        assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == 200
    assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers={"origin": "http://x"}).headers


def test_a_key_opens_what_costs_and_nothing_else_does():
    with serving(Script(), Options(key="s3cret")) as (url, _):
        for key in ("wrong", "s3cre", "s3cret2"):
            with pytest.raises(openai.AuthenticationError, match="the key is missing or wrong") as told:
                client(url, key).completions.create(model="toy", prompt="x")
            assert told.value.code == "invalid_api_key"
        assert client(url, "s3cret").completions.create(model="toy", prompt="x").choices[0].text == "you said x"
        basic = base64.b64encode(b"x:s3cret").decode()
        for path, headers, status in (
            ("/v1/models", {}, 401), ("/metrics", {}, 401), ("/v1/models", {"authorization": f"Basic {basic}"}, 401),
            ("/v1/models", {"authorization": "Bearer sécret".encode()}, 401), ("/v1/nothing", {}, 401),
            ("/metrics", {"authorization": "bearer s3cret"}, 200), ("/health", {}, 200), ("/", {}, 200),
        ):  # fmt: skip
            assert httpx.get(url + path, headers=headers).status_code == status, (path, headers)
        assert httpx.get(f"{url}/health", headers={"host": "box.example"}).status_code == 200, "a key: any host"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_other_hosts_need_a_key(host):
    with pytest.raises(RequestError, match="--api-key-env"):
        check_host(host, None)
    check_host(host, "key")
    check_host("127.0.0.1", None)


def test_limits_of_size_and_time(caplog):
    script = Script(says=lambda prompt: "x" * 60)
    with serving(script, Options(max_tokens=10, timeout_s=0.4, max_body_bytes=500)) as (url, engine):
        assert post(url, {"prompt": "x", "max_tokens": 11}).json()["error"]["param"] == "max_tokens"
        large = post(url, {"prompt": "x" * 500})
        assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
        pieces = httpx.post(
            f"{url}/v1/completions",
            content=(b"x" * 100 for _ in range(9)),
            headers={"content-type": "application/json"},
        )
        assert pieces.status_code == 413, "a body without a length is counted as it comes"
        script.pause_s = 0.1
        slow = post(url, {"prompt": "x", "max_tokens": 10})
        assert slow.status_code == 504 and slow.json()["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match=r"the answer took longer than 0\.4 s; ask for fewer tokens"):
            list(client(url).completions.create(model="toy", prompt="x", max_tokens=10, stream=True))
        until(lambda: engine.running == 0)
        assert script.dropped == [0, 0]


def test_a_full_queue_says_when_to_come_back():
    script = Script()
    script.gate.clear()
    with serving(script, max_batch=1, max_queue=2) as (url, engine), concurrent.futures.ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(post, url, {"prompt": "0"})]
        until(lambda: engine.running == 1)
        asked += [pool.submit(post, url, {"prompt": str(i)}) for i in (1, 2)]
        until(lambda: engine.waiting == 2)
        refused = post(url, {"prompt": "x"})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "queue_full" and refused.json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "waiting": 2, "running": 1}
        script.gate.set()
        assert [future.result(10).json()["choices"][0]["text"] for future in asked] == [
            f"you said {i}" for i in range(3)
        ]


def test_fifty_requests_at_once_are_all_answered_within_the_batch(url):
    script = Script(says=lambda prompt: f"{TEXT} {prompt}")
    with serving(script, max_batch=8, max_queue=64) as (url, engine):

        def ask(i: int) -> str:
            if i % 2:
                return post(url, {"prompt": f"{i}", "max_tokens": 50}).json()["choices"][0]["text"]
            stream = client(url).completions.create(model="toy", prompt=f"{i}", max_tokens=50, stream=True)
            return "".join(chunk.choices[0].text for chunk in stream)

        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            assert list(pool.map(ask, range(50))) == [f"{TEXT} {i}" for i in range(50)]
        assert script.most <= 8 and script.now == 0 and engine.waiting == 0


# --- what is kept, told and counted ---------------------------------------------------------------------------------


def test_prompts_are_not_logged(url, script, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("httpx").setLevel(logging.WARNING)
        post(url, {"prompt": "xyzzy secret"})
        post(url, {"prompt": "xyzzy secret", "temperature": "xyzzy"})
        script.fail = lambda step: ValueError("xyzzy")
        assert post(url, {"prompt": "xyzzy secret"}).json()["error"]["message"].startswith("the server failed with Val")
    mine = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpcore", "openai"))]
    assert any("ValueError" in line for line in mine)
    assert not any("xyzzy" in line for line in mine) and "xyzzy" not in "".join(capfd.readouterr())


SAMPLE = re.compile(r'[a-zA-Z_:][\w:]*(\{\w+="(?:[^"\\\n]|\\.)*"(,\w+="(?:[^"\\\n]|\\.)*")*\})? (\S+)')


def test_metrics_are_text_that_prometheus_reads():
    with serving(Script()) as (url, _):
        client(url).completions.create(model="toy", prompt="hi")
        list(client(url).completions.create(model="toy", prompt="hi", stream=True))
        post(url, {"prompt": 3})
        httpx.get(url + '/no"such')
        response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines, types, values = response.text.splitlines(), {}, {}
    for line in lines:
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            types[name] = kind
        elif not line.startswith("# HELP "):
            assert SAMPLE.fullmatch(line), line
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
            assert (
                re.sub(r"_(bucket|sum|count)$", "", name.partition("{")[0]) in types or name.partition("{")[0] in types
            )
    assert values['fedpeft_tokens_total{kind="said"}'] == 22 and values['fedpeft_tokens_total{kind="prompt"}'] == 4
    assert values['fedpeft_requests_total{how="finished",route="completions"}'] == 2
    assert values['fedpeft_requests_total{how="refused",route="completions"}'] == 1
    assert values['fedpeft_http_responses_total{method="GET",path="other",status="404"}'] == 1
    assert values["fedpeft_first_token_seconds_count"] == 1 == values['fedpeft_first_token_seconds_bucket{le="+Inf"}']
    assert values["fedpeft_rows_running"] == 0 and types["fedpeft_request_seconds"] == "histogram"


def test_files_of_the_page_load_nothing_from_elsewhere(url):
    for path in ("/", "/page.css", "/page.js"):
        response = httpx.get(url + path)
        assert response.status_code == 200 and "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert not re.findall(r"https?://|innerHTML|insertAdjacent|document\.write|eval\(", response.text)


def test_a_server_that_stops_says_so():
    script = Script()
    script.gate.clear()
    with serving(script) as (url, engine), concurrent.futures.ThreadPoolExecutor(1) as pool:
        stream = pool.submit(lambda: post(url, {"prompt": "x", "stream": True}))
        until(lambda: engine.running == 1)
        engine.stop()
        assert post(url, {"prompt": "y"}).json()["error"]["code"] == "stopping"
        assert httpx.get(f"{url}/health").status_code == 503
        threading.Timer(0.2, script.gate.set).start()
        engine.close()
        time.sleep(0)
        assert '"code": "stopping"' in stream.result(10).text


def test_without_a_large_model_the_tuned_one_answers_alone():
    from dataclasses import replace

    trio = replace(fake_trio(), large=None, base=None)
    with serving(Script(), artefact=Artefact(trio)) as (url, _):
        (model,) = client(url).models.list()
        assert (model.id, model.kind, model.large) == ("toy", "small", None)
        assert client(url).completions.create(model="toy", prompt="x").choices[0].text == "you said x"
