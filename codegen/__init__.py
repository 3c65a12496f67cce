"""What turns a plan into source text (``emit``) and binaries (``build``), per target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..ir.plan import Plan
from . import cpp, triton
from .cpp.target import CpuTarget
from .triton.target import GpuTarget
from .triton.tiles import Table, check_table

Target: TypeAlias = CpuTarget | GpuTarget
Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """Files by name, to lie beside the sources, and what the report says of them, row by row."""

    files: Mapping[str, bytes]
    facts: list[dict[str, Any]] = field(default_factory=list)


def parse_target(name: str) -> Target:
    """A target by name, such as ``cpu``, ``cpu-x86-64-v3`` or ``sm_90``; raises BadRecipe."""
    parse = triton.target.parse_target if name.startswith("sm_") else cpp.target.parse_target
    return parse(name)


def emit(plan: Plan, target_name: str, table: Table | None = None) -> dict[str, str]:
    """Source files of a plan for a target: name -> text; ``table`` has tiles of GPU kernels."""
    target = parse_target(target_name)
    if isinstance(target, CpuTarget):
        return cpp.emit(plan, target)
    return triton.emit(plan, target, table)


def toolchain(target: Target) -> str:
    """Name and version of what builds for ``target``; raises CompilerMissing, or MissingExtra."""
    if isinstance(target, CpuTarget):
        return cpp.build.toolchain(target.machine)
    from .triton import build as gpu

    return gpu.toolchain()


def build(files: Mapping[str, str], target: Target, progress: Progress) -> Built:
    """The binaries of emitted ``files``."""
    what = f"build {target.name}"
    if isinstance(target, CpuTarget):
        progress(what, 0, 1)
        library = cpp.build.build_cpu(files, target)
        progress(what, 1, 1)
        return Built({"step.so": library})
    from .triton import build as gpu

    built = gpu.build_gpu(files, target, lambda done, total: progress(what, done, total))
    return Built(built.files, built.facts())


__all__ = ["Built", "Table", "Target", "build", "check_table", "emit", "parse_target", "toolchain"]
