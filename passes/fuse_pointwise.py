"""Pointwise regions become single expressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ..ir import expr
from ..ir.expr import Expr, Ref
from ..ir.program import Program, is_weight
from .base import Pass, calls, is_call, mill, replace, same_shape, sweep
from .scalar import cost, count, scalar_expression
from .views import features, rows, width


@dataclass
class FusePointwise(Pass):
    """f(g(x), h(y)) => one expression of x and y

    A producer is computed inside its consumers if all of them are pointwise and nothing dear is
    repeated: it is named once, or reads one row and costs at most ``repeat`` cheap operations.
    """

    repeat: int = 4

    name = "fuse_pointwise"

    def run(self, program: Program) -> int:
        for node in list(program.graph.nodes):
            if (found := scalar_expression(node)) and _is_rowwise(node, found[1]):
                with program.graph.inserting_before(node):
                    replace(program, node, pointwise(program, *found, like=node))
                program.graph.erase_node(node)
        for producer in calls(program, mill.pointwise):
            if self._belongs_to_users(producer):
                for consumer in list(producer.users):
                    inline(producer, consumer)
        sweep(program)
        return len(list(calls(program, mill.pointwise)))

    def _belongs_to_users(self, producer: fx.Node) -> bool:
        if not producer.users or not all(is_call(u, mill.pointwise) for u in producer.users):
            return False
        once = sum(count(body(u), operand(u, producer)) for u in producer.users) == 1
        if once and all(same_shape(producer, u) for u in producer.users):
            return True
        reads = [i for i in producer.args[0] if not is_weight(i)]
        return len(reads) == 1 and cost(body(producer)) <= self.repeat


def body(node: fx.Node) -> Expr:
    """The expression of a pointwise node."""
    return expr.parse(node.args[1])


def operand(node: fx.Node, source: fx.Node) -> str:
    """What a pointwise node calls one of its inputs."""
    return f"x{node.args[0].index(source)}"


def arguments(what: Expr, inputs: Sequence[fx.Node]) -> tuple[list[fx.Node], str]:
    """A pointwise node's arguments: the inputs that the expression uses, in order of use."""
    used = [int(name[1:]) for name in expr.names(what)]
    order = {f"x{old}": Ref(f"x{new}") for new, old in enumerate(used)}
    return [inputs[i] for i in used], expr.text(expr.substitute(what, order))


def pointwise(program: Program, what: Expr, inputs: Sequence[fx.Node], like: fx.Node) -> fx.Node:
    return program.call(mill.pointwise.default, *arguments(what, inputs), like=like)


def inline(producer: fx.Node, consumer: fx.Node) -> None:
    """Compute a pointwise producer inside its pointwise consumer."""
    inputs = list(dict.fromkeys([*consumer.args[0], *producer.args[0]]))
    places = {f"x{i}": Ref(f"x{inputs.index(n)}") for i, n in enumerate(producer.args[0])}
    inner = expr.substitute(body(producer), places)
    outer = expr.substitute(body(consumer), {operand(consumer, producer): inner})
    consumer.args = arguments(outer, inputs)


def _is_rowwise(node: fx.Node, inputs: list[fx.Node]) -> bool:
    """Whether every input is a row like the result, one number per row, or a weight."""
    if features(node) is None or all(map(is_weight, inputs)):
        return False
    return all(
        is_weight(i)
        or (features(i) is not None and rows(i) == rows(node) and width(i) in (width(node), 1))
        for i in inputs
    )
