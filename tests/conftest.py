"""What all tests share: the golden-file flag, one thread per process, the bundled checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tokenmill
import torch

# Here Triton kernels run on the CPU; triton reads this when it is imported.
os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/golden/ with what the emitters give now (then read the diff)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # The models here are tiny, and pytest-xdist already runs one process per core.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


def _checkpoint(name: str) -> Path:
    path = ROOT / "examples" / name
    if not (path / "model.safetensors").is_file():
        pytest.skip(f"examples/{name} holds no checkpoint: run its train.py")
    return path


@pytest.fixture(scope="session")
def tiny_deepseek() -> Path:
    """The bundled checkpoint of the DeepSeek-V3 architecture."""
    return _checkpoint("tiny_deepseek")


@pytest.fixture(scope="session")
def tiny_qwen3_moe() -> Path:
    """The bundled checkpoint of the Qwen3-MoE architecture."""
    return _checkpoint("tiny_qwen3_moe")


@pytest.fixture(scope="session")
def int4_artifact(tiny_deepseek: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_deepseek compiled to INT4 for this machine; read it, copy it, do not change it."""
    path = tmp_path_factory.mktemp("artifacts") / "int4"
    tokenmill.optimize(tiny_deepseek, path, recipe=tokenmill.Recipe(weights="int4"))
    return path
