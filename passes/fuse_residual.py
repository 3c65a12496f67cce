"""The add after an experts block moves into it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..ir.expr import Call, Expr, Ref
from ..ir.program import Program, is_weight
from .base import Pass, calls, is_call, mill, replace, same_shape, sweep
from .fuse_epilogue import is_row
from .fuse_pointwise import body, operand, pointwise
from .scalar import count

RESIDUAL = 5  # position among the arguments of mill.experts


@dataclass
class FuseResidual(Pass):
    """h + (experts(x) + shared(x)) => experts(x, residual = h + shared(x))

    The inner sum is left for the shared expert's epilogue, so that a block ends without a step
    that only adds up.
    """

    name = "fuse_residual"

    def run(self, program: Program) -> int:
        matches = 0
        for node in calls(program, mill.pointwise):
            found = [i for i in node.args[0] if is_call(i, mill.experts) and _takes(i, node)]
            if found:
                _fuse(program, node, max(found))
                matches += 1
        sweep(program)
        return matches


def _takes(experts: fx.Node, node: fx.Node) -> bool:
    rest = without(body(node), name := operand(node, experts))
    return (
        rest is not None
        and count(rest, name) == 0
        and experts.args[RESIDUAL] is None
        and len(experts.users) == 1
        and same_shape(experts, node)
        and any(is_row(i, node) and i is not experts for i in node.args[0])
    )


def without(total: Expr, term: str) -> Expr | None:
    """What a sum leaves when one of its terms is taken away; None if it is not among them."""
    match total:
        case Call("add", (left, right)):
            if Ref(term) in (left, right):
                return left if right == Ref(term) else right
            if (fewer := without(left, term)) is not None:
                return Call("add", (fewer, right))
            if (fewer := without(right, term)) is not None:
                return Call("add", (left, fewer))
    return None


def _fuse(program: Program, node: fx.Node, experts: fx.Node) -> None:
    rest = without(body(node), operand(node, experts))
    assert rest is not None
    with program.graph.inserting_before(node):
        residual = _value(program, node, rest)
        args = (*experts.args[:RESIDUAL], residual, *experts.args[RESIDUAL + 1 :])
        fused = program.call(mill.experts.default, *args, like=experts)
    replace(program, node, fused)
    program.graph.erase_node(node)


def _value(program: Program, node: fx.Node, rest: Expr) -> fx.Node:
    match rest:
        case Ref(name) if not is_weight(source := node.args[0][int(name[1:])]):
            return source
    return pointwise(program, rest, node.args[0], like=node)
