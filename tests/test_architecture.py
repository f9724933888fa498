"""Who may import whom, held as data and proved by walking the imports; and what stays light, proved by importing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sparkray"

BASE = {"errors", "types"}
SHARED = BASE | {"config", "hardware", "models", "telemetry"}
DOMAIN = SHARED
EDGE = SHARED | {"metis", "search", "handoff", "grpo", "distill", "pruning", "poc", "cluster", "serving"}

# Package (or top module) -> the sparkray packages that it may import, besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "types": {"errors"},
    "config": BASE,
    "hardware": BASE | {"config"},
    "models": BASE | {"config"},
    "telemetry": BASE | {"config"},
    "poc": DOMAIN,
    "metis": DOMAIN,
    "search": DOMAIN | {"metis"},
    "handoff": DOMAIN,
    "grpo": DOMAIN | {"metis"},
    "distill": DOMAIN,
    "pruning": DOMAIN,
    "cluster": SHARED,
    "serving": EDGE - {"serving"},
    "cli": EDGE | {"__init__"},
}

# A heavy module -> the file names that may import it. Only these touch the machinery.
HEAVY: dict[str, tuple[str, ...]] = {
    "ray": ("actors.py", "deployment.py", "train_loop.py", "vllm_*.py", "ray_*.py"),
    "vllm": ("vllm_*.py", "deployment.py"),
    "mlx": ("mlx_*.py",),
    "mlx_lm": ("mlx_*.py",),
    "llama_cpp": ("llamacpp_*.py",),
}
# `cluster` and `serving` are Ray's own ground: there any file may import ray, none may import an engine.
RAY_GROUND = {"cluster", "serving"}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "sparkray":
                yield from (f"sparkray.{alias.name}" for alias in node.names)
            elif node.module:
                yield node.module


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_table(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is not in the table: say what it may import"
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "sparkray" and len(parts) > 1 and not parts[1].startswith("__"):
            assert parts[1] == room or parts[1] in MAY_IMPORT[room], f"{room} may not import {module}"


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_modules_stay_in_edge_files(path: Path) -> None:
    for module in imported_modules(path):
        top = module.split(".")[0]
        if top not in HEAVY or (top == "ray" and room_of(path) in RAY_GROUND):
            continue
        assert any(path.match(pattern) for pattern in HEAVY[top]), f"{path.name} may not import {module}"


@pytest.mark.parametrize(
    "statement",
    ["import sparkray", "import sparkray.config", "import sparkray.cli.main"],
)
def test_light_imports_stay_light(statement: str) -> None:
    code = f"{statement}; import sys; print(sorted({{'torch', 'ray', 'vllm', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_are_sorted() -> None:
    import sparkray

    names = sparkray.__all__
    assert names[1:] == sorted(names[1:])
    for name in names:
        assert getattr(sparkray, name) is not None
