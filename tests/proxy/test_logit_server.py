"""The logit server and its client over loopback: the same bits as in process, limits, and what goes wrong."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch

import trios
from fedpeft.core import records
from fedpeft.core.errors import RequestError
from fedpeft.proxy import protocol
from fedpeft.proxy.backends import open_backend
from fedpeft.proxy.blackbox import BackendError, BlackBoxLM, Full, Labels, Scores, TopK, Want
from fedpeft.proxy.connection import Connection, Refused
from fedpeft.proxy.decode import decode
from fedpeft.proxy.logit_sessions import Limits, LogitSessions, limits_of
from fedpeft.proxy.protocol import RECORD, Begin, Begun, Step
from fedpeft.proxy.refusal import Refusal
from fedpeft.proxy.remote import Remote
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.trio import Trio
from proxy.lent import VOCAB, large, lending, prompts
from proxy.served import until

WANTS = [Full(), TopK(7), Labels((4, 90, 2))]


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def lent(clock: Clock) -> Iterator[Any]:
    with lending(clock=clock) as found:
        yield found


@pytest.fixture
def remote(lent: Any) -> Iterator[Remote]:
    found = open_backend(lent[0])
    assert isinstance(found, Remote)
    yield found
    found.connection.close()


@pytest.fixture
def sessions(lent: Any) -> Any:
    lent[1].close()
    return lent[1]


def same(a: Scores, b: Scores) -> bool:
    ids = a.ids is b.ids is None or (a.ids is not None and b.ids is not None and torch.equal(a.ids, b.ids))
    return torch.equal(a.values, b.values) and torch.equal(a.mass, b.mass) and ids and a.exact == b.exact


def said(model: BlackBoxLM, between: Any = None) -> list[tuple[int, ...]]:
    """Greedy tokens of the steered model; rows end at different times."""
    small = trios.model("gpt2", 1)
    tuned = trios.Speaker(small, trios.adapter(small, 3))
    trio = Trio(model, tuned, trios.Speaker(small), None, trios.VOCABULARY, frozenset({2}))
    texts = [[token % trios.VOCABULARY for token in own] for own in prompts(4)]
    settings = [Settings(max_tokens=n, alpha=0.7) for n in (12, 5, 9)]
    if between is None:
        return [tuple(own.tokens) for own in decode(trio, texts, settings)]
    from fedpeft.proxy.decode import Decoding

    with Decoding(trio, texts, settings) as decoding:
        while decoding.step():
            between()
        return [tuple(own.tokens) for own in decoding.completions()]


# --- the same as in process ---------------------------------------------------------------------------------------


def test_caps_travel(remote):
    assert remote.caps == large().caps


@pytest.mark.parametrize("want", WANTS, ids=lambda want: type(want).__name__)
def test_scores_have_the_same_bits(remote, sessions, want):
    ours, theirs = large().open(prompts(), want), remote.open(prompts(), want)
    assert same(ours.first, theirs.first) and theirs.first.exact
    for own in (ours, theirs):
        own.keep([2, 0])
    new = [[5, 6, 7], [8, 9, 10]]
    assert same(ours.scores(new), theirs.scores(new))
    for own in (ours, theirs):
        own.rollback(1)
        own.keep([1])
        own.rollback(1)
    assert same(ours.scores([[3]]), theirs.scores([[3]]))
    assert len(sessions.held) == 1
    theirs.close()
    theirs.close()
    assert not sessions.held
    with pytest.raises(RequestError, match="closed"):
        theirs.scores([[3]])


def test_decoding_says_the_same_tokens(remote, sessions):
    assert said(remote) == said(large())
    assert not sessions.held


def test_speculation_says_the_same_tokens(remote):
    small = trios.model("gpt2", 1)
    tuned, base = trios.Speaker(small, trios.adapter(small, 3)), trios.Speaker(small)
    texts = [[token % trios.VOCABULARY for token in own] for own in prompts(4)]
    settings, found = [Settings(max_tokens=10, alpha=0.7)] * 3, []
    for model, drafts in ((large(), 0), (remote, 3)):
        trio = Trio(model, tuned, base, None, trios.VOCABULARY, frozenset({2}))
        found.append([own.tokens for own in decode(trio, texts, settings, drafts)])
    assert found[0] == found[1]


def test_a_closed_session_is_begun_again_and_says_the_same_tokens(remote, sessions, clock):
    """After 300 idle seconds the server closes it and answers 410; the client sends its whole text again."""
    begun = 0

    def wait() -> None:
        nonlocal begun
        clock.now += sessions.limits.idle_s + 1
        sessions.sweep()
        assert not sessions.held
        begun += 1

    assert said(remote, wait) == said(large())
    assert begun == 12 and sessions.limits.idle_s == 300


def test_a_session_in_use_stays(remote, sessions, clock):
    session = remote.open([[5]], Full())
    for _ in range(3):
        clock.now += 299
        session.scores([[6]])
    assert len(sessions.held) == 1
    session.close()


def test_a_lost_session_goes_back_behind_where_it_was_begun_again(remote, sessions):
    """Tokens that were added before the loss are part of the new beginning; taking them back begins once more."""
    session, ours = remote.open([[5, 6]], Full()), large().open([[5, 6]], Full())
    for own in (session, ours):
        own.scores([[7, 8, 9]])
    sessions.close()
    for own in (session, ours):
        own.scores([[10]])
        own.rollback(3)
    torch.testing.assert_close(session.scores([[11]]).values, ours.scores([[11]]).values, atol=1e-4, rtol=0)
    with pytest.raises(RequestError, match="cannot be taken back"):
        session.rollback(3)
    session.close()


def test_a_step_that_was_done_already_is_noticed(remote, sessions):
    """A request that is sent twice, because the connection broke before the answer, would append twice."""
    session, ours = remote.open([[5, 6]], Full()), large().open([[5, 6]], Full())
    ours.scores([[7]])
    (name,) = sessions.held
    sessions.step(name, Step(0, None, 0, torch.tensor([[7]])))
    with pytest.raises(Refused) as caught:
        remote.connection.send(
            "POST", f"/v1/sessions/{name}", records.encode(Step(0, None, 0, torch.tensor([[7]]))), RECORD
        )
    assert caught.value.status == 409
    torch.testing.assert_close(
        session.scores([[7]]).values[:, -1], large().open([[5, 6, 7]], Full()).first.values[:, 0]
    )
    session.close()


def test_many_positions_come_in_several_answers():
    limits = Limits(max_answer_bytes=4 * (4 * VOCAB + 4) + 3)  # two rows of two positions
    with lending(limits=limits) as (url, sessions):
        session, ours = Remote(Connection(url)).open(prompts(0, 2), Full()), large().open(prompts(0, 2), Full())
        new = [[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]]
        found, right = session.scores(new), ours.scores(new)
        torch.testing.assert_close(found.values, right.values, atol=1e-4, rtol=0)
        assert found.values.shape == (2, 5, VOCAB) and next(iter(sessions.held.values())).done == 3
        session.close()


# --- half precision -----------------------------------------------------------------------------------------------


def test_float16_is_within_four_thousandths_above_minus_sixteen(lent):
    exact = large().open(prompts(), Full()).first
    session = open_backend(f"{lent[0]}?wire=float16").open(prompts(), Full())
    found = session.first
    assert not found.exact and found.values.dtype == torch.float32
    error = (found.values - exact.values).abs()
    assert 0 < float(error[exact.values > -16].max()) <= 0.004
    session.close()


def test_float16_keeps_what_is_too_low_finite_and_what_is_infinite_infinite():
    values = torch.tensor([[[-1e6, float("-inf"), -1.5]]])
    there = protocol.narrowed(Scores(values, None, torch.ones(1, 1), True), "float16")
    assert there.values.dtype == torch.float16
    assert protocol.widened(there).values.tolist() == [[[protocol.LOWEST, float("-inf"), -1.5]]]


def test_a_server_of_float16_alone_says_so():
    with lending(limits=limits_of("float16", 1, 99, 999, 9999, 9, 9)) as (url, _):
        with pytest.raises(RequestError, match="sends float16, not float32"):
            open_backend(url)
        assert open_backend(f"{url}?wire=float16").caps.vocab == VOCAB
    with pytest.raises(RequestError, match="--wire is 'int8'"):
        limits_of("int8", 1, 1, 1, 1, 1, 1)
    with pytest.raises(RequestError, match="idle_s is 0"):
        limits_of("float32", 1, 1, 1, 1, 0, 1)


# --- who may ask, and how much ------------------------------------------------------------------------------------


def begin(texts: list[list[int]], want: Want = WANTS[1], wire: str = "float32") -> bytes:
    return records.encode(protocol.begin(texts, want, wire))


def post(url: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/sessions", content=body, headers={"content-type": RECORD, **headers}, trust_env=False)


def test_a_key_opens_the_server_and_nothing_else_does():
    with lending(key="s3cret") as (url, sessions):
        for token, words in ((None, "none was sent"), ("wrong", "that was sent is wrong")):
            with pytest.raises(Refused, match=words) as caught:
                open_backend(url, token=token)
            assert caught.value.status == 401
        session = open_backend(url, token="s3cret").open([[5]], TopK(5))
        (name,) = sessions.held
        for path, method in (
            (f"/v1/sessions/{name}", "DELETE"),
            ("/v1/model", "GET"),
            (f"/v1/sessions/{name}", "POST"),
        ):
            answer = httpx.request(method, url + path, headers={"content-type": RECORD}, trust_env=False)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert sessions.held and httpx.get(f"{url}/health", trust_env=False).json()["sessions"] == 1
        session.close()


def test_without_a_key_other_names_of_this_machine_are_refused(lent):
    assert post(lent[0], begin([[5]]), host="example.org").json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not a|bytes"),
        (b"\xff" * 64, 400, "."),
        (records.encode(Step(0, None, 0, torch.zeros(1, 1, dtype=torch.int64))), 400, "'Begin' was expected"),
        (begin([[5]])[:-8], 400, "header describes"),
        (records.encode(Begin(torch.tensor([5]), torch.tensor([2]), TopK(5), "float32")), 400, "add up to 1"),
        (records.encode(Begin(torch.tensor([5, 5]), torch.tensor([3, -1]), TopK(5), "float32")), 400, "add up to 2"),
        (records.encode(Begin(torch.tensor([5.0]), torch.tensor([1]), TopK(5), "float32")), 400, "send int64"),
        (begin([[5]], wire="int8"), 400, "float32 or float16"),
        (begin([[VOCAB]]), 400, f"token {VOCAB}"),
        (begin([[5] * 65]), 400, "65 tokens"),
        (begin([[5]] * 65), 400, "65 prompts"),
        (begin([[5]], TopK(4)), 400, "4 candidates"),
    ],
)
def test_what_is_malformed_is_told_and_the_server_lives(lent, sessions, body, status, words):
    answer = post(lent[0], body)
    error = answer.json()["error"]
    assert answer.status_code == status and re.search(words, error["message"]), error
    assert not sessions.held and post(lent[0], begin([[5]])).status_code == 200
    sessions.close()


@pytest.mark.parametrize(
    ("step", "status", "words"),
    [
        (Step(0, torch.tensor([2]), 0, torch.tensor([[5]])), 400, "cannot be kept"),
        (Step(0, torch.tensor([], dtype=torch.int64), 0, torch.zeros(0, 1, dtype=torch.int64)), 400, "0 rows"),
        (Step(0, None, 1, torch.tensor([[5], [5]])), 400, "cannot be taken back"),
        (Step(0, None, 0, torch.tensor([[5]])), 400, "2 rows got"),
        (Step(0, None, 0, torch.tensor([5])), 400, "int64 of 2"),
        (Step(1, None, 0, torch.tensor([[5], [5]])), 409, "has made 0 steps"),
    ],
)
def test_a_wrong_step_changes_nothing(lent, sessions, step, status, words):
    name = sessions.begin(protocol.begin([[5], [6, 7]], TopK(5), "float32")).session
    path = f"{lent[0]}/v1/sessions/{name}"
    send = {"headers": {"content-type": RECORD}, "trust_env": False}
    answer = httpx.post(path, content=records.encode(step), **send)
    assert answer.status_code == status and words in answer.json()["error"]["message"]
    right = Step(0, None, 0, torch.tensor([[5], [5]]))
    assert httpx.post(path, content=records.encode(right), **send).status_code == 200
    sessions.close()


def test_a_session_that_is_not_there_is_gone(lent):
    body = records.encode(Step(0, None, 0, torch.tensor([[5]])))
    answer = httpx.post(f"{lent[0]}/v1/sessions/none", content=body, headers={"content-type": RECORD}, trust_env=False)
    assert answer.status_code == 410 and answer.json()["error"]["code"] == "gone"


def test_limits():
    limits = Limits(max_sessions=2, max_tokens=20, max_body_bytes=1200, max_answer_bytes=12 * 40)
    with lending(limits=limits) as (url, sessions):
        assert post(url, bytes(1201)).json()["error"]["code"] == "body_too_large"
        chunked = httpx.post(
            f"{url}/v1/sessions",
            content=iter([bytes(1000), bytes(1000)]),
            headers={"content-type": RECORD},
            trust_env=False,
        )
        assert chunked.status_code == 413
        assert post(url, begin([[5]] * 9)).json()["error"]["code"] == "answer_too_large"
        assert post(url, begin([[5] * 7, [5], [5]])).json()["error"]["code"] == "too_many_tokens"
        assert post(url, begin([[5]]), **{"content-type": "text/plain"}).status_code == 415
        model = Remote(Connection(url))
        first, second = model.open([[5] * 9], TopK(5)), model.open([[5] * 9], TopK(5))
        with pytest.raises(Refused, match="2 sessions are open") as caught:
            model.open([[5]], TopK(5))
        assert caught.value.status == 503
        with pytest.raises(Refused, match="may keep 20"):
            first.scores([[5, 5, 5]])
        assert first.scores([[5]]).values.shape == (1, 1, 5) and sessions.tokens == 19
        second.close()
        assert first.scores([[5, 5, 5]]).values.shape == (1, 3, 5)


def test_a_body_that_does_not_come_is_given_up():
    with lending(limits=Limits(body_s=0.2)) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            head = f"POST /v1/sessions HTTP/1.1\r\nHost: {host}\r\nContent-Type: {RECORD}\r\nContent-Length: 99\r\n\r\n"
            slow.sendall(head.encode() + b"x")
            assert b" 408 " in slow.recv(200)


class Slow:
    """A model that waits at a gate, or fails."""

    def __init__(self) -> None:
        self.caps, self.gate, self.error = large().caps, threading.Event(), None

    def open(self, texts: Any, want: Any) -> Any:
        if self.error is not None:
            raise self.error
        assert self.gate.wait(20)
        return large().open(texts, want)


def test_requests_wait_their_turn_for_so_long_and_so_many():
    slow = Slow()
    with lending(slow, Limits(timeout_s=0.5, max_waiting=2)) as (url, _):
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(post(url, begin([[5]])))) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: httpx.get(f"{url}/health", trust_env=False).json()["waiting"] == 2)
        busy = post(url, begin([[5]]))
        assert busy.status_code == 503 and busy.json()["error"]["code"] == "busy" and busy.headers["retry-after"] == "1"
        for thread in threads:
            thread.join()
        assert [answer.json()["error"]["code"] for answer in answers] == ["timeout"] * 2
        slow.gate.set()
        assert post(url, begin([[5]])).status_code == 200


def test_a_session_that_begins_after_its_request_was_given_up_is_closed():
    """Its name was never told, so nobody could close it, and it would keep the place of another for `idle_s`."""
    slow = Slow()
    with lending(slow, Limits(timeout_s=0.2, max_sessions=1)) as (url, sessions):
        assert post(url, begin([[5]])).json()["error"]["code"] == "timeout"
        slow.gate.set()
        send = {"headers": {"content-type": RECORD}, "trust_env": False}
        assert httpx.delete(f"{url}/v1/sessions/none", **send).status_code == 204, "the model's thread has come to this"
        assert not sessions.held
        assert post(url, begin([[5]])).status_code == 200 and len(sessions.held) == 1


def test_a_model_that_fails_is_told_and_no_text_is_logged(caplog):
    slow = Slow()
    slow.gate.set()
    with lending(slow) as (url, _), caplog.at_level(logging.DEBUG):
        slow.error = ValueError("token 77 of the prompt 77 77")
        failed = post(url, begin([[77]]))
        assert failed.status_code == 500 and "ValueError" in failed.json()["error"]["message"]
        slow.error = MemoryError()
        assert post(url, begin([[77]])).status_code == 503
        slow.error = None
        assert post(url, begin([[77]])).status_code == 200
        assert "77" not in failed.text and "ValueError" in caplog.text
        assert not [own for own in caplog.records if own.name == "fedpeft" and "77" in own.getMessage()]


def test_paths_that_are_not_served(lent):
    assert httpx.get(f"{lent[0]}/v1/completions", trust_env=False).status_code == 404
    assert httpx.get(f"{lent[0]}/v1/sessions", trust_env=False).status_code == 405


# --- a server that misbehaves -------------------------------------------------------------------------------------


def test_a_server_that_dies_in_the_middle_is_named():
    with lending() as (url, _):
        model = Remote(Connection(url))
        session = model.open([[5]], Full())
    with pytest.raises(BackendError, match=r"did not answer .* see whether the server runs"):
        session.scores([[6]])
    session.close()


def test_a_server_that_was_started_again_with_another_model_is_noticed():
    """A lost session must not go on, and no other begin, with scores of a model that the client knows nothing of."""
    with lending() as (url, sessions):
        model = Remote(Connection(url))
        session = model.open([[5]], Full())
        sessions.close()
        sessions.model = large(seed=3)
        for ask in (lambda: session.scores([[6]]), lambda: model.open([[5]], Full())):
            with pytest.raises(BackendError, match="start it with that model again, or start anew here") as caught:
                ask()
            assert large(seed=3).caps.identity in str(caught.value) and large().caps.identity in str(caught.value)
        assert not sessions.held
        session.close()


class Lying:
    """A connection whose answers are changed."""

    url = "http://liar"

    def __init__(self, change: Any) -> None:
        self.change = change

    def send(self, method: str, path: str, *rest: Any) -> bytes:
        if method == "GET":
            hello = protocol.Hello(protocol.PROTOCOL, large().caps, protocol.WIRES, 1 << 20)
            return records.encode(self.change(hello) if self.change(hello) is not None else hello)
        first = large().open([[5]], Full()).first
        return records.encode(Begun("x", large().caps.identity, self.change(first) or first))


def of(kind: type, change: Any) -> Any:
    return Lying(lambda record: change(record) if isinstance(record, kind) else None)


@pytest.mark.parametrize(
    ("connection", "words"),
    [
        (of(protocol.Hello, lambda hello: replace(hello, protocol=9)), "speaks version 9"),
        (of(protocol.Hello, lambda hello: Step(0, None, 0, torch.zeros(1, 1))), "no logit server of fedpeft"),
        (of(Scores, lambda own: replace(own, values=own.values[..., 1:])), "another form"),
        (of(Scores, lambda own: replace(own, values=own.values * float("nan"))), "another form"),
        (of(Scores, lambda own: replace(own, values=own.values.long())), "another form"),
        (of(Scores, lambda own: replace(own, ids=torch.zeros(1, 1, VOCAB).long())), "another form"),
        (of(Scores, lambda own: replace(own, mass=own.mass[0])), "another form"),
    ],
)
def test_an_answer_of_another_form_is_not_believed(connection, words):
    with pytest.raises(BackendError, match=words):
        Remote(connection).open([[5]], Full())


def test_rows_that_leave_do_not_make_a_cache_narrower() -> None:
    """Two short rows beside one of 30 tokens: what is counted is what the cache holds, padding included."""
    sessions = LogitSessions(large(), Limits(max_tokens=130))
    long = [1] * 30
    begun = sessions.begin(protocol.begin([long, [2, 3], [4]], TopK(5), "float32"))
    assert sessions.tokens == 3 * 30
    keep = torch.tensor([1, 2])
    sessions.step(begun.session, Step(0, keep, 0, torch.tensor([[5], [6]])))
    assert sessions.tokens == 2 * 31
    sessions.step(begun.session, Step(1, None, 1, torch.tensor([[5, 5], [6, 6]])))
    assert sessions.tokens == 2 * 32
    with pytest.raises(Refusal, match="may keep 130"):
        sessions.begin(protocol.begin([long, [2], [4]], TopK(5), "float32"))
    sessions.end(begun.session)
    assert sessions.tokens == 0
