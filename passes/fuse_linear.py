"""Linear maps over rows become one dialect op, which later passes grow."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.program import Program, is_weight, shape
from .base import Pass, aten, calls, replace, sweep
from .linears import Linear
from .views import features


@dataclass
class FuseLinear(Pass):
    """aten.linear(x, W, b) => mill.linear(x, [W], b), where x is one vector per row"""

    name = "fuse_linear"

    def run(self, program: Program) -> int:
        matches = 0
        for node in calls(program, aten.linear):
            x, weight, bias = (*node.args, None)[:3]
            if not is_weight(weight) or len(shape(weight)) != 2 or len(features(x) or ()) != 1:
                continue
            with program.graph.inserting_before(node):
                replace(program, node, Linear(x, [weight], bias).add(program, node))
            matches += 1
        sweep(program)
        return matches
