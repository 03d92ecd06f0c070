"""Fakes of other servers, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxy import fake_servers


@pytest.fixture(scope="session")
def fakes() -> Iterator[dict[str, str]]:
    with fake_servers.running() as addresses:
        yield addresses
