"""Pointwise work moves into the linear map that feeds it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..ir import expr
from ..ir.expr import Expr, Ref
from ..ir.program import Program, is_weight
from .base import Pass, calls, is_call, mill, replace, same_shape, sweep
from .fuse_pointwise import body, operand
from .linears import Linear
from .scalar import cost, count
from .views import features, rows, width


@dataclass
class FuseEpilogue(Pass):
    """f(x W^T, r) => x W^T with the epilogue f(acc0, e0) and e0 = r

    The usual f is the residual add.
    """

    name = "fuse_epilogue"

    def run(self, program: Program) -> int:
        matches = 0
        for node in calls(program, mill.pointwise):
            if (producer := _producer(node)) is not None:
                _fuse(program, node, producer)
                matches += 1
        sweep(program)
        return matches


def is_row(source: fx.Node, like: fx.Node) -> bool:
    """Whether ``source`` holds a number for each of ``like``."""
    fits = not is_weight(source) and features(source) is not None and rows(source) == rows(like)
    return fits and width(source) == width(like)


def _producer(node: fx.Node) -> fx.Node | None:
    """The last linear map that only this node reads; its other inputs are there by then."""
    inputs = node.args[0]
    if not all(is_weight(i) or is_row(i, node) for i in inputs):
        return None
    found = [i for i in inputs if is_call(i, mill.linear) and _can_grow(i, node)]
    return max(found, default=None)


def _can_grow(linear: fx.Node, node: fx.Node) -> bool:
    once = count(body(node), operand(node, linear)) == 1
    cheap = cost(expr.parse(Linear(*linear.args).epilogue)) == 0
    return len(linear.users) == 1 and same_shape(linear, node) and (once or cheap)


def _fuse(program: Program, node: fx.Node, producer: fx.Node) -> None:
    linear = Linear(*producer.args)
    extras = list(dict.fromkeys([*linear.extras, *(i for i in node.args[0] if i is not producer)]))
    names: dict[str, Expr] = {
        f"x{i}": expr.parse(linear.epilogue) if n is producer else Ref(f"e{extras.index(n)}")
        for i, n in enumerate(node.args[0])
    }
    epilogue = expr.text(expr.substitute(body(node), names))
    with program.graph.inserting_before(node):
        fused = linear._replace(extras=extras, epilogue=epilogue).add(program, node)
    replace(program, node, fused)
    program.graph.erase_node(node)
    program.graph.erase_node(producer)
