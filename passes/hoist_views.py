"""Reshapes move up, out of the way of fusion."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..ir.program import Program, is_weight, shape
from .base import Pass, aten, calls, is_call, mill, replace, sweep
from .scalar import scalar_expression
from .views import RESHAPES, features, reshape, row_dim

PER_ROW = (mill.linear, mill.experts, mill.pointwise, mill.rms_norm, mill.layer_norm)


@dataclass
class HoistViews(Pass):
    """view(f(x)) => f(view(x)), for an f that works row by row on the last dim

    Models flatten [1, T, F] to [T, F] around some of their blocks; moved up, the two reshapes meet
    and cancel, and nothing is left between producers and consumers.
    """

    name = "hoist_views"

    def run(self, program: Program) -> int:
        matches = sum(_hoist(program, v) for v in reversed(list(calls(program, *RESHAPES))))
        sweep(program)
        return matches


def _hoist(program: Program, view: fx.Node) -> int:
    """Move one view up as far as it goes; the number of ops that it passed."""
    if not view.users or not _movable(view):
        return 0
    node, leading = view.args[0], list(shape(view)[:-1])

    def moved(value: fx.Node) -> fx.Node:
        if is_weight(value):
            return value
        return reshape(program, value, [*leading, shape(value)[-1]])

    with program.graph.inserting_before(node):
        args = fx.node.map_arg(node.args, moved)
        twin = program.call(node.target, *args, like=node, **node.kwargs)
    replace(program, view, twin)
    program.graph.erase_node(view)
    program.graph.erase_node(node)
    above = [n for n in twin.all_input_nodes if is_call(n, aten.reshape)]
    return 1 + sum(_hoist(program, n) for n in above)


def _movable(view: fx.Node) -> bool:
    """Whether the view only adds or drops dims of size 1, after a row-by-row op used just there."""
    node = view.args[0]
    if len(node.users) > 1 or not (is_call(node, *PER_ROW) or scalar_expression(node)):
        return False
    inputs = [n for n in node.all_input_nodes if not is_weight(n)]
    return (
        row_dim(view) is not None
        and len(row := features(view) or ()) == 1
        and row == features(node)
        and all(_leading(n) == _leading(node) for n in inputs)
    )


def _leading(node: fx.Node) -> list[str]:
    return [str(size) for size in shape(node)[:-1]]
