"""Which backend a specification means, and the logit server as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import tiny_lm
from fedpeft.core.errors import ModelError, RequestError
from fedpeft.proxy.backends import open_backend
from fedpeft.proxy.blackbox import BackendError, Full
from fedpeft.proxy.inprocess import InProcess
from proxy.lent import PADDED, TOKENIZER


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fedpeft serve` and the first line that it says."""
    line = [sys.executable, "-m", "fedpeft", "serve", *arguments]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env={**os.environ, **environment}, **pipes) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ftp://host", "no known kind"),
        ("openai+http://host", "no known kind"),
        ("http://", "give http://HOST:PORT"),
        ("http://host:99999", "give http://HOST:PORT"),
        ("http://me:secret@host", "does not belong into an address"),
        ("http://host?wire=int8", "wire 'int8'"),
        ("http://host?speed=1", "'speed' .* is no option; there is wire"),
        ("llamacpp+http://host?wire=float16", "is no option; there is none"),
        ("http://host#part", "leave out"),
    ],
)
def test_specifications_that_mean_nothing(spec, words):
    with pytest.raises(RequestError, match=words):
        open_backend(spec)


@pytest.mark.parametrize("token", ["", " ", "schlüssel", "two\nlines"])
def test_a_key_that_cannot_travel(token):
    with pytest.raises(RequestError, match="printable ASCII"):
        open_backend("http://127.0.0.1:9", token=token)


@pytest.mark.parametrize("spec", ["http://127.0.0.1:9", "vllm+http://127.0.0.1:9", "llamacpp+http://127.0.0.1:9"])
def test_a_server_that_is_not_there(spec):
    with pytest.raises(BackendError, match=r"127\.0\.0\.1:9 did not answer .*see whether the server runs"):
        open_backend(spec)


def test_models_of_this_process(tmp_path):
    folder = str(tiny_lm.save("gpt2", TOKENIZER, tmp_path / "m", PADDED))
    assert isinstance(open_backend(folder), InProcess)
    with pytest.raises(RequestError, match="takes no key"):
        open_backend(folder, token="x")
    with pytest.raises(ModelError, match="does not exist"):
        open_backend(str(tmp_path / "none"))


def test_the_command_serves_exact_scores_until_it_is_told_to_stop(tmp_path):
    folder = str(tiny_lm.save("llama", TOKENIZER, tmp_path / "m", PADDED))
    line = ("--logits", folder, "--port", "0", "--api-key-env", "LENT_KEY", "--max-sessions", "1", "--max-batch", "3")
    with command(*line, LENT_KEY="s3cret") as (process, told):
        url = told.split(" at ")[1].split(";")[0]
        here, there = open_backend(folder), open_backend(url, token="s3cret")
        assert there.caps.identity == here.caps.identity and there.caps.max_batch == 3
        session = there.open([[5, 6], [7]], Full())
        assert session.first.values.equal(here.open([[5, 6], [7]], Full()).first.values)
        with pytest.raises(BackendError, match="none was sent"):
            open_backend(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None and process.stderr.read() == ""
        with pytest.raises(BackendError, match="did not answer"):
            session.scores([[1], [2]])
