"""Building: same text, same bytes; failures are errors of the catalogue."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tokenmill import codegen
from tokenmill.codegen.cpp import build
from tokenmill.codegen.cpp.target import host_target
from tokenmill.errors import BuildFailed, CompilerMissing, CrossCompilerMissing
from tokenmill.ir.plan import Capacity, Plan


@pytest.fixture
def _forgetful() -> Iterator[None]:
    """The choice of a compiler is remembered; here it must not be."""
    build.compiler.cache_clear()
    build.toolchain.cache_clear()
    yield
    build.compiler.cache_clear()
    build.toolchain.cache_clear()


def test_same_text_gives_same_bytes() -> None:
    files = codegen.emit(Plan({}, (), (), Capacity(0, 0), 0, "", 1, 1), "cpu")
    assert build.build_cpu(files, host_target()) == build.build_cpu(files, host_target())


def test_compile_error_shows_the_first_lines() -> None:
    with pytest.raises(BuildFailed, match="no_such_thing"):
        build.build_cpu({"step.cpp": "no_such_thing;\n" * 1000}, host_target())


@pytest.mark.usefixtures("_forgetful")
def test_another_machine_needs_a_compiler_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CrossCompilerMissing, match="vax"):
        build.compiler("vax")


def test_toolchain_names_the_version() -> None:
    assert any(c.isdigit() for c in build.toolchain())


@pytest.mark.usefixtures("_forgetful")
def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(CompilerMissing):
        build.toolchain()
    monkeypatch.delenv("CXX")
    build.compiler.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing, match="ziglang"):
        build.compiler()
