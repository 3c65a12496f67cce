"""Only the rows that somebody asks for go through the head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..ir.program import Program, is_weight
from .base import Pass, aten, is_call, mill, same_shape


@dataclass
class SelectRows(Pass):
    """head(x)[rows] = head(x[rows]): decoding needs the logits of one token per sequence"""

    name = "select_rows"

    def run(self, program: Program) -> int:
        rows = _rows_input(program)
        output = program.output
        at, user = output.args[0], output
        while (below := _narrows(at)) is not None and len(at.users) == 1:
            at, user = below, at
        with program.graph.inserting_after(at):
            selected = program.call(mill.select_rows.default, at, rows, like=at)
        user.replace_input_with(at, selected)
        _refresh(program, user)
        return 1


def _rows_input(program: Program) -> fx.Node:
    with program.graph.inserting_after(program.input("positions")):
        node = program.graph.placeholder("rows")
    # As many rows as tokens: a size of its own would not be related to anything else.
    node.meta["val"] = program.input("ids").meta["val"][0]
    return node


def _narrows(node: fx.Node) -> fx.Node | None:
    """The token-major input of the head's last ops, down to and including its linear."""
    if is_call(node, aten.linear, mill.linear):
        below = node.args[0]
    elif is_call(node, aten.mul, aten.div, aten.add, aten.tanh, aten._to_copy):
        tensors = [a for a in node.all_input_nodes if not is_weight(a)]
        below = tensors[0] if len(tensors) == 1 and same_shape(tensors[0], node) else None
    else:
        return None
    inner_linear = is_call(below, aten.linear, mill.linear) or (
        below is not None and _narrows(below)
    )
    return below if is_call(node, aten.linear, mill.linear) or inner_linear else None


def _refresh(program: Program, node: fx.Node) -> None:
    """Infer shapes again from ``node`` to the output."""
    seen = False
    for at in program.graph.nodes:
        seen |= at is node
        if seen and at.op == "call_function":
            at.meta["val"] = program.infer(at)
