"""The project around the package: licence, set-up, make targets, pins, and documents that say what is true."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
ROOMS = sorted(p.name for p in (ROOT / "src" / "fedpeft").iterdir() if (p / "__init__.py").exists())
FORBIDDEN = re.compile(
    r"pypi\.(?:org|python)|pythonhosted|download\.pytorch|anaconda\.(?:org|com)|index-url|find-links|"
    r"(?<![\w.])/(?:root|work|opt|home)/\w"
)


def tracked() -> list[Path]:
    """The project's own files: what git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so the project's own files cannot be told from others")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


# --- files ------------------------------------------------------------------------------------------------------


def test_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert all(f"   {number}. " in text for number in range(1, 10))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]


def test_no_file_names_a_registry_or_a_place_on_somebodys_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path != Path(__file__)
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["https://pypi.org/simple", "see /work/main/x", "files.pythonhosted.org", "/home/me/x"]
)
def test_the_search_for_places_finds_them(text):
    assert FORBIDDEN.search(text)


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    listed = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return {r.name.lower().replace("_", "-"): r for r in map(Requirement, listed)}


def test_constraints_pin_every_direct_dependency_within_its_range():
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin = Requirement(line)
        pins.setdefault(pin.name.lower(), []).extend(s.version for s in pin.specifier if s.operator == "==")
    for name, requirement in requirements().items():
        assert pins.get(name), f"constraints.txt does not pin {name}"
        assert all(requirement.specifier.contains(version) for version in pins[name]), (requirement, pins[name])


# --- continuous integration and make ----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 3])
def test_ci_runs_make_test_and_ends_as_it_ends(tmp_path, code):
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    fake = tmp_path / "make"
    fake.write_text(f'#!/bin/sh\necho "make $*"\nexit {code}\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code and done.stdout.strip() == "make test"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("target", "last"),
    [
        ("setup", "scripts/setup.py"),
        ("demo", ".venv/bin/fedpeft demo"),
        ("test", "-m pytest"),
        ("test-all", '-m ""'),
        ("lint", "mypy"),
        ("bench", "-m benchmarks."),
        ("clean", "rm -rf"),
    ],
)
def test_make_targets_set_up_first_and_then_do_their_work(target, last):
    done = make("-n", target, f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr
    assert last in done.stdout
    if target not in ("setup", "clean"):
        assert done.stdout.index("scripts/setup.py") < done.stdout.rindex(last)
    if target.startswith("test"):
        assert all(tool in done.stdout for tool in ("ruff check", "ruff format --check", "mypy", "OMP_NUM_THREADS=1"))


def test_make_says_what_to_do_where_there_is_no_python():
    done = make("setup", "PYTHON=")
    assert done.returncode != 0 and "PYTHON=/path/to/python3.11" in done.stderr


# --- documents --------------------------------------------------------------------------------------------------


def fenced(path: Path) -> list[tuple[str, str]]:
    """The code blocks of a document: (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_that_exist(path):
    links = re.findall(r"\]\(([^)#\s]+)", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing, f"{path.name} links to {missing}"


def verbs() -> set[str]:
    """The commands of the command line, asked in a process of its own: typer's imports warn."""
    code = "from fedpeft.cli import app; print(*(c.name for c in app.registered_commands))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_commands_in_documents_exist():
    known = verbs()
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    lines = [
        line for path in DOCUMENTS for language, text in fenced(path) if not language for line in text.splitlines()
    ]
    seen = set()
    for line in lines:
        if found := re.match(r"(?:\.venv/bin/)?(make|fedpeft) ([\w-]+)", line):
            tool, word = found.groups()
            seen.add(tool)
            assert word in (known if tool == "fedpeft" else targets), line
        if found := re.search(r"(\S+\.yaml)", line):
            assert (ROOT / found.group(1)).is_file(), line
    assert seen == {"make", "fedpeft"}


def test_the_example_in_the_readme_is_the_shipped_one():
    (block,) = [text for language, text in fenced(ROOT / "README.md") if language == "yaml"]
    assert yaml.safe_load(block) == yaml.safe_load((ROOT / "examples" / "trec_lora.yaml").read_text())


def test_python_in_the_documents_uses_names_that_exist():
    import fedpeft

    blocks = [text for path in DOCUMENTS for language, text in fenced(path) if language == "python"]
    names = {name for text in blocks for name in re.findall(r"\bfedpeft\.(\w+)", text) if "import fedpeft" in text}
    assert "run" in names
    assert names <= set(fedpeft.__all__)


def test_documents_name_every_room_method_verb_and_key():
    from fedpeft import methods
    from fedpeft.config.sections import SECTIONS

    architecture, readme = ((ROOT / name).read_text() for name in ("docs/architecture.md", "README.md"))
    interface = (ROOT / "docs" / "interface.md").read_text()
    assert [room for room in ROOMS if f"`{room}/`" not in architecture or f"src/fedpeft/{room}/" not in readme] == []
    assert [name for name in methods.names() if f"`{name}`" not in readme or f"`{name}`" not in architecture] == []
    assert [verb for verb in verbs() if f"`fedpeft {verb}" not in interface] == []
    keys = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
    missing = [key for key in keys if not re.search(rf"\b{key.rpartition('.')[2]}:", interface)]
    assert missing == []


def test_dependencies_are_explained():
    explained = re.sub(r"[_ ]", "-", (ROOT / "docs" / "dependencies.md").read_text().lower())
    assert [name for name in requirements() if name not in explained] == []


def test_architecture_names_what_a_method_and_an_exchange_are_made_of_and_every_decision():
    from fedpeft.core.exchange import Exchange, Method

    text = (ROOT / "docs" / "architecture.md").read_text()
    for cls in (Method, Exchange):
        listed = text[text.index(f"class {cls.__name__}") :].split("\n\n\n")[0]
        parts = [name for name in {**vars(cls), **cls.__annotations__} if not name.startswith("_")]
        assert [name for name in parts if not re.search(rf"\b{name}\b[:(]", listed)] == [], cls
    decisions = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert [name for name in decisions if f"](decisions/{name})" not in text.partition("## 6.")[2]] == []


def test_architecture_names_the_modules_of_core():
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = sorted(p.name for p in (ROOT / "src" / "fedpeft" / "core").glob("*.py") if p.name != "__init__.py")
    assert [name for name in modules if f"`{name}`" not in text] == []
