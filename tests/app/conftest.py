"""What the tests of this room share: one place with data and a model, and one finished run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import said
import small
from fedpeft import app


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, pairs and the tiny model; tokens are cached there and not in the user's own folder."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CACHE", str(folder / "cache"))
        yield small.make_place(folder)


@pytest.fixture(scope="session")
def finished(place: Path) -> app.Run:
    """A finished run of `small.config`; only to be read."""
    return app.run(small.config(place), out=place / "finished")


@pytest.fixture(scope="session")
def models(place: Path) -> Path:
    """The place, with models and texts of `said`."""
    return said.make(place)


@pytest.fixture(scope="session")
def ran(models: Path) -> app.Run:
    """A finished run of `said.config`; only to be read."""
    return app.run(said.config(models), out=models / "run-fedpt")
