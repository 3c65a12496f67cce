"""Step two of quantization: kernels read the formats themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.program import Program, Stage
from .base import Pass, is_call, mill, sweep
from .weight_slots import Slot, slots


@dataclass
class FuseDequantize(Pass):
    """f(x, dequantize(parts)) => f(x, parts, format): the full weight never exists"""

    name = "fuse_dequantize"
    produces: ClassVar[Stage | None] = Stage.FUSED

    def run(self, program: Program) -> int:
        matches = sum(_fuse(slot) for slot in slots(program))
        sweep(program)
        return matches


def _fuse(slot: Slot) -> bool:
    readers = [parts[0] for parts in slot.weights]
    if not all(is_call(r, mill.dequantize) for r in readers):
        return False
    (format,) = {r.args[1] for r in readers}
    slot.fill([list(r.args[0]) for r in readers], format)
    return True
