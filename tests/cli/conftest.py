"""typer 0.20 imports a name that newer versions of click warn about; the warning is met here, once, and not by us."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pytest

import fedpeft

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    importlib.import_module("typer.testing")

command_line = importlib.import_module("command_line")  # after the warning


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    monkeypatch.chdir(tmp_path)
    fake = command_line.FakeApp()
    monkeypatch.setitem(sys.modules, "fedpeft.app", fake)
    monkeypatch.setattr(fedpeft, "app", fake, raising=False)
    return fake


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "config.yaml").write_text("method: {name: fedavg}\n")
    return folder
