"""Activations of a GPU plan in 16 bits, except where rounding would add up.

fp32 stay: what a residual sum adds to or leaves behind, what the router sees and says, angles, logits, and
whatever torch runs on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ..ir.plan import Experts, Extern, Linear, Norm, Plan, Rope, Route, Step


def narrow(plan: Plan, dtype: Literal["bf16", "f16"] = "bf16") -> Plan:
    """``plan`` with its other fp32 activations in ``dtype``."""
    steps = [link for step in plan.steps for link in step.links]
    wide = {plan.output, *(step.bind[p].buffer for step in steps for p in _wide(step))}
    buffers = {
        name: replace(b, dtype=dtype)
        if b.kind == "arena" and b.dtype == "f32" and name not in wide
        else b
        for name, b in plan.buffers.items()
    }
    return replace(plan, buffers=buffers)


def _wide(step: Step) -> list[str]:
    """Operands of a step that stay fp32."""
    match step.spec:
        case Norm(residual=True):
            return ["residual", "sum"]
        case Linear(extras=extras):
            return [f"e{i}" for i, kind in enumerate(extras) if kind == "row"]
        case Rope():
            return ["cos", "sin"]
        case Route():
            return ["logits", "weights"]
        case Experts(residual=residual):
            return ["weights", *(["residual", "out"] if residual else [])]
        case Extern() as spec:
            return list(spec.params)
    return []
