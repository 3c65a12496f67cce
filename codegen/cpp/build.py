"""From emitted C++ to a shared library, with whatever compiler the machine has.

The same text and compiler give the same bytes: compilation runs in a fresh directory with relative
names, and nothing of the path or the clock enters the binary.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from ...errors import BuildFailed, CompilerMissing, CrossCompilerMissing
from .target import CpuTarget

MAIN = "step.cpp"
LOG_LINES = 40  # the first error is the one that counts
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    # IEEE semantics stay (masks rely on infinities, bit-equality on the order of sums); only what no
    # kernel looks at is given up.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-nostdinc++",  # the sources use C headers only, and the library needs libc alone
    "-pthread",
    "-Wl,--build-id=none",
)


@lru_cache
def compiler(machine: str = "") -> tuple[str, ...]:
    """The command: ``$CXX``, else g++, clang++, else the clang inside the PyPI package ziglang.

    For another ``machine`` (as ``platform.machine()`` says it) than this one, ziglang alone: it has
    what it takes to link for all of them.
    """
    if chosen := os.environ.get("CXX"):
        return tuple(shlex.split(chosen))
    foreign = machine not in ("", platform.machine())
    for name in () if foreign else ("g++", "clang++"):
        if path := shutil.which(name):
            return (path,)
    if find_spec("ziglang") is not None:  # "c++" would first build libc++, for minutes
        return (sys.executable, "-m", "ziglang", "cc", "-x", "c++")
    if foreign:
        raise CrossCompilerMissing(machine=machine)
    raise CompilerMissing(tried="CXX, g++, clang++, python -m ziglang cc")


def _is_zig(command: Sequence[str]) -> bool:
    return "ziglang" in command or Path(command[0]).name == "zig"


@lru_cache
def toolchain(machine: str = "") -> str:
    """Name and version of the compiler, for the manifest."""
    command = compiler(machine)
    name = "zig cc" if _is_zig(command) else Path(command[0]).name
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompilerMissing(tried=f"{shlex.join(command)}: {error}") from error
    return f"{name}: {done.stdout.splitlines()[0]}"


def build_cpu(files: Mapping[str, str], target: CpuTarget) -> bytes:
    """The shared library of emitted ``files``."""
    with tempfile.TemporaryDirectory(prefix="tokenmill-") as directory:
        root = Path(directory)
        for name, text in files.items():
            (root / name).write_text(text)
        tool = compiler(target.machine)
        flags = target.zig_flags if _is_zig(tool) else target.flags
        command = [*tool, *flags, *FLAGS, f"-ffile-prefix-map={directory}=."]
        command += [MAIN, "-o", "step.so"]
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        except OSError as error:
            raise CompilerMissing(tried=f"{shlex.join(tool)}: {error}") from error
        if done.returncode != 0:
            log = (done.stderr or done.stdout).strip().splitlines()
            raise BuildFailed(file=MAIN, log="\n".join(log[:LOG_LINES]))
        return (root / "step.so").read_bytes()
