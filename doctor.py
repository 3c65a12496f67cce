"""What this machine can build and run, and how to get what is missing."""

from __future__ import annotations

import ctypes.util
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections import defaultdict
from importlib import metadata
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from .codegen.cpp import build
from .codegen.cpp.target import host_target
from .errors import TokenmillError
from .runtime.cpu import available_cores
from .units import size

CORE = "core"
EXTRAS = {
    CORE: "everything",
    "hf": "Hugging Face checkpoints and text",
    "onnx": "ONNX export",
    "triton": "compiling for NVIDIA GPUs",
    "cuda": "running on NVIDIA GPUs",
    "lm-eval": "tasks of lm-eval",
    "dev": "working on tokenmill",
}


def diagnose() -> dict[str, Any]:
    """Facts by subject, and ``remedies``: what to do for what is missing."""
    compiler, cpu, packages = _compiler(), _cpu(), _packages()
    remedies = [found["remedy"] for found in (compiler, cpu) if "remedy" in found]
    for extra, versions in packages.items():
        if missing := [name for name, version in versions.items() if version is None]:
            name = "tokenmill" if extra == CORE else f"tokenmill[{extra}]"
            remedies.append(f"for {EXTRAS[extra]} ({', '.join(missing)}): pip install '{name}'")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "memory_bytes": _memory(),
        "compiler": compiler,
        "gpus": _gpus(),
        "cuda_driver": ctypes.util.find_library("cuda") is not None,
        "packages": packages,
        "remedies": remedies,
    }


def view(found: dict[str, Any]) -> list[RenderableType]:
    """The same for people."""
    table = Table.grid(padding=(0, 2))
    table.add_row("python", f"{found['python']} on {found['system']}")
    table.add_row("cpu", _told(found["cpu"], "{target}, {cores} cores"))
    table.add_row("memory", size(found["memory_bytes"]) if found["memory_bytes"] else "unknown")
    table.add_row("compiler", _told(found["compiler"], "{version} ({command})"))
    table.add_row("gpu", "\n".join(", ".join(g.values()) for g in found["gpus"]) or "none found")
    for extra, versions in found["packages"].items():
        shown = ", ".join(f"{n} {v}" if v else f"{n} (missing)" for n, v in versions.items())
        table.add_row(f"packages: {extra}", shown)
    return [table, *(f"-> {remedy}" for remedy in found["remedies"])]


def _told(fact: dict[str, Any], template: str) -> str:
    return str(fact["problem"]) if "problem" in fact else template.format(**fact)


def _cpu() -> dict[str, Any]:
    try:
        target = host_target()
    except TokenmillError as error:
        return {"problem": error.message, "remedy": error.advice}
    return {"target": target.name, "cores": available_cores()}


def _compiler() -> dict[str, Any]:
    try:
        return {"command": shlex.join(build.compiler()), "version": build.toolchain()}
    except TokenmillError as error:
        return {"problem": error.message, "remedy": error.advice}


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not every system tells
        return None


def _gpus() -> list[dict[str, str]]:
    """What nvidia-smi lists; empty without it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    fields = ("name", "memory.total", "driver_version", "compute_cap")
    query = [command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(", ") for line in done.stdout.strip().splitlines())
    return [dict(zip(fields, row, strict=False)) for row in rows]


def _packages() -> dict[str, dict[str, str | None]]:
    """Versions of what tokenmill and each of its extras ask for; None where not installed."""
    packages: dict[str, dict[str, str | None]] = defaultdict(dict)
    try:
        requirements = metadata.requires("tokenmill") or []
    except metadata.PackageNotFoundError:  # run from a checkout
        requirements = []
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
        packages[extra[1] if extra else CORE][name] = _version(name)
    return dict(packages)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
