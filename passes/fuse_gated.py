"""Gate and up projections become one linear map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from ..ir import expr
from ..ir.expr import Expr, Ref
from ..ir.program import Program, is_weight, shape
from .base import Pass, calls, mill, replace, same_size, sweep
from .fuse_epilogue import is_row
from .fuse_pointwise import body
from .linears import Linear, part, plain_linear, stack
from .scalar import inside_dear
from .views import Columns, columns, readers, width


@dataclass
class FuseGated(Pass):
    """f(x G^T, x U^T) => one linear map by [G; U] that ends in f(acc0, acc1), as in SwiGLU

    Gate and up may be two maps or two cuts of one.
    """

    name = "fuse_gated"

    def run(self, program: Program) -> int:
        matches = 0
        for node in calls(program, mill.pointwise):
            if (pair := _find(node)) is not None:
                _fuse(program, node, pair)
                matches += 1
        sweep(program)
        return matches


class _Side(NamedTuple):
    operand: str
    linear: Linear
    columns: Columns


def _find(node: fx.Node) -> list[_Side] | None:
    """The two operands of a pointwise node to be computed as one, the gate first."""
    sides = [side for i, n in enumerate(node.args[0]) if (side := _side(node, f"x{i}", n))]
    sides = [s for s in sides if s.linear.x is sides[0].linear.x]
    if len(sides) != 2 or not all(
        any(n is _input(node, s) for s in sides) or is_weight(n) or is_row(n, node)
        for n in node.args[0]
    ):
        return None
    gates = inside_dear(body(node))
    return sorted(sides, key=lambda side: side.operand not in gates)


def _side(node: fx.Node, operand: str, source: fx.Node) -> _Side | None:
    """A linear map's result, or cut of it, that only this node reads."""
    found = columns(source)
    linear = plain_linear(found.base)
    if linear is None or any(user is not node for user, _ in readers(found.base)):
        return None
    outcome = [*shape(linear.x)[:-1], found.width]
    fits = len(outcome) == len(shape(node)) and all(map(same_size, outcome, shape(node)))
    return _Side(operand, linear, found) if fits else None


def _input(node: fx.Node, side: _Side) -> fx.Node:
    source: fx.Node = node.args[0][int(side.operand[1:])]
    return source


def _fuse(program: Program, node: fx.Node, sides: list[_Side]) -> None:
    accumulators = {side.operand: Ref(f"acc{i}") for i, side in enumerate(sides)}
    others = [i for i in range(len(node.args[0])) if f"x{i}" not in accumulators]
    names: dict[str, Expr] = {f"x{i}": Ref(f"e{j}") for j, i in enumerate(others)}
    with program.graph.inserting_before(node):
        weight, bias = _weight(program, sides)
        fused = Linear(
            sides[0].linear.x,
            [weight],
            bias,
            [node.args[0][i] for i in others],
            parts=2,
            epilogue=expr.text(expr.substitute(body(node), names | accumulators)),
        )
        replace(program, node, fused.add(program, node))
    program.graph.erase_node(node)


def _weight(program: Program, sides: list[_Side]) -> tuple[fx.Node, fx.Node | None]:
    """[G; U], which one map cut in halves has already."""
    gate, up = sides
    halves = gate.columns.base is up.columns.base and (gate.columns.start, up.columns.start)
    if halves == (0, gate.columns.width) and width(gate.columns.base) == 2 * gate.columns.width:
        return gate.linear.weight[0], gate.linear.bias
    return stack(
        program, [part(program, s.linear, s.columns.start, s.columns.width) for s in sides]
    )
