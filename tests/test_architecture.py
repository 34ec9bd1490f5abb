"""Who may import whom, and that the checkers are content."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import nflows_iresnet

PACKAGE = Path(nflows_iresnet.__file__).parent
ROOT = PACKAGE.parent
BASE = {"torch", "numpy"}
FOUNDATIONS = BASE | {
    "linearization",
    "precision",
    "tensor_float",
    "conditioning",
    "settings",
    "validation",
    "renamed",
    "constants",
}
ALLOWED: dict[str, set[str]] = {
    "linearization": BASE | {"renamed", "tensor_float"},
    "tensor_float": BASE,
    "renamed": BASE,
    "constants": BASE,
    "datasets": BASE | {"sklearn"},
    "testing": BASE | {"linearization"},
    "validation": BASE,
    "interruption": set(),
    "precision": BASE | {"linearization", "tensor_float"},
    "conditioning": BASE,
    "settings": BASE,
    "logdet": FOUNDATIONS,
    "solvers": FOUNDATIONS,
    "nn": FOUNDATIONS,
    "transforms": FOUNDATIONS | {"nflows", "logdet", "solvers"},
    "flows": FOUNDATIONS | {"nflows", "logdet", "solvers", "nn", "transforms"},
    "classifiers": FOUNDATIONS | {"nflows", "logdet", "solvers", "nn", "transforms"},
    "graphs": FOUNDATIONS
    | {"nflows", "logdet", "solvers", "nn", "transforms", "flows", "classifiers", "interop"},
    "files": set(),
    "training": FOUNDATIONS | {"logdet", "transforms", "graphs", "interruption", "files"},
    "interop": FOUNDATIONS
    | {"nflows", "normflows", "transforms", "flows", "nn", "logdet", "solvers", "sbi"},
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {_room(name) for name in names} - set(sys.stdlib_module_names) - {room_of(path)}


def _room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "nflows_iresnet" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    allowed = ALLOWED.get(room_of(path))
    if allowed is not None:
        assert imported_rooms(path) <= allowed


def test_only_one_file_imports_normflows() -> None:
    rooms = {path.name for path in sources() if "normflows" in imported_rooms(path)}
    compare = {path.name for path in (PACKAGE / "experiments").rglob("*.py")}
    assert rooms - compare <= {"normflows.py"}


def test_import_is_light() -> None:
    script = (
        "import sys, nflows.flows; before = set(sys.modules)\n"
        "from nflows_iresnet import *\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'normflows', 'matplotlib', 'rich', 'sklearn', 'sbi'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        pytest.param(["mypy"], marks=pytest.mark.slow),
    ],
    ids=["ruff-check", "ruff-format", "mypy"],
)
def test_checkers_are_content(command: list[str]) -> None:
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed; pip install '.[dev]' in the clone")
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
