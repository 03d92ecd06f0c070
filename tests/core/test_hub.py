"""A hub that does not answer: the switch of its libraries, and how long it takes to know."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from fedpeft.core.hub import hub_answers, loading_from_hub

NOBODY = "http://127.0.0.1:9"  # the port of a service that no machine runs


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub: its address leads nowhere."""
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that answers every question with 501."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Silent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


class Silent(http.server.BaseHTTPRequestHandler):
    """Knows no method and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.mark.usefixtures("quiet")
def test_without_a_hub_its_libraries_are_offline_inside_and_as_before_afterwards() -> None:
    assert not hub_answers()
    with loading_from_hub("owner/name"):
        assert constants.HF_HUB_OFFLINE and constants.is_offline_mode()
    assert not constants.HF_HUB_OFFLINE
    said = rf"{NOBODY} does not answer, and owner/name was not downloaded before"
    with pytest.raises(ConnectionError, match=said), loading_from_hub("owner/name"):
        raise ValueError("whatever the library says")
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("quiet")
def test_a_folder_needs_no_hub(tmp_path: Path) -> None:
    with loading_from_hub(str(tmp_path)):
        assert not constants.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match="damaged"), loading_from_hub(str(tmp_path)):
        raise ValueError("damaged")


@pytest.mark.usefixtures("refusing")
def test_a_hub_that_answers_is_left_to_its_libraries() -> None:
    assert hub_answers()
    with loading_from_hub("owner/name"):
        assert not constants.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match="as it is"), loading_from_hub("owner/name"):
        raise ValueError("as it is")


@pytest.mark.usefixtures("quiet")
def test_a_model_that_is_nowhere_is_known_at_once_and_quietly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match="does not answer"), loading_from_hub("owner/name"):
        AutoConfig.from_pretrained("owner/name", cache_dir=tmp_path)
    assert time.perf_counter() - start < 5
    assert capfd.readouterr() == ("", "")
