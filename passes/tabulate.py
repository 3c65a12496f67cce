"""Functions of the position alone become tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..ir.program import Program, shape
from .base import (
    Pass,
    aten,
    is_call,
    mill,
    replace,
    sweep,
    token_count,
    tokens_outermost,
)
from .region import Region, dependents


@dataclass
class Tabulate(Pass):
    """f(position) = table[position]: rotary angles and learned positions, however they are computed"""

    name = "tabulate"

    def run(self, program: Program) -> int:
        positions = program.input("positions")
        known = dependents(program, lambda n: n is positions)
        other = dependents(program, lambda n: n.op == "placeholder" and n is not positions)
        alone = known - other - {positions}
        ends = [
            n for n in program.graph.nodes
            if n in alone and _is_table(program, n) and any(u not in alone for u in n.users)
        ]  # fmt: skip
        frontier = list(dict.fromkeys(_origin(program, n) for n in ends))
        for node in frontier:
            with program.graph.inserting_before(node):
                replace(program, node, _lookup(program, node))
        sweep(program)
        return len(frontier)


def _origin(program: Program, node: fx.Node) -> fx.Node:
    """The node that computes the values which ``node`` only reshapes or slices: layers share it."""
    while is_call(node, aten.reshape, aten.slice, aten.unsqueeze):
        source = node.args[0]
        if not isinstance(source, fx.Node) or not _is_table(program, source):
            break
        node = source
    return node


def _is_table(program: Program, node: fx.Node) -> bool:
    """Float values ``[1.., T, F..]``: one row per token."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return False
    return tokens_outermost(program, node)


def _lookup(program: Program, node: fx.Node) -> fx.Node:
    """embed(table, positions) in the node's shape; complex tables are stored as (re, im) pairs."""
    positions, complex_ = program.input("positions"), node.meta["val"].is_complex()
    name = tabulated(program, node)
    table = program.weight(name)
    rows = program.call(mill.embed.default, [table], positions, "fp32", like=node)
    count = token_count(program)
    sizes = [s if isinstance(s, int) else count for s in shape(node)]
    if complex_:
        pairs = program.call(aten.reshape.default, rows, [*sizes, 2])
        return program.call(aten.view_as_complex.default, pairs)
    return rows if len(sizes) == 3 else program.call(aten.reshape.default, rows, sizes)


def tabulated(program: Program, node: fx.Node) -> str:
    """Derive the weight ``[positions, F]`` of a node that depends on the position alone."""
    region, length = Region([node], [program.input("positions")]), program.positions
    sources = list(dict.fromkeys(region.weights))

    def rows(index: Tensor, *values: Tensor) -> Tensor:
        out = region([index[None]], len(index), dict(zip(sources, values, strict=True)))[0]
        out = torch.view_as_real(out) if out.is_complex() else out
        return out.reshape(len(index), -1).float().contiguous()

    def compute(*values: Tensor) -> Tensor:
        device = values[0].device if values else "cpu"
        return rows(torch.arange(length, device=device), *values)

    name = program.weights.fresh(f"positions.{node.name}")
    program.weights.derive(name, compute, *sources, rows=rows)
    return name
