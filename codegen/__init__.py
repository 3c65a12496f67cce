"""What turns a plan into source text (``emit``) and binaries (``build``), per target."""

from __future__ import annotations

from ..ir.plan import Plan


def emit(plan: Plan, target_name: str) -> dict[str, str]:
    """Source files of a plan for a target such as ``cpu`` or ``cpu-x86-64-v3``: name -> text."""
    from . import cpp
    from .cpp.target import parse_target

    return cpp.emit(plan, parse_target(target_name))


__all__ = ["emit"]
