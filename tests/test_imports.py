"""Who may import whom, and what a serving machine must not need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What a part may import of ours, besides itself. Everything else may import anything.
ALLOWED = {
    "errors": set(),
    "units": set(),
    "recipe": {"errors"},
    "drawing": set(),
    "report": {"drawing", "units"},
    "runtime": {"errors"},
    "ir": {"errors"},
    "passes": {"errors", "ir", "recipe"},
    "capture": {"errors", "ir"},
    "codegen": {"errors", "ir", "runtime.artifact"},
    "export": {"__version__", "api", "capture", "errors", "ir", "passes", "runtime"},
}


def _ours(file: Path) -> set[str]:
    """The modules of tokenmill that ``file`` imports, as dotted paths below the package."""
    here = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            found |= {".".join(filter(None, [*base, name.name])) for name in node.names}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names]
            )
            found |= {
                name.partition(".")[2] for name in names if f"{name}.".startswith("tokenmill.")
            }
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_it_may(part: str) -> None:
    files = (
        [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").is_file() else (ROOT / part).rglob("*.py")
    )
    for file in files:
        for name in _ours(file):
            allowed = any(f"{name}.".startswith(f"{a}.") for a in ALLOWED[part] | {part})
            assert allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_the_runtime_starts_without_the_compiler() -> None:
    heavy = ("torch", "transformers", "triton", "networkx", "onnx", "pydantic", "yaml", "rich")
    code = f"import sys, tokenmill; tokenmill.load; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_help_starts_without_torch() -> None:
    code = "import sys, tokenmill.cli; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"
