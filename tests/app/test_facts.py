"""What a run says about where it was made."""

from __future__ import annotations

import json
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import fedpeft
from fedpeft.app import facts


def test_environment_is_plain_data_about_this_machine() -> None:
    found = facts.describe_environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["fedpeft"] == fedpeft.__version__ and found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == metadata.version("transformers")
    assert found["machine"]["threads"] == torch.get_num_threads() and found["machine"]["cores"] >= 1
    assert found["machine"]["processor"]
    assert (found["machine"]["gpu"] is not None) == torch.cuda.is_available()


def test_commit_is_that_of_the_checkout() -> None:
    root = Path(facts.__file__).parents[3]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    said = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    commit = facts.describe_environment()["commit"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", commit) and said.stdout.startswith(commit[:12])


def test_no_commit_outside_of_a_checkout_or_without_git(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    assert facts.describe_environment()["commit"] is None
    monkeypatch.setattr(facts, "__file__", str(tmp_path / "a" / "b" / "c" / "facts.py"))
    assert facts.describe_environment()["commit"] is None


def test_peak_memory_grows_with_what_is_held() -> None:
    before = facts.peak_memory_bytes()
    held = np.ones((before - psutil.Process().memory_info().rss) // 8 + 8_000_000)  # 64 MB above the peak so far
    assert 30e6 < facts.peak_memory_bytes() - before < 2 * held.nbytes
