"""`fedpeft serve RUN_DIR`: what it refuses, what it passes on, and processes that end in order."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import command_line
from fedpeft.app import serving
from proxy.served import Artefact

PROGRAM = Path(__file__).parents[1] / "serving_process.py"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("")
    return tmp_path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of `open_artefact`; nothing is listened to."""
    calls: list[tuple[Any, ...]] = []

    def open_artefact(folder: Path, large: str | None, **told: Any) -> Any:
        calls.append((folder, large, *told.values()))
        return Artefact()

    monkeypatch.setitem(sys.modules, "fedpeft.app.proxying", types.SimpleNamespace(open_artefact=open_artefact))
    return calls


def test_the_command_passes_on_what_it_was_told(run, opened, monkeypatch):
    heard: list[Any] = []

    def listen(app: Any, sock: Any, stop: Any, end: Any, grace_s: float, connections: int) -> int:
        heard.extend((app, sock.getsockname(), connections))
        engines.append(stop.__self__)
        return signal.SIGTERM

    engines: list[Any] = []
    monkeypatch.setattr("fedpeft.proxy.listening.listen", listen)
    monkeypatch.setenv("KEY", "s3cret")
    monkeypatch.setenv("TOKEN", "t0ken")
    words = (
        "--large http://there --alpha 0.5 --speculate 4 --max-batch 3 --max-queue 5 --max-tokens-limit 7 --timeout 9"
    )
    told = command_line.call(
        "serve", str(run), *words.split(), "--port", "0", "--api-key-env", "KEY", "--token-env", "TOKEN",
        "--expert-prompt", "Be brief."
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert opened == [(run, "http://there", 0.5, "t0ken", "Be brief.")]
    app, (host, port), connections = heard
    assert told.output == f"serving toy at http://127.0.0.1:{port}; stop with Ctrl+C\n" and host == "127.0.0.1"
    assert app.key == b"s3cret" and connections == 2 * 3 + 5 + serving.SPARE
    (engine,) = engines
    assert (engine.max_batch, engine.max_queue, engine._speculate) == (3, 5, 4) and not engine.alive
    assert engine._patience_s == 9 / 2, "a server that hangs is told before the request's time is over"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "say what to serve: fedpeft serve RUN_DIR"),
        ("RUN --host 0.0.0.0", "--host 0.0.0.0 can be reached from other machines, and there is no key"),
        ("RUN --api-key-env NOBODY_SET_THIS", "names the variable NOBODY_SET_THIS, which is not set or empty"),
        ("RUN --token-env NOBODY_SET_THIS", "--token-env names the variable NOBODY_SET_THIS"),
        ("RUN --speculate -1", "--speculate -1 drafts nothing"),
        ("RUN --max-batch 0", "max_batch 0 serves nobody"),
        ("RUN --max-queue 0", "max_queue 0 serves nobody"),
        ("RUN --max-tokens-limit 0", "--max-tokens-limit 0 answers nobody"),
        ("RUN --timeout 0", "--timeout 0.0 answers nobody"),
        ("RUN --timeout nan", "--timeout nan answers nobody"),
    ],
)
def test_what_cannot_be_served(run, opened, words, told):
    arguments = [str(run) if word == "RUN" else word for word in words.split()]
    done = command_line.call("serve", *arguments, *(["--port", "0"] if arguments else []))
    assert done.exit_code == 2 and told in done.output, done.output


def test_an_exported_adapter_is_served(tmp_path, opened, monkeypatch):
    monkeypatch.setattr("fedpeft.proxy.listening.listen", lambda *told: signal.SIGTERM)
    assert command_line.call("serve", str(tmp_path), "--port", "0").exit_code == 0
    assert [folder for folder, *_ in opened] == [tmp_path]


def test_a_folder_that_is_none_is_refused(tmp_path):
    done = command_line.call("serve", str(tmp_path / "nowhere"), "--port", "0")
    assert done.exit_code == 2 and "nowhere is no folder; give that of a run, or of an exported adapter" in done.output


def test_a_port_that_is_taken(run, opened):
    from fedpeft.proxy.listening import bind

    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        done = command_line.call("serve", str(run), "--port", str(sock.getsockname()[1]))
    assert done.exit_code == 2 and "choose another --port" in done.output and opened == []


# --- processes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(run: Path, text: str, pause_s: float, grace_s: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own, and its URL."""
    command = [sys.executable, str(PROGRAM), text, str(pause_s), str(grace_s), "serve", str(run), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as made:
        try:
            assert made.stdout is not None and made.stderr is not None
            line = made.stdout.readline()
            found = re.fullmatch(r"serving toy at (http://127\.0\.0\.1:\d+); stop with Ctrl\+C\n", line)
            assert found, (line, made.stderr.read() if made.poll() is not None else "")
            yield made, found[1]
        finally:
            made.kill()


def stream(url: str, begun: threading.Event) -> list[str]:
    """The events of one completion."""
    body = {"prompt": "x", "max_tokens": 300, "temperature": 0, "stream": True}
    content = ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        for part in response.iter_text():
            content += part
            begun.set()
    return content.split("\n\n")


def interrupted(run: Path, number: int, text: str, grace_s: float, pause_s: float = 0.05) -> tuple[int, list[str], str]:
    """A signal in the middle of a stream: exit code, the stream's events, and what was printed as errors."""
    found: list[str] = []
    begun = threading.Event()
    with process(run, text, pause_s, grace_s) as (made, url):
        asking = threading.Thread(target=lambda: found.extend(stream(url, begun)))
        asking.start()
        assert begun.wait(20)
        made.send_signal(number)
        asking.join(20)
        assert not asking.is_alive()
        _, errors = made.communicate(timeout=20)
    return made.returncode, found, errors


def text_of(events: list[str]) -> str:
    bodies = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    return "".join(choice["text"] for body in bodies for choice in body.get("choices", ()))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_the_stream_come_to_its_end(run, number, code):
    ended, events, errors = interrupted(run, number, "a text of some length", grace_s=15)
    assert ended == code, errors
    assert text_of(events) == "a text of some length" and events[-2:] == ["data: [DONE]", ""]
    assert errors == ("" if code == 0 else "interrupted.\n")


def test_after_the_grace_the_stream_is_ended_with_an_error(run):
    ended, events, errors = interrupted(run, signal.SIGTERM, "x" * 250, grace_s=0.3)
    assert ended == 0, errors
    assert 0 < len(text_of(events)) < 250 and events[-2:] == ["data: [DONE]", ""]
    error = json.loads(events[-3].removeprefix("data: "))["error"]
    assert error["code"] == "stopping" and "ask again" in error["message"]


def test_who_connects_as_soon_as_the_address_is_told_is_not_refused():
    import socket

    from fedpeft.proxy.listening import bind, reached

    with bind("127.0.0.1", 0) as sock:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(sock.getsockname(), timeout=5)
        port = int(reached(sock).rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ("--logits", "demo-large", "--alpha", "2"),
            "--alpha has no effect here: fedpeft serve --logits serves scores",
        ),
        (("RUN", "--idle", "5"), "--idle has no effect here: it belongs to fedpeft serve --logits MODEL"),
        (("RUN", "--logits", "demo-large"), "are two things to serve; start one server for each"),
    ],
)
def test_options_of_the_other_kind_of_server_are_refused(run: Path, given: tuple[str, ...], said: str) -> None:
    done = command_line.call("serve", *(str(run) if word == "RUN" else word for word in given))
    assert done.exit_code == 2 and said in " ".join(done.stderr.split())
