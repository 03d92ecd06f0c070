"""Who may import whom, what must not be imported early, and the laws that can be read off the source.

The table is that of `docs/architecture.md`, section 3. A room may import itself, the rooms named here, the standard
library, and the packages named here: at the top of a module, or late (inside a function or under TYPE_CHECKING).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
FILES = sorted((SRC / "fedpeft").rglob("*.py"))


@dataclass(frozen=True)
class Room:
    """What a room may import; None: anything."""

    rooms: str | None
    top: str | None = ""
    late: str | None = ""


LIGHT = "torch numpy safetensors "
ROOMS = {
    "core": Room("", LIGHT),
    "maths": Room("core", LIGHT),
    "planner": Room("core maths", LIGHT, "scipy"),
    "methods": Room("core maths planner", LIGHT),
    "models": Room("core maths", LIGHT + "tokenizers", "transformers peft bitsandbytes huggingface_hub"),
    "data": Room("core", LIGHT + "tokenizers", "datasets pyarrow huggingface_hub"),
    "engines": Room("core", LIGHT, "flwr"),
    "proxy": Room("core maths models", LIGHT, "transformers fastapi starlette uvicorn httpx scipy rouge_score"),
    "runs": Room("core planner", LIGHT + "yaml psutil", "matplotlib tensorboard torch mlflow wandb rouge_score"),
    "config": Room(None, None, None),
    "app": Room(None, None, None),  # and every other module beside it
    "cli": Room(None, None, None),
}
PROMISED = ["core", "methods", "models", "data", "engines"]  # import without any of:
OPTIONAL = ["pydantic", "typer", "datasets", "peft", "flwr", "scipy", "transformers"]

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_NAMES = {
    "torch.load", "torch.save", "random.seed", "numpy.random.seed", "torch.manual_seed", "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all", "torch.random.manual_seed", "torch.seed", "transformers.set_seed",
}  # fmt: skip
FORBIDDEN_KEYWORDS = {"trust_remote_code", "allow_pickle"}  # with any value but the literal False


@dataclass(frozen=True)
class Import:
    name: str  # dotted; `from a import b` gives a.b
    late: bool
    line: int


def imports(tree: ast.Module, module: str, package: bool) -> Iterator[Import]:
    """Every import of a module, import_module("...") included."""

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, late, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parts = module.split(".")
                up = child.level - package if child.level else len(parts)
                base = [*parts[: len(parts) - up], *(child.module or "").split(".")] if child.level else [child.module]
                prefix = ".".join(p for p in base if p)
                yield from (Import(f"{prefix}.{alias.name}", late, child.lineno) for alias in child.names)
            elif (
                isinstance(child, ast.Call)
                and dotted(child.func) in ("importlib.import_module", "import_module", "__import__")
                and child.args
                and isinstance(child.args[0], ast.Constant)
            ):
                yield Import(str(child.args[0].value), late, child.lineno)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and (dotted(child.test) or "").endswith("TYPE_CHECKING")
            yield from visit(child, late or inside or typing_only)

    yield from visit(tree, False)


def dotted(node: ast.AST) -> str | None:
    """`a.b.c` of an expression, None where it is something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return None


def module_of(path: Path) -> tuple[str, bool]:
    parts = path.relative_to(SRC).with_suffix("").parts
    package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if package else parts), package


def layer_problems(module: str, package: bool, source: str) -> list[str]:
    """Every import that the table does not allow."""
    parts = module.split(".")
    here = parts[1] if len(parts) > 1 else "fedpeft"
    room = ROOMS.get(here, ROOMS["app"])
    problems = []
    for item in imports(ast.parse(source), module, package):
        where = f"{module}:{item.line} imports {item.name}"
        top, *rest = item.name.split(".")
        if top == "fedpeft":
            there = rest[0] if rest else ""
            if here == "methods" and there == "methods" and not package:
                problems.append(f"{where}: a method never imports another method")
            if room.rooms is not None and there not in (here, *room.rooms.split(), "__version__"):
                problems.append(f"{where}: {here} may import {room.rooms or 'no other room'}")
        elif top not in sys.stdlib_module_names and room.top is not None and room.late is not None:
            allowed = room.top.split() + (room.late.split() if item.late else [])
            if top not in allowed:
                problems.append(f"{where}: {here} may import {', '.join(allowed)} {'late' if item.late else 'here'}")
    return problems


def law_problems(module: str, source: str) -> list[str]:
    """Every use of what the laws forbid: code in files, global seeds, foreign code."""
    tree = ast.parse(source)
    names = {"np": "numpy"}
    problems = []
    for item in imports(tree, module, False):
        if item.name.split(".")[0] in FORBIDDEN_MODULES or item.name in FORBIDDEN_NAMES:
            problems.append(f"{module}:{item.line} imports {item.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            head, _, tail = name.partition(".")
            if f"{names.get(head, head)}.{tail}" in FORBIDDEN_NAMES:
                problems.append(f"{module}:{node.lineno} uses {name}")
        if (
            isinstance(node, ast.keyword)
            and node.arg in FORBIDDEN_KEYWORDS
            and not (isinstance(node.value, ast.Constant) and node.value.value is False)
        ):
            problems.append(f"{module}:{node.value.lineno} passes {node.arg}")
    return problems


# --- the package ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_every_module_keeps_to_its_room_and_the_laws(path: Path) -> None:
    module, package = module_of(path)
    source = path.read_text(encoding="utf-8")
    assert layer_problems(module, package, source) + law_problems(module, source) == []


def test_every_room_is_in_the_table() -> None:
    rooms = {path.parent.name for path in (SRC / "fedpeft").glob("*/__init__.py")}
    assert rooms <= ROOMS.keys()
    assert {"core", *PROMISED} <= rooms


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_promised_rooms_import_without_the_optional_packages() -> None:
    modules = [m for m in (module_of(path)[0] for path in FILES) if m.split(".")[1:2] and m.split(".")[1] in PROMISED]
    assert len(modules) > 20
    out = run(f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    importlib.import_module(module)
print(sorted(set({OPTIONAL!r}) & sys.modules.keys()))
""")
    assert out.strip() == "[]"


def test_importing_the_package_is_cheap() -> None:
    out = run("import sys, fedpeft; print(sorted({'torch', 'numpy', 'transformers', 'pydantic'} & sys.modules.keys()))")
    assert out.strip() == "[]"


def test_planning_does_without_torch() -> None:
    """Its import takes as long as all the rest of `fedpeft plan`."""
    out = run("import sys, fedpeft.app.planning; print(sorted({'torch', 'transformers'} & sys.modules.keys()))")
    assert out.strip() == "[]"


# --- the checks themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fedpeft.core.x", "from fedpeft.maths import fisher"),
        ("fedpeft.core.x", "from fedpeft import maths"),
        ("fedpeft.core.x", "from ..maths import fisher"),
        ("fedpeft.core.x", "def f():\n    import fedpeft.runs.store"),
        ("fedpeft.core.x", "def f():\n    import scipy"),
        ("fedpeft.core.x", "import transformers"),
        ("fedpeft.maths.x", "from fedpeft.planner import device"),
        ("fedpeft.planner.x", "import scipy.optimize"),
        ("fedpeft.methods.x", "from fedpeft.methods.fedavg import FedAvg"),
        ("fedpeft.methods.x", "from .fedavg import FedAvg"),
        ("fedpeft.methods.x", "def f():\n    from fedpeft.methods import fedavg"),
        ("fedpeft.methods.x", "from fedpeft.engines.inprocess import InProcess"),
        ("fedpeft.methods.x", "def f():\n    import transformers"),
        ("fedpeft.methods.x", "import flwr"),
        ("fedpeft.models.x", "import transformers"),
        ("fedpeft.models.x", "try:\n    import peft\nexcept ImportError:\n    peft = None"),
        ("fedpeft.models.adapters.x", "class A:\n    import transformers"),
        ("fedpeft.models.x", "from fedpeft.data import tasks"),
        ("fedpeft.data.x", "from datasets import load_dataset"),
        ("fedpeft.data.x", "import importlib\nimportlib.import_module('pyarrow')"),
        ("fedpeft.engines.x", "from fedpeft.methods import load"),
        ("fedpeft.runs.x", "from fedpeft.config import Config"),
        ("fedpeft.runs.x", "import pydantic"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(layer_problems(module, False, source)) == 1, source


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fedpeft.core.x", "import json, torch\nfrom fedpeft.core import tree\nfrom fedpeft import __version__"),
        ("fedpeft.planner.x", "def f():\n    from scipy.optimize import milp"),
        ("fedpeft.models.x", "def f():\n    from transformers import AutoModel"),
        ("fedpeft.models.x", "import typing as t\nif t.TYPE_CHECKING:\n    from transformers import AutoModel"),
        ("fedpeft.models.adapters.x", "from fedpeft.models.parts import P\nfrom ..parts import Q"),
        ("fedpeft.methods.x", "from fedpeft.maths import fisher\nfrom fedpeft.planner import device"),
        ("fedpeft.app", "import pydantic\nfrom fedpeft.cli import main\nfrom fedpeft.engines import inprocess"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert layer_problems(module, False, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "import torch as t\nt.save(1)",
        "from torch import load", "import random\nrandom.seed(0)", "from random import seed",
        "import numpy as np\nnp.random.seed(3)", "from numpy import random\nrandom.seed(3)",
        "import torch\ntorch.manual_seed(0)", "import torch\ntorch.cuda.manual_seed_all(0)",
        "f(trust_remote_code=True)", "f(trust_remote_code=x)", "np.load('x', allow_pickle=True)",
    ],
)  # fmt: skip
def test_a_broken_law_is_found(source: str) -> None:
    assert len(law_problems("fedpeft.x", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.load(f)",
        "g.manual_seed(3)",
        "f(trust_remote_code=False)",
        "from safetensors.torch import load",
    ],
)
def test_a_law_that_is_kept_is_not(source: str) -> None:
    assert law_problems("fedpeft.x", source) == []
