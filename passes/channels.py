"""Weights among a node's arguments, changed one by one: for passes that fold factors into them."""

from __future__ import annotations

from torch import fx

from ..ir.program import Program, is_weight


def weight_at(node: fx.Node, at: int) -> fx.Node:
    """Argument ``at``, which is a weight or the list of its parts."""
    argument = node.args[at]
    weight: fx.Node = argument[0] if isinstance(argument, list | tuple) else argument
    return weight


def set_weight(program: Program, node: fx.Node, at: int, name: str) -> None:
    """Let argument ``at`` be the weight ``name``."""
    with program.graph.inserting_before(node):
        weight = program.weight(name)
    args = list(node.args)
    args[at] = [weight] if isinstance(args[at], list | tuple) else weight
    node.args = tuple(args)


def users(program: Program, name: str) -> set[fx.Node]:
    """All nodes that read the weight ``name``."""
    nodes = [n for n in program.graph.nodes if is_weight(n) and n.target == name]
    return {user for node in nodes for user in node.users}
