"""`scripts/setup.py`: which build of torch is taken, and when a set-up counts as done."""

from __future__ import annotations

import importlib.util
import re
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.markers import Marker, default_environment

ROOT = Path(__file__).parents[1]
LINUX = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.11"}
MARKED = 'cuda-toolkit[cublas,cudart]==13.0.3; platform_system == "Linux"'


@cache
def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fedpeft_setup", ROOT / "scripts" / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup() -> ModuleType:
    return load_setup()


def report(*requires: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What pip would report for torch with these requirements."""
    metadata = {"name": "torch", "version": "2.13.0", "requires_dist": list(requires)}
    return {"install": [{"metadata": metadata}], "environment": environment or LINUX}


@pytest.mark.parametrize(
    ("requires", "found"),
    [
        ((), []),
        (("filelock", "triton-like-name>=1"), ["triton-like-name"]),  # the prefix decides
        (("nvidia-cudnn-cu13==9.20.0.48", "sympy>=1.13.3"), ["nvidia-cudnn-cu13"]),
        ((MARKED,), ["cuda-toolkit"]),
        (("Nvidia_NCCL-cu13 (==2.29.7)",), ["nvidia-nccl-cu13"]),
        (('triton==3.7.1; platform_system == "Windows"',), []),
        (('triton==3.7.1; platform_machine == "x86_64" and (sys_platform == "linux")',), ["triton"]),
        (('nvidia-x; extra == "gpu"',), []),
        (('nvidia-x; python_version < "3.9"',), []),
        (('nvidia-x; python_version ~= "3.9"',), ["nvidia-x"]),  # cannot be read: rather one question too many
        (("optree>=0.13; extra == 'optree'", "setuptools>=77"), []),
    ],
)
def test_cuda_requirements_are_those_that_apply_here(setup, requires, found):
    assert setup.cuda_requirements(report(*requires)) == found


CLAUSES = st.sampled_from(
    [
        'platform_system == "Linux"',
        'sys_platform != "win32"',
        'python_version < "3.12"',
        'python_full_version >= "3.11.0"',
        'platform_machine in "x86_64 aarch64"',
        'os_name not in "nt"',
        'extra == "gpu"',
        '"3.11" <= python_version',
    ]
)


def joined(parts: tuple[str, str, str]) -> str:
    return f"({parts[0]} {parts[1]} {parts[2]})"


@given(st.recursive(CLAUSES, lambda inner: st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(joined)))
def test_markers_hold_as_the_packaging_library_says(marker):
    environment = {**default_environment(), "extra": ""}
    assert load_setup().marker_holds(marker, environment) == Marker(marker).evaluate(environment)


@pytest.mark.parametrize(
    ("case", "route"),
    [
        ({"installed": "2.13.0+cpu"}, "present"),
        ({"installed": "2.13.0"}, "present"),
        ({"installed": "2.12.1"}, "uv"),
        ({}, "uv"),
        ({"gpu": True}, "pip"),
        ({"linux": False}, "pip"),
        ({"allowed": True}, "pip"),
    ],
)
def test_route_of_torch_where_pip_would_bring_cuda(setup, case, route):
    given_ = {"installed": None, "linux": True, "gpu": False, "allowed": False, **case}
    installed = given_.pop("installed")
    assert setup.torch_route(installed, "2.13.0", **given_, ask=lambda: report(MARKED)) == route


def test_route_of_torch_where_pip_finds_a_cpu_wheel(setup):
    cpu = report("filelock", "sympy>=1.13.3")
    assert setup.torch_route(None, "2.13.0", linux=True, gpu=False, allowed=False, ask=lambda: cpu) == "pip"


def test_pip_is_not_asked_where_the_answer_does_not_matter(setup):
    def ask() -> dict[str, Any]:
        raise AssertionError("asked")

    for installed, linux, gpu in (("2.13.0", True, False), (None, True, True), (None, False, False)):
        setup.torch_route(installed, "2.13.0", linux=linux, gpu=gpu, allowed=False, ask=ask)


def test_pin_of_torch_is_read_from_the_constraints(setup):
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.fullmatch(r"2\.\d+\.\d+", setup.pinned("torch", constraints))
    assert setup.pinned("torch", "torchvision==9\ntorch==1.2 ; x == 'y'\n") == "1.2"
    with pytest.raises(setup.SetupError, match="names no version of uv"):
        setup.pinned("uv", "torch==1\n")


@pytest.fixture
def sandbox(setup, tmp_path, monkeypatch) -> Any:
    """The set-up in an empty folder, with commands that are written down instead of run."""
    for name in setup.INPUTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("torch==2.13.0\n")
    venv = tmp_path / ".venv"
    places = {"ROOT": tmp_path, "VENV": venv, "STAMP": venv / "stamp", "STARTED": venv / "started"}
    for name, value in places.items():
        monkeypatch.setattr(setup, name, value)
    setup.commands = []
    setup.fails = None  # what a command that holds this word does
    python = setup.python_of(venv)

    def run(*command: object, why: str) -> None:
        text = " ".join(map(str, command))
        if setup.fails is not None and setup.fails[0] in text:
            raise setup.fails[1]
        setup.commands.append(text)
        if "--clear" in text:
            shutil.rmtree(venv, ignore_errors=True)
            python.parent.mkdir(parents=True)
            python.touch()

    def output(*command: object) -> str | None:
        text = " ".join(map(str, command))
        if "importlib.metadata" in text:
            return "2.13.0+cpu\n"
        return "" if python.exists() else None

    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(setup, "output", output)
    return setup


def test_set_up_is_done_once_and_again_when_its_inputs_change(sandbox):
    sandbox.main()
    assert [c for c in sandbox.commands if "--clear" in c] and sandbox.commands[-1].endswith(sandbox.MINILM)
    assert any("-c constraints.txt -e .[dev]" in c for c in sandbox.commands)
    for changed in (None, *sandbox.INPUTS):
        sandbox.commands.clear()
        if changed is not None:
            (sandbox.ROOT / changed).write_text("torch==2.13.0\n# changed\n")
        sandbox.main()
        assert bool(sandbox.commands) == (changed is not None)
        assert not any("--clear" in c for c in sandbox.commands)


def test_a_killed_set_up_does_not_count_and_starts_from_an_empty_environment(sandbox):
    sandbox.fails = ("-e .[dev]", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sandbox.main()
    assert not sandbox.STAMP.exists()
    sandbox.fails = None
    sandbox.commands.clear()
    sandbox.main()
    assert "--clear" in sandbox.commands[0] and sandbox.STAMP.exists() and not sandbox.STARTED.exists()


def test_a_failed_set_up_does_not_count_but_keeps_the_environment(sandbox):
    sandbox.fails = ("-e .[dev]", sandbox.SetupError("no network"))
    with pytest.raises(sandbox.SetupError):
        sandbox.main()
    sandbox.fails = None
    sandbox.commands.clear()
    sandbox.main()
    assert sandbox.commands and not any("--clear" in c for c in sandbox.commands)


def test_a_damaged_or_foreign_stamp_does_not_count(setup, tmp_path):
    stamp = tmp_path / "stamp"
    for content in ("", "[]", '{"made_from": "other"}', "{"):
        stamp.write_text(content)
        assert not setup.is_current(stamp, "this")
    stamp.write_text('{"made_from": "this"}')
    assert setup.is_current(stamp, "this")


def test_a_cpu_build_that_cannot_be_had_is_told_with_both_ways_out(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox, "torch_route", lambda *_, **__: "uv")
    sandbox.fails = ("--torch-backend cpu", sandbox.SetupError("uv ended with 2"))
    with pytest.raises(sandbox.SetupError, match=r"CPU build of torch==2\.13\.0(?s:.*)FEDPEFT_ALLOW_CUDA=1"):
        sandbox.main()
