"""Fakes of other servers, started once, and an endpoint over a scripted decoder that a module's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from proxy import callers, fake_servers
from proxy.served import Script, serving


@pytest.fixture(scope="session")
def fakes() -> Iterator[dict[str, str]]:
    with fake_servers.running() as addresses:
        yield addresses


@pytest.fixture(scope="module")
def script() -> Script:
    """What the module's endpoint says."""
    return Script()


@pytest.fixture(scope="module")
def shared(script: Script) -> Iterator[tuple[str, Any]]:
    """The endpoint's address and its engine."""
    with serving(script) as served:
        yield served


@pytest.fixture
def url(shared: tuple[str, Any], script: Script) -> str:
    """Its address; the script is as it was at first."""
    script.says, script.fail, script.pause_s = lambda prompt: f"you said {prompt}", lambda step: None, 0.0
    script.gate.set()
    script.opened.clear()
    script.dropped.clear()
    return shared[0]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    callers.close_clients()
