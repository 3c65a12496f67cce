"""Only the rows that somebody asks for go through the head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..ir.program import Program, is_weight
from .base import Pass, aten, is_call, mill


@dataclass
class SelectRows(Pass):
    """head(x)[rows] = head(x[rows]): decoding needs the logits of one token per sequence"""

    name = "select_rows"

    def run(self, program: Program) -> int:
        rows = _rows_input(program)
        user, at = program.output, program.output.args[0]
        while len(at.users) == 1 and (below := _source(at)) is not None:
            user, at = at, below
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


# Ops of a head that see each token alone, once ProveTokens has passed them.
_TOKENWISE = (
    aten.linear, mill.linear, mill.rms_norm, mill.layer_norm, aten.mul, aten.div, aten.add, aten.sub,
    aten.tanh, aten._to_copy,
)  # fmt: skip


def _source(node: fx.Node) -> fx.Node | None:
    """The one activation that an op of the head reads; None where two come together, or none."""
    activations = [n for n in node.all_input_nodes if not is_weight(n)]
    return activations[0] if is_call(node, *_TOKENWISE) and len(activations) == 1 else None


def _refresh(program: Program, node: fx.Node) -> None:
    """Infer shapes again from ``node`` to the output."""
    seen = False
    for at in program.graph.nodes:
        seen |= at is node
        if seen and at.op == "call_function":
            at.meta["val"] = program.infer(at)
