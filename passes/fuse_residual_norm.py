"""A residual add that nothing else took joins the norm that follows."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from ..ir.program import Program
from .base import Pass, calls, is_call, mill, replace, sweep
from .fuse_epilogue import is_row
from .views import features


@dataclass
class FuseResidualNorm(Pass):
    """s = x + r, rms_norm(s) => (s, n) = add_rms_norm(x, r)

    Runs after :mod:`.fuse_epilogue`: an add at the end of a linear map costs nothing at all.
    """

    name = "fuse_residual_norm"

    def run(self, program: Program) -> int:
        matches = 0
        for norm in calls(program, mill.rms_norm):
            if _is_sum(norm.args[0]):
                _fuse(program, norm.args[0], norm)
                matches += 1
        sweep(program)
        return matches


def _is_sum(node: fx.Node) -> bool:
    return (
        is_call(node, mill.pointwise)
        and node.args[1] == "x0 + x1"
        and all(is_row(i, node) for i in node.args[0])
        and len(features(node) or ()) == 1
    )


def _fuse(program: Program, total: fx.Node, norm: fx.Node) -> None:
    (x, residual), (_, weight, eps) = total.args[0], norm.args
    with program.graph.inserting_before(total):
        scale = program.weight(weight.target)
        both = program.call(mill.add_rms_norm.default, x, residual, scale, eps, like=norm)
        parts = [program.call(operator.getitem, both, i, like=norm) for i in (0, 1)]
    for old, new in zip((total, norm), parts, strict=True):
        replace(program, old, new)
